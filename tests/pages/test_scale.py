"""What pages ask for at the documents' scale, as text: without data, without network."""

from __future__ import annotations

import math
import socket

import pytest

from lib.__main__ import main
from lib.pages import contents, parameters, profiles, scale, scale_page

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
    assert "  missing  seed 0" in text and "1e+12 multiply-adds a second, as given" in text
    assert "weights timm of vit_base_patch16_224: not here" in text
    assert "data set m-forestnet: not here" in text and "refused" not in text
    assert main([*command[:-1], "0"]) == 2
    assert "--rate 0.0: give multiply-adds a second above 0" in capsys.readouterr().err


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
