"""What runs ask for: by hand for three of them, and against the committed records."""

from __future__ import annotations

import math
import statistics

import pytest

from lib.inputs import at_hand, published
from lib.runs import demand
from lib.runs.estimate import passes
from lib.runs.store import spec_of, store, verified
from lib.spec import BackboneSpec, DataSpec, MaskSpec, MoESpec, RunSpec, TrainSpec

CIFAR = DataSpec(name="cifar100", label="fine_label", image_size=224, val=5000)
DENSE = RunSpec(
    data=CIFAR,
    backbone=BackboneSpec(name="vit_small_patch14_dinov2", weights="timm"),
    train=TrainSpec(epochs=100.0, batch=1024),
    dtype="bfloat16",
    device="cuda",
)
# ViT-S/14 at 224 px: 16 x 16 patches of 14 x 14 x 3 pixels and a class token; width, hidden width
PATCHES, TOKENS, D, H = 256, 257, 384, 1536
PATCH_MACS = PATCHES * 14 * 14 * 3 * D
# queries, keys, values and what joins the heads; both maps of the MLP; two products of N x N
BLOCK_MACS = TOKENS * (4 * D * D + 2 * D * H) + 2 * TOKENS * TOKENS * D
VIT_MACS = PATCH_MACS + 12 * BLOCK_MACS + 2 * D  # a head for two classes, as skeletons have it


def test_a_dense_run_by_hand():
    asked = demand.demand_of(DENSE, demand.published_sizes)
    # 50,000 images, of which a tenth is lent to validation; steps of 1,024, the last one smaller
    assert (asked.images, asked.basis) == ((45_000, 5_000, 10_000), "published")
    assert asked.steps == 100 * 44 and 44 == math.ceil(45_000 / 1024)
    assert asked.trained == 100 * 45_000
    # forward and twice that backward for each of 100 epochs, validation before and after each
    seen = 3 * 100 * 45_000 + 101 * 5_000 + 10_000
    assert asked.macs == seen * VIT_MACS
    seconds = {DENSE.id: demand.seconds_at(2e13, DENSE, asked)}
    total = demand.total_of([DENSE.id], {DENSE.id: DENSE}, {DENSE.id: asked}, seconds)
    assert total.hours == {"cuda": pytest.approx(seen * VIT_MACS / 2e13 / 3600)}
    assert 1.1 < total.hours["cuda"] < 1.3  # 14 million passes of 6.1e9 at 2e13 a second
    assert asked.disk == 20_000 + 3 * 10_000
    on_cpu = DENSE.on("cpu").but(threads=4)  # a rate is of a thread there
    assert demand.seconds_at(1e10, on_cpu, asked) == pytest.approx(seen * VIT_MACS / 4e10)


def test_a_mixture_with_a_shared_expert_by_hand():
    moe = MoESpec(layers=2, experts=8, router="image", shared=True)
    asked = demand.demand_of(DENSE.but(moe=moe), demand.published_sizes)
    # in each of two blocks: one of eight experts as before, one shared, and a router that reads
    # the class token
    layer = TOKENS * 2 * D * H + 8 * D
    assert asked.macs == (3 * 100 * 45_000 + 101 * 5_000 + 10_000) * (VIT_MACS + 2 * layer)
    # seven further experts and a shared one, router without bias, in float32 with gradients and
    # two moments; what is saved is in proportion to the multiply-adds
    dense = demand.demand_of(DENSE, demand.published_sizes)
    saved = 1024 * 3.5 * demand.model_size(DENSE).outputs
    parameters = demand.model_size(DENSE).parameters + 2 * (8 * (2 * D * H + D + H) + 8 * D)
    grown = (VIT_MACS + 2 * layer) / VIT_MACS
    assert asked.memory == pytest.approx(16 * parameters + grown * saved, rel=1e-3)
    assert dense.memory == pytest.approx(16 * demand.model_size(DENSE).parameters + saved)


def test_masked_pretraining_by_hand():
    backbone = BackboneSpec(patch=3, width=192, depth=6, heads=12, hidden=448)
    train = TrainSpec(epochs=3000.0, batch=768, mask=MaskSpec(width=192, depth=4, heads=6))
    spec = DENSE.but(data={"image_size": 36}, backbone=backbone, train=train)
    asked = demand.demand_of(spec, demand.published_sizes)
    n, d, h = 145, 192, 448
    encoder = 144 * 27 * d + 6 * (n * (4 * d * d + 2 * d * h) + 2 * n * n * d) + 2 * d
    decoder = 4 * (12 * 144 * d * d + 2 * 144 * 144 * d) + 144 * d * (d + 27)
    assert asked.steps == 3000 * 59
    seen = 3 * 3000 * 45_000 + 3001 * 5_000 + 10_000
    assert asked.macs == pytest.approx(seen * (encoder / 4 + decoder))


