"""Fixes how many seeds a claim gets in all, once its pilot is there.

Three seeds are the pilot. From its variance the second stage is computed (`stats.second_stage`) and
written into the claim's entry in `data/papers`, once: a stage that is there is never changed, so
that nobody adds seeds until a verdict pleases. The history of the file says when it was fixed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .. import paths
from ..verdicts import ledger
from ..verdicts.law import Law
from ..verdicts.stats import MIN_SEEDS, Interval, second_stage


def fix(listed: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Writes the second stage of each claim whose pilot is whole and whose stage is open.

    listed: rows of `claims.json`. Returns {id: seeds in all} of what was written.
    """
    entries, fixed = ledger.claims(), {}
    for row in listed:
        claim = entries[row["id"]]
        is_open = not isinstance(claim.seeds, int) and len(claim.seeds) == 1 and not claim.parts
        if is_open and row["law"] and row["n"] >= max(MIN_SEEDS, claim.planned_seeds):
            estimate = Interval(
                row["effect"], row["low"], row["high"], row["n"], law=Law(**row["law"])
            )
            fixed[claim.id] = second_stage(estimate, claim.size)
    texts = {}
    for claim, seeds in fixed.items():
        path = paths.PAPERS / f"{entries[claim].study}.yaml"
        text = texts.get(path) or path.read_text(encoding="utf-8")
        texts[path] = with_stage(text, claim, [entries[claim].seeds[0], seeds])
    for path, text in texts.items():  # only once all entries were found
        with paths.written_whole(path) as part:
            part.write_text(text, encoding="utf-8")
    return fixed


def with_stage(text: str, claim: str, seeds: list[int]) -> str:
    """Returns the text of a file of the ledger with the stages of one entry in it.

    The rest stays as it is, comments too. Raises ValueError unless the entry is there once.
    """
    heads = list(re.finditer(rf"^( *)- id: {re.escape(claim)} *(?:#.*)?$", text, re.MULTILINE))
    if len(heads) != 1:
        raise ValueError(f"{len(heads)} entries have the line '- id: {claim}': write it so, once")
    (head,), indent = heads, heads[0][1] + "  "
    # the entry's own fields go on as long as lines are indented as deep; deeper ones are its parts
    rest = text[head.end() :]
    end = re.search(rf"^(?!{indent}| *$).", rest, re.MULTILINE)
    fields = rest[: end.start()] if end else rest
    line = f"{indent}seeds: {seeds}"
    changed, count = re.subn(rf"^{indent}seeds:.*$", line, fields, flags=re.MULTILINE)
    if not count:
        changed = f"\n{line}{fields}"
    return text[: head.end()] + changed + (rest[end.start() :] if end else "")
