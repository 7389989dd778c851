"""Finetuning on a loader: against a plain loop, with a teacher, with experts, refused by name."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from small_classifier import Wrapped, images_and_labels, loader, same_state, state_of, vit
from torch.utils.data import DataLoader, TensorDataset

import lib
from lib.models.balance import switch_loss
from lib.training.loop import Diverged
from lib.training.streams import stream_loss, stream_of

IMAGES, LABELS = images_and_labels()
STILL = 1e-12  # a rate at which no weight moves


def mixture(experts=4, **fields):
    spec = {"layers": 2, "experts": experts, "router": "token", "gate": "renormalised"}
    generator = torch.Generator().manual_seed(3)
    return lib.upcycle(vit(), lib.MoESpec(**spec | fields), generator=generator)


def test_it_equals_a_plain_loop():
    model = Wrapped(vit()).eval()
    trained = lib.finetune(model, loader(), epochs=1, lr=1e-2, weight_decay=0.1)
    plain = copy.deepcopy(model).train()
    decayed = [p for n, p in plain.named_parameters() if p.ndim > 1 and not n.endswith(".bias")]
    rest = [p for p in plain.parameters() if all(p is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optim = torch.optim.AdamW(groups, lr=1e-2)
    steps = 5  # a tenth of them is no whole step of warm-up
    for step, (images, labels) in enumerate(loader(), start=1):
        for group in optim.param_groups:
            group["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))
        optim.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optim.step()
    want = state_of(plain)
    for name, mine in state_of(trained).items():
        # the bias of keys has no gradient but rounding, which AdamW makes as large as any other
        if not name.endswith("qkv.bias"):
            torch.testing.assert_close(mine, want[name], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(trained.top.weight, model.top.weight, atol=1e-3)


def test_rates_fall_from_block_to_block_where_timm_tells_them():
    model = vit()
    stream = {"teacher": vit(num_heads=3), "distil_stream": 1.0}
    falls = [
        ({}, 0.65),
        ({"layer_decay": 1.0}, 1),
        (stream, 1),
        ({**stream, "layer_decay": 0.5}, 0.5),
    ]
    for options, fall in falls:
        trained = lib.finetune(model, loader(), epochs=0.2, lr=1e-3, **options)
        with torch.no_grad():
            first, last = (
                (trained.blocks[i].mlp.fc1.weight - model.blocks[i].mlp.fc1.weight).abs().mean()
                for i in (0, 1)
            )
        assert float(first / last) == pytest.approx(fall, rel=0.05), options
    with pytest.raises(ValueError, match="Wrapped has no group_matcher"):
        lib.finetune(Wrapped(vit()), loader(), layer_decay=0.65)


def test_history_tells_top1_and_losses_of_each_epoch():
    model, val = vit(), loader(batch=16)
    trained = lib.finetune(model, loader(), val, epochs=2, lr=STILL)
    with torch.no_grad():
        logits = model(IMAGES)
    top1 = 100 * (logits.argmax(dim=1) == LABELS).double().mean().item()
    loss = F.cross_entropy(logits, LABELS).item()
    rows = trained.finetuning
    assert [row["epoch"] for row in rows] == [0.0, 1.0, 2.0]
    for row in rows:
        assert row["val_top1"] == pytest.approx(top1) and row["val_loss"] == pytest.approx(loss)
    assert [row["train_loss"] for row in rows[1:]] == pytest.approx([loss] * 2)
    assert len(lib.finetune(trained, loader(), epochs=1).finetuning) == 4


def test_a_teacher_is_learnt_from_with_its_weight():
    model, teacher = vit(), vit(num_heads=3).train()
    trained = lib.finetune(model, loader(), epochs=1, lr=STILL, teacher=teacher, distil=0.25)
    assert teacher.training and not trained.training
    with torch.no_grad():
        logits, taught = model(IMAGES), teacher.eval()(IMAGES)
    task = F.cross_entropy(logits, LABELS)
    wanted = taught.softmax(-1) * (taught.log_softmax(-1) - logits.log_softmax(-1))
    [row] = trained.finetuning
    assert row["train_task_loss"] == pytest.approx(float(task), rel=1e-5)
    distilled = float(wanted.sum(-1).mean())
    assert row["train_distil_loss"] == pytest.approx(distilled, rel=1e-4)
    assert row["train_loss"] == pytest.approx(0.75 * float(task) + 0.25 * distilled, rel=1e-4)


def test_the_stream_of_a_teacher_is_learnt_with_its_weight():
    model, teacher = vit(), vit(num_heads=3)
    options = {"epochs": 1, "lr": STILL, "teacher": teacher, "distil": 0.25}
    [row] = lib.finetune(model, loader(), **options, distil_stream=0.75).finetuning
    with torch.no_grad(), stream_of(model) as stream, stream_of(teacher) as target:
        model(IMAGES)
        teacher(IMAGES)
    assert row["train_stream_loss"] == pytest.approx(float(stream_loss(stream, target)), rel=1e-4)
    rest = 0.75 * row["train_task_loss"] + 0.25 * row["train_distil_loss"]
    wanted = 0.25 * rest + 0.75 * row["train_stream_loss"]
    assert row["train_loss"] == pytest.approx(wanted, rel=1e-4)


def test_experts_learn_the_stream_of_the_model_that_they_were_cut_from():
    dense = vit()
    extracted = lib.extract(dense, loader(), count=3)
    options = {"epochs": 8, "lr": 3e-3, "teacher": dense}
    rows = lib.finetune(extracted, loader(), **options, distil_stream=1.0).finetuning
    assert rows[-1]["train_stream_loss"] < 0.8 * rows[0]["train_stream_loss"]


def test_experts_are_balanced_with_the_coefficient():
    model = mixture()
    trained = lib.finetune(model, [(IMAGES, LABELS)], epochs=1, lr=STILL, coefficient=0.5)
    with torch.no_grad(), lib.RoutingTape(model) as tape:
        logits = model(IMAGES)
    want = 0.5 * sum(float(switch_loss(routing)) for routing in tape.routings())
    [row] = trained.finetuning
    assert row["train_balance_loss"] == pytest.approx(want, rel=1e-5)
    task = float(F.cross_entropy(logits, LABELS))
    assert row["train_loss"] == pytest.approx(task + want, rel=1e-5)
    with torch.no_grad():
        assert float(lib.auxiliary_loss(tape, 0.5)) == pytest.approx(want)


def test_auxiliary_loss_moves_routers_that_learn_and_needs_one():
    model = mixture()
    with lib.RoutingTape(model) as tape:
        model(IMAGES)
    lib.auxiliary_loss(tape).backward()
    assert all(block.mlp.router.weight.grad.abs().sum() > 0 for block in model.blocks)
    extracted = lib.extract(vit(), loader(), count=3)
    for other in (extracted, vit()):
        with lib.RoutingTape(other) as tape:
            other(IMAGES)
        with pytest.raises(ValueError, match="no MoE layer whose router learns"):
            lib.auxiliary_loss(tape)
    # it is finetuned all the same, without a balance loss
    [row] = lib.finetune(extracted, loader(), epochs=1).finetuning
    assert "train_balance_loss" not in row


def test_a_seed_decides_all_and_the_global_generator_is_left_alone():
    shuffling = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8, shuffle=True)
    model = mixture(noise=1.0)
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = lib.finetune(model, shuffling, shuffling, epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert same_state(lib.finetune(model, shuffling, shuffling, epochs=1), state_of(first))
    assert not same_state(lib.finetune(model, shuffling, epochs=1, seed=1), state_of(first))


class Stream:
    """A loader without a length, which draws in each pass."""

    def __iter__(self):
        torch.rand(3)
        yield from loader()


def test_neither_generator_nor_gradients_are_left_changed():
    model = vit()
    torch.manual_seed(11)
    state = torch.get_rng_state()
    trained = lib.finetune(model, Stream(), epochs=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in trained.parameters())
    extracted = lib.extract(vit(), loader(), clusters="moefication", count=2)
    assert all(parameter.grad is None for parameter in extracted.parameters())


def test_a_loader_without_a_length_and_parts_of_an_epoch():
    whole = lib.finetune(vit(), loader(), epochs=1.4)
    assert same_state(lib.finetune(vit(), Stream(), epochs=1.4), state_of(whole))
    assert [row["epoch"] for row in whole.finetuning] == [1.0, 1.4]


def test_in_place_frozen_parts_modes_and_types():
    model = vit().double()
    model.blocks[0].requires_grad_(False)
    model.blocks[1].train()
    state, modes = state_of(model), [module.training for module in model.modules()]
    trained = lib.finetune(model, loader(torch.float64), epochs=1, lr=1e-2)
    assert same_state(model, state) and [m.training for m in trained.modules()] == modes
    assert all(parameter.dtype == torch.float64 for parameter in trained.parameters())
    now = trained.state_dict()
    moved = {name for name in now if not torch.equal(now[name], state[name])}
    assert moved and not any(name.startswith("blocks.0.") for name in moved)
    assert lib.finetune(model, loader(torch.float64), epochs=1, inplace=True) is model
    assert not same_state(model, state)


def with_noted(value):
    model = vit()
    model.finetuning = value
    return model


def not_finite(value):
    batches = loader()
    batches[1][0][0, 0, 0, 0] = value
    return batches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_types_are_refused_where_weights_are_trained(dtype):
    model = vit().to(dtype)
    with pytest.raises(ValueError, match=r"of torch.b?float16, which rounds.*model.float\(\)"):
        lib.finetune(model, loader(dtype))
    model = vit().requires_grad_(False)
    model.head.float().requires_grad_(True)
    model.blocks[0].mlp.to(dtype)  # frozen: nothing of it is lost
    assert "finetuning" in vars(lib.finetune(Mixed(model), loader(), epochs=0.2))


class Mixed(torch.nn.Module):
    """A head that is trained on features of a trunk whose types are its own matter."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk = trunk

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.trunk(x).float()


