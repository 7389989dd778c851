"""Our values against the cells of published tables, at the precision in which these are printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from .stats import Interval, paired_difference


@dataclass(frozen=True)
class Cell:
    """One published cell: our value, the published one, and the decimals that are printed."""

    ours: float
    published: float
    decimals: int

    @property
    def ratio(self) -> float:
        """Ours divided by the published value."""
        return self.ours / self.published

    def texts(self) -> tuple[str, str]:
        """Returns our value and the published one with the decimals that are printed."""
        return f"{self.ours:.{self.decimals}f}", f"{self.published:.{self.decimals}f}"


class PrintedCells(dict[str, Cell]):
    """Collects the cells of published tables, row by row: {"T1 stored N=8, L=2": Cell}.

    decimals: {column: decimals that are printed}, a column being a quantity and its unit, such as
    "stored (M)".
    """

    def __init__(self, decimals: Mapping[str, int]):
        super().__init__()
        self.decimals = decimals

    def row(
        self, table: str, row: str, values: Mapping[str, tuple[float, float]]
    ) -> dict[str, str]:
        """Adds the cells of a row; returns ours, the published value and the ratio as texts.

        table, row: what the labels of the cells begin and end with. values: {column: (ours,
        published)}. Raises KeyError for a column without decimals.
        """
        texts = {}
        for column, (ours, published) in values.items():
            cell = Cell(float(ours), float(published), self.decimals[column])
            self[f"{table} {column.partition(' (')[0]} {row}"] = cell
            texts[column], texts[f"{column}, paper"] = cell.texts()
            texts[f"{column}, ratio"] = f"{cell.ratio:.4f}"
        return texts

    def apart(self) -> dict[str, Cell]:
        """Returns the cells whose printed digits differ from ours."""
        return {label: cell for label, cell in self.items() if len(set(cell.texts())) > 1}

    def telling(self, count: int) -> dict[str, float]:
        """Returns the `count` smallest ratios, the `count` largest and those `apart`, from small to
        large."""
        ratios = sorted(((label, cell.ratio) for label, cell in self.items()), key=lambda x: x[1])
        wanted = {label for label, _ in (*ratios[:count], *ratios[-count:])} | self.apart().keys()
        return {label: ratio for label, ratio in ratios if label in wanted}


def gains_in_order(
    records_of: Mapping[str, Sequence[Any]], printed: Mapping[str, float]
) -> list[Interval | None]:
    """Computes what the higher setting of each pair that printed values order gains over the other.

    Pairs of equal printed values are in no order and left out. records_of: the records of each
    setting. In points: test top-1, as in `paired_difference`; None without a record of either.
    """
    pairs = [sorted(pair, key=printed.__getitem__) for pair in combinations(printed, 2)]
    return [
        paired_difference(records_of.get(higher, ()), records_of.get(lower, ()))
        for lower, higher in pairs
        if printed[lower] < printed[higher]
    ]


def beyond_printed(
    records: Sequence[Any], reference: Sequence[Any], printed_gain: float
) -> Interval | None:
    """Computes how much more records gain over a reference than the printed values do, in points.

    So the levels of two data sets or budgets drop out. printed_gain: printed top-1 less that of the
    reference. None without a record of either.
    """
    gain = paired_difference(records, reference)
    if gain is None:
        return None
    low, high = (None if end is None else end - printed_gain for end in (gain.low, gain.high))
    return Interval(gain.mean - printed_gain, low, high, gain.n, gain.method)
