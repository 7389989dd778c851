"""The command line: `python -m lib run | fill | status`, and papermill by hand."""

from __future__ import annotations

import json

import pytest

from lib.__main__ import main
from lib.pages import profiles, status
from lib.runs import collect as runs
from lib.spec import RunSpec


@pytest.fixture
def away(tmp_path):
    """A folder with an empty `lib` in it, which must not hide the package."""
    (tmp_path / "away" / "lib").mkdir(parents=True)
    return tmp_path / "away"


def test_run_with_overrides_from_any_folder(tiny, away):
    tiny.notebook("a/one", "print(p.width, p.scale, p.layers)")
    command = "run a/one --profile smoke -p width 4 -p scale 2 -p layers 5,6 -o out.ipynb"
    done = tiny.call("-m", "lib", *command.split(), cwd=away)
    assert done.returncode == 0, done.stderr
    out = json.loads((away / "out.ipynb").read_text())
    assert out["cells"][-1]["outputs"][0]["text"] == ["4 2.0 (5, 6)\n"]
    assert out["metadata"]["moe"]["given"] == {"width": 4, "scale": 2.0, "layers": [5, 6]}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            ["-p", "expert", "8"],
            "unknown parameter 'expert' for a/one; it has profile: str; width: int",
        ),
        (["-p", "width", "wide"], "width='wide' for a/one is not int: hidden width in units, 1-9"),
        (["-p", "layers", "1,b"], "layers='1,b' for a/one is not list[int]"),
        (["-p", "profile", "smoke"], "give the profile with --profile"),
        (["--profile", "fast"], "unknown profile 'fast'"),
        (["-p", "scale", "1e18"], "a/one has no runs for scale=1e+18: epochs=1e+18: it should be"),
    ],
)
def test_bad_input_is_refused(tiny, options, says):
    done = tiny.call("-m", "lib", "run", "a/one", *options)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and says in done.stderr
    assert not (tiny.root / "_build").exists()


def test_a_failing_notebook_exits_1(tiny):
    tiny.notebook("a/one", "undefined_name")
    done = tiny.call("-m", "lib", "run", "a/one")
    assert done.returncode == 1 and "error: a/one: NameError" in done.stderr
    assert (tiny.root / "_build" / "runs" / "quick" / "a" / "one.failed.ipynb").is_file()


