"""`python -m benchmarks`: the MoE layer against the dense bound, attention in two forms, pruning,
extraction, and the trainer."""

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
    options.add_argument("--no-pruning", action="store_true", help="leave static pruning out")
    options.add_argument(
        "--no-extraction", action="store_true", help="leave experts that are cut out of MLPs out"
    )
    options.add_argument("--no-trainer", action="store_true", help="leave the trainer out")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    print(
        f"torch {torch.__version__}, {_processor()}, {given.threads} threads; medians of "
        f"{given.repeats} repeats"
    )
    if (
        load := os.getloadavg()[0]
    ) > 1.0:  # a thread that waits for a core holds up every product it has a share in
        print(
            f"NOT VALID as a measurement: other work runs on this machine (load average {load:.1f})"
        )
    print(
        f"MoE layer: B={moe.B} N={moe.N} D={moe.D} H={moe.H} E={moe.E} K=1; ratio = dense bound "
        "over layer"
    )
    print(
        f"{'pass':<17} {'routing':<8} {'dtype':<9} {'bound ms':>9} {'bound':<9} {'layer ms':>9} "
        f"{'ratio':>6} "
        f"{'target':>7}"
    )
    for row in moe.rows(given.repeats):
        print(_line(row), flush=True)
    ms = attention.step_ms(given.repeats)
    print(
        f"bf16 training step, ViT-S/14 at {attention.SIDE} px: fused attention {ms['fused']:.0f} "
        "ms, written out "
        f"{ms['written out']:.0f} ms, ratio {ms['fused'] / ms['written out']:.2f} (above 1: "
        "written out is right here)"
    )
    if not given.no_pruning:
        for row in pruning.rows(given.repeats):
            print(row, flush=True)
    if not given.no_extraction:
        for row in extraction.rows(given.repeats):
            print(row, flush=True)
    if not given.no_trainer:
        over = trainer.overhead(rounds=max(20, given.repeats))
        mark = "pass" if over.share <= trainer.TARGET else "SHORT"
        print(
            f"trainer: bare timm loop {over.bare_s:.2f} s, lib.training.loop {over.trainer_s:.2f} "
            f"s, overhead {over.share:+.1%} "
            f"(target at most {trainer.TARGET:.0%})  {mark}"
        )


def _line(row: moe.Row) -> str:
    target = "" if row.target is None else f">={row.target:.2f}"
    mark = "" if row.target is None else "pass" if row.ratio >= row.target else "SHORT"
    text = (
        f"{row.what:<17} {row.routing:<8} {row.dtype:<9} {row.bound_ms:>9.1f} {row.bound_name:<9} "
        f"{row.layer_ms:>9.1f} "
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
