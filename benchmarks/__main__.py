"""Measures speeds against their limits and prints one table of ratios: `python -m benchmarks`.

Without `--full`: the layer, its peers, whole models and growth where goals are set, in less than
five minutes on two quiet cores; with 20 repeats, as the committed tables have them, in eight. With
`--full`: every setting, batch 64, pruning, extraction, attention, the trainer and its input, which
takes far longer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from lib.verdicts import speed
from lib.verdicts.speed import Ratio

from . import attention, extraction, growth, inputs, layers, machine, models, pruning, trainer

FULL_REPEATS, SHORT_REPEATS = 20, 7


def main() -> None:
    given = _options()
    torch.set_num_threads(given.threads)
    repeats = given.repeats or (FULL_REPEATS if given.full else SHORT_REPEATS)
    start = time.perf_counter()
    print(f"torch {torch.__version__}, threads: {given.threads}, {repeats} interleaved repeats")
    for sentence in machine.cannot():
        print(f"cannot measure: {sentence}")
    load = machine.load_before()
    print(HEAD)
    rows, so_far = [], given.out.with_suffix(".unfinished.part")  # an hour's rows outlive a failure
    for row in measured(given.full, repeats):
        rows.append(row)
        print(line(row), flush=True)
        about = machine.about("benchmarks", repeats, start, load)
        speed.write(so_far, about, rows)
    so_far.replace(given.out)
    print(f"{len(rows)} rows in {about['seconds']} s, written to {given.out}")


def measured(full: bool, repeats: int) -> Iterator[Ratio]:
    """Measures all rows; each comes as soon as it is measured."""
    yield from layers.rows(repeats, full)
    yield from growth.rows(repeats, full)
    # A model's pass is many products long: fewer repeats vary as little.
    yield from models.rows(repeats if full else max(3, repeats - 2), full)
    if full:
        yield from attention.rows(repeats)
        yield from pruning.rows(repeats)
        yield from extraction.rows()
        yield from trainer.rows(repeats)
        yield from inputs.rows(repeats)


HEAD = (
    f"{'what':<32} {'shape':<40} {'dtype':<8} {'ours':<14} {'against':<22} "
    f"{'ours ms':>16} {'against ms':>16} {'ratio':>12} {'goal':>5}\n"
    f"{'times and ratios: median (10% quantile)':>60}"
)


def line(row: Ratio) -> str:
    """Prints a row: times and ratio with their low quantiles, goal, reached or not."""
    sides = f"{row.what:<32} {row.shape:<40} {row.dtype:<8} {row.ours_is:<14} {row.against:<22}"
    if row.ratio is None:
        return f"{sides} {row.note}"
    times = " ".join(f"{t.median:>8.1f} ({t.low:.1f})".rjust(16) for t in (row.ours, row.other))
    goal = "" if row.goal is None else f"{row.goal:.2f}"
    mark = {None: "", True: "reached", False: "SHORT"}[row.reached]
    cause = row.cause if row.reached is False else ""
    said = "; ".join(filter(None, (row.note, cause)))
    ratio = f"{row.ratio:.3f} ({row.low_ratio:.3f})"
    return f"{sides} {times} {ratio:>14} {goal:>5} {mark:<7} {said}".rstrip()


def _options() -> argparse.Namespace:
    """Reads the command line."""
    options = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    options.add_argument("--full", action="store_true", help="every row, not the short table")
    options.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="torch threads (default: torch's own)",
    )
    options.add_argument(
        "--repeats",
        type=int,
        help=f"interleaved repeats after warm-up (default: {SHORT_REPEATS}; full: {FULL_REPEATS})",
    )
    options.add_argument("--out", type=Path, help="JSON file (default: data/results/bench/cpu/...)")
    given = options.parse_args()
    if given.repeats is not None and given.repeats < 3:
        options.error(f"--repeats {given.repeats} gives no median and quantile: at least 3")
    given.out = given.out or speed.file_of("full" if given.full else "short")
    return given


if __name__ == "__main__":
    main()
