"""What pages ask for at the documents' scale, as text: without data, without network."""

from __future__ import annotations

import math
import socket

import pytest

from lib.__main__ import main
from lib.pages import contents, missing, parameters, profiles, scale, scale_page
from lib.runs import order
from lib.runs.estimate import Estimate

DOCUMENTS = ("vimoe", "durham", "leiden", "expert_pruning", "moee")


@pytest.fixture(autouse=True)
def nothing_at_hand(monkeypatch, tmp_path):
    """No data, no weights, an empty cache, and a network that breaks the test."""
    for name in ("MOE_DATA", "MOE_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))

    def refuse(*_):
        raise AssertionError("a plan reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("study", DOCUMENTS)
def test_the_paper_profile_of_each_document_is_priced(study):
    pages = scale.runs_of(parameters.keys_of(study), "paper")
    plan = scale.priced(pages, "paper")
    assert set(plan.demands) == set(plan.runs)  # each model can be built
    assert {demand.basis for demand in plan.demands.values()} == {"published"}
    assert plan.total.macs == math.fsum(demand.macs for demand in plan.demands.values())
    backwards = {key: runs[::-1] for key, runs in reversed(pages.items())}
    assert scale.priced(backwards, "paper").total == plan.total
    text = scale.listing(plan)
    assert all(key in text for key in pages) and "all, each run once" in text
    assert "assumed" in text and "backward" in text
    assert len(profiles.readings(study, "paper")) >= 2
    assert all(sentence in text for sentence in profiles.readings(study, "paper"))
    missing = "\n".join(scale.here(plan.runs.values(), check=False))
    for name in {spec.data.name for spec in plan.runs.values()} - {"mnist5k"}:
        assert f"data set {name}: not here (MOE_DATA is not set)" in missing


def test_a_page_lists_its_runs_their_price_and_what_is_missing(capsys):
    command = ["run", "leiden/taylor", "--profile", "paper", "--dry", "--rate", "1e12"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "  missing  seed 0" in text and "Hours: at 1e+12 multiply-adds a second" in text
    assert "weights timm of vit_base_patch16_224: not here" in text
    assert "data set m-forestnet: not here" in text and "refused" not in text
    assert main([*command[:-1], "0"]) == 2
    assert "--rate 0.0: give multiply-adds a second above 0" in capsys.readouterr().err
    for computing in (["run", "leiden/taylor"], ["fill", "--budget", "1s"]):
        assert main([*computing, "--rate", "1e12"]) == 2
        assert "computes nothing: give --dry with it" in capsys.readouterr().err


def test_hours_are_those_that_fill_expects(monkeypatch):
    keys = ["durham/recipe", "vimoe/frontier"]
    expected = {}

    class Known:
        def of(self, spec):
            expected[spec.id] = 3600.0 * (1 + len(expected))
            return Estimate(expected[spec.id], "2 x another seed")

    monkeypatch.setattr(scale, "_known", Known)
    pages = scale.runs_of(keys, "small")
    plan = scale.priced(pages, "small")
    assert plan.total.hours == {"cpu": pytest.approx(sum(expected.values()) / 3600)}
    assert f"of {len(expected)} runs {len(expected)} by records" in plan.pace
    # what a plan says is left of a run goes first; what it does not list is there already
    child = next(run for run in pages["durham/recipe"] if run.init is not None)
    left = {child.id: Estimate(1800.0, "a default rate")}
    plan = scale.priced({"durham/recipe": [child]}, "small", None, left)
    assert plan.total.hours == {"cpu": 0.5} and (plan.total.runs, plan.total.parents) == (1, 0)
    assert "of 1 run 0 by records" in plan.pace and "at an assumed rate" in plan.pace
    # a parent that is missing counts, also where nobody has estimated it yet
    both = left | {child.init.id: None}
    plan = scale.priced({"durham/recipe": [child]}, "small", None, both)
    assert plan.total.hours == {"cpu": pytest.approx(0.5 + expected[child.init.id] / 3600)}
    assert plan.total.parents == 1
    # a rate is for all: both give other hours
    assert scale.priced({"durham/recipe": [child]}, "small", 1e9, left).total.hours != {"cpu": 0.5}


@pytest.mark.parametrize("on_cpu", (False, True))  # True: in the place of runs for a card
def test_both_tables_of_fill_say_the_same_time(on_cpu):
    page = "expert_pruning/scores" if on_cpu else "vimoe/frontier"
    (grid,) = scale.runs_of([page], "small").values()
    specs = [spec for spec in grid if not on_cpu or spec.device == "cuda"][:3]
    specs = [spec.on("cpu") for spec in specs]
    purpose = order.Purpose(page, "all", tuple(spec.id for spec in specs))
    items = tuple(
        order.Item(spec, Estimate(seconds, "1 x another seed"), (purpose,), frozenset())
        for spec, seconds in zip(specs, (3600.0, 1800.0, 5400.0), strict=True)
    )
    plan = order.Plan(items, (purpose,))
    assert "still missing then: 3 runs, 3.0 h" in missing.listing(plan, 0.0, 1)
    priced = missing.price(plan, "small", [page], None)
    assert "3.0 cpu" in next(line for line in priced.splitlines() if line.startswith(page))


def test_a_study_is_planned_or_computed_but_not_run(capsys):
    assert main(["run", "vimoe"]) == 2
    assert "vimoe is a study of 6 pages" in capsys.readouterr().err


def test_every_study_of_the_paper_profile_has_its_readings():
    studies = {
        key.split("/")[0] for key in contents.in_book() if profiles.has_profile(key, "paper")
    }
    assert studies == set(profiles.profile_table("paper")["readings"])
    assert profiles.readings("vimoe", "quick") == []


def test_the_page_says_the_sum_first_and_is_counted_once(tmp_path, monkeypatch):
    monkeypatch.setattr(scale_page, "FILE", tmp_path / "scale_table.md")
    keys = ["leiden/taylor", "foundations/speed"]
    text = scale_page.page(keys)
    lines = text.splitlines()
    assert lines[0].startswith("% made from ") and lines[2].startswith("**1 runs, and 0 that they")
    assert "[leiden/taylor](notebooks/leiden/taylor.ipynb)" in text and "6,464" in text
    assert "MOE_DATA/m-forestnet" in text and "*leiden*" in text
    # what it was made from is the same: it is read, not counted
    scale_page.FILE.write_text(text + "read\n")
    monkeypatch.setattr(scale, "priced", None)
    assert scale_page.page(keys) == text + "read\n"
    with pytest.raises(TypeError):
        scale_page.page(keys[:1])


def test_a_book_without_the_profile_needs_no_counting():
    plan = scale.priced({}, "paper")
    assert scale_page._text(plan) == ["No page has runs under the profile `paper`."]
