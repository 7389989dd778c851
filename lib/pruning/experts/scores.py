"""How much each whole expert matters: scores from weights and from calibration images.

    scores_of_layer = scores(model, "router_norm_change", before=state_before_finetuning)
    keep = keep_by_score(scores_of_layer, share=0.5)

Layers are named as in `model.named_modules()`. A score is high where an expert should stay; experts
are ranked inside their layer, since scales differ between layers. Sources: Chowdhury et al. 2024,
2405.16646, and rival scores in the notation of 2606.15716.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **A** assignments, **D** width,
**E** experts of a layer, **E'** those that stay, **K** experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...models.modes import modes_kept
from ...models.moe import MoELayer, RoutingTape
from ...models.pruned import STACKS, stacks_of
from ...routers.base import Routing
from .dropping import routed

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
    """Holds what the measured scores of one layer need.

    sums[a, c]: (E,) float64, the sum of g^a ||f||^c over an expert's tokens; sums[0, 0] counts
    them.
    """

    sums: Mapping[tuple[int, int], Tensor]

    def score(self, b: int, a: int, c: int) -> Tensor:
        """Computes (E,) S(b, a, c); zero for an expert without tokens."""
        return self.sums[a, c] / self.sums[0, 0].clamp_min(1) ** b


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Calibration]:
    """Measures, in one pass over the images, all that the measured scores need: {layer: ...}.

    g is the weight that the layer multiplies an output with (at K = 1 with a renormalised gate
    always one), f the expert's output before it; assignments that a capacity refused do not count.

    batches: images (B, channels, height, width). Raises ValueError without a batch, and as
    `routed`.
    """
    powers = sorted({(a, c) for _, a, c in MEASURED.values()})
    sums = {
        name: {power: torch.zeros(layer.router.experts, dtype=torch.float64) for power in powers}
        for name, layer in routed(model).items()
    }

    def add(name: str, layer: MoELayer, rows: Tensor, routing: Routing) -> None:
        # (A,) norms of outputs before the gate: each assignment as a row of its own, of weight one.
        one_by_one = replace(
            routing,
            token=torch.arange(len(routing.token), device=rows.device),
            weight=torch.ones_like(routing.weight),
        )
        size = layer.serve(rows[routing.token], one_by_one).double().norm(dim=-1)
        expert, gate = routing.expert.cpu(), routing.weight.double()
        for (a, c), total in sums[name].items():
            total.index_add_(0, expert, (gate**a * size**c).cpu())

    observe(model, batches, add)
    return {name: Calibration(sums_of_layer) for name, sums_of_layer in sums.items()}


def observe(
    model: nn.Module,
    batches: Iterable[Tensor],
    observer: Callable[[str, MoELayer, Tensor, Routing], None],
) -> None:
    """Runs the model over images and calls `observer(name, layer, rows, routing)` of each layer.

    batches: images (B, channels, height, width). rows: (T, D), the input of the layer. In
    evaluation mode; the modes of the modules are put back. Raises ValueError without an image.
    """
    tape = RoutingTape(model)

    # A forward hook, since a block hands the input of its MLP to nobody else.
    def hook(name: str) -> Callable:
        def seen(layer: MoELayer, inputs: tuple[Tensor], _: Tensor) -> None:
            tokens = inputs[0].movedim(1, -1) if layer.channels_first else inputs[0]
            observer(name, layer, tokens.reshape(-1, tokens.shape[-1]), tape[layer])

        return seen

    handles = [layer.register_forward_hook(hook(name)) for name, layer in routed(model).items()]
    image_count = 0
    try:
        with modes_kept(model):
            model.eval()
            for images in batches:
                with tape:
                    model(images)
                image_count += len(images)
    finally:
        for handle in handles:
            handle.remove()
    if not image_count:
        raise ValueError(
            "calibration needs images: batches is an iterable of tensors (B, C, height, width), "
            "and it was empty"
        )


def scores(
    model: nn.Module,
    name: str,
    *,
    before: Mapping[str, Tensor] | None = None,
    calibration: Mapping[str, Calibration] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Scores the experts of each layer, {layer: (E,) float64}; high = keep.

    From weights, with w the router row of an expert: `router_norm_change` ||w_after|| -
    ||w_before||, signed, as in the released code of 2405.16646; its controls
    `router_norm_change_abs` (its absolute value) and `router_change` ||w_after - w_before||;
    `router_norm` ||w_after||; `weight_change`, the norm of the change of all weights of the expert.
    Measured: those of `MEASURED`, S(b, a, c) over calibration tokens. `random`: uniform.

    before: state dict before finetuning, for the changes. calibration: of `calibrate`, for the
    measured ones; one serves all. generator: for `random`. Each name takes what it needs, so a loop
    over names may pass all three. Raises ValueError for an unknown name, for what is needed and not
    given, for a layer that `before` lacks or has in another shape, and as `routed`.
    """
    if name not in NAMES:
        raise ValueError(f"score {name!r} is unknown: use one of {', '.join(NAMES)}")
    layers = routed(model)
    if name == "random":
        _check_given(name, generator, "a torch.Generator as generator")
        return {
            layer_name: torch.rand(layer.router.experts, generator=generator, dtype=torch.float64)
            for layer_name, layer in layers.items()
        }
    if name in MEASURED:
        _check_given(name, calibration, "calibration=calibrate(model, batches)")
        _check_calibration(layers, calibration)
        return {layer_name: calibration[layer_name].score(*MEASURED[name]) for layer_name in layers}
    if name != "router_norm":
        _check_given(name, before, "the state dict before finetuning as before")
    return {
        layer_name: _from_weights(name, layer_name, layer, before)
        for layer_name, layer in layers.items()
    }


def _check_given(name: str, value: object, what: str) -> None:
    if value is None:
        raise ValueError(f"score {name!r} needs {what}")


def _check_calibration(
    layers: Mapping[str, MoELayer], calibration: Mapping[str, Calibration]
) -> None:
    foreign = [
        layer_name
        for layer_name, layer in layers.items()
        if layer_name not in calibration
        or len(calibration[layer_name].sums[0, 0]) != layer.router.experts
    ]
    if foreign:
        raise ValueError(
            f"the calibration is not of this model: {', '.join(foreign)} is absent or has other "
            "experts"
        )


def _from_weights(
    name: str, layer_name: str, layer: MoELayer, before: Mapping[str, Tensor] | None
) -> Tensor:
    """Scores (E,) the experts of one layer by their weights, and by those before finetuning."""
    if name == "weight_change":
        changes = [
            _in_double(now) - _weights_before(layer_name, f"experts.{key}", now, before)
            for key, now in zip(STACKS, stacks_of(layer.experts), strict=True)
        ]
        return torch.cat([change.flatten(1) for change in changes], dim=1).norm(dim=1)
    row_after = _in_double(layer.router.weight)
    if name == "router_norm":
        return row_after.norm(dim=1)
    row_before = _weights_before(layer_name, "router.weight", layer.router.weight, before)
    if name == "router_change":
        return (row_after - row_before).norm(dim=1)
    change = row_after.norm(dim=1) - row_before.norm(dim=1)
    return change.abs() if name == "router_norm_change_abs" else change


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.detach().double().cpu()  # differences of norms are small against the norms


def _weights_before(layer_name: str, key: str, now: Tensor, before: Mapping[str, Tensor]) -> Tensor:
    """Looks up the weights, of the shape of `now`, that a layer had before finetuning."""
    old = before.get(f"{layer_name}.{key}")
    if old is None or old.shape != now.shape:
        what = "has no"
        if old is not None:
            what = f"has shape {tuple(old.shape)} instead of {tuple(now.shape)} for"
        raise ValueError(
            f"the state before finetuning {what} {layer_name}.{key}: a change is measured from a "
            f"checkpoint of the same MoE model, whose layer {layer_name} already had its router "
            "and experts"
        )
    return _in_double(old)


def keep_by_score(scores_of_layer: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Picks the experts that stay, {layer: (E',) numbers, ascending}.

    The same number stays in each layer, the best of it; of equal scores the lower number stays.

    scores_of_layer: {layer: (E,)}. share: of the experts, to drop. Raises ValueError for a share
    outside [0, 1), one that is no whole number of experts, layers of different E, and scores that
    are not finite.
    """
    sizes = {len(score) for score in scores_of_layer.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"layers have {sorted(sizes)} experts: the same number stays in each layer, so E must "
            "be the same"
        )
    left = remaining(sizes.pop(), share)
    for name, score in scores_of_layer.items():
        if not torch.isfinite(score).all():
            raise ValueError(
                f"the scores of {name} are not finite: {score.tolist()}. There is no order: look "
                "at the weights and the calibration images"
            )
    return {
        name: score.sort(descending=True, stable=True).indices[:left].sort().values
        for name, score in scores_of_layer.items()
    }


def remaining(experts: int, share: float) -> int:
    """Computes E' = E (1 - share); raises ValueError unless it is whole and above zero."""
    dropped = round(share * experts)
    if not 0 <= share < 1 or dropped == experts:
        raise ValueError(
            f"share={share} of {experts} experts leaves none, or is no share: a layer needs at "
            f"least one, so the share to drop is at least 0 and at most {experts - 1}/{experts}"
        )
    if abs(share * experts - dropped) > 1e-6:
        raise ValueError(
            f"share={share} of {experts} experts is {share * experts:g} experts: give a multiple "
            f"of 1/{experts}"
        )
    return experts - dropped
