"""Times the MoE layer against the dense bound, at ViT-S size.

Dense bound: the faster of (a) one MLP on all K*T rows and (b) the same rows in E equal
contiguous chunks with E different MLPs; same dtype and threads, warmed, measured in turn with the
layer. At a ratio of 1 routing costs nothing.

bf16 comes in two forms. "bf16": weights and activations are bfloat16, as a model is deployed.
"autocast": weights stay float32 and are cast in each pass, as the trainer runs.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **H** expert hidden
width, **E** experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from lib.measure.timing import compare
from lib.models.experts import Experts
from lib.models.moe import MoELayer
from lib.routers.top_k import TopKRouter

B, N, D, H, E = 16, 257, 384, 1536, 8
TARGETS = {("fp32", False): 0.95, ("bf16", False): 0.85, ("fp32", True): 0.90, ("bf16", True): 0.80}


@dataclass(frozen=True)
class Row:
    """Holds one line: dense bound and layer in ms (medians), and what keeps them apart.

    target: least ratio of the bound to the layer; None: shown, not promised.
    """

    what: str
    routing: str
    dtype: str
    bound_ms: float
    bound_name: str
    layer_ms: float
    target: float | None
    cause: str

    @property
    def ratio(self) -> float:
        return self.bound_ms / self.layer_ms


def rows(repeats: int = 20) -> Iterator[Row]:
    """Measures each combination of dtype, pass and routing level.

    A row comes as soon as it is measured.
    """
    x = torch.randn(B, N, D, generator=torch.Generator().manual_seed(0))
    token, image = (_layer(per_image) for per_image in (False, True))
    one, many = Mlp(D, H), nn.ModuleList(Mlp(D, H) for _ in range(E))
    for dtype in ("fp32", "bf16", "autocast"):
        for model in (token, image, one, many):
            model.to(torch.bfloat16 if dtype == "bf16" else torch.float32)
        for backward in (False, True):
            passes = {
                "one MLP": (one, lambda x: one(x.view(-1, D))),
                "E chunks": (many, lambda x: chunks(many, x)),
                "token": (token, token),
                "image": (image, image),
            }
            calls = {
                name: _call(forward, module, x, dtype, backward)
                for name, (module, forward) in passes.items()
            }
            timed = compare(calls, repeats)
            ms = {name: time.median for name, time in timed.items()}
            bound = min(("one MLP", "E chunks"), key=ms.__getitem__)
            for routing in ("token", "image"):
                ratio, target = ms[bound] / ms[routing], TARGETS.get((dtype, backward))
                # without a target a cause is shown below 0.8
                short = ratio < (0.8 if target is None else target)
                cause = _cause(ms, routing, dtype, backward) if short else ""
                yield Row(
                    what="forward+backward" if backward else "forward",
                    routing=routing,
                    dtype=dtype,
                    bound_ms=ms[bound],
                    bound_name=bound,
                    layer_ms=ms[routing],
                    target=target,
                    cause=cause,
                )


def _layer(per_image: bool) -> MoELayer:
    """Makes a layer of distinct experts, each of which gets about its share of random inputs."""
    generator = torch.Generator().manual_seed(1)
    router = TopKRouter(D, E, 1, per_image=per_image, std=1.0, generator=generator)
    return MoELayer(router, Experts(E, D, H))


def chunks(mlps: nn.ModuleList, x: Tensor) -> Tensor:
    """Applies one MLP to each of equal contiguous chunks of the rows: bound (b).

    x: (B, N, D). Returns (T, D).
    """
    rows = x.view(-1, x.shape[-1])
    return torch.cat([mlp(part) for mlp, part in zip(mlps, rows.chunk(len(mlps)), strict=True)])


def _call(
    forward: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, dtype: str, backward: bool
) -> Callable[[], None]:
    """Makes a call that runs one forward pass, and one backward pass if asked for.

    Input and weights get gradients, which are deleted afterwards, as in a step of a trainer.
    """
    x = x.to(torch.bfloat16) if dtype == "bf16" else x
    grad = torch.ones(x.numel() // D, D)

    def run() -> None:
        # Autocast is entered in each call, since it remembers casts of whole weights until it is
        # left.
        cast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast")
        with cast, torch.set_grad_enabled(backward):
            y = forward(x.detach().requires_grad_(backward))
        if backward:
            y.view(-1, D).backward(grad.to(y.dtype))
            module.zero_grad(set_to_none=True)

    return run


def _cause(ms: dict[str, float], routing: str, dtype: str, backward: bool) -> str:
    """Splits a shortfall into what E weights cost without routing and what the layer adds."""
    weights, layer = ms["E chunks"] - ms["one MLP"], ms[routing] - ms["E chunks"]
    kinds = "cast and packed" if dtype == "autocast" else "packed"
    moves = "router, sort, gather, un-sort, unequal slices"
    if backward:
        moves += ", stacked gradients"
    return (
        f"{E} weights ({kinds} each) instead of one: {weights:+.1f} ms without routing; "
        f"{moves}: {layer:+.1f} ms"
    )
