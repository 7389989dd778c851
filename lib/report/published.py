"""Published tables, as `verdicts.papers` reads them, made ready for a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from .tables import Table, secondary, table

# names of columns in `data/papers`, as a reader wants them
HEADS = {
    "dense": "dense (%)",
    "gmacs_dense": "dense MACs (G)",
    "gmacs": "MACs (G)",
    "top1": "top-1 (%)",
    "pruned": "pruned (% of neurons)",
    "magnitude": "magnitude (%)",
    "snip": "SNIP (%)",
    "vbp": "VBP (%)",
    "dvbp_ob2c": "DVBP, OB2C (%)",
    "macs_cut": "MACs saved (%)",
    "params_cut": "parameters saved (%)",
    "retained": "accuracy kept (%)",
}


def retold(published: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """Returns some columns as a reader wants them, each value marked as retold by the table's
    source."""
    source = published.attrs["source"]["table"]
    marked = {
        HEADS.get(column, column): [secondary(value, source) for value in published[column]]
        for column in columns
    }
    return pd.DataFrame(marked, index=published.index)


def side_by_side(methods: Mapping[str, pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """Sorts the retold rows of several methods by model, so that they can be compared.

    methods: {method: published table with a column `model`}. The models are those of the first
    table. columns: see `retold`.
    """
    first = next(iter(methods.values()))
    rows = pd.concat(
        table[["model"]].assign(method=method).join(retold(table, columns))
        for method, table in methods.items()
    )
    return rows[rows.model.isin(first.model)].sort_values("model", kind="stable")


def with_deviations(published: pd.DataFrame, column: str, decimals: int = 0) -> list[str]:
    """Writes the means of a column with their standard deviations: "81.2 (sd 0.4)".

    published: has the deviations in a column whose name ends in `_std`.
    """
    pairs = zip(published[column], published[f"{column}_std"], strict=True)
    return [f"{mean:.{decimals}f} (sd {deviation:.{decimals}f})" for mean, deviation in pairs]


def as_printed(published: pd.DataFrame, note: str, decimals: int = 1) -> Table:
    """Tabulates a published table with what it is about and its source, then `note`, as caption."""
    about, source = published.attrs["about"], published.attrs["source"]["table"]
    caption = f"{about[:1].upper()}{about[1:]}; {source}. {note}"
    return table(published.rename(columns=HEADS), caption, decimals=decimals)
