"""The training loop: equal twice, equal when broken off and resumed, and each part by hand."""

from __future__ import annotations

import math
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.inputs.splits import load_splits
from lib.models.backbone import build
from lib.models.moe import RoutingTape
from lib.runs import collect as runs
from lib.runs.store import TIMING, _content
from lib.spec import BackboneSpec, DataSpec, MoESpec, RunSpec, TrainSpec
from lib.training import checkpoint, loop
from lib.training.order import mix

# 4 steps an epoch, 12 in all
BASE = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    threads=1,
    train=TrainSpec(epochs=3, batch=16, lr=3e-3, layer_decay=0.8, label_smoothing=0.1),
)
NOISY = {"data": {"augment": "shift"}, "backbone": {"drop_path": 0.2}}
TOKEN = MoESpec(
    layers=2,
    experts=4,
    top_k=2,
    router="token",
    capacity_factor=1.0,
    noise=1.0,
    shared=True,
    z_weight=1e-3,
)
IMAGE = MoESpec(
    layers=1, experts=4, router="image", balance="loss_free", noise=1.0, gate="renormalised"
)


def outcome(spec: RunSpec, folder, file=None) -> dict:
    """What must be equal bit for bit: the record without its times, and its arrays."""
    made, arrays = runs.execute(spec, str(folder / "states"), str(file) if file else None)
    assert made["status"] == "ok", made.get("error")
    return {name: value for name, value in made.items() if name not in TIMING} | {
        "content": _content(arrays)
    }


def parts_of(spec: RunSpec):
    """A fresh model and the data of a spec."""
    torch.set_num_threads(spec.threads)
    splits = load_splits(spec.data)
    return build(spec, 10, 1), splits


def test_attention_written_out_on_cpu_in_bfloat16_alone():
    fused, written = (build(BASE.but(dtype=dtype), 10, 1) for dtype in ("float32", "bfloat16"))
    assert all(block.attn.fused_attn for block in fused.blocks) and not any(
        block.attn.fused_attn for block in written.blocks
    )
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    # Both in float32 here: the two forms are one function.
    logits = [model(images) for model in (fused, written)]
    torch.testing.assert_close(*logits)
    for out in logits:
        out.square().sum().backward()
    for one, other in zip(fused.parameters(), written.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# ---- the same spec, the same record


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moe", [None, TOKEN, IMAGE], ids=["dense", "token", "image"])
def test_same_spec_twice(tmp_path, moe, dtype):
    spec = BASE.but(**NOISY, moe=moe, dtype=dtype, train={"epochs": 1.5})
    first = outcome(spec, tmp_path)
    torch.rand(7)  # the state of the global generator must not matter
    assert outcome(spec, tmp_path) == first
    assert [row["epoch"] for row in first["history"]] == [0.0, 1.0, 1.5]
    # Each part of the noise is there, or the comparison above would prove nothing about it.
    if moe is None:
        for change in (
            {"seed": 1},
            {"data": {"augment": "none"}},
            {"backbone": {"drop_path": 0.0}},
        ):
            assert (
                outcome(spec.but(**change), tmp_path)["weights"]["final"]
                != first["weights"]["final"]
            )
    elif moe is TOKEN:
        quiet = outcome(spec.but(moe={"noise": 0.0}), tmp_path)
        assert quiet["weights"]["start"] == first["weights"]["start"]
        assert quiet["weights"]["final"] != first["weights"]["final"]


def test_global_generators_are_left_alone():
    model, splits = parts_of(BASE.but(**NOISY, moe=TOKEN))
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    loop.fit(model, splits.train, splits.val, BASE.but(**NOISY, moe=TOKEN, train={"epochs": 0.5}))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.random.get_state()[1].tolist() == states[1] and random.getstate() == states[2]


def test_seeds_do_not_collide():
    seeds = {mix(seed, use, step) for seed in range(20) for use in (1, 2, 3) for step in range(500)}
    assert len(seeds) == 20 * 3 * 500 and all(0 <= seed < 2**63 for seed in seeds)


# ---- resume


class Stopped(KeyboardInterrupt):
    """Not an Exception: like Ctrl-C it goes through `execute`."""


@pytest.mark.parametrize("stop", [6, 8], ids=["mid-epoch", "epoch boundary"])
@pytest.mark.parametrize(
    "case",
    [{}, {"train": {"ema": 0.9}}, {"moe": IMAGE, "train": {"ema": 0.9}}, {"moe": TOKEN}],
    ids=["dense", "dense ema", "image ema", "token"],
)
def test_resumed_run_equals_unbroken_one(tmp_path, monkeypatch, case, stop):
    spec = BASE.but(**NOISY, **case)
    whole = outcome(spec, tmp_path)
    steps, limit, real = [0], [stop], loop.losses

    def counted(*args):
        if steps[0] == limit[0]:
            raise Stopped
        steps[0] += 1
        return real(*args)

    monkeypatch.setattr(loop, "losses", counted)
    # A clock that ticks once a step and stands still while a checkpoint is written: one is written
    # after every step.
    monkeypatch.setattr(checkpoint, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: steps[0]))
    file = tmp_path / "run.pt"
    with pytest.raises(Stopped):
        runs.execute(spec, str(tmp_path / "states"), str(file))
    assert file.is_file()
    steps[0], limit[0] = 0, None
    assert outcome(spec, tmp_path, file) == whole
    assert steps[0] == 12 - stop  # it went on, rather than from the start


