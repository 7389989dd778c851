"""Records what the MLPs of a trained network do with tokens, in one pass over images.

Axis letters: **B** images, **N** tokens of an image, **n** recorded tokens, **D** width, **H**
hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..models.mlps import MlpMaps, maps_of, why_no_neurons, why_not_copied
from ..models.modes import modes_kept
from ..models.plain import check_unshared
from ..models.upcycle import chosen_mlps


@dataclass(frozen=True)
class RecordedTokens:
    """Holds tokens of one MLP, in float32, on the device of its model.

    inputs: (n, D). hidden: (n, H), after the activation function. image: (n,) number of the image
    that a token is of. place: (n,) of a token in its image; where a ViT has a class token, that is
    place 0. residual: (n, D) the residual stream that the MLP's output is added to; None if it was
    not asked for.
    """

    inputs: Tensor
    hidden: Tensor
    image: Tensor
    place: Tensor
    residual: Tensor | None = None

    @property
    def is_class_token(self) -> Tensor:
        """Says (n,) which tokens are class tokens, of a model that has one."""
        return self.place == 0


@dataclass(frozen=True)
class LayerCalibration:
    """Holds a layer's calibration tokens, and target (n, D), what it ought to give on them."""

    tokens: RecordedTokens
    target: Tensor


def mlps_of(
    model: nn.Module, ignore: Collection[str] = (), *, modules: Sequence[str] | None = None
) -> dict[str, nn.Module]:
    """Returns {name: MLP} of the blocks of a model, but of those that are ignored, by name.

    modules: patterns of names of MLPs to take instead of the blocks' own. Raises ValueError as
    `chosen_mlps`, and for an MLP whose neurons are not known, that changes the width, or that
    shares parameters with another part of the model.
    """
    mlps = {name: mlp for name, mlp in chosen_mlps(model, modules) if name not in ignore}
    if not mlps:
        raise ValueError(f"no MLP of a {type(model).__name__} is left: {', '.join(ignore)} stay")
    for name, mlp in mlps.items():
        if reason := why_no_neurons(mlp) or why_not_copied(mlp):
            raise ValueError(
                f"{name} {reason}: no experts are extracted from it, and no neuron is pruned. "
                "Leave it out with ignore="
            )
    check_unshared(model, mlps.items())
    return mlps


@torch.no_grad()
def record_tokens(
    model: nn.Module,
    batches: Iterable[Tensor],
    mlps: Mapping[str, nn.Module] | None = None,
    *,
    per_image: int,
    limit: int,
    seed: int,
    norms: Mapping[str, nn.Module] | None = None,
) -> dict[str, RecordedTokens]:
    """Records tokens of MLPs in one pass of the model, in evaluation mode: {name: tokens}.

    batches: of images (B, C, height, width). mlps: of the model, by name; None = all of `mlps_of`.
    per_image: tokens of each image, drawn at random; all if it has fewer. limit: n at most, a
    uniform sample of all that were drawn. Memory is n (2 D + H) floats a layer, whatever the number
    of images. seed: draws tokens by their place alone, so the same ones in all layers of as many
    tokens, and in a second pass. norms: {name: the norm before an MLP}, whose input is kept as
    `residual`.

    Raises ValueError as `mlps_of`, without an image, for activations that are not finite, and for
    MLPs that do not run.
    """
    mlps = mlps_of(model) if mlps is None else mlps
    sample = _Sample(per_image, limit, seed)
    watch = _Watch(mlps, norms or {}, sample.add)
    try:
        with modes_kept(model):
            model.eval()
            for images in batches:
                model(images)
                sample.images_seen += len(images)
    finally:
        watch.stop()
    if not sample.images_seen:
        raise ValueError(
            "recording needs images: batches is an iterable of tensors (B, C, height, width), and "
            "it was empty"
        )
    if idle := [name for name in mlps if name not in sample.pieces]:
        raise ValueError(
            f"{', '.join(idle[:4])}{' and others' if len(idle) > 4 else ''} did not run on the "
            "images, so there is nothing to go by: leave out what the model does not use, as with "
            f"ignore=[{idle[0].partition('.')[0] if len(idle) < len(mlps) else idle[0]!r}]"
        )
    return sample.tokens()


