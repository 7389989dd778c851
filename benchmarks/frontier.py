"""Times the models of the page `beyond/frontier` beside the dense model that all are made from:
`python -m benchmarks.frontier`, in ten minutes on two quiet cores.

Models are those that the further pass of each method trains: built from the dense model's weights,
pruned, extracted or dropped on its images. So it needs the data (MOE_DATA), and the weights of the
runs that others start from, which `python -m lib fill --profile small --pages beyond/frontier`
leaves in the cache. All are frozen for inference and timed in turn, alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

import lib
from lib.measure import cost
from lib.runs.execute import prepared
from lib.runs.store import store
from lib.spec import RunSpec
from lib.verdicts import speed
from lib.verdicts.speed import Ratio

from . import machine
from .clock import DTYPES, forward, timed

PAGE, DENSE = "beyond/frontier", "dense"
BATCHES = (1, 16)


def models(runs: Mapping[str, RunSpec]) -> dict[str, nn.Module]:
    """Makes the model of each run, by name; says which cannot be made and why.

    Raises FileNotFoundError where the dense one cannot.

    All in the dtype of the dense run: runs in bfloat16 on a processor have an attention of several
    kernels, which would count against them.
    """
    made = {}
    for name, run in runs.items():
        try:
            alike = run.but(dtype=runs[DENSE].dtype)
            made[name] = prepared(alike, str(store().states)).float().eval()
            print(f"made: {name}", flush=True)
        except FileNotFoundError as error:
            if name == DENSE:  # the others are timed beside it
                raise
            print(f"not timed: {name}: {error}", flush=True)
    return made


def rows(plain: Mapping[str, nn.Module], side: int, repeats: int) -> Iterator[Ratio]:
    """Measures all dtypes and batches of images of side x side pixels; rows come as soon as they
    are measured."""
    channels = plain[DENSE].patch_embed.proj.in_channels
    macs = {name: cost.count(model, side).macs for name, model in plain.items()}
    for dtype in ("fp32", "bf16"):
        if machine.why_not(dtype, packed=True):
            continue
        frozen = {
            name: lib.freeze_for_inference(model.to(DTYPES[dtype])) for name, model in plain.items()
        }
        for batch in BATCHES:
            x = torch.randn(batch, channels, side, side).to(DTYPES[dtype])
            calls = {name: forward(model, x) for name, model in frozen.items()}
            times = timed(calls, repeats, warmup=1, settle=int(batch == 1))
            for name in list(times)[1:]:
                yield Ratio(
                    part="models",
                    what=name,
                    shape=f"batch {batch}, frozen",
                    dtype=dtype,
                    ours_is=name,
                    against=DENSE,
                    ours=times[name],
                    other=times[DENSE],
                    ideal=macs[DENSE] / macs[name],
                )


def main() -> None:
    """Measures, prints one line a row and writes the file that the page reads."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.frontier", description=__doc__)
    options.add_argument("--profile", default="small", help="default: small")
    options.add_argument("--repeats", type=int, default=20, help="default: 20")
    options.add_argument("--threads", type=int, default=machine.cores())
    options.add_argument("--out", type=Path, default=speed.file_of("frontier"))
    given = options.parse_args()
    start, load = time.perf_counter(), machine.load_before()
    first = {name: runs[0] for name, runs in lib.plan(PAGE, given.profile).items()}
    made = models(first)
    torch.set_num_threads(given.threads)  # only now: to make a model sets the threads of its run
    measured = []
    for row in rows(made, first[DENSE].data.image_size, given.repeats):
        measured.append(row)
        share = 100 * row.ours.median / row.other.median
        print(f"{row.what:<52} {row.shape:<18} {row.dtype:<5} {share:6.1f}% of dense", flush=True)
    about = machine.about("benchmarks.frontier", given.repeats, start, load)
    speed.write(given.out, about, measured)
    print(f"{len(measured)} rows, written to {given.out}")


if __name__ == "__main__":
    main()
