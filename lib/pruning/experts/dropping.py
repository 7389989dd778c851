"""Whole experts: how much each one matters, and taking some away (Chowdhury et al. 2024,
2405.16646, and rival scores).

    found = scores(model, "router_norm_change", before=state_before_finetuning)
    drop_experts(model, keep_by_score(found, share=0.5), "zero_update")

Layers are named as in `model.named_modules()`; a score is high where an expert should stay; experts
are ranked inside their layer, since scales differ between layers.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **A** assignments, **D** width,
**H** hidden width, **E** experts of a layer, **E'** those that stay, **K** experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...models.experts import Experts
from ...models.moe import MoELayer
from ...routers.base import LinearRouter, Routing
from ...routers.group import GroupRouter

STACKS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
SEMANTICS = ("zero_update", "reroute")


def routed(model: nn.Module) -> dict[str, MoELayer]:
    """{name: layer} of the MoE layers, from input to output. ValueError if there is none, or if one
    has no router row for each expert, experts of unequal width, or is pruned with zero updates
    already."""
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, MoELayer)
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoELayer whose experts could be ranked: upcycle it first"
        )
    for name, layer in layers.items():
        if isinstance(layer, PrunedLayer):
            raise ValueError(
                f"{name} is pruned already, its router still counts {layer.router.experts} experts: start from the "
                "model before pruning and drop more of them at once"
            )
        if not isinstance(layer.router, LinearRouter):
            raise ValueError(
                f"{name} has a {type(layer.router).__name__}: expert pruning needs a linear router, with one row an "
                "expert"
            )
        if layer.experts.fc1.weight.ndim != 3:
            raise ValueError(
                f"{name} has experts of unequal hidden width; whole experts are dropped from stacks of equal ones: "
                "drop experts first, and neurons after"
            )
    return layers


def stacks(experts: Experts) -> list[Tensor]:
    """The tensors of `STACKS`: (E, H, D), (E, H), (E, D, H), (E, D)."""
    return [experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias]


class PrunedLayer(MoELayer):
    """A MoE layer of E' experts whose router still decides over E: dropped experts give zero
    updates (2405.16646, as released).

    Their rows stay in the softmax, in the choice of K and in a capacity, so the gates of the others
    do not change. An assignment to one of them is taken out of the Routing and counted as dropped;
    a token without any other passes by the residual connection (and the shared expert) alone. On
    the tape experts keep their numbers 0..E-1; `kept`: (E',) those that are left, ascending.
    """

    def __init__(self, layer: MoELayer, kept: Tensor):
        super().__init__(layer.router, _pick(layer.experts, kept), layer.shared, layer.dropout)
        self.register_buffer("kept", kept)
        self.train(layer.training)

    def decide(self, tokens: Tensor) -> Routing:
        """tokens: (B, N, D) -> a Routing of probabilities (T, E), with assignments to surviving
        experts only."""
        routing = super().decide(tokens)
        alive = torch.isin(routing.expert, self.kept)
        lost = routing.token[~alive]
        return replace(
            routing,
            token=routing.token[alive],
            expert=routing.expert[alive],
            weight=routing.weight[alive],
            dropped=routing.dropped.index_add(0, lost, torch.ones_like(lost)),
        )

    def serve(self, rows: Tensor, routing: Routing) -> Tensor:
        """rows: (T, D) -> (T, D); experts are renumbered for the shorter stack."""
        place = torch.searchsorted(self.kept, routing.expert)
        return self.experts(rows, replace(routing, expert=place, probs=routing.probs[:, self.kept]))


def drop_experts(
    model: nn.Module, keep: Mapping[str, Sequence[int] | Tensor], semantics: str
) -> nn.Module:
    """Remove all experts that `keep` does not name, in place; layers absent from it stay whole.
    Returns the model.

    keep: {layer: experts that stay}, numbered 0..E-1 as now. semantics: "zero_update" puts a
    `PrunedLayer` in the layer's place (a tape or an optimiser made before knows the old one);
    "reroute" removes the router rows, too: tokens choose among the survivors, by a softmax over
    them. With a printed gate rerouting therefore scales the gates of all tokens by 1 / (1 - p of
    the dropped experts), also of tokens that never chose one. Raises ValueError for an unknown
    semantics or layer, for experts that are none, double or out of range, where fewer stay than a
    token chooses, and as `routed`. Nothing is changed when it raises.
    """
    if semantics not in SEMANTICS:
        raise ValueError(f"semantics={semantics!r} is unknown: use one of {', '.join(SEMANTICS)}")
    layers = routed(model)
    if unknown := [name for name in keep if name not in layers]:
        raise ValueError(f"no MoE layer {', '.join(unknown)}: the model has {', '.join(layers)}")
    stay = {name: _checked(name, layers[name], keep[name]) for name in keep}
    if semantics == "zero_update":
        for name in stay:
            if type(layers[name]) is not MoELayer:
                raise ValueError(
                    f"{name} is a {type(layers[name]).__name__}, zero updates are defined for a MoELayer: use "
                    "'reroute'"
                )
        for name, kept in stay.items():
            model.set_submodule(name, PrunedLayer(layers[name], kept))
        return model
    routers = {
        name: resized(layers[name].router, len(kept), lambda t, kept=kept: t[kept])
        for name, kept in stay.items()
    }
    for name, router in routers.items():
        check_room(name, router)
    for name, kept in stay.items():
        layers[name].router, layers[name].experts = routers[name], _pick(layers[name].experts, kept)
    return model


def _checked(name: str, layer: MoELayer, keep: Sequence[int] | Tensor) -> Tensor:
    listed, experts = [int(e) for e in keep], layer.router.experts
    if not listed:
        raise ValueError(f"no expert of {name} would be left: keep at least one of its {experts}")
    if len(set(listed)) < len(listed) or min(listed) < 0 or max(listed) >= experts:
        raise ValueError(
            f"keep={listed} of {name} must name different experts out of 0..{experts - 1}"
        )
    return torch.tensor(sorted(listed), device=layer.router.weight.device)


def check_room(name: str, router: LinearRouter) -> None:
    """ValueError if a token cannot choose as many experts as the router wants."""
    wanted = next(
        (getattr(router, field) for field in ("top_k", "choices") if hasattr(router, field)), 1
    )
    grouped = isinstance(router, GroupRouter)
    left = (
        int(torch.bincount(router.group, minlength=router.members).min())
        if grouped
        else router.experts
    )
    if wanted > left:
        raise ValueError(
            f"{name} gives a token {wanted:g} experts, but {left} would be left{' in a group' if grouped else ''}: "
            "keep more, or use semantics='zero_update', under which the router goes on choosing among all"
        )


def resized(router: LinearRouter, experts: int, change: Callable[[Tensor], Tensor]) -> LinearRouter:
    """A copy of a router with E' experts; change: maps each of its tensors with a first axis E to
    one with E'."""
    made = copy.deepcopy(router)
    made.experts = experts
    for name, tensor in router.named_parameters(recurse=False):
        setattr(
            made, name, nn.Parameter(change(tensor.detach()), requires_grad=tensor.requires_grad)
        )
    for name, tensor in router.named_buffers(recurse=False):
        setattr(made, name, change(tensor))
    return made


def restacked(experts: Experts, parts: Sequence[Tensor]) -> Experts:
    """Experts with these parts, (E', H, D), (E', H), (E', D, H), (E', D), and the activation of
    `experts`."""
    with torch.device("meta"):  # no initialisation that is overwritten at once
        out = Experts(len(parts[0]), experts.width, parts[0].shape[1], experts.act)
    for key, held, old in zip(STACKS, parts, stacks(experts), strict=True):
        stack, name = key.split(".")
        setattr(
            getattr(out, stack),
            name,
            nn.Parameter(held.contiguous(), requires_grad=old.requires_grad),
        )
    return out.train(experts.training)


def _pick(experts: Experts, kept: Tensor) -> Experts:
    return restacked(experts, [stack.detach()[kept] for stack in stacks(experts)])
