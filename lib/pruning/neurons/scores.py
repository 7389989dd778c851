"""Importance scores of hidden neurons and attention dimensions, and which of them stay.

Sources: Leiden thesis, section 4; Molchanov et al. 2019, 1906.10771.

Scores and kept indices are dictionaries by the names that `groups` gives to sets of groups:

    scores = neuron_scores(model, [(images, labels)], "taylor")
    remove(model, {name: keep_indices(score, share=0.5) for name, score in scores.items()})

Axis letters: **B** images, **H** hidden width, **E** experts, **A** heads, **C** dimensions of a
head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from functools import partial

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from ...models.experts import Experts
from ...models.mlps import maps_of
from ...models.modes import ambient_modes_off, modes_kept
from ...models.moe import moe_layers
from ...routers.forced import ForcedRouter
from .groups import NamedSets, groups_of, prunable, shapes_of, supported

Batches = Iterable[tuple[Tensor, Tensor]]  # images (B, channels, height, width) and labels (B,)
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Reduce = Callable[[list[Tensor]], Tensor]  # tensors (..., groups, members) -> (..., groups)


class Importance(StrEnum):
    """Says how a group is scored from its weights w and the gradients g of the loss."""

    # sum of (g w)^2 over the group: opposite signs do not cancel (Leiden thesis)
    TAYLOR = "taylor"
    # square of the sum of g w: they do (Molchanov 2019, the form of a gate)
    MOLCHANOV = "molchanov"
    MAGNITUDE = "magnitude"  # sum of w^2; needs no images
    RANDOM = "random"  # uniform in [0, 1), the control; needs no images


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Computes the mean cross-entropy of a batch: the loss of scores if no other is given."""
    return F.cross_entropy(model(images), labels)


# ---- scores


