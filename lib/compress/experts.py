"""Whole experts: how much each one matters, and taking some away (Chowdhury et al. 2024, 2405.16646, and rival scores).

    found = scores(model, "router_norm_change", before=state_before_finetuning)
    drop_experts(model, keep_by_score(found, share=0.5), "zero_update")

Layers are named as in `model.named_modules()`; a score is high where an expert should stay; experts are ranked inside their
layer, since scales differ between layers.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **A** assignments, **D** width, **H** hidden width, **E**
experts of a layer, **E'** those that stay, **K** experts per token.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..models.ensemble import GroupRouter
from ..models.experts import Experts
from ..models.moe import MoELayer, RoutingTape
from ..models.routing import LinearRouter, Routing

# S_j(b, a, c) = |X_j|^-b sum over the tokens X_j of expert j of g^a ||f||^c (2606.15716, section 3), by name: (b, a, c).
MEASURED = {"load": (0, 0, 0), "gate_sum": (0, 1, 0), "mean_gate": (1, 1, 0), "ean": (0, 0, 1), "reap": (1, 1, 1),
            "man": (1, 0, 1), "msan": (1, 0, 2)}
NAMES = ("router_norm_change", "router_norm_change_abs", "router_change", "router_norm", "weight_change", *MEASURED, "random")
SEMANTICS = ("zero_update", "reroute")
STACKS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@dataclass(frozen=True)
class Calibration:
    """sums[a, c]: (E,) float64, the sum of g^a ||f||^c over an expert's tokens; sums[0, 0] counts them."""

    sums: Mapping[tuple[int, int], Tensor]

    def score(self, b: int, a: int, c: int) -> Tensor:
        """(E,) S(b, a, c); zero for an expert without tokens."""
        return self.sums[a, c] / self.sums[0, 0].clamp_min(1) ** b


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Calibration]:
    """One pass in evaluation mode over batches of images (B, C, height, width): all that the measured scores need.

    g is the weight that the layer multiplies an output with (at K = 1 with a renormalised gate always one), f the expert's
    output before it; assignments that a capacity refused do not count. Raises ValueError without a batch, and as `routed`.
    """
    powers = sorted({(a, c) for _, a, c in MEASURED.values()})
    sums = {name: {power: torch.zeros(layer.router.experts, dtype=torch.float64) for power in powers}
            for name, layer in routed(model).items()}

    def add(name: str, layer: MoELayer, rows: Tensor, routing: Routing) -> None:
        single = replace(routing, token=torch.arange(len(routing.token), device=rows.device),
                         weight=torch.ones_like(routing.weight))
        size = layer.serve(rows[routing.token], single).double().norm(dim=-1)  # (A,) each assignment as a row of its own
        for (a, c), total in sums[name].items():
            total.index_add_(0, routing.expert.cpu(), (routing.weight.double() ** a * size ** c).cpu())

    watch(model, batches, add)
    return {name: Calibration(each) for name, each in sums.items()}


def watch(model: nn.Module, batches: Iterable[Tensor], see: Callable[[str, MoELayer, Tensor, Routing], None]) -> None:
    """Run the model in evaluation mode over batches of images; `see(layer name, layer, rows (T, D), Routing)` after each layer.

    A forward hook, since a block hands the input of its MLP to nobody else; the modes of the modules are put back.
    """
    tape, modes = RoutingTape(model), [(module, module.training) for module in model.modules()]

    def hook(name: str) -> Callable:
        return lambda layer, args, _: see(name, layer, args[0].reshape(-1, args[0].shape[-1]), tape[layer])

    handles = [layer.register_forward_hook(hook(name)) for name, layer in routed(model).items()]
    seen = 0
    try:
        model.eval()
        for images in batches:
            with tape:
                model(images)
            seen += len(images)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not seen:
        raise ValueError("calibration needs images: batches is an iterable of tensors (B, C, height, width), and it was empty")


# ---------------------------------------------------------------- scores


