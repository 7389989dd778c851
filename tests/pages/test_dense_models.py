"""The table of dense models: which runs it is of, and what it says that their ways differ in."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from factory import record

from lib.pages import dense_models, profiles
from lib.runs import store
from lib.spec import BackboneSpec, DataSpec, DropSpec, RunSpec, TrainSpec

DENSE = RunSpec(
    data=DataSpec(name="cifar100", train=5000, image_size=56),
    backbone=BackboneSpec(name="vit_small_patch14_dinov2"),
    train=TrainSpec(epochs=3.0),
)
LONGER = DENSE.but(train={"epochs": 6.0}, data={"train": None})
MIXTURE = DENSE.but(moe={"layers": 2, "experts": 4})
PACKAGED = RunSpec(train=TrainSpec())
SEEDS = range(3)
PLANS = {
    "a/one": {
        "dense": [DENSE.but(seed=seed) for seed in SEEDS],
        "another rate": [DENSE.but(train={"lr": 1e-3})],  # no claim asks for it
        "mixture": [MIXTURE],  # no experts are taken from it
        "packaged": [PACKAGED],
    },
    "a/two": {
        # the same training elsewhere, and without a claim here
        "start": [DENSE.but(seed=seed, threads=1, study="two") for seed in SEEDS],
        "start, longer": [LONGER],
        "pruned": [LONGER.but(init=LONGER, prune={"share": 0.5}, train=None)],
        "unjudged": [LONGER.but(dtype="bfloat16")],
        "whole": [MIXTURE.but(seed=1)],
        "dropped": [
            MIXTURE.but(
                seed=1, init=MIXTURE.but(seed=1), train=None, drop=DropSpec(share=0.5, score="load")
            )
        ],
    },
}
JUDGED = {"a/one": ["dense", "mixture", "packaged"], "a/two": ["pruned", "whole", "dropped"]}


@pytest.fixture
def book(monkeypatch):
    """Two pages, their claims and records; gives the records by the id of their run."""
    runs = [*PLANS["a/one"]["dense"], LONGER, MIXTURE.but(seed=1), MIXTURE]
    records = {run.id: record(run.seed, spec=run, top1=70.0 + 5 * bool(run.moe)) for run in runs}
    monkeypatch.setattr(profiles, "plan", lambda key, name: PLANS[key])
    monkeypatch.setattr(profiles, "has_profile", lambda key, name: key in PLANS)
    monkeypatch.setattr(
        dense_models.ledger, "on_runs_of", lambda key: [SimpleNamespace(arms=JUDGED[key])]
    )
    monkeypatch.setattr(store, "store", lambda: SimpleNamespace(peek=records.get))
    return records


BUT = "*as in the first row, but:*"


def rows_of(text):
    """Returns the rows of the only table of a text, as lists of cells."""
    lines = [line for line in text.splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_rows_are_ways_of_training_that_claims_or_other_runs_need(book):
    text = dense_models.page(["a/one", "a/two", "a/without"])
    assert text.startswith("**CIFAR-100**\n") and text.count("| --- ") == 3
    first, longer, mixture = rows_of(text)
    both = "[a/<wbr>one](notebooks/a/one.ipynb), [a/<wbr>two](notebooks/a/two.ipynb)"
    assert first[0] == both and longer[0] == "[a/<wbr>two](notebooks/a/two.ipynb)"
    assert first[1].endswith("], n=3") and longer[1].endswith(", n=1")  # the longest interval: none
    assert "all classes, 5,000 training images at 56 px, augmentation `none`, 3 epochs" in first[2]
    assert longer[2] == f"{BUT} all training images at 56 px, 6 epochs"
    assert mixture[2] == f"{BUT} `vit_small_patch14_dinov2`, E=4, K=1 in 2 blocks"


def test_a_half_of_the_classes_is_named(book, monkeypatch):
    halves = [DENSE.but(data={"classes": part}) for part in ((0, 50), (50, 100))]
    second = halves[1].but(init=halves[0], train={"trainable": "head"})
    monkeypatch.setitem(PLANS["a/two"], "pruned", [second])
    book[second.id] = record(0, spec=second)
    row = rows_of(dense_models.page(list(PLANS)))[1]
    assert row[2] == f"{BUT} classes 50 to 99 after classes 0 to 49, 3 + 3 (head) epochs"


def test_ways_without_a_record_are_left_out(book):
    del book[LONGER.id]
    assert len(rows_of(dense_models.page(list(PLANS)))) == 2
    book.clear()
    assert dense_models.page(list(PLANS)) == "No record yet.\n"


def test_a_record_of_the_other_side_of_a_run_counts_once(book):
    dense = PLANS["a/one"]["dense"]
    other = PLANS["a/two"]["start"][0]
    book[other.id] = book.pop(dense[0].id)
    first = rows_of(dense_models.page(list(PLANS)))[0]
    assert first[1].endswith("], n=3")
    book[other.id] = record(0, spec=other, status="failed")
    first = rows_of(dense_models.page(list(PLANS)))[0]
    assert first[1].endswith(", n=2")


def test_what_is_cut_or_reconstructs_is_no_dense_model():
    assert dense_models.is_dense(DENSE) and dense_models.is_dense(LONGER.but(init=DENSE))
    assert not dense_models.is_dense(MIXTURE) and dense_models.is_whole(MIXTURE)
    cut = PLANS["a/two"]["pruned"][0]
    assert not dense_models.is_whole(cut) and not dense_models.is_whole(PACKAGED)
    assert not dense_models.is_whole(DENSE.but(train={"mask": {"ratio": 0.75}}))
