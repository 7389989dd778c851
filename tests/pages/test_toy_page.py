"""A page is a notebook, an entry in the profiles and a line in the table of contents: no more."""

from __future__ import annotations

import shlex

import pytest

PARAMETERS = """profile: str = "quick"  # smoke, quick, small or paper
seeds: list[int] = None  # random starts
"""
SPECS = """import lib
from lib.verdicts.claims import compare

p = lib.profile("{key}", globals())


def grid(p):
    base, moe = p.base, {{"layers": 1, "experts": 2}}
    runs = {{"dense": base, "MoE": base.but(moe=moe)}}
    return {{name: [run.but(seed=seed) for seed in p.seeds] for name, run in runs.items()}}
"""
CELLS = (
    "import pandas as pd\n\npage = lib.page(grid, p)\npage.intro()",
    "def claims(side):\n"
    '    return [compare("The MoE beats dense", side["MoE"], side["dense"], "greater")]\n\n\n'
    "page.answer(claims)",
    'models = pd.DataFrame({"model": list(page.reproduced)})\n'
    'page.table(models, {}, lambda side: {"top-1 (%)": [side.accuracy(key) for key in side]})',
    'page.costs("dense")',
    "page.verdicts(claims)",
)
RUN = """base:
  data: {{name: mnist5k, image_size: 28, train: 64, val: 20, test: 30}}
  backbone: {{patch: 7, width: 16, depth: 2, heads: 2}}
  train: {{epochs: 1.0, batch: 32, lr: 0.001}}
  threads: 1
  publish: {publish}
a/toy: {{seeds: [{seed}]}}
"""
FILL = "python -m lib run a/toy --profile small --records"


@pytest.fixture
def book(tiny):
    """The tiny book with one page, the toy."""
    tiny.notebook("a/toy", *CELLS, parameters=PARAMETERS, specs=SPECS)
    tiny.profile("quick", RUN.format(publish="false", seed=0))
    tiny.profile("small", RUN.format(publish="true", seed=1))
    tiny.contents("notebooks/a/toy", "status", "verdicts", "how_to_read")
    return tiny


def html_of(book, name: str) -> str:
    return (book.root / "_build" / "html" / f"{name}.html").read_text()


def test_a_toy_page_is_built_and_its_own_command_fills_it(book):
    code = "\n".join([PARAMETERS, SPECS, *CELLS])
    assert len([line for line in code.splitlines() if line.strip()]) <= 20

    built = book.build("-W")
    assert built.returncode == 0, built.stdout + built.stderr
    page = html_of(book, "notebooks/a/toy")
    assert "<strong>Reproduced:</strong> mnist5k at 28 px, 64 training images" in page
    assert "None of this page’s 1 claims has its records yet." in page
    assert page.count(FILL) >= 2  # below the table, and in the caption of the costs
    assert "This build: The MoE beats dense" in page and "one seed claims no order" in page
    assert "Limit: the speed of &#x27;dense&#x27; scaled by multiply-adds." in page
    assert "0 <em>undecided</em>, 1 <em>not tested</em>" in html_of(book, "verdicts")
    records = book.executed("a/toy")["metadata"]["moe"]["records"]
    assert sorted(map(bool, records.values())) == [False, False, True, True]
    assert {path.parent.name for path in book.root.glob("cache/records/*/*.json")} == {"a"}

    filled = book.call(*shlex.split(FILL)[1:])
    assert filled.returncode == 0, filled.stderr
    assert filled.stdout == "a/toy, small: all 2 records are there\n"
    published = [path.stem for path in book.root.glob("data/results/a/*.json")]
    assert sorted(published) == sorted(record for record, value in records.items() if not value)
    stale = book.call(
        "-c", "from lib.pages.manifest import *; print(reason_to_run('a/toy', 'quick'))"
    )
    assert stale.stdout.startswith("2 of the records it read changed"), stale.stderr
