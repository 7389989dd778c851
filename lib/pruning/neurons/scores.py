"""Importance of hidden neurons and attention dimensions (Leiden thesis; Molchanov 2019,
1906.10771), and which of them go.

Scores and kept indices are dictionaries by the names that `removal` gives to sets of groups:

    scores = neuron_scores(model, [(images, labels)], "taylor")
    remove(model, {name: keep_indices(score, share=0.5) for name, score in scores.items()})

Axis letters: **B** images, **H** hidden width, **E** experts, **A** heads, **C** dimensions of a
head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from ...models.experts import Experts
from ...models.moe import MoELayer
from ...routers.forced import ForcedRouter
from .removal import Pieces, groups_of, matrices_of, prunable, shapes_of, supported

Batches = Sequence[tuple[Tensor, Tensor]]  # images (B, C, S, S) and labels (B,)
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class Importance(StrEnum):
    """How a group is scored from its weights w and the gradients g of the loss."""

    TAYLOR = "taylor"  # sum of (g w)^2 over the group: opposite signs do not cancel (Leiden thesis)
    # square of the sum of g w: they do (Molchanov 2019, the form of a gate)
    MOLCHANOV = "molchanov"
    MAGNITUDE = "magnitude"  # sum of w^2; needs no images
    RANDOM = "random"  # uniform in [0, 1), the control; needs no images


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of a batch: the loss that scores are taken from if no other is given."""
    return F.cross_entropy(model(images), labels)


# ---- scores


