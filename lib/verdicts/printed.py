"""Our values against the cells of published tables, at the precision in which these are printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


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

    def extremes(self, count: int) -> dict[str, float]:
        """Returns the `count` smallest ratios and the `count` largest, from small to large."""
        ratios = sorted(((label, cell.ratio) for label, cell in self.items()), key=lambda x: x[1])
        return dict([*ratios[:count], *ratios[-count:]])