def test_a_teacher_that_is_the_copied_model_stays_and_gradients_are_recorded():
    model = vit()
    with torch.no_grad():
        trained = lib.finetune(model, loader(), epochs=1, lr=1e-2, teacher=model)
    assert trained.finetuning[0]["train_distil_loss"] > 0
    with pytest.raises(ValueError, match="teacher shares trained parameters with model"):
        lib.finetune(model, loader(), teacher=model, inplace=True)
    with pytest.raises(ValueError, match="teacher shares trained parameters with model"):
        lib.finetune(model, loader(), teacher=Mixed(model), inplace=True)


def shrinking():
    """A loader that says five batches and gives two."""

    class Short(list):
        def __len__(self):
            return 5

    return Short(loader()[:2])


@pytest.mark.parametrize(
    "model, options, says",
    [
        (vit(), {"epochs": 0}, "epochs=0.0"),
        (vit(), {"lr": -1.0}, "lr=-1.0"),
        (vit(), {"loader": []}, "gave no batch"),
        (vit(), {"loader": shrinking()}, "loader ended after 2 batches of 5"),
        (vit(), {"teacher": vit().to("meta")}, "teacher lies on meta and model on cpu"),
        (vit(), {"teacher": vit(num_classes=9)}, "teacher predicts 9 classes and model 5"),
        (vit(), {"val": iter(loader())}, "val is a list_iterator, which can be read once"),
        (vit(), {"val": [IMAGES]}, "val gave a Tensor"),
        (torch.compile(vit(), backend="eager"), {}, "OptimizedModule wraps .* model._orig_mod"),
        (vit().requires_grad_(False), {}, "every parameter of the model is frozen"),
        (vit(), {"distil": 0.9}, "distil=0.9 weighs what a teacher gives"),
        (vit(), {"distil_stream": 0.9}, "distil_stream=0.9 weighs what a teacher gives"),
        (Wrapped(vit()), {"teacher": vit(), "distil_stream": 0.9}, "and Wrapped is none"),
        (vit(), {"teacher": Wrapped(vit()), "distil_stream": 0.9}, "and Wrapped is none"),
        (vit(), {"teacher": vit(depth=3), "distil_stream": 0.9}, "wants equal depth, width and"),
        (vit(), {"teacher": vit(), "distil_stream": 2.0}, "distil_stream=2.0"),
        (vit(), {"seed": -1}, "seed=-1: give a whole number"),
        (vit(), {"seed": 0.5}, "seed=0.5: give a whole number"),
        (vit(), {"val": not_finite(math.nan)}, "val gave images with numbers that are not finite"),
        (vit(), {"loader": not_finite(math.inf)}, "loader gave images with numbers that are not"),
        (with_noted(torch.nn.ReLU()), {}, "model.finetuning is a ReLU of the model's own"),
        (with_noted(0.5), {}, "model.finetuning is a float of the model's own"),
        (vit(num_classes=3), {}, "labels from 0 to 4, .* has 3 classes"),
    ],
)
def test_what_is_refused(model, options, says):
    options = {"loader": loader()} | options
    with pytest.raises(ValueError, match=says):
        lib.finetune(model, **options)


