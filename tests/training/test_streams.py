"""The residual stream as a target: what is compared, by hand, and what learns from it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from lib.models.backbone import build, create
from lib.models.moe import RoutingTape
from lib.runs.checks import check
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec
from lib.training.losses import losses
from lib.training.streams import stream_loss, stream_of

BACKBONE = BackboneSpec(patch=7, width=16, depth=3, heads=2)
PARENT = RunSpec(data=DataSpec(train=64, val=20, test=30), backbone=BACKBONE, train=TrainSpec())
IMAGES = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


def child(**train):
    return PARENT.but(init=PARENT, train=train)


def pair():
    """A teacher, and a student with one weight of its second block changed."""
    teacher = build(PARENT, 10, 1).eval()
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.blocks[1].mlp.fc2.weight *= 30.0
    return student, teacher


def parts(spec, student, teacher):
    return losses(student, IMAGES, LABELS, spec, RoutingTape(student), teacher)


def test_a_stream_is_all_tokens_after_each_block_but_the_last_and_what_the_head_reads():
    model = build(PARENT, 10, 1).eval()
    with stream_of(model) as stream:
        logits = model(IMAGES)
    after, features = stream[:-1], stream[-1]
    expected = model.patch_embed(IMAGES)
    expected = model.norm_pre(model._pos_embed(expected))
    for block, tokens in zip(model.blocks, after, strict=False):
        expected = block(expected)
        torch.testing.assert_close(tokens, expected)
    assert len(after) == 2
    torch.testing.assert_close(model.head(features), logits)
    model(IMAGES)
    assert len(stream) == 3  # the pass after it is not heard


def test_both_heads_of_a_distilled_deit_are_heard():
    backbone = BackboneSpec(name="deit_tiny_distilled_patch16_224", patch=7, depth=2)
    model = create(backbone, 28, 10, 1)
    with stream_of(model.eval()) as stream:
        model(IMAGES)
    assert [tuple(place.shape) for place in stream[1:]] == [(4, 192), (4, 192)]


def test_stream_loss_by_hand():
    """(1, -1) and (3, 1) are (1, -1) once they are normed; (0, 4) is (-1, 1)."""
    target = [torch.tensor([[[1.0, -1.0], [3.0, 1.0]]]), torch.tensor([[1.0, -1.0]])]
    same = [torch.tensor([[[2.0, 0.0], [9.0, 1.0]]]), torch.tensor([[5.0, 3.0]])]
    assert stream_loss(same, target).item() == pytest.approx(0.0, abs=1e-4)
    other = [torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]), same[1]]
    # one of two tokens is wrong by 2 in each of its two numbers: 4, of which half; of two places
    assert stream_loss(other, target).item() == pytest.approx(1.0, abs=1e-4)
    for wrong in (other[:1], [other[0][:, :1], other[1]]):
        with pytest.raises(ValueError, match="wants equal depth, width and tokens"):
            stream_loss(wrong, target)


def test_an_equal_student_has_no_loss_and_a_changed_one_gets_nearer():
    student, teacher = pair()
    spec = child(distil_stream=1.0)
    assert parts(spec, copy.deepcopy(teacher), teacher)["loss"].item() == 0
    optim = torch.optim.AdamW(student.parameters(), lr=1e-2)
    values = []
    for _ in range(20):
        optim.zero_grad()
        loss = parts(spec, student, teacher)["loss"]
        loss.backward()
        optim.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
    assert all(weight.grad is None for weight in teacher.parameters())


def test_the_loss_is_what_the_weights_say_of_labels_logits_and_stream():
    student, teacher = pair()
    made = parts(child(distil_logits=0.5, distil_stream=0.25), student, teacher)
    with stream_of(student) as stream, stream_of(teacher) as target:
        logits, taught = student(IMAGES), teacher(IMAGES)
    label = F.cross_entropy(logits, LABELS)
    log_taught = taught.log_softmax(-1)
    divergence = (log_taught.exp() * (log_taught - logits.log_softmax(-1))).sum(-1).mean()
    # places differ only behind the changed block
    errors = [
        (F.layer_norm(s, (16,)) - F.layer_norm(t, (16,))).square().mean()
        for s, t in zip(stream, target, strict=True)
    ]
    assert errors[0] == 0 and min(errors[1:]) > 1e-3
    expected = 0.75 * (label + divergence) / 2 + 0.25 * sum(errors) / 3
    torch.testing.assert_close(made["loss"], expected)
    torch.testing.assert_close(made["stream_loss"], sum(errors) / 3)
    assert "stream_loss" not in parts(child(distil_logits=0.5), student, teacher)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "convnext_atto"])
def test_models_without_such_a_stream_are_refused_before_any_work(name):
    parent = RunSpec(
        data=DataSpec(image_size=224), backbone=BackboneSpec(name=name), train=TrainSpec()
    )
    check(parent)
    with pytest.raises(ValueError, match="timm VisionTransformer, and .* is none: leave it at 0"):
        check(parent.but(init=parent, train={"distil_stream": 0.5}))
