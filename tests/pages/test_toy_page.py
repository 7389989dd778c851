"""A new study: three edits of lib, a file of the ledger, a notebook, an entry in the profiles, a
line in the table of contents."""

from __future__ import annotations

import re
import shlex

import pytest
from toy_study import BASE, CELLS, LEDGER, PARAMETERS, SPECS, add_router

KEY = "hash/positions"
FILL = f"python -m lib run {KEY} --profile small --records"


@pytest.fixture
def book(tiny):
    """The tiny book with one page, of the router by hash."""
    add_router(tiny.root / "lib")
    (tiny.root / "data" / "papers" / "hash.yaml").write_text(LEDGER)
    specs = SPECS.replace("{", "{{").replace("}", "}}")
    tiny.notebook(KEY, *CELLS, parameters=PARAMETERS, specs=specs)
    for name, seeds, publish in (("quick", [0], "false"), ("small", [1, 2, 3], "true")):
        tiny.profile(name, f"{BASE}  publish: {publish}\n{KEY}: {{seeds: {seeds}}}\n")
    tiny.contents(f"notebooks/{KEY}", "status", "verdicts", "how_to_read")
    return tiny


def html_of(book, name: str) -> str:
    return (book.root / "_build" / "html" / f"{name}.html").read_text()


def test_a_new_study_is_built_and_its_own_command_fills_it(book):
    code = "\n".join([PARAMETERS, SPECS, *CELLS])
    assert len([line for line in code.splitlines() if line.strip()]) <= 20

    built = book.build("-W")
    assert built.returncode == 0, built.stdout + built.stderr
    page = html_of(book, f"notebooks/{KEY}")
    assert "<strong>Reproduced:</strong> MNIST (5,000 images) at 28 px, 64 training images" in page
    assert "The claim of this page has no records yet." in page
    assert FILL not in page  # the commands stand on the page of the status, once
    # below the table, and in the caption of the costs
    assert page.count('<a href="../../status.html#what-is-not-computed-yet">Status</a>') >= 2
    state = html_of(book, "status")
    assert re.sub("<.*?>", "", state).count(FILL) == 1 and 'id="what-is-not-computed-yet"' in state
    assert page.count("Sorting tokens by place beats the dense model") == 2  # on both sides
    # one seed claims no order
    assert "points, n=1</td>" in page and "undecided (pilot)</td>" in page
    assert ">MACs (% of dense)</th>" in page and "images/s" not in page
    verdicts = html_of(book, "verdicts")
    assert "Routing by hash" in verdicts and "</span> not tested</span>" in verdicts
    records = book.executed(KEY)["metadata"]["moe"]["records"]
    assert sorted(map(bool, records.values())) == [False] * 6 + [True] * 2
    assert {path.parent.name for path in book.root.glob("cache/records/*/*.json")} == {"hash"}

    filled = book.call(*shlex.split(FILL)[1:])
    assert filled.returncode == 0, filled.stderr
    assert filled.stdout == f"{KEY}, small: all 6 records are there\n"
    published = [path.stem for path in book.root.glob("data/results/hash/*.json")]
    assert sorted(published) == sorted(record for record, value in records.items() if not value)
    stale = book.call(
        "-c", f"from lib.pages.manifest import *; print(reason_to_run({KEY!r}, 'quick'))"
    )
    assert stale.stdout.startswith("6 of the records it read changed"), stale.stderr
