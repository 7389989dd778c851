"""The build: what runs, what does not, and what a failure leaves."""

from __future__ import annotations

import json
import os

import pytest

from lib import paths
from lib.pages import build, manifest, parameters, profiles
from lib.runs import store

LEDGER = """paper: {short: Doc, title: A document}
claims:
  - id: A1
    statement: a|b
    source: Table 1
    direction: greater
    published: 0.5
    page: a/one
    seeds: 3
  - {id: A2, statement: Too large., source: Table 2, reason: Not at this scale.}
items:
  - {id: T1, what: a|b, page: a/one, arms: [run*]}
  - {id: F1, what: A drawing., page: a/one}
"""
# a Markdown cell with two labels, one of which belongs to the code cell behind it
LABELS = "(a-t1)=\n## Table 1\n\nBefore a figure.\n\n(a-f1)="
ANSWER = """from lib.verdicts import ledger
from lib.verdicts.evidence import judge_estimate, verdicts_on
from lib.verdicts.stats import mean_interval
from lib.report.text import answer
given = judge_estimate("A1", mean_interval([0.9, 1.0, 1.1]))
answer(verdicts_on([given], ledger.of_page("a/one")))"""


@pytest.fixture
def book(tiny, monkeypatch):
    """The tiny book, seen by this process and its cache, too."""
    for module in (manifest, parameters, profiles, build, paths):
        monkeypatch.setattr(module, "ROOT", tiny.root)
    monkeypatch.setattr(paths, "RESULTS", tiny.root / "data" / "results")
    monkeypatch.setenv("MOE_CACHE", str(tiny.root / "cache"))
    return tiny


def why(key: str, profile: str = "quick") -> str | None:
    return manifest.reason_to_run(key, profile)


