"""Imports between the rooms of lib go one way, from the end of this list to its beginning."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIB = ROOT / "lib"
# Rooms on one line may import each other.
ORDER = (
    {"machine", "paths"},
    {"spec"},
    {"inputs"},
    {"routers", "models"},
    {"pruning", "extraction"},
    {"training"},
    {"measure"},
    {"api"},
    {"runs"},
    {"verdicts"},
    {"report"},
    {"pages"},
    {"__init__", "__main__"},
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}
WITHOUT_TORCH = ("lib", "lib.spec", "lib.verdicts.stats", "lib.verdicts.claims", "lib.pages.build")


def rooms_that(file: Path) -> dict[str, int]:
    """{room: line} of every room of lib that a module imports, inside its functions, too."""
    package = file.relative_to(LIB).with_suffix("").parts[:-1]
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level == 0 and (node.module or "").split(".")[0] != "lib":
            continue
        above = package[: len(package) - node.level + 1] if node.level else ()
        named = (node.module or "").removeprefix("lib").strip(".")
        path = [*above, *filter(None, named.split("."))]
        for room in [path[0]] if path else [name.name for name in node.names]:
            if room in LEVEL:
                found[room] = node.lineno
    return found


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_imports_go_one_way(room):
    files = [LIB / f"{room}.py"] if (LIB / f"{room}.py").is_file() else (LIB / room).rglob("*.py")
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {other}"
        for file in files
        for other, line in rooms_that(file).items()
        if LEVEL[other] > LEVEL[room]
    ]
    assert not wrong


def test_every_room_has_its_place():
    there = {path.stem for path in LIB.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert there - {"__pycache__"} == set(LEVEL)


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_planning_and_judging_import_no_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr
