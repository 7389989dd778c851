"""Training from images that other processes read: the same weights, also when it is resumed."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lib.inputs import loading
from lib.runs import collect as runs
from lib.runs.store import TIMING, _content
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec
from lib.training import checkpoint, loop

# 3 steps an epoch, the last of 4 images; 7 in all
SPEC = RunSpec(
    data=DataSpec(name="pictures", image_size=14, augment="resized_crop"),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    threads=1,
    train=TrainSpec(epochs=7 / 3, batch=8, lr=3e-3),
)


@pytest.fixture
def pictures(home):
    """20 training, 10 validation and 10 test pictures of two classes."""
    numbers = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 10), ("test", 10)):
        for i in range(count):
            file = home / "pictures" / split / "ab"[i % 2] / f"{i:02}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(numbers.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file)


@pytest.fixture
def outcome(pictures, tmp_path, monkeypatch):
    """Computes a run with some reading processes: its record without times, and its arrays."""

    def compute(count: int, spec: RunSpec = SPEC, file=None) -> dict:
        monkeypatch.setenv(loading.VARIABLE, str(count))
        made, arrays = runs.execute(spec, str(tmp_path / "states"), str(file) if file else None)
        assert made["status"] == "ok", made.get("error")
        assert not multiprocessing.active_children()
        return {name: value for name, value in made.items() if name not in TIMING} | {
            "content": _content(arrays)
        }

    return compute


def test_records_and_weights_are_equal_for_0_1_and_4_processes(outcome, monkeypatch):
    counts, real = [], loading.in_processes

    def watched(requests, count, pinned):
        counts.append(count)
        return real(requests, count, pinned)

    monkeypatch.setattr(loading, "in_processes", watched)
    here = outcome(0)
    assert not counts and [row["epoch"] for row in here["history"]][1:] == [1.0, 2.0, 7 / 3]
    for count in (1, 4):
        assert outcome(count) == here
    # training, four validations, test: each has processes of its own
    assert counts == [1] * 6 + [4] * 6
    other = outcome(1, SPEC.but(data={"augment": "none"}))
    assert other["weights"]["final"] != here["weights"]["final"]


def test_epochs_of_one_batch(outcome):
    spec = SPEC.but(train={"batch": 64, "epochs": 2.0})
    assert outcome(2, spec) == outcome(0, spec)


class Stopped(KeyboardInterrupt):
    """Not an Exception: like Ctrl-C it goes through `execute`."""


@pytest.mark.parametrize("before, after", [(2, 0), (0, 2)])
def test_a_run_is_resumed_with_another_number_of_processes(
    outcome, tmp_path, monkeypatch, before, after
):
    whole, file = outcome(0), tmp_path / "run.pt"
    steps, limit, real = [0], [4], loop.losses

    def counted(*args):
        if steps[0] == limit[0]:
            raise Stopped
        steps[0] += 1
        return real(*args)

    monkeypatch.setattr(loop, "losses", counted)
    # a clock that ticks once a step and stands still while a checkpoint is written
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: steps[0]))
    with pytest.raises(Stopped):
        outcome(before, file=file)
    assert torch.load(file, weights_only=True)["step"] == 4
    steps[0], limit[0] = 0, None
    assert outcome(after, file=file) == whole
    assert steps[0] == 3  # it went on, in the middle of an epoch


def test_a_damaged_picture_fails_the_run_by_name(outcome, home, tmp_path, monkeypatch):
    damaged = home / "pictures" / "train" / "b" / "01.jpg"
    damaged.write_bytes(damaged.read_bytes()[:100])
    errors = []
    for count in ("0", "2"):
        monkeypatch.setenv(loading.VARIABLE, count)
        made, _ = runs.execute(SPEC, str(tmp_path / "states"))
        errors.append((made["status"], made["error"]["kind"], made["error"]["message"]))
        assert not multiprocessing.active_children()
    assert errors[0] == errors[1]
    assert errors[0][:2] == ("failed", "ValueError") and str(damaged) in errors[0][2]


def test_a_wrong_number_of_processes_is_no_failed_run(tmp_path, monkeypatch):
    monkeypatch.setenv(loading.VARIABLE, "many")
    with pytest.raises(ValueError, match="MOE_LOADERS='many' is no number"):
        runs.execute(SPEC, str(tmp_path / "states"))
