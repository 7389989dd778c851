"""The residual stream of a dense model as the target of what was made of it.

Axis letters: **B** images, **N** tokens of an image, **D** width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


def check_stream(model: nn.Module) -> None:
    """Raises ValueError for a model without a residual stream that `stream_of` knows."""
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            "distil_stream compares residual streams after each block of a timm VisionTransformer, "
            f"and {type(model).__name__} is none: leave it at 0, and learn from distil_logits"
        )


@contextlib.contextmanager
def stream_of(model: VisionTransformer) -> Iterator[list[Tensor]]:
    """Collects the residual stream of one pass inside.

    These are the tokens (B, N, D) after each block but the last, and (B, D) what each head reads:
    of what the last block gives, nothing else reaches the logits.
    """
    stream: list[Tensor] = []
    heads = model.get_classifier()  # two in a distilled DeiT
    heads = heads if isinstance(heads, tuple) else (heads,)
    handles = [
        *(
            b.register_forward_hook(lambda _m, _in, out: stream.append(out))
            for b in model.blocks[:-1]
        ),
        *(h.register_forward_pre_hook(lambda _m, args: stream.append(args[0])) for h in heads),
    ]
    try:
        yield stream
    finally:
        for handle in handles:
            handle.remove()


def stream_for(weight: float, model: nn.Module) -> contextlib.AbstractContextManager:
    """Collects the stream of one pass inside where it has a weight in the loss, else nothing."""
    return stream_of(model) if weight else contextlib.nullcontext()


def stream_loss(stream: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
    """Computes the squared error of a stream against a teacher's, the mean over places.

    stream, target: tensors (..., D), one a place. Each token is normed first (mean 0 and variance 1
    over D), as all that reads the stream norms it. So a place counts whatever its scale is, and an
    unrelated stream is wrong by 2. Raises ValueError for streams of different shapes.
    """
    shapes, wanted = ([tuple(place.shape) for place in places] for places in (stream, target))
    if shapes != wanted:
        raise ValueError(
            f"the model's residual stream has the shapes {shapes} and the teacher's {wanted}: "
            "distil_stream wants equal depth, width and tokens; learn from the logits instead"
        )
    errors = [F.mse_loss(_normed(s), _normed(t)) for s, t in zip(stream, target, strict=True)]
    return torch.stack(errors).mean()


def _normed(tokens: Tensor) -> Tensor:
    return F.layer_norm(tokens.float(), tokens.shape[-1:])
