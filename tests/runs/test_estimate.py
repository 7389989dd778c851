"""What a run is expected to take: by hand from made-up records, and against the committed ones."""

from __future__ import annotations

import statistics

import pytest

from lib.runs import estimate as module
from lib.runs.environment import environment
from lib.runs.estimate import (
    DEFAULT_RATE,
    LEAST_LEFT,
    START_SECONDS,
    Estimates,
    facts_of,
    kinds,
    row_of,
    whole_seconds,
)
from lib.runs.model_size import model_size
from lib.runs.store import Store, spec_of, store, verified
from lib.spec import BackboneSpec, DataSpec, MoESpec, PruneSpec, RunSpec, TrainSpec

RUN = RunSpec(
    data=DataSpec(train=100, val=10, test=50),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    train=TrainSpec(epochs=1.0, batch=10),
    threads=1,
)
# 3 passes of 100 images, validation before and after the epoch, test
PASSES = 3 * 100 + 2 * 10 + 50


def content(spec, seconds, macs=1000.0, **changes):
    """The JSON of a finished record, as far as an estimate reads it."""
    return {
        "status": "ok",
        "spec": spec.model_dump(mode="json"),
        "environment": environment(spec),
        "created": "2026-01-01T00:00:00+00:00",
        "test": {"n": 50},
        "val": {"n": 10},
        "history": [{}, {}],
        "cost": {"macs": macs},
        "timing": {"eval_images_per_s": 100.0, "train_seconds": 1.0, "train_images_per_s": 100.0}
        | ({} if seconds is None else {"run_seconds": seconds}),
    } | changes


def estimates(*contents):
    """Estimates from records, by the ids of their specs."""
    rows = {spec_of(c).id: row_of(spec_of(c), c) for c in contents}
    assert len(rows) == len(contents)
    return Estimates(rows)


def test_other_seeds_of_the_same_run_are_nearest():
    far = content(RUN.but(train={"epochs": 2.0}), 999.0)
    near = [content(RUN.but(seed=s), t) for s, t in ((1, 10.0), (2, 14.0), (3, 100.0))]
    estimate = estimates(far, *near).of(RUN)
    assert (estimate.seconds, estimate.basis) == (14.0, "3 x another seed")  # their median


def test_a_record_of_its_own_counts_as_well():
    known = estimates(content(RUN, 10.0), content(RUN.but(seed=1), 30.0))
    assert known.of(RUN).seconds == 20.0  # a parent that is computed again has its own record


def test_the_same_model_is_scaled_by_its_passes():
    longer = RUN.but(train={"epochs": 2.0})
    estimate = estimates(content(RUN, 10.0)).of(longer)
    assert estimate.basis == "1 x the same model"
    assert estimate.seconds == pytest.approx(10.0 * (3 * 200 + 3 * 10 + 50) / PASSES)


def test_another_model_is_scaled_by_its_multiply_adds():
    dense = estimates().of(RUN)
    macs = (dense.seconds - START_SECONDS) * DEFAULT_RATE["cpu"] / PASSES
    both = RUN.but(moe=MoESpec(layers=2, experts=2, top_k=2, router="token"))
    one = RUN.but(moe=MoESpec(layers=1, experts=2, top_k=2, router="token"))
    known = estimates(content(one, 10.0, macs=macs * 1.25))
    estimate = known.of(both)
    assert estimate.basis == "1 x the same methods"
    default = (estimates().of(both).seconds - START_SECONDS) * DEFAULT_RATE["cpu"] / PASSES
    assert estimate.seconds == pytest.approx(10.0 * default / (macs * 1.25))
    assert 1.2 < default / macs < 2.0  # a second expert for each token, in both blocks


def test_counting_one_moe_layer_is_enough():
    from lib.measure.cost import count
    from lib.models.backbone import skeleton

    spec = RUN.but(moe=MoESpec(layers=2, experts=4, top_k=2, router="token", shared=True))
    whole = count(skeleton(spec.backbone, 28, classes=2, moe=spec.moe), 28).macs
    seconds = estimates().of(spec).seconds - START_SECONDS
    assert seconds * DEFAULT_RATE["cpu"] / PASSES == pytest.approx(whole)


def test_what_is_left_of_a_pruned_model_scales_nothing():
    pruned = RUN.but(init=RUN, prune=PruneSpec(share=0.5), moe=None)
    assert pruned.narrowed
    wider = pruned.but(prune=PruneSpec(share=0.25))
    estimate = estimates(content(pruned, 10.0, macs=1.0)).of(wider)
    assert estimate.seconds == pytest.approx(10.0) and estimate.basis == "1 x the same methods"


def test_other_processors_and_failed_runs_say_nothing():
    here = environment(RUN)
    other = content(RUN.but(seed=1), 10.0, environment=here | {"processor": "another"})
    rounded = content(
        RUN.but(seed=2), 10.0, environment=here | {"products": "float32, rounded to bfloat16"}
    )
    failed = content(RUN.but(seed=3), 10.0) | {"status": "failed"}
    old = content(RUN.but(seed=4), 10.0)
    known = estimates(other, rounded)
    assert known.of(RUN).basis == "a default rate" and len(known.seconds) == 2
    assert facts_of(failed, spec_of(failed))["row"] is None
    assert facts_of(old, None)["row"] is None  # another spec made it