def test_a_pass_that_fails_leaves_no_gradients():
    broken = [*loader()[:2], (torch.full_like(loader()[0][0], math.nan), loader()[0][1])]
    model = vit()
    with pytest.raises(ValueError, match="not finite"):
        lib.finetune(model, broken, inplace=True)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_validation_loader_does_not_change_what_is_trained():
    data = TensorDataset(IMAGES, LABELS)
    shuffled = DataLoader(data, batch_size=8, shuffle=True)
    given = (None, [*DataLoader(data, batch_size=8)], DataLoader(data, batch_size=8))
    trained = [lib.finetune(vit(), shuffled, val=val, epochs=2, lr=1e-2) for val in given]
    assert all(same_state(model, state_of(trained[0])) for model in trained[1:])


class Caching(Wrapped):
    """Makes a table at its first pass, as positions that rotate and masks are made."""

    table = None

    def forward(self, images):
        if self.table is None:
            self.table = torch.ones(1) * 2
        return super().forward(images) * self.table


def test_what_a_model_caches_when_it_is_judged_can_be_trained_with():
    model = Caching(vit())
    lib.finetune(model, loader(), val=loader())
    lib.compare({"whole": model}, loader(), batches=(2,))
    model(IMAGES).sum().backward()


def test_experts_of_moefication_are_finetuned():
    """Their routers have weights, and decide without a gradient: there is no load to balance."""
    model = lib.extract(vit(), loader(), 0.5, clusters="moefication")
    trained = lib.finetune(model, loader(), lr=1e-2)
    assert "balance_loss" not in trained.finetuning[-1]
    assert not same_state(trained, state_of(model))


def test_a_loss_that_is_not_finite_ends_it():
    broken = vit()
    with torch.no_grad():
        broken.head.bias.fill_(math.inf)
    with pytest.raises(Diverged, match="loss is not finite at step 0"):
        lib.finetune(broken, loader())