def test_a_teacher_costs_a_pass_and_its_weights():
    child = DENSE.but(init=DENSE, train={"distil_logits": 0.5})
    alone, taught = (
        demand.demand_of(spec, demand.published_sizes)
        for spec in (child.but(train={"distil_logits": 0.0}), child)
    )
    assert taught.macs - alone.macs == 100 * 45_000 * VIT_MACS
    assert taught.memory - alone.memory == 4 * demand.model_size(DENSE).parameters


def test_parents_count_once_and_keep_their_weights():
    child = DENSE.but(init=DENSE, seed=1)
    runs = demand.with_parents([child, child.but(seed=2)])
    demands = demand.demands_of(runs, demand.published_sizes)
    total = demand.total_of(list(runs)[:2], runs, demands, dict.fromkeys(runs, 1800.0))
    assert (total.runs, total.parents, total.epochs) == (2, 1, 300.0)
    assert total.hours == {"cuda": 1.5}
    weights = 4 * demand.model_size(DENSE).parameters
    assert total.disk == 3 * (20_000 + 3 * 10_000) + weights


def test_published_sizes_follow_the_rules_of_splits():
    def sizes(name, **fields):
        return published.images_of(DataSpec(name=name, **fields))

    # no test split: a tenth of the training images is lent; no validation split: another tenth
    assert sizes("imagenet") == (1_281_167 - 128_116, 50_000, 128_116)
    assert sizes("mnist5k") == (4_000, 500, 500)
    assert sizes("mit-indoor") == (5_360 - 536, 536, 1_340)
    assert sizes("cifar100", classes=(0, 50), train=1_000) == (1_000, 2_500, 5_000)
    assert sizes("birds") is None


def test_what_is_absent_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_DATA", str(tmp_path))
    monkeypatch.setenv("MOE_WEIGHTS", str(tmp_path))
    missing = at_hand.missing_data("cifar100")
    assert str(tmp_path / "cifar100") in missing.looked and "MOE_DATA/cifar100" in missing.get
    (tmp_path / "cifar100").mkdir()
    assert at_hand.missing_data("cifar100") is None and at_hand.missing_data("mnist5k") is None
    weights = ("pth:satmae.pth@" + 64 * "0", "vit_base_patch16_224")
    assert str(tmp_path / "satmae.pth") in at_hand.missing_weights(*weights).looked
    (tmp_path / "satmae.pth").touch()
    assert at_hand.missing_weights(*weights) is None
    assert at_hand.missing_weights(None, "vit_base_patch16_224") is None


def test_runs_that_would_be_refused_are_counted_by_reason():
    deep = DENSE.but(moe=MoESpec(layers=13))
    said = demand.failing([DENSE, deep, deep.but(seed=1)])
    assert list(said.values()) == [2] and "13" in next(iter(said))
    unknown = DENSE.but(backbone=BackboneSpec(name="vit_smal"))
    assert demand.demands_of({unknown.id: unknown}, demand.published_sizes) == {}


def test_committed_records_took_about_the_memory_and_disk_that_was_asked_for():
    memory, disk = [], []
    for file in sorted(store().published.glob("*/*.json"))[::9]:
        content = verified(file)
        spec = spec_of(content)
        learns_whole = spec.train is not None and spec.train.trainable == "all"
        if learns_whole and not (spec.narrowed or spec.extracted or spec.reduced):
            images = (content["cost"]["macs"], 0, content["test"]["n"])
            asked = demand.demand_of(spec, lambda _, images=images: (images, "record"))
            weights = 4 * demand.model_size(spec).parameters if spec.keep else 0
            size = sum(part.stat().st_size for part in file.parent.glob(f"{file.stem}.*"))
            disk.append((asked.disk - weights) / size)
            if content.get("memory") and spec.train.mask is None:
                memory.append(asked.memory / 2**20 / content["memory"]["total"])
    assert len(memory) > 10
    assert 0.8 < statistics.median(memory) < 1.25
    assert all(1 / 2 < ratio < 2 for ratio in memory)
    assert 0.5 < statistics.median(disk) < 2


def test_evaluation_alone_counts_the_test_images():
    spec = DENSE.but(train=None)
    assert passes(spec, (1, 2, 3)) == 3
    assert demand.demand_of(spec, demand.published_sizes).macs == 10_000 * VIT_MACS
