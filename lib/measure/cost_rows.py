"""The cost of a model as rows, one a module, and what is summed over them.

`cost.count` makes the rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

# per element of a LayerNorm: the rule of the counter behind ViMoE's tables (fvcore's)
NORM_OPERATIONS = 5


@dataclass(frozen=True)
class Row:
    """Holds what one module costs.

    active: parameters that one image touches; None if that depends on data and was not given. macs:
    multiply-adds for the counted images; None likewise. elements: of the input, for norms only, for
    the same images.
    """

    module: str
    kind: str  # linear, conv, patch, attention, norm, router, other
    stored: int
    active: float | None
    macs: int | None = 0
    elements: int = 0


@dataclass(frozen=True)
class Cost:
    """Holds the rows of a model, and sums them up.

    Own rule for MACs: every product (linear layers, convolutions, attention, whatever a model
    multiplies by parameters of its own) and every router, one multiply-add each. Elementwise work,
    as that of norms and layer scales, is not counted. An MoE layer counts the K experts (and the
    shared one) that a token passes, as if no capacity refused any; after experts were dropped
    without rerouting those that it measurably passes. An expert that sees whole images computes all
    tokens of each that touches it: without a measurement, of every one. Behind a `ChannelMask` the
    second map counts the neurons that stay. Among experts of unequal width each one passed, or
    touched by an image, counts as their mean: which ones it is, only data decide. Where all are
    passed equally often (all experts, expert choice, Soft MoE) that is exact.
    """

    rows: tuple[Row, ...]
    images: int = 1

    @property
    def params_stored(self) -> int:
        """Counts all parameters."""
        return sum(row.stored for row in self.rows)

    @property
    def params_active(self) -> float:
        """Counts the parameters that one image touches. ValueError if that was not measured."""
        if open_rows := [row.module for row in self.rows if row.active is None]:
            raise ValueError(
                "under token-level routing an image touches a number of experts that only data "
                f"decide ({', '.join(open_rows)}): measure it and pass "
                "count(..., experts_per_image=...)"
            )
        return sum(row.active for row in self.rows)

    @property
    def macs(self) -> int:
        """Counts the multiply-adds of all counted images under the own rule.

        ValueError after experts were dropped with zero updates, if what they served was not given.
        """
        return sum(self._counted_macs(row) for row in self.rows)

    @staticmethod
    def _counted_macs(row: Row) -> int:
        if row.macs is None:
            raise ValueError(
                f"{row.module} has lost experts that its router still chooses, and only data "
                "decide how many choices are left to compute: measure the share that is dropped (a "
                "RoutingProbe's `dropped`) and pass count(..., unserved=...)"
            )
        return row.macs

    def by_kind(self) -> dict[str, int]:
        """Sums the MACs of each kind."""
        out: dict[str, int] = {}
        for row in self.rows:
            out[row.kind] = out.get(row.kind, 0) + self._counted_macs(row)
        return out

    def table(self) -> pd.DataFrame:
        """Makes a frame of the rows: module, kind, stored, active, macs, elements."""
        import pandas as pd  # only here: packed runs go where it may be absent

        return pd.DataFrame([vars(row) for row in self.rows])


def printed_gflops(cost: Cost, convention: str = "small") -> float:
    """Computes the "FLOPs" column of ViMoE's Tables 1 to 3, in G per image.

    These are multiply-adds, plus 5 operations per LayerNorm element. convention="small" leaves the
    attention products out, as the table's ViT-S rows do; "base" has them in, as its ViT-B rows do.
    The two are not comparable; show both.
    """
    if convention not in ("small", "base"):
        raise ValueError(
            f"convention={convention!r} is unknown: 'small' (without attention products) or 'base' "
            "(with them)"
        )
    attention = 0 if convention == "base" else cost.by_kind().get("attention", 0)
    macs = cost.macs - attention
    return (macs + NORM_OPERATIONS * sum(row.elements for row in cost.rows)) / cost.images / 1e9
