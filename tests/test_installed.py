"""The package as a user has it: a wheel, without the book, beside a folder `lib` of the user's.

The wheel is built and installed from what is here: nothing is downloaded.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from lib import paths

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
# what only the book or an extra asks for: figures in notebooks, building, clusters, GradCAM
OF_THE_BOOK = {
    "accelerate",
    "distributed",
    "grad-cam",
    "ipython",
    "ipywidgets",
    "nbformat",
    "packaging",
}
OF_THE_BOOK |= {"docutils", "papermill", "sphinx"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that a wheel of this checkout was installed into."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("installed")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", wheels, paths.ROOT]
    subprocess.run([*PIP, *build], check=True)
    [wheel] = wheels.glob("*.whl")
    subprocess.run([*PIP, "install", "--no-deps", "--no-index", "-t", target, wheel], check=True)
    return target


@pytest.fixture
def python(installed, tmp_path):
    """Runs Python in a folder with a `lib` of the user's; with the wheel and no checkout on the
    path, and a home of its own."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "__init__.py").write_text("MINE = 1\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MOE_")}
    env |= {"PYTHONPATH": str(installed), "HOME": str(tmp_path / "home")}
    env.pop("XDG_CACHE_HOME", None)

    def run(*arguments, **extra):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=env | extra,
            capture_output=True,
            text=True,
        )

    return run


def test_the_alias_works_beside_a_lib_of_the_users(python, installed):
    code = """
import json, sys
import moe_vision as lib
from moe_vision import MoESpec, upcycle
from moe_vision.verdicts import papers
import torch
from timm.models import VisionTransformer

vit = VisionTransformer(28, 14, embed_dim=12, depth=2, num_heads=2, num_classes=3)
moe = upcycle(vit, MoESpec(layers=1, experts=2))
print(json.dumps({
    "layer": type(moe.blocks[-1].mlp).__module__,
    "same": lib.upcycle is upcycle,
    "lib": "lib" in sys.modules,
    "logits": list(moe(torch.zeros(1, 3, 28, 28)).shape),
    "papers": papers.names(),
    "cache": str(lib.paths.cache()),
    "results": str(lib.paths.RESULTS),
    "homes": list({getattr(lib, name).__module__.split(".")[0] for name in lib.__all__}),
}))
import lib as mine
assert mine.MINE == 1
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    home = Path(said["cache"]).parents[2]
    assert home.name == "home" and not home.is_relative_to(installed)
    assert said == {
        "layer": "moe_vision.models.moe",
        "same": True,
        "lib": False,
        "logits": [1, 3],
        "papers": sorted(path.stem for path in paths.PAPERS.glob("*.yaml")),
        "cache": str(home / ".cache" / "moe_vision" / "cache"),
        "results": str(home / ".cache" / "moe_vision" / "results"),
        "homes": ["moe_vision"],  # of every public name
    }


def test_the_cache_lies_where_the_user_says(python, tmp_path):
    code = "from moe_vision import paths; print(paths.cache())"
    done = python("-c", code, XDG_CACHE_HOME=str(tmp_path / "caches"))
    assert done.stdout.strip() == str(tmp_path / "caches" / "moe_vision" / "cache"), done.stderr
    done = python("-c", code, MOE_CACHE=str(tmp_path / "mine"))
    assert done.stdout.strip() == str(tmp_path / "mine"), done.stderr


def test_what_needs_the_book_says_so(python):
    done = python("-m", "moe_vision", "status")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: the command status needs a checkout of the project")
    done = python("-c", "import moe_vision; moe_vision.profile('vimoe/convergence', 'quick')")
    assert "needs a checkout" in done.stderr.splitlines()[-1]
    done = python("-c", "import moe_vision; moe_vision.plan('vimoe/convergence', 'quick')")
    assert "needs a checkout" in done.stderr.splitlines()[-1]


def test_a_checkout_keeps_all_in_its_folders(monkeypatch):
    monkeypatch.delenv("MOE_CACHE")
    assert not paths.INSTALLED
    assert paths.cache() == paths.ROOT / "data" / "cache"
    assert paths.RESULTS == paths.ROOT / "data" / "results"
    assert paths.PAPERS == paths.ROOT / "data" / "papers"


def test_no_module_asks_for_lib_by_its_name():
    """Under the alias that would be another package, or the user's."""
    absolute = [
        f"{file.relative_to(paths.ROOT)}:{node.lineno}"
        for file in paths.LIB.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if "lib" in [name.split(".")[0] for name in _imported(node)]
    ]
    assert absolute == []


def test_what_lib_imports_is_among_its_dependencies():
    project = tomllib.loads((paths.ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.match(r"[\w-]+", need)[0].lower() for need in project["dependencies"]}
    distributions = packages_distributions()
    wanted = {
        distribution.lower()
        for file in paths.LIB.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in _imported(node)
        for distribution in distributions.get(name.split(".")[0], ())
    }
    assert wanted - OF_THE_BOOK == declared


def _imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports by their whole names."""
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    if isinstance(node, ast.ImportFrom) and node.level == 0:
        return [node.module]
    return []
