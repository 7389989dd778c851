"""Reads and writes measured speeds as ratios to a bound, and says what each shortfall is made of.

A measurement is one JSON file in `data/results/bench/<device>/`, written by `python -m benchmarks`
and checked on every read. It is no record: the clock is not a function of a run. The same one from
a machine of another kind lies beside it: `short-avx2.json` beside `short.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .. import paths
from ..runs.index import checksum_of

VERSION = 1
PARTS = {
    "layer": "MoE layer against dense MLPs",
    "peers": "MoE layer against other libraries",
    "models": "whole models",
    "growth": "growth with experts, tokens and depth",
    "other": "pruning, extraction, attention, trainer",
}

# sides of rows that stand for several other libraries; their notes say for how many
FASTEST_PEER, MEDIAN_PEER = "fastest peer", "median peer"
MEDIAN_PEER_GOAL, MEDIAN_PEER_EXPERTS = 1.3, (8, 32)  # for layers of so many experts


@dataclass(frozen=True)
class Timing:
    """Holds the median and the 10% quantile of the times of one call, in ms."""

    median: float
    low: float


@dataclass(frozen=True)
class Ratio:
    """Is one row of the table: the time of ours beside that of something else.

    part: one of PARTS. what, shape: what runs, and its sizes. ours_is, against: the two sides.
    ours, other: their times; None where they were not measured, which `note` then explains. ideal:
    the other's time over ours at the limit (the ratio of multiply-adds). goal: the least share of
    the limit; None: shown, not promised. beside: times of further candidates of the same turns.
    """

    part: str
    what: str
    shape: str
    dtype: str
    ours_is: str
    against: str
    ours: Timing | None = None
    other: Timing | None = None
    ideal: float = 1.0
    goal: float | None = None
    note: str = ""
    beside: dict[str, Timing] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """Computes the share of the limit that ours reaches, by medians; 1 is the limit."""
        return self._share("median")

    @property
    def low_ratio(self) -> float | None:
        """Computes the same by low quantiles, which other work on the machine moves less."""
        return self._share("low")

    @property
    def is_frozen(self) -> bool:
        """Says whether ours ran with packed weights."""
        return "frozen" in self.ours_is or self.shape.endswith("frozen")

    @property
    def reached(self) -> bool | None:
        """Says whether the goal is reached; None without a goal or without times."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal

    def _share(self, quantile: str) -> float | None:
        if self.ours is None or self.other is None:
            return None
        return getattr(self.other, quantile) / getattr(self.ours, quantile) / self.ideal

    @property
    def cause(self) -> str:
        """Says in ms what keeps ours from the bound, as far as the same turns measured it."""
        steps = [name for name in STEPS if name in self.beside]
        if self.against in steps:
            steps = steps[steps.index(self.against) :]
        if self.ours is None or not steps:
            return ""
        times = [self.beside[name].median for name in steps] + [self.ours.median]
        labels = [STEPS[name] for name in steps[1:]] + [LAST_STEP[steps[-1]]]
        added = zip(labels, times[1:], times[:-1], strict=True)
        return "; ".join(f"{label} {after - before:+.1f} ms" for label, after, before in added)


# name of a measurement -> the command that makes it
COMMANDS = {
    "short": "make bench",
    "full": "make bench-full",
    "frontier": "python -m benchmarks.frontier",
}

# Candidates in the order in which ours is reached from the bound, and what each adds to the one
# before it; then what ours adds to the last.
STEPS = {
    "one MLP": "",
    "equal chunks": "several weights in place of one",
    "one MLP, packed": "",
    "equal chunks, packed": "several weights in place of one",
    "whole model at the ratio of multiply-adds": "",
    "static model": "what does not shrink with the neurons",
}
LAST_STEP = {
    "equal chunks": "routing, gather, unequal slices and combine",
    "equal chunks, packed": "routing, gather, unequal slices and combine",
    "static model": "routing and several experts",
}


# what a processor multiplies with, by name of the capability, from the widest on
VECTORS = {
    "amx": "AMX",
    "avx512_bf16": "AVX-512 and bf16 products",
    "avx512": "AVX-512",
    "avx2": "AVX2, without bf16 products",
}


