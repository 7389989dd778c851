"""Shows on which models of timm each method works, from the file that `benchmarks.timm_models`
writes. Nothing is built or measured here."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from ..paths import BENCH

__all__ = ["families", "in_short", "read", "refusals", "shares"]

FILE = BENCH / "timm" / "models.json"
COMMAND = "python -m benchmarks.timm_models"
METHODS = ("upcycling", "pruning", "extraction")
COLUMNS = ("family", "model", *METHODS)
# Outcomes; all others say why a method is refused.
WORKS, COPIES = "works", "works by whole copies"
NAMED = " with modules="  # ends an outcome of MLPs that must be named
_WORKING = tuple(word + end for word in (WORKS, COPIES) for end in ("", NAMED))


def read(file: Path | None = None) -> pd.DataFrame:
    """Reads family, name and the outcome of each method, a row a model.

    attrs: timm, torch (versions), date, goals ({method: share of models that it is to work on}).
    Raises FileNotFoundError for a file that is not there, and ValueError for one of another form.
    """
    file = FILE if file is None else file
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there: `{COMMAND}` writes it")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = pd.DataFrame(content["rows"], columns=content["columns"], dtype=str)
        rows.attrs = {key: content[key] for key in ("timm", "torch", "date", "goals")}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is damaged: {error!r}; `{COMMAND}` writes it anew") from error
    as_asked = tuple(rows.columns) == COLUMNS and set(rows.attrs["goals"]) == set(METHODS)
    if not as_asked or rows.empty or rows.isna().any(axis=None):
        raise ValueError(
            f"{file} does not have the columns {', '.join(COLUMNS)} and a goal for each method: "
            f"`{COMMAND}` writes it anew"
        )
    return rows


def shares(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Computes a row a method: on how many models it works, their share in percent, and the goal.

    outcomes: of `read`.
    """
    return pd.DataFrame([_share(outcomes, method) for method in METHODS])


def _share(outcomes: pd.DataFrame, method: str) -> dict[str, str | int | float]:
    counts = outcomes[method].value_counts().reindex(_WORKING, fill_value=0)
    share, goal = counts.sum() / len(outcomes), outcomes.attrs["goals"][method]
    return {
        "method": method,
        "works as it is": int(counts[WORKS] + counts[COPIES]),
        "with modules=": int(counts[WORKS + NAMED] + counts[COPIES + NAMED]),
        "in all": int(counts.sum()),
        "of these by whole copies": int(counts[COPIES] + counts[COPIES + NAMED]),
        "share (%)": float(100 * share),
        "share without modules= (%)": float(100 * (counts[WORKS] + counts[COPIES]) / len(outcomes)),
        "goal (%)": float(100 * goal),
        "reached": bool(share >= goal),
    }


def families(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Counts a row a family: its models, on how many of them each method works, how many need their
    MLPs named, and how many are upcycled by whole copies."""
    working = outcomes[list(METHODS)].isin(_WORKING)
    named = outcomes[list(METHODS)].apply(lambda column: column.str.endswith(NAMED)).any(axis=1)
    counts = working.assign(
        **{
            "models": True,
            "MLPs named": named,
            "whole copies": outcomes["upcycling"].str.startswith(COPIES),
        }
    )
    counts = counts.groupby(outcomes["family"], sort=True).sum()
    order = ["models", "MLPs named", "upcycling", "whole copies", "pruning", "extraction"]
    return counts[order].reset_index()


def refusals(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Counts a row a reason: the models that each method refuses for it, and their families.

    What keeps most models from a method comes first.
    """
    long = outcomes.melt(["family", "model"], list(METHODS), "method", "reason")
    refused = long[~long["reason"].isin(_WORKING)]
    counts = pd.crosstab(refused["reason"], refused["method"])
    counts = counts.reindex(columns=METHODS, fill_value=0)
    names = refused.groupby("reason")["family"].agg(lambda f: ", ".join(sorted(set(f))))
    order = counts.sum(axis=1).sort_values(ascending=False, kind="stable").index
    return counts.assign(families=names).loc[order].rename_axis(columns=None).reset_index()


def in_short(outcomes: pd.DataFrame) -> str:
    """Says in sentences on which share of the models each method works, whether that is the goal,
    and how many are upcycled by whole copies."""
    rows = shares(outcomes).to_dict("records")
    said = [
        f"{row['method']} works on {row['in all']} ({row['share (%)']:.1f}%; the goal of "
        f"{row['goal (%)']:.0f}% is {'reached' if row['reached'] else 'missed'})"
        for row in rows
    ]
    copied = sum(row["of these by whole copies"] for row in rows)
    return (
        f"Of {len(outcomes)} names of timm {outcomes.attrs['timm']} in "
        f"{outcomes['family'].nunique()} families, {', '.join(said[:-1])}, and {said[-1]}. "
        f"{copied} of the upcycled models hold whole copies of an MLP, which is slow."
    )
