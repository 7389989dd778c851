"""The committed records: whole, unedited, and filed under the id that their spec has today."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path

import numpy as np
import pytest

from lib import paths
from lib.pages import profiles
from lib.runs.store import Record, Store

STUDIES = sorted({file.parent for file in paths.RESULTS.glob("*/*.json")})


@pytest.fixture
def linked_store(tmp_path):
    """A store of links to the committed files: a damaged record is moved aside, and the committed
    one must stay where it is."""
    for study in STUDIES:
        (tmp_path / "published" / study.name).mkdir(parents=True)
        for file in study.iterdir():
            (tmp_path / "published" / study.name / file.name).symlink_to(file)
    return Store(tmp_path / "published", tmp_path / "private")


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_records_are_whole_and_filed_under_the_ids_of_their_specs(study, linked_store):
    complaints = {
        file.stem: faults
        for file in sorted(study.glob("*.json"))
        if (faults := faults_of(file, linked_store))
    }
    assert not complaints, f"{len(complaints)} records of {study.name}: {complaints}"


def faults_of(file: Path, store: Store) -> list[str]:
    """Says what is wrong with a committed record, in one sentence a fault."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        # a socket that another test left open may be collected just here
        warnings.simplefilter("ignore", ResourceWarning)
        record = store.peek(file.stem)
    faults = [str(warning.message) for warning in warned]
    if record is None:
        return faults or ["is not there"]
    if record.status != "ok":
        return [*faults, f"its status is {record.status!r}"]
    if record.spec.id != file.stem:
        faults.append(
            f"a change to the specs gave this run the id {record.spec.id}: "
            "old records are lost by it"
        )
    if len(record.arrays["test_label"]) != record.test["n"]:
        faults.append(f"{len(record.arrays['test_label'])} labels for {record.test['n']} images")
    return faults + faults_of_the_test_result(record) + faults_of_the_routing(record)


def faults_of_the_test_result(record: Record) -> list[str]:
    """Compares the accuracy with the predictions, or the loss with its range where a pretraining
    predicts pixels."""
    arrays = record.arrays
    if record.spec.train is not None and record.spec.train.mask is not None:
        if "test_pred" in arrays or not 0 < record.test["loss"] < 2:
            return [f"pretraining with predictions, or with a loss of {record.test['loss']}"]
        return []
    top1 = 100 * (arrays["test_pred"] == arrays["test_label"]).mean()
    if top1 != pytest.approx(record.test["top1"]):
        return [f"its predictions have top-1 {top1}, and it says {record.test['top1']}"]
    return []


def faults_of_the_routing(record: Record) -> list[str]:
    """Checks the shares of the experts and the counts of each MoE layer."""
    counts = record.arrays.get("class_expert", ())
    if len(counts) != len(record.moe):
        return [f"{len(counts)} tables of counts for {len(record.moe)} MoE layers"]
    return [
        f"block {layer['block']}: load {sum(layer['load'])} and {np.sum(table)} assignments"
        for layer, table in zip(record.moe, counts, strict=True)
        if sum(layer["load"]) != pytest.approx(1) or not np.sum(table) > 0
    ]


def test_every_committed_record_is_wanted_by_a_notebook(monkeypatch):
    # Each plan reads its profile's file anew, half a second of YAML: here one read is enough.
    monkeypatch.setattr(profiles, "profile_table", functools.cache(profiles.profile_table))
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
        for specs in profiles.plan(key, profile).values()
        for spec in specs
        # where there was no card, a claim's run for one was computed on the CPU
        for made in ((spec,) if spec.device == "cpu" else (spec, spec.on("cpu")))
        for run in made.lineage
    }
    committed = {file.stem for study in STUDIES for file in study.glob("*.json")}
    assert committed <= wanted, f"no notebook wants {sorted(committed - wanted)}"