def routed(model: nn.Module) -> dict[str, MoELayer]:
    """{name: layer} of the MoE layers, from input to output. ValueError if there is none, or if one has no router row for each
    expert, experts of unequal width, or is pruned with zero updates already."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no MoELayer whose experts could be ranked: upcycle it first")
    for name, layer in layers.items():
        if isinstance(layer, PrunedLayer):
            raise ValueError(f"{name} is pruned already, its router still counts {layer.router.experts} experts: start from the "
                             "model before pruning and drop more of them at once")
        if not isinstance(layer.router, LinearRouter):
            raise ValueError(f"{name} has a {type(layer.router).__name__}: expert pruning needs a linear router, with one row an "
                             "expert")
        if layer.experts.fc1.weight.ndim != 3:
            raise ValueError(f"{name} has experts of unequal hidden width; whole experts are dropped from stacks of equal ones: "
                             "drop experts first, and neurons after")
    return layers


def scores(model: nn.Module, name: str, *, before: Mapping[str, Tensor] | None = None,
           calibration: Mapping[str, Calibration] | None = None,
           generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """{layer: (E,) float64 scores}, high = keep.

    From weights, with w the router row of an expert: `router_norm_change` ||w_after|| - ||w_before||, signed, as in the released
    code of 2405.16646; its controls `router_norm_change_abs` (its absolute value) and `router_change` ||w_after - w_before||;
    `router_norm` ||w_after||; `weight_change`, the norm of the change of all of the expert's own weights.
    Measured: those of `MEASURED`, S(b, a, c) over calibration tokens. `random`: uniform.

    before: state dict before finetuning, for the changes. calibration: of `calibrate`, for the measured ones; one serves all.
    generator: for `random`. Each name takes what it needs, so a loop over names may pass all three. Raises ValueError for an
    unknown name, for what is needed and not given, for a layer that `before` lacks or has in another shape, and as `routed`.
    """
    if name not in NAMES:
        raise ValueError(f"score {name!r} is unknown: use one of {', '.join(NAMES)}")
    layers = routed(model)
    if name == "random":
        _needed(name, generator, "a torch.Generator as generator")
        return {at: torch.rand(layer.router.experts, generator=generator, dtype=torch.float64) for at, layer in layers.items()}
    if name in MEASURED:
        _needed(name, calibration, "calibration=calibrate(model, batches)")
        if lost := [at for at, layer in layers.items()
                    if at not in calibration or len(calibration[at].sums[0, 0]) != layer.router.experts]:
            raise ValueError(f"the calibration is not of this model: {', '.join(lost)} is absent or has other experts")
        return {at: calibration[at].score(*MEASURED[name]) for at in layers}
    if name != "router_norm":
        _needed(name, before, "the state dict before finetuning as before")
    return {at: _from_weights(name, at, layer, before) for at, layer in layers.items()}


def _needed(name: str, value: object, what: str) -> None:
    if value is None:
        raise ValueError(f"score {name!r} needs {what}")


def _from_weights(name: str, at: str, layer: MoELayer, before: Mapping[str, Tensor] | None) -> Tensor:
    if name == "weight_change":
        pairs = zip(STACKS, stacks(layer.experts), strict=True)
        changes = [_now(part) - _then(at, f"experts.{key}", part, before) for key, part in pairs]
        return torch.cat([change.flatten(1) for change in changes], dim=1).norm(dim=1)
    after = _now(layer.router.weight)
    if name == "router_norm":
        return after.norm(dim=1)
    old = _then(at, "router.weight", layer.router.weight, before)
    if name == "router_change":
        return (after - old).norm(dim=1)
    change = after.norm(dim=1) - old.norm(dim=1)
    return change.abs() if name == "router_norm_change_abs" else change


def _now(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()  # differences of norms are small against the norms


def _then(at: str, part: str, now: Tensor, before: Mapping[str, Tensor]) -> Tensor:
    old = before.get(f"{at}.{part}")
    if old is None or old.shape != now.shape:
        what = "has no" if old is None else f"has shape {tuple(old.shape)} instead of {tuple(now.shape)} for"
        raise ValueError(f"the state before finetuning {what} {at}.{part}: a change is measured from a checkpoint of the same "
                         f"MoE model, whose layer {at} already had its router and experts")
    return _now(old)


def keep_by_score(found: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """found: {layer: (E,) scores}; share of the experts to drop -> {layer: (E',) experts that stay, ascending}.

    The same number stays in each layer, the best of it; of equal scores the lower index stays. Raises ValueError for a share
    outside [0, 1), one that is no whole number of experts, layers of different E, and scores that are not finite.
    """
    sizes = {len(score) for score in found.values()}
    if len(sizes) != 1:
        raise ValueError(f"layers have {sorted(sizes)} experts: the same number stays in each layer, so E must be the same")
    left = remaining(sizes.pop(), share)
    for name, score in found.items():
        if not torch.isfinite(score).all():
            raise ValueError(f"the scores of {name} are not finite: {score.tolist()}")
    return {name: score.sort(descending=True, stable=True).indices[:left].sort().values for name, score in found.items()}


def remaining(experts: int, share: float) -> int:
    """E' = E (1 - share), which must come out whole and above zero; ValueError otherwise."""
    dropped = round(share * experts)
    if not 0 <= share < 1 or dropped == experts:
        raise ValueError(f"share={share} of {experts} experts leaves none, or is no share: a layer needs at least one, so the "
                         f"share to drop is at least 0 and at most {experts - 1}/{experts}")
    if abs(share * experts - dropped) > 1e-6:
        raise ValueError(f"share={share} of {experts} experts is {share * experts:g} experts: give a multiple of 1/{experts}")
    return experts - dropped


# ---------------------------------------------------------------- removal


class PrunedLayer(MoELayer):
    """A MoE layer of E' experts whose router still decides over E: dropped experts give zero updates (2405.16646, as released).

    Their rows stay in the softmax, in the choice of K and in a capacity, so the gates of the others do not change. An assignment
    to one of them is taken out of the Routing and counted as dropped; a token without any other passes by the residual connection
    (and the shared expert) alone. On the tape experts keep their numbers 0..E-1; `kept`: (E',) those that are left, ascending.
    """

    def __init__(self, layer: MoELayer, kept: Tensor):
        super().__init__(layer.router, _pick(layer.experts, kept), layer.shared, layer.dropout)
        self.register_buffer("kept", kept)
        self.train(layer.training)

    def decide(self, tokens: Tensor) -> Routing:
        """tokens: (B, N, D) -> a Routing of probabilities (T, E), with assignments to surviving experts only."""
        routing = super().decide(tokens)
        alive = torch.isin(routing.expert, self.kept)
        lost = routing.token[~alive]
        return replace(routing, token=routing.token[alive], expert=routing.expert[alive], weight=routing.weight[alive],
                       dropped=routing.dropped.index_add(0, lost, torch.ones_like(lost)))

    def serve(self, rows: Tensor, routing: Routing) -> Tensor:
        """rows: (T, D) -> (T, D); experts are renumbered for the shorter stack."""
        place = torch.searchsorted(self.kept, routing.expert)
        return self.experts(rows, replace(routing, expert=place, probs=routing.probs[:, self.kept]))


def drop_experts(model: nn.Module, keep: Mapping[str, Sequence[int] | Tensor], semantics: str) -> nn.Module:
    """Remove all experts that `keep` does not name, in place; layers absent from it stay whole. Returns the model.

    keep: {layer: experts that stay}, numbered 0..E-1 as now. semantics: "zero_update" puts a `PrunedLayer` in the layer's place
    (a tape or an optimiser made before knows the old one); "reroute" removes the router rows, too: tokens choose among the
    survivors, by a softmax over them. With a printed gate rerouting therefore scales the gates of all tokens by 1 / (1 - p of
    the dropped experts), also of tokens that never chose one.
    Raises ValueError for an unknown semantics or layer, for experts that are none, double or out of range, where fewer stay
    than a token chooses, and as `routed`. Nothing is changed when it raises.
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
                raise ValueError(f"{name} is a {type(layers[name]).__name__}, zero updates are defined for a MoELayer: use "
                                 "'reroute'")
        for name, kept in stay.items():
            model.set_submodule(name, PrunedLayer(layers[name], kept))
        return model
    routers = {name: resized(layers[name].router, len(kept), lambda t, kept=kept: t[kept]) for name, kept in stay.items()}
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
        raise ValueError(f"keep={listed} of {name} must name different experts out of 0..{experts - 1}")
    return torch.tensor(sorted(listed), device=layer.router.weight.device)


def check_room(name: str, router: LinearRouter) -> None:
    """ValueError if a token cannot choose as many experts as the router wants."""
    wanted = next((getattr(router, field) for field in ("top_k", "choices") if hasattr(router, field)), 1)
    grouped = isinstance(router, GroupRouter)
    left = int(torch.bincount(router.group, minlength=router.members).min()) if grouped else router.experts
    if wanted > left:
        raise ValueError(f"{name} gives a token {wanted:g} experts, but {left} would be left{' in a group' if grouped else ''}: "
                         "keep more, or use semantics='zero_update', under which the router goes on choosing among all")


def resized(router: LinearRouter, experts: int, change: Callable[[Tensor], Tensor]) -> LinearRouter:
    """A copy of a router with E' experts; change: maps each of its tensors with a first axis E to one with E'."""
    made = copy.deepcopy(router)
    made.experts = experts
    for name, tensor in router.named_parameters(recurse=False):
        setattr(made, name, nn.Parameter(change(tensor.detach()), requires_grad=tensor.requires_grad))
    for name, tensor in router.named_buffers(recurse=False):
        setattr(made, name, change(tensor))
    return made


def restacked(experts: Experts, parts: Sequence[Tensor]) -> Experts:
    """Experts with these parts, (E', H, D), (E', H), (E', D, H), (E', D), and the activation of `experts`."""
    with torch.device("meta"):  # no initialisation that is overwritten at once
        out = Experts(len(parts[0]), experts.width, parts[0].shape[1], experts.act)
    for key, held, old in zip(STACKS, parts, stacks(experts), strict=True):
        stack, name = key.split(".")
        setattr(getattr(out, stack), name, nn.Parameter(held.contiguous(), requires_grad=old.requires_grad))
    return out.train(experts.training)


def stacks(experts: Experts) -> list[Tensor]:
    """The tensors of `STACKS`: (E, H, D), (E, H), (E, D, H), (E, D)."""
    return [experts.fc1.weight, experts.fc1.bias, experts.fc2.weight, experts.fc2.bias]


def _pick(experts: Experts, kept: Tensor) -> Experts:
    return restacked(experts, [stack.detach()[kept] for stack in stacks(experts)])
