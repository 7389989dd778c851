"""A new method touches three files: a router that sends tokens by the hash of their position."""

from __future__ import annotations

import json

import pytest
from toy_study import CLASS, ROUTER, WORD, add_router

USE = """
import json

from pydantic import ValidationError

from lib.measure.cost import count, needs_measured_experts
from lib.models.backbone import skeleton
from lib.runs import collect as runs
from lib.spec import BackboneSpec, DataSpec, MoESpec, RunSpec, TrainSpec

out = {}
try:
    MoESpec(router="hash", experts=3, balance="switch")
except ValidationError as error:
    out["refused"] = str(error)
spec = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    moe=MoESpec(router="hash", experts=3, balance="none"),
    train=TrainSpec(epochs=1.0, batch=32),
    threads=1,
)
runs.check(spec)
model, dense = (skeleton(spec.backbone, 28, 10, moe) for moe in (spec.moe, None))
out["needs"] = needs_measured_experts(model)
out["macs"] = [count(m, 28).macs for m in (model, dense)]
record = runs.collect({"toy": [spec]})["toy"][0]
out["status"], out["cost"], out["layer"] = record.status, record.cost, record.moe[0]
out["history"] = sorted(record.history[-1])
out["token_expert"] = record.arrays["token_expert"].tolist()
print(json.dumps(out))
"""


def test_a_new_router_is_a_word_a_class_and_a_line(tiny):
    assert len((WORD + CLASS + ROUTER).strip().splitlines()) <= 30
    add_router(tiny.root / "lib")
    done = tiny.call("-c", USE, OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout.splitlines()[-1])
    assert "router='hash' has nothing to learn" in out["refused"]
    assert "set balance='none'" in out["refused"]
    assert out["needs"] and out["macs"][0] == out["macs"][1]  # one expert a token, no router
    assert out["status"] == "ok" and "train_balance_loss" not in out["history"]
    # 17 tokens, 3 experts: all are touched, and each position goes where it goes in every image.
    assert out["layer"]["experts_per_image"] == 3
    assert sum(out["layer"]["load"]) == pytest.approx(1)
    assert out["cost"]["params_active"] == out["cost"]["params_stored"]
    [images] = out["token_expert"]
    wanted = [position * 2654435761 % 2**32 % 3 for position in range(17)]
    assert len(images) == 12 and all(image == wanted for image in images)