def test_by_default_a_pruned_model_takes_what_its_shares_leave():
    def work(spec):
        return Estimates({}).of(spec).seconds - START_SECONDS

    whole = work(RUN)
    assert work(RUN.but(prune=PruneSpec(share=0.25))) == pytest.approx(0.75 * whole)
    half = RUN.but(prune=PruneSpec(share=0.5))
    assert work(RUN.but(init=half)) == pytest.approx(0.5 * whole)  # what its parent lost is gone
    assert work(RUN.but(prune=PruneSpec(share=0.95))) == pytest.approx(LEAST_LEFT * whole)
    masked = PruneSpec(share=0.5, structured=False)  # single weights: nothing gets smaller
    assert work(RUN.but(prune=masked)) == pytest.approx(whole)


def test_a_model_that_cannot_be_built_stops_no_plan():
    unfit = RUN.but(backbone={"patch": 5})
    assert estimates(content(RUN, 10.0)).of(unfit).basis == "no such model"


def test_a_run_from_a_weight_file_is_estimated_whatever_the_grid_of_its_positions():
    given = RUN.but(backbone={"weights": "file:mine.safetensors", "grid": (4, 4)})
    assert estimates(content(RUN, 10.0)).of(given).basis == "1 x the same model"


def test_kinds_go_from_near_to_far():
    again = RUN.but(seed=1)
    longer = RUN.but(train={"epochs": 2.0})
    mixture = RUN.but(moe=MoESpec())
    wider = RUN.but(backbone={"width": 32})
    other_type = RUN.but(dtype="bfloat16")
    shared = [
        [a == b for a, b in zip(kinds(RUN), kinds(spec), strict=True)]
        for spec in (again, longer, mixture, wider, other_type)
    ]
    assert shared == [
        [True, True, True, True, True],
        [False, True, True, True, True],
        [False, False, False, False, True],
        [False, False, False, False, True],
        [False, False, False, False, False],
    ]


def test_old_records_are_completed_by_the_start_of_the_next():
    def at(second, seconds=None, **environment_changes):
        made = content(RUN, seconds, created=f"2026-01-01T00:{second // 60:02}:{second % 60:02}")
        made["environment"] = made["environment"] | environment_changes
        return made

    # training 1 s, and 50 + 2 x 10 images at 100 a second: 1.7 s are measured
    contents = {
        "whole": at(0, seconds=5.0),
        "followed": at(10),
        "elsewhere": at(12, processor="another"),
        "beside": at(11),  # starts before the measured part of "followed" is over
        "before a pause": at(30),
        "last": at(200),
    }
    seconds = whole_seconds({name: row_of(RUN, made) for name, made in contents.items()})
    assert seconds == pytest.approx(
        {
            "whole": 5.0,
            "followed": 20.0,
            "elsewhere": 1.7,
            "beside": 19.0,
            "before a pause": 1.7,
            "last": 1.7,
        }
    )


def test_sizes_of_data_come_from_records():
    whole = RUN.but(data={"train": None, "val": None, "test": None}, train={"epochs": 2.0})
    record = content(whole, 10.0)  # 1 s at 100 images a second in two epochs
    known = estimates(record)
    assert known.images(whole) == (50, 10, 50)
    assert known.images(whole.but(data={"train": 7})) == (7, 10, 50)
    assert known.images(whole.but(data={"name": "other"})) == (45_000, 5_000, 10_000)


def committed():
    """What the committed records say, by run: the JSON of each, and its row."""
    contents = {file.stem: verified(file) for file in store().published.glob("*/*.json")}
    rows = {run: facts_of(content, spec_of(content))["row"] for run, content in contents.items()}
    return contents, {run: row for run, row in rows.items() if row}


def test_most_committed_records_lie_within_a_factor_of_two_of_an_estimate_by_others(monkeypatch):
    """With a margin: new records change the sample, and what else ran beside a run is in its time.

    Of all records five in six lie within it; of estimates by the default rate alone, far fewer.
    """
    contents, rows = committed()
    seconds, asked = whole_seconds(rows), sorted(rows)[::4]
    near = {}
    for given in (rows, {}):
        known = Estimates({run: row for run, row in given.items() if run not in asked})
        ratios = []
        for run in asked:
            place = contents[run]["environment"]
            monkeypatch.setattr(module, "_environment", lambda *_, place=place: place)
            ratios.append(known.of(spec_of(contents[run])).seconds / seconds[run])
        near[bool(given)] = sum(0.5 <= ratio <= 2 for ratio in ratios) / len(ratios)
        if given:
            assert len(ratios) > 200 and 0.8 < statistics.median(ratios) < 1.25
    assert near[True] > 0.7 and near[True] > near[False] + 0.2, near


def test_a_store_says_what_its_records_say(tmp_path):
    where = Store(store().published, tmp_path)
    contents, rows = committed()
    from_contents = Estimates(rows)
    for _ in range(2):  # read from the records, then from the index
        of_store = Estimates.of_store(where)
        where.index.save()
        assert of_store.seconds == from_contents.seconds
        for run in sorted(of_store.seconds)[::60]:
            spec = spec_of(contents[run])
            assert of_store.of(spec).seconds == pytest.approx(from_contents.of(spec).seconds)


def test_layers_that_differ_in_how_they_learn_share_a_count():
    weighted = MoESpec(layers=2, experts=4, balance_weights=(0.1, 0.2))
    plain, taught = (RUN.but(moe=moe) for moe in (MoESpec(layers=2, experts=4), weighted))
    assert model_size(plain) == model_size(taught)
    assert estimates(content(RUN, 10.0)).of(taught).basis == "1 x this processor"