def neuron_scores(
    model: nn.Module,
    batches: Batches,
    kind: str = "taylor",
    *,
    parts: Sequence[str] | None = None,
    ignore: Collection[str] = (),
    modules: Sequence[str] | None = None,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Scores all groups, each set by its name: (H,) or (A, C), averaged over the batches.

    Experts are scored by what their router sends them. Weights, `.grad`, frozen parameters and
    modes are left as they were.

    kind: an `Importance`. parts: of "mlp", "attention", "experts"; None is what the model has.
    ignore: names of layers that are left out. modules: patterns of MLPs, as `prunable` takes them.
    loss(model, images, labels): a scalar; it is called in evaluation mode and outside of any
    autocast, and may enter one. generator: of the random scores. Raises ValueError for an unknown
    kind or part, a layer that cannot be pruned (by name), calibration without images, a loss that
    is not finite or not of these weights, and for random scores without a generator.
    """
    modules, kind = prunable(model, parts, ignore, modules=modules), _known(kind)
    if kind in _FROM_GRADIENTS:
        return scores_from_gradients(
            model, modules, groups_of, _FROM_GRADIENTS[kind], batches, loss
        )
    return _without_images(modules, kind, generator)


def expert_scores(
    model: nn.Module,
    batches_of_expert: Sequence[Batches],
    kind: str = "taylor",
    *,
    loss: Loss = cross_entropy,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Scores (H,) the neurons of each expert on its own images, all forced through it (Leiden).

    batches_of_expert: E lists of batches, the same for all MoE layers; magnitude and random scores
    do not look at them. Raises ValueError as `neuron_scores` and `forced` do, for another number of
    lists than E, and for an empty one.
    """
    modules, kind = prunable(model, ("experts",)), _known(kind)
    if kind in _FROM_GRADIENTS:
        return scores_from_gradients_by_expert(
            model, modules, groups_of, _FROM_GRADIENTS[kind], batches_of_expert, loss
        )
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
    """Measures by how much the loss rises when one hidden neuron of a dense MLP is removed alone.

    This is what scores stand for, at the price of a pass for each neuron. name: of the MLP. Returns
    (len(neurons),) float64 differences of the loss averaged over the batches, negative where it
    falls. Runs in evaluation mode; weights and modes are left as they were. Raises ValueError if
    `name` is no dense MLP that can be pruned, if a neuron is out of range, and without a batch.
    """
    dense_mlps = {
        key: module
        for key, module in supported(model).items()
        if not isinstance(module, Experts | Attention)
    }
    if name not in dense_mlps:
        raise ValueError(
            f"{name} is no dense MLP whose neurons can be removed singly: valid are "
            f"{', '.join(dense_mlps) or 'none'}"
        )
    weight = maps_of(dense_mlps[name]).last_map.weight
    if wrong := [neuron for neuron in neurons if not 0 <= neuron < weight.shape[1]]:
        raise ValueError(
            f"neurons={wrong} of {name} are out of range: it has 0..{weight.shape[1] - 1}"
        )
    batches = list(batches)  # read once for each neuron
    if not batches:
        raise ValueError(
            "effects are measured on images: batches is an iterable of (images, labels), and it "
            "was empty"
        )

    def mean_loss() -> Tensor:
        return torch.stack([loss(model, *batch).double() for batch in batches]).mean()

    with modes_kept(model):
        model.eval()
        whole_loss, effects, whole_weight = mean_loss(), [], weight.detach().clone()
        try:
            for neuron in neurons:
                weight[:, neuron] = 0.0  # a neuron acts by its column alone
                effects.append(mean_loss() - whole_loss)
                weight[:, neuron] = whole_weight[:, neuron]
        finally:
            weight.copy_(whole_weight)
    return torch.stack(effects).cpu()


@contextmanager
def forced(model: nn.Module, expert: int) -> Iterator[None]:
    """Sends, inside, all tokens of every MoE layer to `expert`, with weight 1.

    No weight is touched, and shared experts run on. Raises ValueError if a layer has no such
    expert, if it mixes by slots (Soft MoE), and if there is no MoE layer.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer whose tokens could be forced to expert "
            f"{expert}"
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


# ---- which groups stay


def keep_indices(scores: Tensor, share: float) -> Tensor:
    """Picks the groups with the highest scores along the last axis: (..., n) -> rising (..., n').

    Of n groups `cut_size(n, share)` go, of equal scores the last ones. Raises ValueError as
    `cut_size`, and if a score is not finite.
    """
    return highest(scores, scores.shape[-1] - cut_size(scores.shape[-1], share))


def highest(scores: Tensor, count: int) -> Tensor:
    """Picks `count` groups with the highest scores along the last axis: (..., n) -> rising
    (..., count).

    Of equal scores the first ones stay. Raises ValueError if a score is not finite.
    """
    if not torch.isfinite(scores).all():
        raise ValueError(
            "a score is not finite, so there is no order: look at the loss and the weights it came "
            "from"
        )
    return scores.argsort(dim=-1, descending=True, stable=True)[..., :count].sort(dim=-1).values


def cut_size(count: int, share: float) -> int:
    """Computes how many of `count` groups go: round(share * count), halves to even.

    Raises ValueError if `share` is outside [0, 1) or if no group would be left.
    """
    if not 0 <= share < 1:
        raise ValueError(
            f"share={share} is the part that goes: valid is 0 (nothing) up to, but not including, 1"
        )
    if round(share * count) >= count:
        raise ValueError(
            f"share={share} of {count} leaves nothing (a layer without neurons, a head without "
            f"dimensions): valid is below {(count - 0.5) / count:.4g}"
        )
    return round(share * count)


# ---- arithmetic


def _squares(tensors: list[Tensor]) -> Tensor:
    return sum(tensor.square().sum(dim=-1) for tensor in tensors)


def _square_of_sum(tensors: list[Tensor]) -> Tensor:
    return sum(tensor.sum(dim=-1) for tensor in tensors).square()


_FROM_GRADIENTS = {Importance.TAYLOR: _squares, Importance.MOLCHANOV: _square_of_sum}


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
            set_name: _squares(tensors)
            for name, module in modules.items()
            for set_name, tensors in groups_of(name, module)
        }
    if generator is None:
        raise ValueError(
            "random scores are drawn from a generator that is handed over: pass generator="
        )
    return {
        set_name: torch.rand(shape, generator=generator, device=generator.device)
        for set_name, shape in shapes_of(modules).items()
    }


def scores_from_gradients_by_expert(
    model: nn.Module,
    modules: Mapping[str, Experts],
    sets_of: Callable[..., NamedSets],
    reduce: Reduce,
    batches_of_expert: Sequence[Batches],
    loss: Loss,
) -> dict[str, Tensor]:
    """Computes `scores_from_gradients` of each expert on its own batches, all tokens sent to it.

    Raises ValueError for another number of lists of batches than E, and for one without images.
    """
    batches_of_expert = list(batches_of_expert)
    for name, module in modules.items():
        if len(batches_of_expert) != module.experts:
            raise ValueError(
                f"{len(batches_of_expert)} calibration groups for the {module.experts} experts of "
                f"{name}: one an expert"
            )
    batches_of_expert = [list(batches) for batches in batches_of_expert]  # read more than once
    for e, batches in enumerate(batches_of_expert):
        if not sum(len(labels) for _, labels in batches):
            raise ValueError(
                f"the calibration group of expert {e} is empty: it needs at least one image"
            )
    scores: dict[str, Tensor] = {}
    for e, batches in enumerate(batches_of_expert):
        sets_of_expert = partial(sets_of, expert=e)
        with forced(model, e):
            scores |= scores_from_gradients(model, modules, sets_of_expert, reduce, batches, loss)
    return scores


def scores_from_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    sets_of: Callable[..., NamedSets],
    reduce: Reduce,
    batches: Batches,
    loss: Loss,
) -> dict[str, Tensor]:
    """Averages over the batches what `reduce` makes of the products g * w that the groups hold.

    modules: by name. sets_of: `groups_of` or `matrices_of`. Returns scores by name of a set.
    Raises ValueError for batches without images, for a loss that is not finite, and for one that
    does not depend on a weight.
    """
    name_of = {
        parameter: f"{name}.{local_name}"
        for name, module in modules.items()
        for local_name, parameter in module.named_parameters()
    }
    batches = list(batches)  # counted before they are used: a generator gives them once
    if not batches or not all(len(labels) for _, labels in batches):
        raise ValueError(
            f"{len(batches)} calibration batches of {[len(labels) for _, labels in batches]} "
            "images: scores from gradients need at least one batch, and none may be empty. "
            "Hand over (images, labels); a generator gives them once"
        )
    scores: dict[str, Tensor] = {}
    with _differentiable(model, list(name_of)):
        for images, labels in batches:
            products = partial(_product, _gradients(loss(model, images, labels), name_of))
            for name, module in modules.items():
                for set_name, tensors in sets_of(name, module, products):
                    score = reduce(tensors) / len(batches)
                    scores[set_name] = scores.get(set_name, 0.0) + score
    return scores


def _gradients(value: Tensor, name_of: Mapping[Tensor, str]) -> dict[Tensor, Tensor]:
    """Maps each parameter of `name_of` to the gradient of the loss `value`."""
    if not torch.isfinite(value):
        raise ValueError(
            f"the loss on a calibration batch is {value.item()}: no score can be taken from it"
        )
    gradients = torch.autograd.grad(value, list(name_of), allow_unused=True)
    gradient_of = dict(zip(name_of, gradients, strict=True))
    if unused := [name_of[p] for p, gradient in gradient_of.items() if gradient is None]:
        raise ValueError(
            f"the loss does not depend on {', '.join(unused)}: their scores would be zeros without "
            "meaning. Leave out what the model does not use, with ignore="
        )
    return gradient_of


def _product(gradient_of: Mapping[Tensor, Tensor], parameter: Tensor) -> Tensor:
    """Multiplies a parameter with its gradient, in float32 or wider."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return gradient_of[parameter].to(dtype) * parameter.detach().to(dtype)


@contextmanager
def _differentiable(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Puts the model, inside, in evaluation mode, without a caller's modes and with all gradients.

    Each parameter has a gradient, frozen or not; afterwards all is as it was.
    """
    frozen = [p for p in parameters if not p.requires_grad]
    # a backward pass inside a caller's autocast would multiply in its precision
    with modes_kept(model), ambient_modes_off():
        model.eval()
        for p in frozen:
            p.requires_grad_(True)
        try:
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)
