"""Dropping of whole experts, under two answers to what a token gets that chose one of them.

    scores_of_layer = scores(model, "router_norm_change", before=state_before_finetuning)
    drop_experts(model, keep_by_score(scores_of_layer, share=0.5), "zero_update")

Layers are named as in `model.named_modules()`. Source: Chowdhury et al. 2024, 2405.16646.

Axis letters: **E** experts of a layer, **E'** those that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ...models.experts import Experts
from ...models.moe import MoELayer, moe_layers
from ...models.pruned import PrunedLayer, picked_experts
from ...routers.base import LinearRouter
from ...routers.group import GroupRouter

SEMANTICS = ("zero_update", "reroute")


def routed(model: nn.Module) -> dict[str, MoELayer]:
    """Lists the MoE layers by name, from input to output.

    Raises ValueError if there is none, or if one has no router row for each expert, experts of
    unequal width, or is pruned with zero updates already.
    """
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoELayer whose experts could be ranked: upcycle it "
            "first"
        )
    for name, layer in layers.items():
        if isinstance(layer, PrunedLayer):
            raise ValueError(
                f"{name} is pruned already, its router still counts {layer.router.experts} "
                "experts: start from the model before pruning and drop more of them at once"
            )
        if not isinstance(layer.router, LinearRouter):
            raise ValueError(
                f"{name} has a {type(layer.router).__name__}: expert pruning needs a linear "
                "router, with one row an expert"
            )
        if not isinstance(layer.experts, Experts):
            raise ValueError(
                f"{name} has whole copies of an MLP as experts ({type(layer.experts).__name__}); "
                "experts are dropped from stacked weights alone: leave the layer as it is"
            )
        if layer.experts.fc1.weight.ndim != 3:
            raise ValueError(
                f"{name} has experts of unequal hidden width; whole experts are dropped from "
                "stacks of equal ones: drop experts first, and neurons after"
            )
    return layers


def drop_experts(
    model: nn.Module, keep: Mapping[str, Sequence[int] | Tensor], semantics: str
) -> nn.Module:
    """Drops all experts that `keep` does not name, in place; returns the model.

    keep: {layer: numbers of the experts that stay}, out of 0..E-1; layers absent from it stay
    whole. semantics: "zero_update" puts a `PrunedLayer` in the layer's place (a tape or an
    optimiser made before knows the old one). "reroute" removes the router rows, too: tokens choose
    among the experts that stay, by a softmax over them. With a printed gate rerouting therefore
    scales the gates of all tokens by 1 / (1 - p of the dropped experts), also of tokens that never
    chose one.

    Raises ValueError for an unknown semantics or layer, for experts that are none, double or out of
    range, where fewer stay than a token chooses, and as `routed`. Nothing is changed when it
    raises.
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics={semantics!r} is unknown: use one of {', '.join(SEMANTICS)}")
    layers = routed(model)
    if unknown := [name for name in keep if name not in layers]:
        raise ValueError(f"no MoE layer {', '.join(unknown)}: the model has {', '.join(layers)}")
    staying = {name: _checked(name, layers[name], keep[name]) for name in keep}
    if semantics == "zero_update":
        _put_pruned_layers(model, layers, staying)
    else:
        _drop_with_rows(layers, staying)
    return model


def _checked(name: str, layer: MoELayer, keep: Sequence[int] | Tensor) -> Tensor:
    """Sorts the numbers of the experts that stay, (E',), on the router's device."""
    numbers, experts = [int(e) for e in keep], layer.router.experts
    if not numbers:
        raise ValueError(f"no expert of {name} would be left: keep at least one of its {experts}")
    if len(set(numbers)) < len(numbers) or min(numbers) < 0 or max(numbers) >= experts:
        raise ValueError(
            f"keep={numbers} of {name} must name different experts out of 0..{experts - 1}"
        )
    return torch.tensor(sorted(numbers), device=layer.router.weight.device)


def _put_pruned_layers(
    model: nn.Module, layers: Mapping[str, MoELayer], staying: Mapping[str, Tensor]
) -> None:
    for name in staying:
        if type(layers[name]) is not MoELayer:
            raise ValueError(
                f"{name} is a {type(layers[name]).__name__}, zero updates are defined for a "
                "MoELayer: use 'reroute'"
            )
    for name, index in staying.items():
        model.set_submodule(name, PrunedLayer(layers[name], index))


def _drop_with_rows(layers: Mapping[str, MoELayer], staying: Mapping[str, Tensor]) -> None:
    routers = {
        name: resized_router(layers[name].router, len(index), lambda rows, index=index: rows[index])
        for name, index in staying.items()
    }
    for name, router in routers.items():
        check_choices(name, router)
    for name, index in staying.items():
        layers[name].router = routers[name]
        layers[name].experts = picked_experts(layers[name].experts, index)


def check_choices(name: str, router: LinearRouter) -> None:
    """Raises ValueError if the router of layer `name` gives a token more experts than it has."""
    wanted = next(
        (getattr(router, field) for field in ("top_k", "choices") if hasattr(router, field)), 1
    )
    left, where = router.experts, ""
    if isinstance(router, GroupRouter):
        left = int(torch.bincount(router.group, minlength=router.members).min())
        where = " in a group"
    if wanted > left:
        raise ValueError(
            f"{name} gives a token {wanted:g} experts, but {left} would be left{where}: keep more, "
            "or let the router go on choosing among all, under 'zero_update' (missing= or "
            "semantics=)"
        )


def resized_router(
    router: LinearRouter, experts: int, resize: Callable[[Tensor], Tensor]
) -> LinearRouter:
    """Copies a router with E' = `experts`; resize: maps a tensor (E, ...) of it to (E', ...)."""
    resized = copy.deepcopy(router)
    resized.experts = experts
    for name, tensor in router.named_parameters(recurse=False):
        new = nn.Parameter(resize(tensor.detach()), requires_grad=tensor.requires_grad)
        setattr(resized, name, new)
    for name, tensor in router.named_buffers(recurse=False):
        setattr(resized, name, resize(tensor))
    return resized
