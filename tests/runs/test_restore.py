"""Models built again from the final states of runs, and states that are not what a run left."""

from __future__ import annotations

import pytest
import torch

from lib.models.backbone import build
from lib.pruning.experts.dropping import drop_experts
from lib.runs.restore import fit, restored
from lib.runs.steps import STEPS, steps_of
from lib.spec import (
    BackboneSpec,
    ChannelSpec,
    DataSpec,
    DropSpec,
    ExtractSpec,
    MoESpec,
    PruneSpec,
    RunSpec,
    TrainSpec,
)

DENSE = RunSpec(
    data=DataSpec(train=80, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2, hidden=24),
    threads=1,
)
MOE = DENSE.but(moe=MoESpec(layers=1, experts=4, router="token"))
DROP = DropSpec(share=0.5, score="load", images=20)
DROPPED = MOE.but(init=MOE, drop=DROP)
LAYER = "blocks.1.mlp"


def left(spec: RunSpec, experts: list[int], semantics: str) -> dict[str, torch.Tensor]:
    """The state of a run's model after all experts but these were dropped."""
    model = build(spec.but(init=None, drop=None), 10, 1)
    return drop_experts(model, {LAYER: experts}, semantics).state_dict()


@pytest.mark.parametrize("missing", ["zero_update", "reroute"])
def test_values_come_from_the_state(missing):
    state = left(MOE, [1, 3], missing)
    model = restored(DROPPED.but(drop={"missing": missing}), state, 10, 1)
    again = model.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_a_model_from_a_weight_file_is_built_again_without_the_file():
    spec = DENSE.but(backbone={"weights": "file:gone.safetensors", "grid": (8, 2)}, seed=1)
    state = build(DENSE, 10, 1).state_dict()
    again = restored(spec, state, 10, 1).state_dict()
    assert all(torch.equal(again[name], value) for name, value in state.items())


def test_a_state_that_the_run_did_not_leave_is_refused():
    state = left(MOE, [0, 1], "zero_update")
    assert restored(DROPPED, state, 10, 1).get_submodule(LAYER).experts.experts == 2
    for other, says in (
        (state | {f"{LAYER}.kept": torch.tensor([0, 7])}, "out of 0..3"),
        ({name: value for name, value in state.items() if name != "norm.weight"}, "norm.weight"),
        (state | {"extra": torch.zeros(1)}, '"extra"'),
        (left(MOE.but(moe={"experts": 6}), [0, 1], "zero_update"), "size mismatch for .*router"),
        (left(MOE.but(moe={"experts": 6}), [0, 1, 2, 3, 4], "reroute"), "shares of run .* leave 2"),
        (build(MOE, 10, 1).state_dict(), "has 4 experts in the state; of 4 the shares .* leave 2"),
    ):
        with pytest.raises(ValueError, match=says):
            restored(DROPPED, other, 10, 1)
    with pytest.raises(ValueError, match="the state has 2 experts"):
        restored(MOE, state, 10, 1)


def test_dropping_during_training_leaves_one_expert():
    spec = MOE.but(train=TrainSpec(single_expert_at=0.5))
    state = left(MOE, [2], "reroute")
    for run in (spec, MOE.but(init=spec)):
        assert restored(run, state, 10, 1).get_submodule(LAYER).experts.experts == 1
    with pytest.raises(ValueError, match="has 2 experts in the state; of 4 .* leave 1"):
        restored(spec, left(MOE, [0, 1], "reroute"), 10, 1)


def test_experts_go_before_neurons():
    """The widths of the experts that are left say nothing of those that went."""
    pruned = DROPPED.but(init=DROPPED, drop=None, prune=PruneSpec(share=0.25, parts=("experts",)))
    unchanged = build(MOE, 10, 1)
    state = dict(left(MOE, [1, 3], "zero_update"))
    for name, axis in (("fc1.weight", 1), ("fc1.bias", 1), ("fc2.weight", 2)):
        key = f"{LAYER}.experts.{name}"
        state[key] = state[key].narrow(axis, 0, 18)
    model = fit(unchanged, state, pruned)
    assert model.get_submodule(LAYER).experts.widths == (18, 18)
    assert restored(pruned, state, 10, 1).get_submodule(LAYER).experts.widths == (18, 18)


def test_a_step_for_each_field_with_rules():
    assert list(STEPS) == list(RunSpec.step_fields)
    assert steps_of(MOE) == []
    extract = ExtractSpec(neurons={"active": 0.5}, clusters={"method": "kmeans"})
    steps = {"drop": DROP, "extract": extract, "prune": PruneSpec()}
    for field, rules in (steps | {"channels": ChannelSpec(active=0.5)}).items():
        start = MOE if field == "drop" else DENSE
        [step] = steps_of(start.but(init=start, **{field: rules}))
        assert step.name == field and step.rules == rules