def neuron_scores(
    model: nn.Module,
    batches: Batches,
    kind: str = "taylor",
    *,
    parts: Sequence[str] | None = None,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Scores of all groups by name, (H,) or (A, C): computed from each batch's loss and averaged
    over the batches.

    parts: of "mlp", "attention", "experts"; None is what the model has. Experts are scored by what
    their router sends them. loss(model, images, labels): a scalar; it is called in evaluation mode
    and outside of any autocast, and may enter one. generator: of the random scores. Weights,
    `.grad`, frozen parameters and modes are left as they were. Raises ValueError for an unknown
    kind or part, a layer that cannot be cut (by name), calibration without images, a loss that is
    not finite or not of these weights, and for random scores without a generator.
    """
    modules, kind = prunable(model, parts), _known(kind)
    if kind in _FROM_IMAGES:
        return _averaged(model, modules, groups_of, _FROM_IMAGES[kind], batches, loss)
    return _without_images(modules, kind, generator)


def expert_scores(
    model: nn.Module,
    groups: Sequence[Batches],
    kind: str = "taylor",
    *,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Scores (H,) of each expert from a calibration group of its own, all of whose tokens are
    forced through it (Leiden thesis).

    groups: E lists of batches, the same for all MoE layers; magnitude and random scores do not look
    at them. Raises ValueError as `neuron_scores` and `forced` do, for another number of groups than
    E, and for an empty group.
    """
    modules, kind = prunable(model, ("experts",)), _known(kind)
    if kind in _FROM_IMAGES:
        return _by_expert(model, modules, groups_of, _FROM_IMAGES[kind], groups, loss)
    return _without_images(modules, kind, generator)


@torch.no_grad()
def removal_effects(
    model: nn.Module,
    name: str,
    batches: Batches,
    neurons: Sequence[int],
    *,
    loss: Loss = cross_entropy,
) -> Tensor:
    """By how much the loss, averaged over the batches, rises when one hidden neuron of the dense
    MLP `name` alone is removed: (len(neurons),) float64, negative where it falls. What scores stand
    for, at the price of a pass for each neuron.

    In evaluation mode; weights and modes are left as they were. Raises ValueError if `name` is no
    dense MLP that can be cut, or if a neuron is out of range.
    """
    mlp = supported(model).get(name)
    if not isinstance(mlp, Mlp):
        known = [key for key, module in supported(model).items() if isinstance(module, Mlp)]
        raise ValueError(
            f"{name} is no dense MLP whose neurons can be removed singly: valid are {', '.join(known) or 'none'}"
        )
    out, modes = mlp.fc2.weight, {module: module.training for module in model.modules()}
    if wrong := [n for n in neurons if not 0 <= n < out.shape[1]]:
        raise ValueError(
            f"neurons={wrong} of {name} are out of range: it has 0..{out.shape[1] - 1}"
        )
    model.eval()

    def mean() -> Tensor:
        return torch.stack([loss(model, *batch).double() for batch in batches]).mean()

    whole, found, held = mean(), [], out.detach().clone()
    try:
        for neuron in neurons:
            out[:, neuron] = 0.0  # a neuron acts by its column alone
            found.append(mean() - whole)
            out[:, neuron] = held[:, neuron]
    finally:
        out.copy_(held)
        for module, mode in modes.items():
            module.training = mode
    return torch.stack(found).cpu()


@contextmanager
def forced(model: nn.Module, expert: int) -> Iterator[None]:
    """Inside, every MoE layer sends all tokens to `expert`, with weight 1. No weight is touched;
    shared experts run on.

    Raises ValueError if a layer has no such expert, if it mixes by slots (Soft MoE), and if there
    is no MoE layer.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, MoELayer)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer whose tokens could be forced to expert {expert}"
        )
    for name, layer in layers.items():
        if layer.router.mixes_tokens:  # Soft MoE
            raise ValueError(
                f"{name} has a {type(layer.router).__name__}, which sends no token to an expert: "
                "score its experts as they run, with neuron_scores(..., parts=('experts',))"
            )
        if not 0 <= expert < layer.experts.experts:
            raise ValueError(f"{name} has experts 0..{layer.experts.experts - 1}, not {expert}")
    routers = {name: layer.router for name, layer in layers.items()}
    for layer in layers.values():
        layer.router = ForcedRouter(layer.experts.experts, expert)
    try:
        yield
    finally:
        for name, router in routers.items():
            layers[name].router = router


def calibration(
    labels: Tensor, groups: Sequence[Sequence[int]], images: int, generator: torch.Generator
) -> list[Tensor]:
    """For each group of classes the indices of at most `images` images of labels (B,), equally many
    of each class up to one.

    Groups that share a class get different images of it. Warns of classes without an image in a
    group that has others; ValueError if a group finds none.
    """
    order, found = torch.randperm(len(labels), generator=generator), []
    for e, classes in enumerate(groups):
        dealt = []
        for c in classes:
            owners = [i for i, group in enumerate(groups) if c in group]
            dealt.append(order[labels[order] == c][owners.index(e) :: len(owners)])
        if images < 1 or not any(map(len, dealt)):
            raise ValueError(
                f"calibration group {e} is empty: images={images}, and {sum(map(len, dealt))} of the "
                f"{len(labels)} images are left for its classes {tuple(classes)}"
            )
        if absent := [c for c, rows in zip(classes, dealt, strict=True) if not len(rows)]:
            warnings.warn(
                f"calibration group {e} has no image of class {', '.join(map(str, absent))}: its score "
                "rests on its other classes",
                stacklevel=2,
            )
        rank = torch.cat([torch.arange(len(rows)) for rows in dealt])
        found.append(torch.cat(dealt)[rank.argsort(stable=True)[:images]])
    return found


# ---- what goes


def keep_indices(scores: Tensor, share: float) -> Tensor:
    """Indices of the highest scores along the last axis, rising; of n groups round(share * n) go,
    ties from the end.

    (..., n) -> (..., kept). Python's round: halves to even. ValueError if share is outside [0, 1),
    if nothing would be left, or if a score is not finite.
    """
    if not torch.isfinite(scores).all():
        raise ValueError(
            "a score is not finite, so there is no order: look at the loss and the weights it came from"
        )
    kept = scores.shape[-1] - cut_size(scores.shape[-1], share)
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :kept].sort(dim=-1).values


def cut_size(count: int, share: float) -> int:
    """How many of `count` groups go. ValueError if `share` is outside [0, 1) or takes all."""
    if not 0 <= share < 1:
        raise ValueError(
            f"share={share} is the part that goes: valid is 0 (nothing) up to, but not including, 1"
        )
    if round(share * count) >= count:
        raise ValueError(
            f"share={share} of {count} leaves nothing (a layer without neurons, a head without dimensions): valid "
            f"is below {(count - 0.5) / count:.4g}"
        )
    return round(share * count)


def mask_weights(
    model: nn.Module,
    batches: Batches,
    share: float,
    *,
    groups: Sequence[Batches] | None = None,
    parts: Sequence[str] | None = None,
    loss: Loss = cross_entropy,
) -> dict[str, Tensor]:
    """Zero single weights, the `share` with the lowest (g w)^2 of each matrix fc1, fc2, qkv, proj;
    nothing gets smaller.

    The unstructured arm, for accuracy alone. Returns masks by name, True where a weight stays, for
    `apply_masks` after each step of an optimiser. groups: E lists of batches to score the experts
    as `expert_scores` does; None: as they are routed. Raises ValueError as these and `keep_indices`
    do.
    """
    modules = prunable(model, parts)
    alone = (
        {} if groups is None else {name: m for name, m in modules.items() if isinstance(m, Experts)}
    )
    routed = {name: m for name, m in modules.items() if name not in alone}
    scores = (
        _averaged(model, routed, matrices_of, _squares_of_each, batches, loss) if routed else {}
    )
    scores |= _by_expert(model, alone, matrices_of, _squares_of_each, groups, loss) if alone else {}
    masks = {}
    for name, score in scores.items():
        stays = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
        stays[score.flatten().argsort(stable=True)[: cut_size(score.numel(), share)]] = False
        masks[name] = stays.view(score.shape)
    apply_masks(model, masks)
    return masks


def apply_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Zero again what `mask_weights` zeroed, since an optimiser's step moves it. ValueError for a
    name that the model lacks."""
    weights = {
        key: held
        for name, module in supported(model).items()
        for key, [held] in matrices_of(name, module)
    }
    if unknown := set(masks) - set(weights):
        raise ValueError(
            f"the model has no {', '.join(sorted(unknown))}: masks go with the model they were made for"
        )
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].masked_fill_(~mask, 0.0)