class _Sample:
    """Keeps a uniform sample of the tokens of each MLP, as batches of images come in.

    Every token drawn gets a random key; the `limit` smallest keys stay (a reservoir).
    """

    def __init__(self, per_image: int, limit: int, seed: int):
        self.per_image, self.limit, self.seed = per_image, limit, seed
        self.images_seen = 0
        # {name: [(keys, image numbers, places, activations ...) of some tokens]}: joined only where
        # some must go, since each joining copies all
        self.pieces: dict[str, list[tuple[Tensor, ...]]] = {}

    def add(self, name: str, *activations: Tensor) -> None:
        """Adds a batch of one MLP. activations: each (B, ..., D) or (B, ..., H)."""
        by_image = [part.reshape(part.shape[0], -1, part.shape[-1]) for part in activations]
        b, n = by_image[0].shape[:2]
        # seeded by the place in the data: all layers draw the same tokens of these images
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.images_seen)
        drawn = torch.rand(b, n, generator=generator).argsort(dim=1)[:, : self.per_image]
        drawn = drawn.sort(dim=1).values  # (B, per_image) places in the image
        row = torch.arange(b).unsqueeze(1)
        image = (self.images_seen + row).expand_as(drawn).flatten()
        key = torch.rand(len(image), generator=generator)
        chosen = [
            (part if self.per_image >= n else part[row, drawn]).flatten(0, 1).float()
            for part in by_image
        ]
        if not all(part.sum().isfinite() for part in chosen):
            raise ValueError(
                f"{name} has activations that are not finite: look at the weights, or run it in "
                "float32"
            )
        device = chosen[0].device
        pieces = self.pieces.setdefault(name, [])
        pieces.append((key.to(device), image.to(device), drawn.flatten().to(device), *chosen))
        if sum(len(piece[0]) for piece in pieces) > self.limit:
            whole = _joined(pieces)
            stay = whole[0].argsort()[: self.limit].sort().values  # in the order they came in
            self.pieces[name] = [tuple(part[stay] for part in whole)]

    def tokens(self) -> dict[str, RecordedTokens]:
        """Hands over the sample of every MLP, and keeps nothing."""
        tokens = {}
        for name in list(self.pieces):
            # let go of one after the other: no second copy of all layers
            _, image, place, inputs, hidden, *residual = _joined(self.pieces.pop(name))
            tokens[name] = RecordedTokens(inputs, hidden, image, place, *residual)
        return tokens


def _joined(pieces: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(map(torch.cat, zip(*pieces, strict=True)))


class _Watch:
    """Calls see(name, input (B, ..., D), hidden (B, ..., H), and the norm's input if there is one)
    whenever an MLP is at its second map, until `stop`."""

    def __init__(
        self, mlps: Mapping[str, nn.Module], norms: Mapping[str, nn.Module], see: Callable
    ):
        self.see = see
        self.inputs: dict[str, list[Tensor]] = {name: [] for name in mlps}
        self.handles = []
        for name, mlp in mlps.items():
            if name in norms:
                self.handles.append(norms[name].register_forward_pre_hook(self._keep(name)))
            self.handles.append(mlp.register_forward_pre_hook(self._keep(name)))
            maps = maps_of(mlp)
            hook = self._hand_over(name, maps)
            self.handles.append(maps.last_map.register_forward_pre_hook(hook))

    def _keep(self, name: str) -> Callable:
        return lambda _, args: self.inputs[name].append(args[0])

    def _hand_over(self, name: str, maps: MlpMaps) -> Callable:
        def hand_over(_, args) -> None:
            *norm_input, mlp_input = self.inputs[name]
            self.inputs[name] = []
            self.see(name, *map(maps.tokens_last, (mlp_input, args[0], *norm_input)))

        return hand_over

    def stop(self) -> None:
        for handle in self.handles:
            handle.remove()
