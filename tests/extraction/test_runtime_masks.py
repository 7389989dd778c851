"""Hidden neurons chosen at run time, by image, by batch or once: scores, masks, runs, costs.

Axis letters: **B** images, **N** tokens of an image, **H** hidden width.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from vits import VIT, D, H, N, batch, build

from lib.extraction.runtime_masks import (
    ChannelMask,
    channel_scores,
    check_maskable,
    mask_channels,
    narrow_to_channels,
)
from lib.extraction.step import ChannelStep
from lib.inputs.splits import load_splits
from lib.measure.cost import count
from lib.models.step import StepInputs
from lib.runs import collect as runs
from lib.spec import BackboneSpec, ChannelSpec, DataSpec, MoESpec, RunSpec, TrainSpec
from lib.training.evaluate import batches_that_choose

BASE = RunSpec(
    data=DataSpec(train=200, val=20, test=60),
    threads=1,
    train=TrainSpec(epochs=12.0, batch=20, lr=1e-2),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2, hidden=24),
)
DENSE = BASE.but(keep=True)


def under(**rules):
    return BASE.but(init=DENSE, train=None, channels=ChannelSpec(**{"active": 0.5} | rules))


def logits(model, images):
    with torch.no_grad():
        return model(images)


def masked(model, pool, active=0.5):
    copied = copy.deepcopy(model)
    return copied, mask_channels(copied, active, pool)


# two images, a class token and two patches, three neurons
HIDDEN = torch.tensor([[[1.0, 0, -2], [4, 0, 0], [0, 8, 0]], [[0.0, 1, 0], [0, 0, 10], [0, 0, 0]]])
ATTENTION = torch.tensor([[0.9, 0.5, 0.25], [0.1, 0.3, 0.75]])


def test_scores_by_hand():
    """Class token twice, patches by attention; a batch averages both before they are multiplied."""
    by_image = channel_scores(HIDDEN, ATTENTION, "image")
    torch.testing.assert_close(by_image, torch.tensor([[4.0, 2.0, 4.0], [0.0, 2.0, 3.0]]))
    # means of the magnitudes: class .5 .5 1, patches 2 0 5 and 0 4 0; of the attention: .4 and .5
    of_batch = channel_scores(HIDDEN, ATTENTION, "batch")
    torch.testing.assert_close(of_batch, torch.tensor([[1.8, 3.0, 4.0]]))


def test_a_mask_keeps_the_highest_scores():
    for pool, kept in (("image", [[0, 2], [1, 2]]), ("batch", [[1, 2], [1, 2]])):
        mask = ChannelMask(3, 2 / 3, pool)
        mask.watch(mask, (ATTENTION[:, None, None, :].expand(2, 4, 3, 3),))
        out = mask(HIDDEN)
        for image, neurons in enumerate(kept):
            want = torch.zeros(3)
            want[neurons] = 1
            assert torch.equal(out[image], HIDDEN[image] * want)


@pytest.mark.parametrize("pool", ["image", "batch"])
def test_a_model_behaves_as_one_that_is_written_out(pool):
    """Block by block with the map of softmax(q k) at hand."""
    model, (images, _) = build(), batch(4)
    changed, _ = masked(model, pool)
    with torch.no_grad():
        x = model._pos_embed(model.patch_embed(images))
        for block in model.blocks:
            inputs, attn = block.norm1(x), block.attn
            q, k, _ = attn.qkv(inputs).reshape(4, N, 3, 2, D // 2).permute(2, 0, 3, 1, 4)
            attention = (q @ k.transpose(-2, -1) * attn.scale).softmax(-1).mean(1)[:, 0]
            x = x + attn(inputs)
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(x)))
            weights = torch.cat([torch.full((4, 1), 2.0), attention[:, 1:]], dim=1)
            magnitudes = hidden.abs()
            if pool == "batch":
                weights, magnitudes = weights.mean(0)[None], magnitudes.mean(0)[None]
            scores = torch.einsum("gn,gnh->gh", weights, magnitudes)
            ranks = scores.argsort(dim=1, descending=True).argsort(dim=1)
            x = x + block.mlp.fc2(hidden * (ranks < H // 2).unsqueeze(1))
        want = model.head(model.norm(x)[:, 0])
    torch.testing.assert_close(logits(changed, images), want, atol=1e-4, rtol=1e-4)


def test_who_shares_a_batch_matters_for_a_choice_by_batch_alone():
    model, (images, _) = build(), batch(6)
    by_image, _ = masked(model, "image")
    by_batch, _ = masked(model, "batch")
    together = logits(by_image, images)
    alone = torch.cat([logits(by_image, one) for one in images.split(1)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    of_one = torch.cat([logits(by_batch, one) for one in images.split(1)])
    torch.testing.assert_close(of_one, alone, atol=1e-5, rtol=1e-5)
    pairs = torch.cat([logits(by_batch, two) for two in images.split(2)])
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    mixed = torch.cat([logits(by_batch, two) for two in images[order].split(2)])[order.argsort()]
    assert not torch.allclose(pairs, mixed, atol=1e-3)
    assert not torch.allclose(pairs, alone, atol=1e-3)


def test_all_active_is_the_model_itself_and_names_stay():
    model, (images, _) = build(), batch(3)
    changed, masks = masked(model, "batch", active=1.0)
    torch.testing.assert_close(logits(changed, images), logits(model, images), atol=1e-5, rtol=1e-5)
    assert list(masks) == ["blocks.0.mlp", "blocks.1.mlp"]
    assert list(changed.state_dict()) == list(model.state_dict())


def test_a_choice_once_for_all_is_that_of_its_batch():
    model, (images, _) = build(), batch(8)
    by_batch, _ = masked(model, "batch")
    narrow = copy.deepcopy(model)
    narrow_to_channels(narrow, 0.5, images)
    torch.testing.assert_close(
        logits(narrow, images), logits(by_batch, images), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(  # whoever else is there
        logits(narrow, images[:2]), logits(narrow, images)[:2], atol=1e-5, rtol=1e-5
    )
    assert narrow.blocks[1].mlp.fc1.out_features == H // 2


def test_costs_by_hand():
    """The first map whole, half of the second, and one multiply-add a token and neuron to choose;
    a choice made before halves both maps and what is stored."""
    model, _ = build(), None
    changed, _ = masked(model, "batch")
    logits(changed, batch(2)[0])  # what it chose last must not matter
    dense, cut, layers = count(model, 28), count(changed, 28), len(model.blocks)
    assert dense.macs - cut.macs == layers * (N * D * H // 2 - N * H)
    assert cut.params_stored == dense.params_stored
    assert dense.params_active - cut.params_active == layers * D * H // 2
    narrow_to_channels(model, 0.5, batch(2)[0])
    assert dense.macs - count(model, 28).macs == layers * N * D * H
    assert dense.params_stored - count(model, 28).params_stored == layers * (D * H + H // 2)


def test_batches_of_a_run():
    labels = torch.tensor([2, 0, 1, 0, 2, 1, 0])
    spec = under(batch=3)
    shuffled = batches_that_choose(labels, spec)
    assert [len(part) for part in shuffled] == [3, 3, 1]
    assert torch.cat(shuffled).sort().values.tolist() == list(range(7))
    other = batches_that_choose(labels, spec.but(seed=1))
    assert torch.cat(other).tolist() != torch.cat(shuffled).tolist()
    by_class = torch.cat(batches_that_choose(labels, under(batch=3, order="class")))
    assert labels[by_class].tolist() == [0, 0, 0, 1, 1, 2, 2]
    # images of a class come in the shuffled order
    place = torch.cat(shuffled).argsort()[by_class]
    assert (place[:3].diff() > 0).all() and (place[3:5].diff() > 0).all()


def run(where, spec):
    record = runs.collect({"one": [spec]}, where=where)["one"][0]
    assert record.status == "ok", record.error
    return record


def test_runs_file_predictions_in_the_order_of_the_split(where):
    """With all neurons active every rule is the dense model, in whatever order it saw the images;
    with half of them it is another."""
    dense = run(where, DENSE)
    assert len(np.unique(dense.arrays["test_pred"])) > 3  # else any order would do
    rules = ({"batch": 7}, {"batch": 7, "order": "class"}, {"pool": "image"})
    for rule in (*rules, {"pool": "calibration", "images": 40}):
        whole, half = run(where, under(active=1.0, **rule)), run(where, under(**rule))
        assert np.array_equal(whole.arrays["test_pred"], dense.arrays["test_pred"])
        assert whole.test["top1"] == dense.test["top1"]
        assert half.cost["macs"] < dense.cost["macs"] < whole.cost["macs"] or "images" in rule
        assert half.weights["parent"] == dense.weights["final"]
    one_an_image = run(where, under(pool="image")), run(where, under(batch=1))
    assert np.array_equal(*(record.arrays["test_pred"] for record in one_an_image))


def test_refusals():
    for make, says in (
        (lambda: ChannelSpec(active=0.5, pool="image", batch=7), "does not look at batch"),
        (lambda: ChannelSpec(active=0.5, pool="image", order="class"), "does not look at order"),
        (lambda: ChannelSpec(active=0.5, images=7), "does not look at images"),
        (lambda: ChannelSpec(active=0.0), "active"),
        (lambda: under().but(train=TrainSpec()), "changes no weight"),
        (lambda: under().but(moe=MoESpec()), "changes no weight"),
        (lambda: BASE.but(channels=ChannelSpec(active=0.5), train=None), "changes no weight"),
        (lambda: BASE.but(init=under()), "no run can start from"),
    ):
        with pytest.raises(ValidationError, match=says):
            make()
    swin = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match="with a class token"):
        check_maskable(swin)
    for registers in (0, 1, 4):  # prefix tokens that are no class token
        no_class = timm.create_model(
            "vit_tiny_patch16_224",
            **VIT,
            class_token=False,
            reg_tokens=registers,
            global_pool="avg",
        )
        with pytest.raises(ValueError, match="with a class token"):
            check_maskable(no_class)
    with pytest.raises(ValueError, match="leaves no weights of its own"):
        ChannelStep(ChannelSpec(active=0.5)).fit(no_class, {})


def test_too_few_images_to_choose_by():
    spec, images = under(pool="calibration", images=300), load_splits(BASE.data).train
    step = ChannelStep(spec.channels)
    with pytest.raises(ValueError, match="the training split has 200: lower it"):
        step.apply(build(), StepInputs(spec, images, 10, {}.__getitem__))
