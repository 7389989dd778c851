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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...models.moe import MoELayer, RoutingTape
from ...routers.base import Routing
from .dropping import STACKS, routed, stacks

# S_j(b, a, c) = |X_j|^-b sum over the tokens X_j of expert j of g^a ||f||^c (2606.15716, section
# 3), by name: (b, a, c).
MEASURED = {
    "load": (0, 0, 0),
    "gate_sum": (0, 1, 0),
    "mean_gate": (1, 1, 0),
    "ean": (0, 0, 1),
    "reap": (1, 1, 1),
    "man": (1, 0, 1),
    "msan": (1, 0, 2),
}
NAMES = (
    "router_norm_change",
    "router_norm_change_abs",
    "router_change",
    "router_norm",
    "weight_change",
    *MEASURED,
    "random",
)


@dataclass(frozen=True)
class Calibration:
    """sums[a, c]: (E,) float64, the sum of g^a ||f||^c over an expert's tokens; sums[0, 0] counts
    them."""

    sums: Mapping[tuple[int, int], Tensor]

    def score(self, b: int, a: int, c: int) -> Tensor:
        """(E,) S(b, a, c); zero for an expert without tokens."""
        return self.sums[a, c] / self.sums[0, 0].clamp_min(1) ** b


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Calibration]:
    """One pass in evaluation mode over batches of images (B, C, height, width): all that the
    measured scores need.

    g is the weight that the layer multiplies an output with (at K = 1 with a renormalised gate
    always one), f the expert's output before it; assignments that a capacity refused do not count.
    Raises ValueError without a batch, and as `routed`.
    """
    powers = sorted({(a, c) for _, a, c in MEASURED.values()})
    sums = {
        name: {power: torch.zeros(layer.router.experts, dtype=torch.float64) for power in powers}
        for name, layer in routed(model).items()
    }

    def add(name: str, layer: MoELayer, rows: Tensor, routing: Routing) -> None:
        single = replace(
            routing,
            token=torch.arange(len(routing.token), device=rows.device),
            weight=torch.ones_like(routing.weight),
        )
        size = (
            layer.serve(rows[routing.token], single).double().norm(dim=-1)
        )  # (A,) each assignment as a row of its own
        for (a, c), total in sums[name].items():
            total.index_add_(
                0, routing.expert.cpu(), (routing.weight.double() ** a * size**c).cpu()
            )

    watch(model, batches, add)
    return {name: Calibration(each) for name, each in sums.items()}


def watch(
    model: nn.Module,
    batches: Iterable[Tensor],
    see: Callable[[str, MoELayer, Tensor, Routing], None],
) -> None:
    """Run the model in evaluation mode over batches of images; `see(layer name, layer, rows (T, D),
    Routing)` after each layer.

    A forward hook, since a block hands the input of its MLP to nobody else; the modes of the
    modules are put back.
    """
    tape, modes = RoutingTape(model), [(module, module.training) for module in model.modules()]

    def hook(name: str) -> Callable:
        return lambda layer, args, _: see(
            name, layer, args[0].reshape(-1, args[0].shape[-1]), tape[layer]
        )

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
        raise ValueError(
            "calibration needs images: batches is an iterable of tensors (B, C, height, width), and it was empty"
        )


def scores(
    model: nn.Module,
    name: str,
    *,
    before: Mapping[str, Tensor] | None = None,
    calibration: Mapping[str, Calibration] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """{layer: (E,) float64 scores}, high = keep.

    From weights, with w the router row of an expert: `router_norm_change` ||w_after|| -
    ||w_before||, signed, as in the released code of 2405.16646; its controls
    `router_norm_change_abs` (its absolute value) and `router_change` ||w_after - w_before||;
    `router_norm` ||w_after||; `weight_change`, the norm of the change of all of the expert's own
    weights. Measured: those of `MEASURED`, S(b, a, c) over calibration tokens. `random`: uniform.

    before: state dict before finetuning, for the changes. calibration: of `calibrate`, for the
    measured ones; one serves all. generator: for `random`. Each name takes what it needs, so a loop
    over names may pass all three. Raises ValueError for an unknown name, for what is needed and not
    given, for a layer that `before` lacks or has in another shape, and as `routed`.
    """
    if name not in NAMES:
        raise ValueError(f"score {name!r} is unknown: use one of {', '.join(NAMES)}")
    layers = routed(model)
    if name == "random":
        _needed(name, generator, "a torch.Generator as generator")
        return {
            at: torch.rand(layer.router.experts, generator=generator, dtype=torch.float64)
            for at, layer in layers.items()
        }
    if name in MEASURED:
        _needed(name, calibration, "calibration=calibrate(model, batches)")
        if lost := [
            at
            for at, layer in layers.items()
            if at not in calibration or len(calibration[at].sums[0, 0]) != layer.router.experts
        ]:
            raise ValueError(
                f"the calibration is not of this model: {', '.join(lost)} is absent or has other experts"
            )
        return {at: calibration[at].score(*MEASURED[name]) for at in layers}
    if name != "router_norm":
        _needed(name, before, "the state dict before finetuning as before")
    return {at: _from_weights(name, at, layer, before) for at, layer in layers.items()}


def _needed(name: str, value: object, what: str) -> None:
    if value is None:
        raise ValueError(f"score {name!r} needs {what}")


def _from_weights(
    name: str, at: str, layer: MoELayer, before: Mapping[str, Tensor] | None
) -> Tensor:
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
        what = (
            "has no"
            if old is None
            else f"has shape {tuple(old.shape)} instead of {tuple(now.shape)} for"
        )
        raise ValueError(
            f"the state before finetuning {what} {at}.{part}: a change is measured from a checkpoint of the same "
            f"MoE model, whose layer {at} already had its router and experts"
        )
    return _now(old)


def keep_by_score(found: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """found: {layer: (E,) scores}; share of the experts to drop -> {layer: (E',) experts that stay,
    ascending}.

    The same number stays in each layer, the best of it; of equal scores the lower index stays.
    Raises ValueError for a share outside [0, 1), one that is no whole number of experts, layers of
    different E, and scores that are not finite.
    """
    sizes = {len(score) for score in found.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"layers have {sorted(sizes)} experts: the same number stays in each layer, so E must be the same"
        )
    left = remaining(sizes.pop(), share)
    for name, score in found.items():
        if not torch.isfinite(score).all():
            raise ValueError(f"the scores of {name} are not finite: {score.tolist()}")
    return {
        name: score.sort(descending=True, stable=True).indices[:left].sort().values
        for name, score in found.items()
    }


def remaining(experts: int, share: float) -> int:
    """E' = E (1 - share), which must come out whole and above zero; ValueError otherwise."""
    dropped = round(share * experts)
    if not 0 <= share < 1 or dropped == experts:
        raise ValueError(
            f"share={share} of {experts} experts leaves none, or is no share: a layer needs at least one, so the "
            f"share to drop is at least 0 and at most {experts - 1}/{experts}"
        )
    if abs(share * experts - dropped) > 1e-6:
        raise ValueError(
            f"share={share} of {experts} experts is {share * experts:g} experts: give a multiple of 1/{experts}"
        )
    return experts - dropped