def test_damaged_checkpoint_starts_anew(tmp_path):
    spec = BASE.but(train={"epochs": 0.5})
    file = tmp_path / "run.pt"
    file.write_bytes(b"PK\x03\x04 torn")
    with pytest.warns(UserWarning, match="run.pt cannot be read .*training starts anew"):
        broken = outcome(spec, tmp_path, file)
    assert broken == outcome(spec, tmp_path)


# ---- the parts of the loop


def test_layer_decay_and_weight_decay_groups():
    spec = BASE.but(moe=TOKEN, train={"layer_decay": 0.5, "weight_decay": 0.1})
    model, _ = parts_of(spec)
    found = {
        id(p): (group["lr_scale"], group["weight_decay"])
        for group in loop.optimiser(model, spec.train).param_groups
        for p in group["params"]
    }
    named = {name: found[id(p)] for name, p in model.named_parameters()}
    assert len(named) == len(found)
    # Embedding, first block, last block with the final norm (timm's grouping), head: 0.5 a step
    # away from the head.
    expected = {
        "cls_token": (0.125, 0.0),
        "pos_embed": (0.125, 0.0),
        "patch_embed.proj.weight": (0.125, 0.1),
        "patch_embed.proj.bias": (0.125, 0.0),
        "blocks.0.attn.qkv.weight": (0.25, 0.1),
        "blocks.0.norm1.weight": (0.25, 0.0),
        "blocks.1.mlp.experts.fc1.weight": (0.5, 0.1),
        "blocks.1.mlp.experts.fc1.bias": (0.5, 0.0),  # stacked: two axes
        "blocks.1.mlp.experts.fc2.bias": (0.5, 0.0),
        "blocks.1.mlp.router.weight": (0.5, 0.1),
        "blocks.1.mlp.shared.fc1.weight": (0.5, 0.1),
        "blocks.1.mlp.shared.fc1.bias": (0.5, 0.0),
        "norm.weight": (0.5, 0.0),
        "head.weight": (1.0, 0.1),
        "head.bias": (1.0, 0.0),
    }
    assert {name: named[name] for name in expected} == expected
    assert all(named[name][1] == 0 for name in named if name.endswith(".bias"))


@pytest.mark.parametrize(
    "warmup, expected",
    [
        # 8 steps of peak 0.4, counted from 1: linear over 2 steps to the peak, then half a cosine
        # that would reach 0 at step 9.
        (0.25, [0.2, 0.4, *(0.2 * (1 + math.cos(math.pi * t / 7)) for t in range(1, 7))]),
        (0.0, [0.2 * (1 + math.cos(math.pi * t / 9)) for t in range(1, 9)]),
    ],
)
def test_warm_up_and_cosine(monkeypatch, warmup, expected):
    spec = BASE.but(train={"epochs": 2.0, "lr": 0.4, "warmup": warmup, "layer_decay": 0.5})
    model, splits = parts_of(spec)
    made, seen, real = [], [], loop.losses
    monkeypatch.setattr(
        loop, "optimiser", lambda *args, real=loop.optimiser: made.append(real(*args)) or made[-1]
    )

    def watched(*args):
        seen.append({group["lr_scale"]: group["lr"] for group in made[0].param_groups})
        for group in made[0].param_groups:
            group["lr"] = 0.0  # the rates are what is looked at: weights stay, so nothing diverges
        return real(*args)

    monkeypatch.setattr(loop, "losses", watched)
    loop.fit(model, splits.train, splits.val, spec)
    assert [rates[1.0] for rates in seen] == pytest.approx(expected)
    assert [rates[0.125] for rates in seen] == pytest.approx([rate / 8 for rate in expected])


