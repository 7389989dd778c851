"""What the README says of the code is so."""

from __future__ import annotations

import re
from pathlib import Path

from test_rooms import ORDER
from toy_study import CELLS, CLASS, LEDGER, PARAMETERS, ROUTER, SPECS, WORD

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_the_new_study_of_the_readme_is_the_one_that_is_tested():
    for text in (WORD, CLASS, ROUTER):
        for line in text.strip("\n").splitlines():
            assert f"+{line}\n" in README, line
    for text in (LEDGER, PARAMETERS, SPECS, *CELLS):
        assert text.strip() in README, text


def test_the_drawing_of_the_rooms_has_them_all_in_their_order():
    drawn = README[README.index("notebooks/  ") :]
    places = [min(drawn.index(f"lib/{room} ") for room in rooms) for rooms in ORDER[1:-1]]
    assert places == sorted(places, reverse=True)


def test_files_that_the_readme_names_are_there():
    named = re.findall(r"`((?:lib|tests|notebooks|book|benchmarks|data)/[\w./]+)`", README)
    assert named and [path for path in named if not (ROOT / path).exists()] == []
