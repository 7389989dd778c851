"""Measures the MoE layer against the dense bound, attention in two forms, pruning, extraction and
the trainer: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import os
import platform

import torch

from . import attention, extraction, moe, pruning, trainer


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    options.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="torch threads (default: torch's own)",
    )
    options.add_argument(
        "--repeats", type=int, default=20, help="interleaved repeats after warm-up, at least 20"
    )
    options.add_argument("--no-pruning", action="store_true", help="leave out static pruning")
    options.add_argument(
        "--no-extraction", action="store_true", help="leave out experts extracted from MLPs"
    )
    options.add_argument("--no-trainer", action="store_true", help="leave out the trainer")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    print(
        f"torch {torch.__version__}, {_processor()}, {given.threads} threads; "
        f"medians of {given.repeats} repeats"
    )
    # A thread that waits for a core holds up each product that it has a share in.
    load = os.getloadavg()[0]
    if load > 1.0:
        print(
            f"NOT VALID as a measurement: other work runs on this machine (load average {load:.1f})"
        )
    print(
        f"MoE layer: B={moe.B} N={moe.N} D={moe.D} H={moe.H} E={moe.E} K=1; "
        "ratio = dense bound over layer"
    )
    print(
        f"{'pass':<17} {'routing':<8} {'dtype':<9} "
        f"{'bound ms':>9} {'bound':<9} {'layer ms':>9} {'ratio':>6} {'target':>7}"
    )
    for row in moe.rows(given.repeats):
        print(_line(row), flush=True)
    ms = attention.step_ms(given.repeats)
    print(
        f"bf16 training step, ViT-S/14 at {attention.SIDE} px: "
        f"fused attention {ms['fused']:.0f} ms, written out {ms['written out']:.0f} ms, "
        f"ratio {ms['fused'] / ms['written out']:.2f} (above 1: written out is right here)"
    )
    if not given.no_pruning:
        for row in pruning.rows(given.repeats):
            print(row, flush=True)
    if not given.no_extraction:
        for row in extraction.rows(given.repeats):
            print(row, flush=True)
    if not given.no_trainer:
        overhead = trainer.overhead(rounds=max(20, given.repeats))
        mark = "pass" if overhead.share <= trainer.TARGET else "SHORT"
        print(
            f"trainer: bare timm loop {overhead.bare_s:.2f} s, "
            f"lib.training.loop {overhead.trainer_s:.2f} s, "
            f"overhead {overhead.share:+.1%} (target at most {trainer.TARGET:.0%})  {mark}"
        )


def _line(row: moe.Row) -> str:
    target = mark = ""
    if row.target is not None:
        target = f">={row.target:.2f}"
        mark = "pass" if row.ratio >= row.target else "SHORT"
    text = (
        f"{row.what:<17} {row.routing:<8} {row.dtype:<9} "
        f"{row.bound_ms:>9.1f} {row.bound_name:<9} {row.layer_ms:>9.1f} "
        f"{row.ratio:>6.3f} {target:>7}  {mark:<5} {row.cause}"
    )
    return text.rstrip()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as info:
            return next(
                line.split(":", 1)[1].strip() for line in info if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
