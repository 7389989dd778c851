"""What the MLPs of a trained network do with tokens, recorded and clustered (MoEE, 2505.15414).

`record` takes tokens of all MLPs in one pass. `density_clusters` are HDBSCAN's, by distances from
matrix products: the library's own labels, many times as fast on wide activations; everything after
the spanning tree is the library's.

Axis letters: **B** images, **N** tokens of an image, **n** recorded tokens, **D** width, **H**
hidden width, **K** clusters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from timm.layers import Mlp
from torch import Tensor, nn

from ..models.upcycle import block_mlps


@dataclass(frozen=True)
class Recorded:
    """Tokens of one MLP, float32, where its model lies: inputs (n, D), hidden (n, H) after the
    activation function, image (n,) they come from, and before (n, D), the residual stream that the
    MLP's output is added to, None where it was not asked for."""

    inputs: Tensor
    hidden: Tensor
    image: Tensor
    before: Tensor | None = None


def mlps_of(model: nn.Module) -> dict[str, Mlp]:
    """{name: MLP} of the blocks. ValueError if there is none, or one that is not timm.layers.Mlp
    with Linear fc1 and fc2."""
    found = dict(block_mlps(model))
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no block MLP to look into: a timm ViT, DeiT, Swin or ConvNeXt has"
        )
    for name, mlp in found.items():
        plain = (
            type(mlp) is Mlp and isinstance(mlp.fc1, nn.Linear) and isinstance(mlp.fc2, nn.Linear)
        )
        if not plain or not isinstance(mlp.norm, nn.Identity):
            raise ValueError(
                f"{name} is a {type(mlp).__name__}: experts are cut out of timm.layers.Mlp with Linear fc1 and fc2 "
                "and no norm between them"
            )
    return found


@torch.no_grad()
def record(
    model: nn.Module,
    batches: Iterable[Tensor],
    mlps: Mapping[str, Mlp] | None = None,
    *,
    per_image: int,
    limit: int,
    seed: int,
    norms: Mapping[str, nn.Module] | None = None,
) -> dict[str, Recorded]:
    """One pass in evaluation mode over batches of images (B, C, height, width): {name of the MLP:
    its tokens}.

    mlps: of the model, by name; None: all of `mlps_of`. per_image: tokens of each image, drawn at
    random, all if it has fewer. limit: n at most; beyond it a uniform sample of all candidates
    stays (a reservoir), so memory is n (2 D + H) floats a layer, whatever the number of images.
    seed: draws tokens by their place alone, the same ones in all layers of as many tokens, and in a
    second pass. norms: {name: the norm before an MLP}, whose input is kept as `before`. Raises
    ValueError as `mlps_of`, without an image, and for activations that are not finite, by layer.
    """
    mlps = mlps_of(model) if mlps is None else mlps
    modes = {module: module.training for module in model.modules()}
    kept: dict[
        str, list[tuple[Tensor, ...]]
    ] = {}  # of each MLP key, image and rows, in pieces: joined only where some must go
    seen = 0

    def keep(name: str, *parts: Tensor) -> None:
        rows = [part.reshape(part.shape[0], -1, part.shape[-1]) for part in parts]
        b, n = rows[0].shape[:2]
        drawn = torch.Generator().manual_seed(seed * 1_000_003 + seen)
        order = torch.rand(b, n, generator=drawn).argsort(dim=1)[:, :per_image].sort(dim=1).values
        image = (seen + torch.arange(b).unsqueeze(1)).expand_as(order).flatten()
        key = torch.rand(len(image), generator=drawn)
        new = [
            (part if per_image >= n else part[torch.arange(b).unsqueeze(1), order])
            .flatten(0, 1)
            .float()
            for part in rows
        ]
        if not all(part.sum().isfinite() for part in new):
            raise ValueError(
                f"{name} has activations that are not finite: look at the weights, or run it in float32"
            )
        kept.setdefault(name, []).append((key.to(new[0].device), image.to(new[0].device), *new))
        if sum(len(piece[0]) for piece in kept[name]) > limit:
            whole = _joined(kept[name])
            stay = whole[0].argsort()[:limit].sort().values
            kept[name] = [tuple(part[stay] for part in whole)]

    watched = _Watched(mlps, keep, norms or {})
    try:
        model.eval()
        for images in batches:
            model(images)
            seen += len(images)
    finally:
        watched.stop()
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise ValueError(
            "recording needs images: batches is an iterable of tensors (B, C, height, width), and it was empty"
        )
    found = {}
    for name in list(kept):
        _, image, x, hidden, *rest = _joined(
            kept.pop(name)
        )  # let go of one after the other: no second copy of all layers
        found[name] = Recorded(x, hidden, image, *rest)
    return found


def _joined(pieces: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(map(torch.cat, zip(*pieces, strict=True)))


class _Watched:
    """see(name, input (B, ..., D), hidden (B, ..., H), and the norm's input if there is one) as
    soon as an MLP is at its second map, until `stop`."""

    def __init__(self, mlps: Mapping[str, Mlp], see: Callable, norms: Mapping[str, nn.Module]):
        self.see, self.held = see, {name: [] for name in mlps}
        self.handles = []
        for name, mlp in mlps.items():
            if name in norms:
                self.handles.append(norms[name].register_forward_pre_hook(self._keep(name)))
            self.handles.append(mlp.register_forward_pre_hook(self._keep(name)))
            self.handles.append(mlp.fc2.register_forward_pre_hook(self._hand_over(name)))

    def _keep(self, name: str) -> Callable:
        return lambda _, args: self.held[name].append(args[0])

    def _hand_over(self, name: str) -> Callable:
        def hand_over(_, args) -> None:
            *before, x = self.held[name]
            self.held[name] = []
            self.see(name, x, args[0], *before)

        return hand_over

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
