"""What the README says of the code is so."""

from __future__ import annotations

import re
from pathlib import Path

from test_rooms import ORDER
from toy_study import CELLS, CLASS, LEDGER, PARAMETERS, ROUTER, SPECS, WORD

from lib.__main__ import _parser
from lib.pages import all_verdicts, parameters, profiles
from lib.verdicts import ledger

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


def test_the_state_of_the_claims_is_that_of_the_ledger():
    """Verdicts change with each record: `python -m lib claims --readme` writes them anew. What the
    ledger alone says must be right at any time."""
    state = README.split(all_verdicts.START)[1].split(all_verdicts.END)[0]
    whole = [claim for claim in ledger.claims().values() if claim.part_of is None]
    documents = [claim for claim in whole if claim.kind == "document"]
    tested = [claim for claim in documents if claim.reason is None]
    said = " ".join(state.split())
    assert f"The documents make {len(documents)} claims. {len(tested)} can be tested here" in said
    assert f"{len(whole) - len(documents)} controls of this book" in said
    verdicts = said.partition("All verdicts:")[2].partition(". ")[0]
    assert sum(map(int, re.findall(r"(\d+) \*", verdicts))) == len(tested)


def test_commands_that_a_reader_types_have_runs():
    """Pages, profiles and values of `run`, in the README and in the book; PAGE is the reader's."""
    texts = [README, *(path.read_text() for path in sorted((ROOT / "book").glob("*.md")))]
    typed = [line for text in texts for line in re.findall(r"python -m (lib run [^`#\n]*)", text)]
    assert len(typed) > 9
    for line in typed:
        options = _parser().parse_args(line.split()[1:])
        if options.notebook == "PAGE":
            continue
        for key in parameters.keys_of(options.notebook):
            given = parameters.from_text(key, dict(options.given))
            assert profiles.plan(key, options.profile or profiles.PUBLISHED, **given) is not None


def test_files_that_the_readme_names_are_there():
    named = re.findall(r"`((?:lib|tests|notebooks|book|benchmarks|data)/[\w./]+)`", README)
    assert named and [path for path in named if not (ROOT / path).exists()] == []
