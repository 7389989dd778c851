"""The committed records: whole, unedited, and still filed under the id that their spec has today."""

from __future__ import annotations

import warnings

import pytest

from lib import paths
from lib.pages import profiles
from lib.runs.store import Store

FILES = sorted(paths.RESULTS.glob("*/*.json"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_record_is_whole_and_found_by_its_spec(file, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a damaged record would be moved aside with a warning
        record = Store(paths.RESULTS, tmp_path).peek(file.stem)
    assert record is not None and record.status == "ok"
    assert record.spec.id == file.stem, (
        "a change to the specs gave this run another id: old records are lost by it"
    )
    assert len(record.arrays["test_label"]) == record.test["n"]
    if (
        record.spec.train is None or record.spec.train.mask is None
    ):  # without training: cut and tested
        right = (record.arrays["test_pred"] == record.arrays["test_label"]).mean()
        assert 100 * right == pytest.approx(record.test["top1"])
    else:  # pretraining predicts pixels
        assert "test_pred" not in record.arrays and 0 < record.test["loss"] < 2
    for layer, counts in zip(record.moe, record.arrays.get("class_expert", ()), strict=True):
        assert sum(layer["load"]) == pytest.approx(1) and counts.sum() > 0


def test_every_committed_record_is_wanted_by_a_notebook():
    folder = paths.ROOT / "notebooks"
    keys = [
        file.relative_to(folder).as_posix().removesuffix(".ipynb")
        for file in folder.glob("*/*.ipynb")
    ]
    wanted = {
        run.id
        for key in keys
        for profile in ("small", "paper")
        if profiles.has_profile(key, profile)
        for group in profiles.plan(key, profile).values()
        for spec in group
        for run in _line(spec)
    }
    assert {file.stem for file in FILES} <= wanted


def _line(spec):
    """A run and those that it starts from."""
    while spec is not None:
        yield spec
        spec = spec.init