def test_loss_parts_by_hand():
    spec = BASE.but(
        moe=TOKEN.but(noise=0.0, capacity_factor=None, balance_weight=0.5, z_weight=0.25),
        train={"label_smoothing": 0.2},
    )
    model, splits = parts_of(spec)
    images, labels = splits.train.batch(torch.arange(6), spec.data), splits.train.labels[:6]
    model.eval()
    tape = RoutingTape(model)
    parts = loop.losses(model, images, labels, spec, tape)
    with torch.no_grad():
        log = model(images).log_softmax(-1)
    # Smoothing 0.2 over 10 classes: 0.82 on the true class, 0.02 on each other one.
    target = torch.full((6, 10), 0.02).scatter(1, labels[:, None], 0.82)
    assert torch.allclose(parts["task_loss"], -(target * log).sum(-1).mean(), atol=1e-5)
    balance, z = [], []
    for routing in tape.routings():
        share = torch.stack([(routing.choice == e).float().mean() for e in range(4)])
        balance.append(4 * (share * routing.probs.mean(0)).sum())
        z.append(routing.logits.exp().sum(-1).log().pow(2).mean())
    assert len(z) == 2
    # The history shows the mean over layers.
    assert torch.allclose(parts["balance_loss"], sum(balance) / 2)
    assert torch.allclose(
        parts["loss"], parts["task_loss"] + 0.5 * sum(balance) + 0.25 * sum(z), atol=1e-5
    )
    by_layer = loop.losses(
        model, images, labels, spec.but(moe={"balance_weights": (2.0, 0.125)}), tape
    )["loss"]
    assert torch.allclose(
        by_layer,
        parts["task_loss"] + 2.0 * balance[0] + 0.125 * balance[1] + 0.25 * sum(z),
        atol=1e-5,
    )


def test_loss_free_balancing_moves_the_bias_by_rate_times_sign(monkeypatch):
    moe = IMAGE.but(bias_rate=0.125)  # a power of two: sums are exact
    spec = BASE.but(moe=moe, train={"epochs": 1.0})
    model, splits = parts_of(spec)
    expected, seen, real = torch.zeros(4), [], loop.update_choice_bias

    def watched(router, routing, rate):
        counts = [int((routing.choice == e).sum()) for e in range(4)]
        for e in range(4):
            # 16 images over 4 experts: 4 is the mean.
            expected[e] += 0.125 * ((counts[e] < 4) - (counts[e] > 4))
        seen.append(counts)
        real(router, routing, rate)

    monkeypatch.setattr(loop, "update_choice_bias", watched)
    loop.fit(model, splits.train, splits.val, spec)
    assert [sum(counts) for counts in seen] == [16] * 4  # one update a step
    assert (
        torch.equal(model.blocks[1].mlp.router.choice_bias, expected) and expected.abs().sum() > 0
    )


def test_average_of_weights_by_hand_is_what_is_evaluated(monkeypatch):
    spec = BASE.but(train={"ema": 0.7, "epochs": 2.0})
    model, splits = parts_of(spec)
    by_hand: dict = {}
    real = loop.add_to_curve

    def watched(curve, step, *rest, **more):  # called after each update
        # timm's warm-up of the decay: 0 in the first two steps, then 1 - step^(-2/3), at most the
        # decay asked for.
        decay = 0.0 if step <= 1 else min(1 - step ** (-2 / 3), 0.7)
        for name, value in model.state_dict().items():
            by_hand[name] = decay * by_hand.get(name, value) + (1 - decay) * value
        real(curve, step, *rest, **more)

    monkeypatch.setattr(loop, "add_to_curve", watched)
    average, progress = loop.fit(model, splits.train, splits.val, spec)
    assert average is not model
    held = average.state_dict()
    assert all(torch.allclose(held[name], value, atol=1e-6) for name, value in by_hand.items())
    assert not torch.allclose(held["head.weight"], model.state_dict()["head.weight"], atol=1e-4)
    assert progress.history[-1]["val_loss"] == loop.evaluate(average, splits.val, spec).loss
    assert progress.history[-1]["val_loss"] != loop.evaluate(model, splits.val, spec).loss


def test_evaluation_by_hand():
    model, splits = parts_of(BASE)
    result = loop.evaluate(model, splits.test, BASE, batch=7)
    with torch.no_grad():
        logits = model.eval()(splits.test.batch(torch.arange(30), BASE.data))
    right = sum(int(logits[i].argmax() == splits.test.labels[i]) for i in range(30))
    assert result.n == 30 and result.top1 == pytest.approx(100 * right / 30)
    assert torch.equal(result.predictions, logits.argmax(-1).to(torch.int16))
    by_hand = -logits.log_softmax(-1)[torch.arange(30), splits.test.labels].mean()
    assert result.loss == pytest.approx(float(by_hand), rel=1e-5)