# ---- arithmetic


def _squares(pieces: list[Tensor]) -> Tensor:
    return sum(piece.square().sum(dim=-1) for piece in pieces)


def _square_of_sum(pieces: list[Tensor]) -> Tensor:
    return sum(piece.sum(dim=-1) for piece in pieces).square()


def _squares_of_each(pieces: list[Tensor]) -> Tensor:
    return pieces[0].square()


_FROM_IMAGES = {Importance.TAYLOR: _squares, Importance.MOLCHANOV: _square_of_sum}


def _known(kind: str) -> Importance:
    try:
        return Importance(kind)
    except ValueError:
        raise ValueError(f"kind={kind!r} is unknown: valid are {', '.join(Importance)}") from None


def _without_images(
    modules: Mapping[str, nn.Module], kind: Importance, generator: torch.Generator | None
) -> dict[str, Tensor]:
    if kind is Importance.MAGNITUDE:
        return {
            key: _squares(pieces)
            for name, module in modules.items()
            for key, pieces in groups_of(name, module)
        }
    if generator is None:
        raise ValueError(
            "random scores are drawn from a generator that is handed over: pass generator="
        )
    return {
        key: torch.rand(shape, generator=generator, device=generator.device)
        for key, shape in shapes_of(modules).items()
    }


def _by_expert(
    model: nn.Module,
    modules: Mapping[str, Experts],
    entries: Callable[..., Pieces],
    reduce: Callable[[list[Tensor]], Tensor],
    groups: Sequence[Batches],
    loss: Loss,
) -> dict[str, Tensor]:
    """`_averaged` for one expert after the other, on its own batches, with all tokens sent to it."""
    for name, module in modules.items():
        if len(groups) != module.experts:
            raise ValueError(
                f"{len(groups)} calibration groups for the {module.experts} experts of {name}: one an expert"
            )
    if empty := [
        e for e, batches in enumerate(groups) if not sum(len(labels) for _, labels in batches)
    ]:
        raise ValueError(
            f"the calibration group of expert {empty[0]} is empty: it needs at least one image"
        )
    found = {}
    for e, batches in enumerate(groups):
        with forced(model, e):
            found |= _averaged(model, modules, partial(entries, expert=e), reduce, batches, loss)
    return found


def _averaged(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    entries: Callable[..., Pieces],
    reduce: Callable[[list[Tensor]], Tensor],
    batches: Batches,
    loss: Loss,
) -> dict[str, Tensor]:
    """`reduce` of the products g * w in each of `entries`, averaged over the batches."""
    owner = {
        p: f"{name}.{own}"
        for name, module in modules.items()
        for own, p in module.named_parameters()
    }
    if not batches or not all(len(labels) for _, labels in batches):
        raise ValueError(
            f"{len(batches)} calibration batches of {[len(labels) for _, labels in batches]} images: scores from "
            "gradients need at least one batch, and none may be empty"
        )
    total: dict[str, Tensor] = {}
    with _differentiable(model, list(owner)):
        for images, labels in batches:
            value = loss(model, images, labels)
            if not torch.isfinite(value):
                raise ValueError(
                    f"the loss on a calibration batch is {value.item()}: no score can be taken from it"
                )
            slopes = dict(
                zip(owner, torch.autograd.grad(value, list(owner), allow_unused=True), strict=True)
            )
            if unused := [owner[p] for p, slope in slopes.items() if slope is None]:
                raise ValueError(
                    f"the loss does not depend on {', '.join(unused)}: their scores would be zeros without meaning"
                )
            products = partial(_product, slopes)
            for name, module in modules.items():
                for key, pieces in entries(name, module, products):
                    total[key] = total.get(key, 0.0) + reduce(pieces) / len(batches)
    return total


def _product(slopes: Mapping[Tensor, Tensor], held: Tensor) -> Tensor:
    wide = torch.promote_types(held.dtype, torch.float32)
    return slopes[held].to(wide) * held.detach().to(wide)


@contextmanager
def _differentiable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode, no autocast, and a gradient for each parameter, frozen or not; afterwards
    all is as it was."""
    modes = {module: module.training for module in model.modules()}
    frozen = [p for p in parameters if not p.requires_grad]
    model.eval()
    for p in frozen:
        p.requires_grad_(True)
    try:
        # A backward pass inside a caller's autocast would multiply in its precision.
        with torch.enable_grad(), torch.autocast(parameters[0].device.type, enabled=False):
            yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
        for module, mode in modes.items():
            module.training = mode