@dataclass(frozen=True)
class Measurement:
    """Holds the rows of one command, and about: command, date, seconds, repeats, machine.

    machine: processor, cores, threads, versions, load average before and after, capabilities, and
    `cannot`, the sentences that say which rows it cannot measure.
    """

    about: dict[str, Any]
    rows: tuple[Ratio, ...]

    @property
    def machine_name(self) -> str:
        """Names the processor and the widest products that it has, such as "EPYC with AVX-512"."""
        machine = self.about["machine"]
        widest = (said for name, said in VECTORS.items() if machine["capabilities"].get(name))
        return " with ".join([machine["processor"], *list(widest)[:1]])

    @property
    def disturbed(self) -> bool:
        """Says whether other work ran: before the start, more than one process wanted a core."""
        return self.about["machine"]["load_average"][0] > 1.0

    def of(self, part: str) -> list[Ratio]:
        """Lists the measured rows of a part."""
        return [row for row in self.rows if row.part == part and row.ratio is not None]

    @property
    def promised(self) -> list[Ratio]:
        """Lists the measured rows that have a goal."""
        return [row for row in self.rows if row.reached is not None]

    @property
    def short(self) -> list[Ratio]:
        """Lists the rows that fall short of their goal, farthest first."""
        missed = [row for row in self.promised if not row.reached]
        return sorted(missed, key=lambda row: row.ratio / row.goal)

    def plain(self, row: Ratio) -> Ratio | None:
        """Returns a row beside another layer, with our plain layer of the same turns in place of a
        frozen one; None where that was not timed.

        Other layers are never frozen, so this is the comparison of like with like.
        """
        if not row.is_frozen:
            return row
        ours = (turn for turn in self._layer_beside(row) if not turn.is_frozen)
        return next((replace(row, ours_is=o.ours_is, ours=o.ours) for o in ours), None)

    def cause(self, row: Ratio) -> str:
        """Says what keeps the ours of a row from its goal, as far as the same turns measured it.

        Beside another layer that is what packed weights cost, and how near that layer is to the
        dense bound already: beyond it, ours would have to beat the bound.
        """
        if row.part != "peers" or row.ours is None or row.other is None:
            return row.cause
        said, plain = [], self.plain(row)
        if row.is_frozen and plain:
            added = row.ours.median - plain.ours.median
            said.append(f"packed weights {added:+.1f} ms, plain ratio {plain.ratio:.3f}")
        if bounds := [turn.other.median for turn in self._layer_beside(row)]:
            room = row.other.median / min(bounds)
            said.append(f"at the dense bound the ratio would be {room:.3f}")
        return "; ".join(said)

    def _layer_beside(self, row: Ratio) -> list[Ratio]:
        """Lists the rows of our layer against its bounds that come of the same turns as a row."""
        same = (row.what, row.shape, row.dtype)
        return [turn for turn in self.of("layer") if (turn.what, turn.shape, turn.dtype) == same]


def file_of(name: str, device: str = "cpu") -> Path:
    """Names the file of a measurement, one of COMMANDS."""
    return paths.BENCH / device / f"{name}.json"


def elsewhere(name: str, device: str = "cpu") -> list[Measurement]:
    """Reads the same measurement from other machines, in the order of their files' names."""
    return [read(file) for file in sorted((paths.BENCH / device).glob(f"{name}-*.json"))]


def write(file: Path, about: Mapping[str, Any], rows: Iterable[Ratio]) -> None:
    """Writes a measurement whole, with a checksum over its content."""
    content = {"version": VERSION, "about": dict(about), "rows": [asdict(row) for row in rows]}
    with paths.written_whole(file) as part:
        text = json.dumps(content | {"checksum": checksum_of(content)}, indent=1, allow_nan=False)
        part.write_text(text + "\n", encoding="utf-8")


def read(file: Path) -> Measurement:
    """Reads a measurement.

    Raises FileNotFoundError where it is absent, and ValueError where it is damaged, cut off, edited
    by hand or of another version; either names the file and the command that makes it anew.
    """
    again = f"measure anew: {COMMANDS.get(file.stem.split('-')[0], COMMANDS['full'])}"
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("it holds no JSON object")
        if content.pop("checksum", None) != checksum_of(content):
            raise ValueError("its checksum does not match its content")
        if content["version"] != VERSION:
            raise ValueError(f"it is of version {content['version']}, not {VERSION}")
        return Measurement(content["about"], tuple(_row(row) for row in content["rows"]))
    except FileNotFoundError:  # it was opened all the same, so a page knows that it asked
        raise FileNotFoundError(f"there is no measurement {file}; {again}") from None
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"measurement {file} is damaged ({error}); {again}") from error


def percent_of_dense(file: Path, shape: str, dtype: str) -> dict[str, float]:
    """Reads the times of a forward pass of one shape and dtype, by model, in percent of what they
    are compared with; empty where there is no such measurement."""
    try:
        measured = read(file)
    except FileNotFoundError:
        return {}
    rows = [row for row in measured.rows if (row.shape, row.dtype) == (shape, dtype)]
    return {row.ours_is: 100 * row.ours.median / row.other.median for row in rows}


def _row(content: dict[str, Any]) -> Ratio:
    timings = {key: content[key] and Timing(**content[key]) for key in ("ours", "other")}
    beside = {name: Timing(**timing) for name, timing in content["beside"].items()}
    return Ratio(**content | timings | {"beside": beside})