def test_history_and_curve_by_hand(monkeypatch):
    # 5 steps at 2.5 epochs of 2 steps; the losses are made up, so the means are known.
    spec = BASE.but(data={"train": 32}, train={"epochs": 2.5})
    model, splits = parts_of(spec)
    losses, real = iter([1.0, 3.0, 5.0, 6.0, 9.0]), loop.losses

    def made_up(*args):
        parts = real(*args)
        return parts | {"loss": parts["loss"] * 0 + next(losses)}

    monkeypatch.setattr(loop, "losses", made_up)
    _, progress = loop.fit(model, splits.train, splits.val, spec)
    assert [row["epoch"] for row in progress.history] == [0.0, 1.0, 2.0, 2.5]
    assert [row.get("train_loss") for row in progress.history] == [None, 2.0, 5.5, 9.0]
    assert progress.curve == {"step": [1, 2, 3, 4, 5], "loss": [1.0, 3.0, 5.0, 6.0, 9.0]}
    curve = {"step": [], "loss": []}
    for step, loss in enumerate([2.0, 4.0, 9.0, 1.0]):
        loop.add_to_curve(curve, step, loss, every=3)
    assert curve == {"step": [3, 4], "loss": [5.0, 1.0]}


def test_training_learns():
    # Dearer than the rest and the only one that would notice a sign error in the loop: 10 digits
    # far above one in ten.
    spec = BASE.but(
        data={"train": 500, "val": 100},
        backbone={"width": 32},
        train={"epochs": 8.0, "label_smoothing": 0.0},
    )
    model, splits = parts_of(spec)
    _, progress = loop.fit(model, splits.train, splits.val, spec)
    assert progress.history[-1]["val_top1"] > 45 > 25 > progress.history[0]["val_top1"]


# ---- a loss that is not finite


def test_diverging_run_is_a_failed_record_with_step_and_last_values(tmp_path):
    made, arrays = runs.execute(BASE.but(train={"lr": 1e30, "warmup": 0.0}), str(tmp_path))
    assert made["status"] == "failed" and arrays == {}
    error = made["error"]
    assert error["kind"] == "Diverged" and error["step"] == 1 and len(error["last"]) == 1
    assert 1 < error["last"][0] < 6  # the loss of the untrained model, ten classes
    assert "loss is not finite at step 1" in error["message"] and "lower lr" in error["message"]
    assert "loop.py" in error["traceback"]


def test_divergence_in_the_last_step_is_found_too(tmp_path):
    # No further training loss would show it; the validation loss after the step does.
    made, _ = runs.execute(
        BASE.but(train={"lr": 1e30, "warmup": 0.0, "epochs": 0.25}), str(tmp_path)
    )
    assert (
        made["status"] == "failed"
        and made["error"]["kind"] == "Diverged"
        and made["error"]["step"] == 1
    )


def test_any_other_error_is_kept_whole(tmp_path, monkeypatch):
    def broken(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(loop, "losses", broken)
    made, _ = runs.execute(BASE, str(tmp_path))
    assert made["status"] == "failed" and "step" not in made["error"]
    assert (made["error"]["kind"], made["error"]["message"]) == (
        "RuntimeError",
        "mat1 and mat2 shapes cannot be multiplied",
    )
    assert "in broken" in made["error"]["traceback"]


# ---- TensorBoard


def test_tensorboard_files_hold_the_history(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    spec = BASE.but(train={"epochs": 1.5})
    history = outcome(spec, tmp_path)["history"]
    events = EventAccumulator(str(tmp_path / "tensorboard" / spec.id))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(history[-1]) - {"epoch"}
    for name in ("train_loss", "val_top1", "lr"):
        points = events.Scalars(name)
        assert [point.step for point in points] == [1000, 1500]  # thousandths of an epoch
        assert [point.value for point in points] == pytest.approx(
            [row[name] for row in history[1:]], rel=1e-6
        )


def test_without_tensorboard_nothing_is_missing(tmp_path, monkeypatch):
    spec = BASE.but(train={"epochs": 0.5})
    with_it = outcome(spec, tmp_path / "with")
    # Importing it raises ImportError.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert outcome(spec, tmp_path / "without") == with_it
    assert not (tmp_path / "without" / "tensorboard").exists()
