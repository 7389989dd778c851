"""A sixth study, as a contributor would add it: a router by hash, and its page.

Each piece of text stands in the README, too (`tests/test_readme.py` holds the two together).
"""

from __future__ import annotations

from pathlib import Path

# ---- the router: a word of the spec, a class, two lines of the registry
WORD = """
    "hash": RouterWord(_LAYER, learns=False),
"""
CLASS = """
from .hash import HashRouter
    "hash": HashRouter,
"""
ROUTER = '''
import torch

from .base import Router, fixed


class HashRouter(Router):
    """Sends a token to the expert that its position hashes to: no gate, nothing to learn."""

    @classmethod
    def from_spec(cls, spec, width, generator):
        return cls(spec.experts)

    def forward(self, x):
        b, n, _ = x.shape
        expert = torch.arange(n, device=x.device) * 2654435761 % 2**32 % self.experts
        return fixed(expert.repeat(b).unsqueeze(1), self.experts, (b, n))

    def expert_rows(self, tokens, images):
        return tokens  # each passes one expert

    def experts_per_image(self):
        return None  # as many as its positions hash to: measured

    def decision_macs(self, tokens, images):
        return 0
'''

# ---- the page: its claim in the ledger, the two tagged cells, the others, an entry in a profile
LEDGER = """paper: {title: Routing by hash}
claims:
  - id: H.place
    kind: ours
    statement: "Sorting tokens by place beats the dense model."
    source: our own idea
    direction: greater
    smallest: 1
    page: hash/positions
    arms: [hash, dense]
answers:
  hash/positions:
    H.place:
      holds: "**Yes** ({ours})."
      fails: "**No** ({ours})."
      open: "**Not decided** ({ours})."
"""

PARAMETERS = """profile: str = "quick"  # smoke, quick, small or paper
seeds: list[int] = None  # random starts
"""
SPECS = """import lib


def grid(p):
    moe = {"layers": 1, "experts": 3, "router": "hash", "balance": "none"}
    runs = {"dense": p.base, "hash": p.base.but(moe=moe)}
    return {name: [run.but(seed=seed) for seed in p.seeds] for name, run in runs.items()}


p = lib.profile("hash/positions", globals())
"""
CELLS = (
    """import pandas as pd

from lib.verdicts.evidence import compare

page = lib.page(grid, p)
page.intro()
""",
    """def claims(side):
    yield compare("H.place", side["hash"], side["dense"])


page.answer(claims)
""",
    """models = pd.DataFrame({"model": list(page.reproduced)})
page.table(models, {}, lambda side: {"top-1 (%)": [side.accuracy(key) for key in side]})
""",
    """page.costs("dense")
""",
    """page.verdicts(claims)
""",
)
BASE = """base:
  data: {name: mnist5k, image_size: 28, train: 64, val: 20, test: 30}
  backbone: {patch: 7, width: 16, depth: 2, heads: 2}
  train: {epochs: 1.0, batch: 32, lr: 0.001}
  threads: 1
"""


def insert(file, lines, before):
    """Adds lines to a file, each before the line that starts with the text of the same place."""
    text = file.read_text()
    for line, mark in zip(lines.strip("\n").splitlines(), before, strict=True):
        assert text.count(mark) == 1, mark
        text = text.replace(mark, f"{line}\n{mark}")
    file.write_text(text)


def add_router(lib: Path) -> None:
    """Makes the three edits of `lib` that the new router needs."""
    insert(lib / "spec" / "moe.py", WORD, ['    "soft": RouterWord('])
    insert(lib / "routers" / "__init__.py", CLASS, ["from .manual import", '    "soft": '])
    (lib / "routers" / "hash.py").write_text(ROUTER.lstrip())