def test_build_then_nothing_then_only_what_changed(book):
    book.ledger("a", LEDGER)
    one = book.notebook("a/one", "from lib.tiny import FACTOR", "print(FACTOR * p.width)", ANSWER)
    content = json.loads(one.read_text())
    content["cells"][-1:-1] = [
        {"cell_type": "markdown", "id": "m", "metadata": {}, "source": LABELS}
    ]
    one.write_text(json.dumps(content))
    book.notebook(
        "a/two",
        "text = open(lib.paths.ROOT / 'data/papers/tiny.yaml').read()",
        "speeds = open(lib.paths.BENCH / 'cpu' / 'short.json').read()",
        "from lib.verdicts import speed\nspeed.elsewhere('short')",
        "speed.percent_of_dense(speed.file_of('frontier'), 'batch 1', 'fp32')",
        "small = lib.load(grid(lib.profile('a/two', 'small')))\nprint(small)",
        "import sys\nprint('a progress ' + 'bar', file=sys.stderr)",
    )
    speeds = book.root / "data" / "results" / "bench" / "cpu" / "short.json"
    speeds.parent.mkdir(parents=True)
    speeds.write_text("{}")
    assert why("a/one") == "never run"
    built = book.build("-W")
    assert built.returncode == 0, built.stdout + built.stderr
    assert "2 in the book, 2 to run (profile quick" in built.stdout
    html = book.root / "_build" / "html"
    assert (html / "index.html").is_file()
    assert "6" in (html / "notebooks" / "a" / "one.html").read_text()
    assert "a/one" in (html / "status.html").read_text()
    verdicts = (book.root / "book" / "verdicts_table.md").read_text()
    assert "The documents make 2 claims. 1 can be tested here and 1 of these is decided" in verdicts
    link = '(Table 1; <a href="notebooks/a/one.html#verdicts">a/one</a>)'
    assert f'<b>A1</b> a|b <span class="source">{link}</span>' in verdicts
    assert '<td data-name="Paper">+0.50 points</td>' in verdicts
    assert '<td data-name="Ours">+1.00 [+0.75, +1.25] points</td>' in verdicts
    assert '<span class="verdict holds"><span aria-hidden="true">✔</span> holds</span>' in verdicts
    assert "Too large." in verdicts and "Not at this scale." in verdicts
    assert (html / "verdicts.html").read_text().count('<table class="verdicts">') == 2
    assert "<strong>State of the claims.</strong>" in (html / "verdicts.html").read_text()
    covered = (html / "coverage.html").read_text()
    assert "2 tables and figures: 1 <strong>whole</strong>, 0 <strong>partly</strong>," in covered
    assert ": a|b</p>" in covered and "absent, 0\u00a0of\u00a01" in covered
    page = (html / "notebooks" / "a" / "one.html").read_text()
    for label in ("a-t1", "a-f1"):
        assert f'href="notebooks/a/one.html#{label}"' in covered and f'id="{label}"' in page
    published = json.loads((html / "claims.json").read_text())
    assert [row["verdict"] for row in published] == ["holds", None]
    assert published == json.loads((book.root / "book" / "claims.json").read_text())

    one = book.executed("a/one")
    assert str(book.root) not in json.dumps(one)
    assert [cell.get("execution_count") for cell in one["cells"]] == [None, 1, 2, 3, 4, 5, None, 6]
    assert not any("lib.pages.manifest" in "".join(cell["source"]) for cell in one["cells"])
    modules = {"lib/tiny.py", "lib/spec/run.py", "lib/__init__.py"}
    assert modules <= set(one["metadata"]["moe"]["modules"])
    assert "a progress bar" not in json.dumps(book.executed("a/two"))  # chatter goes to the log
    assert "a progress bar" in (book.root / "book" / "notebooks" / "a" / "two.log").read_text()
    two = book.executed("a/two")["metadata"]["moe"]
    measured = "data/results/bench/cpu"
    assert two["papers"].pop(f"{measured}/frontier.json") is None  # asked for, and not there
    assert list(two["papers"]) == ["data/papers/tiny.yaml", measured, f"{measured}/short.json"]
    assert "lib/tiny.py" not in two["modules"]
    assert len(two["records"]) == 2 and set(two["records"].values()) == {None}

    stamps = [manifest.executed(key).stat().st_mtime_ns for key in ("a/one", "a/two")]
    again = book.build()
    assert again.returncode == 0 and "2 in the book, 0 to run" in again.stdout
    assert stamps == [manifest.executed(key).stat().st_mtime_ns for key in ("a/one", "a/two")]

    assert why("a/one", "smoke") == "was run with profile quick"
    _changed(book.root / "lib" / "tiny.py", "lib/tiny.py changed", None)
    _changed(book.root / "data" / "papers" / "tiny.yaml", None, "data/papers/tiny.yaml changed")
    _changed(speeds, None, f"{measured}/short.json changed")
    _appears(speeds.with_name("short-avx2.json"), f"{measured} changed")
    _appears(speeds.with_name("frontier.json"), f"{measured} changed")
    record = book.root / "data" / "results" / "foundations" / f"{next(iter(two['records']))}.json"
    record.parent.mkdir(parents=True)
    record.write_text("{}")
    assert why("a/one") is None and why("a/two").startswith("1 of the records it read changed")
    record.unlink()
    table = book.root / "notebooks" / "profiles" / "small.yaml"
    table.write_text(table.read_text().replace("layers: [0, 1]", "layers: [0, 2]"))
    assert why("a/one") is None and why("a/two") == "its parameters changed (profile small)"
    book.notebook("a/one", "print(1)")
    assert why("a/one") == "the notebook changed"


def _appears(path, two: str) -> None:
    """Makes a file, sees that the second page alone notices, and takes it away."""
    path.write_text("{}")
    assert (why("a/one"), why("a/two")) == (None, two)
    path.unlink()
    assert (why("a/one"), why("a/two")) == (None, None)


def _changed(path, one: str | None, two: str | None) -> None:
    """Changes a file, sees which page notices, and puts it back."""
    old = path.read_bytes()
    path.write_bytes(old + b"# touched\n")
    assert (why("a/one"), why("a/two")) == (one, two)
    path.write_bytes(old)
    assert (why("a/one"), why("a/two")) == (None, None)


