"""Defaults of all tests, and a book of two tiny notebooks for the tests of the machinery.

The cache is a temporary one, with few threads; both are set before anything imports torch.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

# one for all tests: a backbone that two of them need is trained once
_CACHE = tempfile.mkdtemp(prefix="cache-")
os.environ["MOE_CACHE"] = _CACHE
# several processes share the tests of `make test`, and each is to keep to one core
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
os.environ.pop("PROFILE", None)  # tests say which profile they mean

ROOT = Path(__file__).resolve().parents[1]

PARAMETERS = """profile: str = "quick"  # smoke, quick, small or paper
width: int = None  # hidden width in units, 1-9
scale: float = 1.0  # factor on the result, 0.5-2
layers: list[int] = None  # blocks to look at
"""
SPECS = """import lib
from lib.spec import RunSpec, TrainSpec

p = lib.profile("{key}", profile, width=width, scale=scale, layers=layers)


def grid(p):
    return {{"runs": [RunSpec(seed=s, train=TrainSpec(epochs=p.scale)) for s in p.layers]}}
"""


# folders whose tests start processes and wait for them
SLOW = ("runs", "pages", "training", "bench", "faults")


def pytest_collection_modifyitems(items):
    """Puts the slow folders first: one long file left at the end would keep one core alone."""
    items.sort(key=lambda item: item.path.parent.name not in SLOW)  # keeps the order otherwise


def pytest_sessionfinish(session, exitstatus):
    shutil.rmtree(_CACHE, ignore_errors=True)


class TinyBook:
    """A project folder with its own copy of `lib`, so that a test may change what it likes."""

    def __init__(self, root: Path):
        self.root = root
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "lib", root / "lib", ignore=ignored)
        shutil.copy(ROOT / "_config.yml", root)
        for name in ("status.md", "verdicts.md", "coverage.md", "how_to_read.md", "references.bib"):
            (root / "book").mkdir(exist_ok=True)
            shutil.copy(ROOT / "book" / name, root / "book")
        shutil.copytree(ROOT / "book" / "_static", root / "book" / "_static")
        (root / "lib" / "tiny.py").write_text("FACTOR = 2\n")
        (root / "data" / "papers").mkdir(parents=True)
        (root / "data" / "papers" / "tiny.yaml").write_text("published: 7\n")
        (root / "book" / "intro.md").write_text(
            "# Tiny\n\nA book {cite}`vimoe`.\n\n```{bibliography}\n```\n"
        )
        prose = ("status", "verdicts", "coverage", "how_to_read")
        self.contents("notebooks/a/one", "notebooks/a/two", *prose)
        (root / "book" / "_toc.yml").symlink_to("../_toc.yml")
        self.notebook("a/one", "from lib.tiny import FACTOR", "print(FACTOR * p.width)")
        self.notebook("a/two", "print(open(lib.paths.ROOT / 'data/papers/tiny.yaml').read())")
        values = "width: 3, layers: [0, 1]"
        for name in ("smoke", "quick", "small"):
            self.profile(name, f"a/one: {{{values}}}\na/two: {{{values}}}\n")

    def contents(self, *files: str) -> None:
        """Writes the table of contents."""
        toc = {"format": "jb-book", "root": "intro", "chapters": [{"file": f} for f in files]}
        (self.root / "_toc.yml").write_text(json.dumps(toc))  # JSON is YAML

    def profile(self, name: str, text: str) -> None:
        """Writes the YAML file of a profile."""
        path = self.root / "notebooks" / "profiles" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def ledger(self, study: str, text: str) -> None:
        """Writes a file of `data/papers`."""
        (self.root / "data" / "papers" / f"{study}.yaml").write_text(text)

    def notebook(
        self, key: str, *cells: str, parameters: str = PARAMETERS, specs: str = SPECS
    ) -> Path:
        """Writes a source notebook with the two tagged cells, a title and more code cells.

        specs: `{key}` in it becomes the key, so other braces are doubled.
        """
        sources = [
            (parameters, ["parameters"]),
            (specs.format(key=key), ["specs"]),
            *((cell, []) for cell in cells),
        ]
        title = {
            "cell_type": "markdown",
            "id": "title",
            "metadata": {},
            "source": f"# Notebook {key}\n",
        }
        code = [
            {
                "cell_type": "code",
                "id": f"c{i}",
                "metadata": {"tags": tags},
                "source": text,
                "outputs": [],
                "execution_count": None,
            }
            for i, (text, tags) in enumerate(sources)
        ]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        content = {
            "cells": [title, *code],
            "metadata": {"kernelspec": kernel},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        path = self.root / "notebooks" / f"{key}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        return path

    def executed(self, key: str) -> dict:
        """Reads the executed copy of a notebook."""
        return json.loads((self.root / "book" / "notebooks" / f"{key}.ipynb").read_text())

    def call(
        self, *command: str, cwd: Path | None = None, **env: str
    ) -> subprocess.CompletedProcess:
        """Runs a python command line against this project's own `lib`."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "MOE_CACHE": str(self.root / "cache"),
            **env,
        }
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd or self.root,
            env=environment,
            text=True,
            capture_output=True,
        )

    def build(self, *options: str, **env: str) -> subprocess.CompletedProcess:
        """Runs `jupyter-book build book`."""
        return self.call(
            "-c", "from jupyter_book.cli.main import main; main()", "build", *options, "book", **env
        )


@pytest.fixture(autouse=True)
def same_environment():
    """Takes back what a command under test sets in the environment of this process.

    `monkeypatch` takes back what it set itself, and notes nothing of a variable that was not set.
    """
    before = {name: value for name, value in os.environ.items() if name.startswith("MOE_")}
    yield
    for name in [name for name in os.environ if name.startswith("MOE_") and name not in before]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture
def tiny(tmp_path) -> TinyBook:
    """A tiny book that one test has for itself."""
    return TinyBook(tmp_path / "project")


@pytest.fixture
def where(tmp_path):
    """An empty store that one test has for itself."""
    from lib.runs.store import Store  # after the cache is set, above

    return Store(tmp_path / "published", tmp_path / "private")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty MOE_DATA, with nothing remembered from another one."""
    from lib.inputs import sources  # after the cache is set, above

    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("MOE_DATA", str(folder))
    monkeypatch.setenv("MOE_CACHE", str(tmp_path / "cache"))
    sources.forget()
    yield folder
    sources.forget()
