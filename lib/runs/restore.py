"""The model that a run left, from its final state: structure first, then the values."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..models.backbone import build
from ..models.moe import moe_layers
from ..models.step import Step
from ..pruning.neurons.groups import shapes_of, supported
from ..pruning.steps import DropStep
from ..spec import DropSpec, RunSpec
from .steps import STEPS, steps_of

# The order in which the steps of a run and of those that it starts from are repeated: there are
# experts to drop once they are extracted, and widths are compared expert by expert.
FITTED = ("extract", "drop", "prune")


def fit(model: nn.Module, state: Mapping[str, Tensor], spec: RunSpec) -> nn.Module:
    """Gives an unchanged model, in place, the structure that the run `spec` left; returns it.

    state: the run's final state, whose values are loaded afterwards by the caller. Raises
    ValueError as the steps' own `fit` does.
    """
    steps = _steps_of_lineage(spec)
    for name in FITTED:
        if name in steps:
            steps[name].fit(model, state)
    return model


def restored(spec: RunSpec, state: Mapping[str, Tensor], classes: int, channels: int) -> nn.Module:
    """Builds the model that the run `spec` left behind, from its final state.

    classes, channels: of its data set. Raises ValueError for a state that another architecture
    left, for a pruned one with a spec that does not prune, and the other way round, and for one
    from which another share was taken.
    """
    unchanged = spec.but(
        init=None,
        backbone={"weights": None, "grid": None},
        train=None,
        fresh_routers=False,
        **dict.fromkeys(STEPS),
    )
    model = build(unchanged, classes, channels)
    sizes = _sizes(model)
    fit(model, state, spec)
    if not spec.extracted:  # there the data decide what is left
        _check_sizes(spec, sizes, _sizes(model))
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(
            f"the state is not what run {spec.id} left: give the spec that it was made with, and "
            f"its {', '.join(STEPS)} ({str(error).splitlines()[-1].strip()})"
        ) from None
    return model


def _steps_of_lineage(spec: RunSpec) -> dict[str, Step]:
    """One step of each name that the run or one that it starts from took.

    One is enough: each reads the whole structure off the state.
    """
    steps = {} if spec.init is None else _steps_of_lineage(spec.init)
    steps |= {step.name: step for step in steps_of(spec)}
    if spec.reduced and "drop" not in steps:  # by train.single_expert_at
        steps["drop"] = DropStep(DropSpec())
    return steps


def _sizes(model: nn.Module) -> dict[str, int]:
    """How many neurons or head dimensions each layer has that can be pruned, and how many experts
    each MoE layer."""
    neurons = {name: shape[-1] for name, shape in shapes_of(supported(model)).items()}
    return neurons | {name: layer.experts.experts for name, layer in moe_layers(model).items()}


def _check_sizes(spec: RunSpec, unchanged: dict[str, int], sizes: dict[str, int]) -> None:
    """Raises ValueError if a layer has another size than the steps of the run and of those that it
    starts from leave."""
    moe_layers = {name for name in unchanged if f"{name}.experts.0" in unchanged}
    for name, size in sizes.items():
        part = "whole_experts" if name in moe_layers else _part(name)
        expected = _remaining(spec, unchanged[name], part)
        if expected not in (None, size):
            raise ValueError(
                f"{name} has {size} {'experts' if name in moe_layers else 'groups'} in the state; "
                f"of {unchanged[name]} the shares of run {spec.id} leave {expected}: give the spec "
                "that the state was made with"
            )


def _part(name: str) -> str:
    if name.endswith((".qk", ".vo")):
        return "attention"
    return "experts" if ".experts." in name else "mlp"


def _remaining(spec: RunSpec, size: int, part: str) -> int | None:
    """What the run and its ancestors leave of `size` neurons, dimensions or experts; None where the
    state alone knows: neurons were pruned before a layer became a mixture, or in one order."""
    if spec.init is not None:
        became_mixture = spec.moe is not None and spec.init.moe is None
        if part in ("mlp", "experts") and became_mixture and spec.init.narrowed:
            return None
        size = _remaining(spec.init, size, part)
    for step in steps_of(spec):
        if size is None:
            return None
        size = step.remaining(size, part)
    one_expert = spec.train is not None and spec.train.single_expert_at
    return 1 if part == "whole_experts" and one_expert else size