def test_a_failed_run_and_its_reason_come_first(monkeypatch, capsys):
    def collect(grid, executor=None):
        raise RuntimeError("run 0123: ValueError: no such cost\nrun 4567: OSError: disk is full")

    monkeypatch.setattr(profiles, "plan", lambda key, name, **given: {})
    monkeypatch.setattr(runs, "collect", collect)
    assert main(["run", "vimoe/convergence", "--profile", "smoke", "--records"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[0] == "error: run 0123: ValueError: no such cost"
    assert "run 4567: OSError: disk is full" in err  # the others follow


@pytest.mark.parametrize("workers", ["0", "-1"])
def test_no_worker_computes_nothing(monkeypatch, capsys, workers):
    monkeypatch.setattr(profiles, "plan", lambda key, name, **given: {})
    assert main(["run", "vimoe/convergence", "--records", "--workers", workers]) == 2
    assert capsys.readouterr().err.startswith(f"error: --workers {workers}: at least one run")


def test_dry_run_lists_runs(tiny):
    done = tiny.call("-m", "lib", "run", "a/one", "--dry", "-p", "layers", "3,4,5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("runs: 3 runs\n") and done.stdout.count("missing") == 3


def test_status_names_state_and_command(tiny):
    done = tiny.call("-m", "lib", "status")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["a/one", "missing", "0/2", "0/2", "-"] in rows
    assert "a/one, small: python -m lib run a/one --profile small --records" in done.stdout
    assert "a/two, page: make book (never run)" in done.stdout
    first = done.stdout.partition("(python -m lib fill --profile quick --budget 1h):\n")[2]
    dry = tiny.call("-m", "lib", "fill", "--profile", "quick", "--budget", "9h", "--dry")
    runs_of = {
        text: [line.strip() for line in text.splitlines()[:3]] for text in (first, dry.stdout)
    }
    assert runs_of[first] == runs_of[dry.stdout] and "a/one: runs and 1 more" in first


def test_papermill_by_hand_from_any_folder(tiny, away):
    source = str(tiny.root / "notebooks" / "a" / "one.ipynb")
    given = "-p profile smoke -p width 8".split()
    done = tiny.call("-m", "papermill", source, "out.ipynb", *given, cwd=away)
    assert done.returncode == 0, done.stderr
    assert "16\n" in json.loads((away / "out.ipynb").read_text())["cells"][-1]["outputs"][0]["text"]
    wrong = tiny.call("-m", "papermill", source, "out.ipynb", "-p", "width", "wide", cwd=away)
    assert wrong.returncode != 0 and "width='wide' for a/one is not int" in wrong.stderr
    told = tiny.call("-m", "papermill", "--help-notebook", source, cwd=away)
    assert (
        "width: int (default None)" in told.stdout and "hidden width in units, 1-9" in told.stdout
    )
    assert "layers: list[int] (default None)" in told.stdout


def test_the_status_page_tells_where_records_were_computed(monkeypatch):
    records = {
        "r1": {
            "created": "2026-01-01T00:00:00+00:00",
            "environment": {"processor": "P", "products": "bfloat16"},
        },
        "r2": {
            "created": "2026-01-03T00:00:00+00:00",
            "weights": {"parent_differs": True},
            "environment": {"processor": "P", "products": "float32, rounded to bfloat16"},
        },
        "r3": {"environment": {"processor": "P"}},
        "r4": {"environment": {"processor": "P", "accelerator": "A", "products": "bfloat16"}},
    }
    content = {
        "profile": "quick",
        "seconds": 3,
        "finished": "2026-01-04T00:00:00+00:00",
        "records": dict.fromkeys(records, "x") | {"r5": None},
        "machine": {"processor": "Q", "cores": 2, "threads": 2, "versions": {}},
    }
    monkeypatch.setattr(status.manifest, "read", {"a/one": content, "a/two": content}.get)
    monkeypatch.setattr(status, "content_of", records.get)
    page = status.page(["a/one", "a/two"])
    assert (
        "- P: 2\n- P, products in float32, rounded to bfloat16: 1\n- A: 1\n" in page
        and "Of these records 1 start" in page
    )
    assert page.count("4 of 5") == 2 and "2026&#8209;01&#8209;01, 3&nbsp;days&nbsp;before" in page


def test_the_status_page_has_the_commands_of_what_is_absent_once(monkeypatch):
    in_folder = RunSpec(data={"name": "eurosat"})
    plans = {
        "a/one": {"arm": [RunSpec(), RunSpec(seed=1)], "same": [RunSpec()]},
        "a/two": {"arm": [in_folder]},
        "a/whole": {"arm": [RunSpec(seed=2)]},
    }
    monkeypatch.setattr(status.profiles, "has_profile", lambda key, name: key in plans)
    monkeypatch.setattr(status.profiles, "plan", lambda key, name: plans[key])
    monkeypatch.setattr(status.manifest, "read", lambda key: None)
    monkeypatch.setattr(status.coverage, "has_record", lambda run: run.seed == 2)
    page = status.page([*plans, "a/prose"])
    assert "| [a/one](notebooks/a/one.ipynb) | 2 of 2 | `python -m lib run a/one" in page
    command = "python -m lib run a/two --profile small --records"
    assert f"| 1 of 1 | `MOE_DATA=... {command}` |" in page and page.count(command) == 1
    assert "python -m lib run a/whole" not in page
    monkeypatch.setattr(status.coverage, "has_record", lambda run: True)
    assert "All records are there that the pages ask for." in status.page(list(plans))