def test_failure_ends_the_build_and_keeps_the_part(book):
    book.notebook("a/one", "print('so far')", "1 / 0", "print('never')")
    built = book.build()
    assert built.returncode != 0
    said = built.stdout + built.stderr
    assert "a/one: ZeroDivisionError: division by zero" in said
    assert "book/notebooks/a/one.failed.ipynb" in said
    assert "done   a/two" in said  # the others are not lost
    part = manifest.failed("a/one").read_text()
    assert "so far" in part and "ZeroDivisionError" in part and "lib.pages.manifest" not in part
    assert not manifest.executed("a/one").exists()
    assert not list(manifest.failed("a/one").parent.glob(".*"))

    book.notebook("a/one", "print('well')")
    assert "2 in the book, 1 to run" in (fixed := book.build("-W")).stdout
    assert fixed.returncode == 0 and not manifest.failed("a/one").exists()


def test_a_killed_runner_is_a_failure_with_its_part(book):
    book.notebook(
        "a/one",
        "print('so far')",
        "import os\nos.kill(os.getppid(), 9)\nimport time\ntime.sleep(60)",
    )
    built = book.build()
    assert built.returncode != 0
    assert "a/one: ended by signal 9 (SIGKILL)" in built.stdout + built.stderr
    assert "so far" in manifest.failed("a/one").read_text()


def test_bad_input_is_refused_before_anything_runs(book):
    def refused(says: str, **env: str) -> None:
        built = book.build(**env)
        assert built.returncode != 0 and says in built.stdout + built.stderr
        assert not (book.root / "book" / "notebooks").exists()

    refused("unknown profile 'fast'; valid: smoke, quick, small, paper", PROFILE="fast")
    quick = book.root / "notebooks" / "profiles" / "quick.yaml"
    good = quick.read_text()
    quick.write_text(good.replace("width: 3", "width: wide", 1))
    refused("width='wide' for a/one is not int")
    quick.write_text(good)
    (book.root / "notebooks" / "a" / "two.ipynb").unlink()
    refused("_toc.yml lists notebooks/a/two")


def test_an_unreadable_executed_copy_runs_again(book):
    manifest.executed("a/one").parent.mkdir(parents=True)
    manifest.executed("a/one").write_text('{"cells": [')
    assert why("a/one") == "executed copy without a valid manifest"


def test_records_are_hashed_where_the_store_finds_them(book):
    cached = book.root / "cache" / "records" / "s" / "0123456789abcdef.json"
    assert manifest.records_now([cached.stem]) == {cached.stem: None}
    cached.parent.mkdir(parents=True)
    cached.write_text("{}")
    assert store.store().find(cached.stem) == cached
    assert manifest.records_now([cached.stem])[cached.stem] == manifest.digest(cached)


def test_threads_and_files_of_this_machine():
    assert 1 <= manifest.cores() <= (os.cpu_count() or 1)
    assert manifest.machine()["processor"]
    assert manifest.machine()["versions"]["papermill"] != "not installed"


# ---- what ends a build


def test_a_notebook_that_hangs_is_a_failure_that_names_the_limit(book):
    book.notebook("a/one", "import time\nprint('so far', flush=True)\ntime.sleep(600)")
    ran = book.call("-m", "lib", "run", "a/one", "--profile", "smoke", "--limit", "3s")
    assert ran.returncode == 1
    assert "a/one: a cell was not done after 3s, the limit (give more with MOE_LIMIT" in ran.stderr
    [part] = (book.root / "_build" / "runs" / "smoke" / "a").glob("*")
    assert part.name == "one.failed.ipynb" and "so far" in part.read_text()


def test_a_limit_that_is_no_time_is_refused(book):
    ran = book.call("-m", "lib", "run", "a/one", "--profile", "smoke", MOE_LIMIT="soon")
    assert ran.returncode == 2 and "limit 'soon' is no time: give hours" in ran.stderr


def test_two_runners_of_one_notebook_do_not_share_a_file(book):
    out = book.root / "one.ipynb"
    assert build._part(out, 1) != build._part(out, 2)
    assert build._part(out, 1).name.startswith(".")
