"""Carries out packed runs, several at a time; `unpack` starts it with MOE_CACHE where they lie.

Each run is a process of its own that calls `collect`. A further one is started as long as what is
free of the memory, of the graphics card or of the machine, holds what one run took at most so far.
A run that does not fit all the same is tried again alone, when all others are done.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from .. import paths
from ..machine import cores
from ..spec import RunSpec
from . import processes, record_files
from .collect import collect
from .store import Record, store

POLL_SECONDS = 0.2
MARGIN = 1.1  # of the memory that a run took: others may still grow
OUT_OF_MEMORY = re.compile("OutOfMemory|MemoryError|out of memory|allocate memory|ALLOC_FAILED")


@dataclass
class Queue:
    """Runs that wait, run, failed. workers: most at a time; settle: seconds between two starts."""

    specs: list[RunSpec]
    bundles: Path
    workers: int
    settle: float
    waiting: list[RunSpec] = field(default_factory=list)
    alone: list[RunSpec] = field(default_factory=list)
    running: dict[str, tuple[RunSpec, subprocess.Popen, float]] = field(default_factory=dict)
    had_company: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)
    bytes_of_run: float = 0.0
    last_start: float = 0.0

    def carry_out(self) -> None:
        """Runs all that have no record, and adds each record to a bundle when it is there."""
        bundled = {
            Path(name).stem
            for file in self.bundles.glob("records-*.moe")
            for name in record_files.read(file)
        }
        for spec in self.specs:
            if not _is_done(spec):
                self.waiting.append(spec)
            elif spec.id not in bundled:  # stopped between record and bundle
                self._bundle(store().peek(spec.id))
        print(
            f"{len(self.waiting)} of {len(self.specs)} runs to do, code in {paths.ROOT}", flush=True
        )
        idle_bytes = self._free_bytes()
        try:
            while self.waiting or self.alone or self.running:
                taken = (idle_bytes - self._free_bytes()) / max(1, len(self.running))
                self.bytes_of_run = max(self.bytes_of_run, taken)
                self._finish()
                if not self._start_next() and not self.running:
                    self._give_up()
                time.sleep(POLL_SECONDS)
        finally:
            for _, process, _ in self.running.values():
                process.terminate()

    def _start_next(self) -> bool:
        """Starts a run if one can be started now, and says whether it did."""
        ready = [spec for spec in self.waiting if _has_parents(spec)]
        if not self.running and not ready and self.alone:
            return self._start(self.alone.pop(0))
        if not ready or not self._fits():
            return False
        self.waiting.remove(ready[0])
        return self._start(ready[0])

    def _fits(self) -> bool:
        """Says whether one more run may be started beside those that run."""
        if not self.running:
            return True
        has_settled = time.monotonic() - self.last_start >= self.settle
        has_room = self._free_bytes() >= MARGIN * self.bytes_of_run
        return len(self.running) < self.workers and has_settled and has_room

    def _start(self, spec: RunSpec) -> bool:
        logs = paths.cache() / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "lib.runs.away", "--run", spec.id]
        command += ["--parent", str(os.getpid())]
        with open(logs / f"{spec.id}.log", "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        self.had_company.discard(spec.id)
        self.last_start = time.monotonic()
        self.running[spec.id] = (spec, process, self.last_start)
        if len(self.running) > 1:
            self.had_company |= self.running.keys()
        return True

    def _finish(self) -> None:
        """Takes the runs whose process has ended off the list, with a line each."""
        for spec, process, started in list(self.running.values()):
            if process.poll() is None:
                continue
            del self.running[spec.id]
            record = store().peek(spec.id)
            seconds = f"{time.monotonic() - started:.0f} s"
            if record is not None and record.status == "ok":
                self._bundle(record)
                self._say(spec, f"{_reached(record)}, {seconds}")
            elif _did_not_fit(process, record) and spec.id in self.had_company:
                self.alone.append(spec)
                self._say(spec, f"did not fit after {seconds}; it will be tried alone")
            else:
                self.failed.append(spec.id)
                self._say(spec, f"failed after {seconds}: {_reason(spec, process, record)}")

    def _give_up(self) -> None:
        """Counts what waits as failed if nothing can be started: the parents left no weights."""
        while self.waiting:
            spec = self.waiting.pop(0)
            self.failed.append(spec.id)
            self._say(spec, "cannot start: a run that it starts from left no weights")

    def _bundle(self, record: Record) -> None:
        record_files.append(self.bundles, record, [spec.id for spec in self.specs])

    def _say(self, spec: RunSpec, result: str) -> None:
        left = len(self.waiting) + len(self.alone) + len(self.running) + len(self.failed)
        progress = f"[{len(self.specs) - left}/{len(self.specs)}]"
        print(f"{progress} {spec.id} {spec.study} seed {spec.seed}: {result}", flush=True)

    def _free_bytes(self) -> float:
        """Memory that is free: of the card if a run is for one, else of the machine."""
        if any(spec.device == "cuda" for spec in self.specs):
            import torch

            return torch.cuda.mem_get_info()[0]
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return 1024 * int(line.split()[1])
        return float("inf")


def _is_done(spec: RunSpec) -> bool:
    return store().can_be_started_from(spec.id) if spec.keep else store().is_done(spec.id)


def _has_parents(spec: RunSpec) -> bool:
    return all(store().can_be_started_from(parent.id) for parent in spec.needed_runs)


def _did_not_fit(process: subprocess.Popen, record: Record | None) -> bool:
    """Whether a run ended for want of memory: by its own error, or killed by the system."""
    if process.returncode == -9:
        return True
    error = {} if record is None else record.content.get("error", {})
    return OUT_OF_MEMORY.search(f"{error.get('kind')} {error.get('message')}") is not None


def _reached(record: Record) -> str:
    """Says what a run reached: its accuracy, or the loss of masked pretraining, which has none."""
    test = record.test
    return f"top-1 {test['top1']:.1f}%" if "top1" in test else f"loss {test['loss']:.3f}"


def _reason(spec: RunSpec, process: subprocess.Popen, record: Record | None) -> str:
    """Why a run failed, in a line: its record says so, else its log."""
    if record is not None:
        return " ".join(f"{record.error['kind']}: {record.error['message']}".split())[:300]
    log = (paths.cache() / "logs" / f"{spec.id}.log").read_text().strip()
    return log.splitlines()[-1][:300] if log else f"exit status {process.returncode}"


def _check_packages(specs: list[RunSpec]) -> None:
    """Ends the process with a message if a package is absent that a run would ask for at its end.

    What every run imports, `unpack` has looked for.
    """
    is_needed = {
        "pytorch_grad_cam": any(spec.cam_probe for spec in specs),
        "hdbscan": any(spec.extract is not None for spec in specs),
    }
    for name, needed in is_needed.items():
        if needed and importlib.util.find_spec(name) is None:
            package = {"pytorch_grad_cam": "grad-cam"}.get(name, name)
            sys.exit(f"error: some of these runs need the package {package}: install it here")


def main() -> int:
    """Carries out all runs, or with --run one of them; the exit status is 1 if any failed."""
    parser = argparse.ArgumentParser(prog="run.py")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help="most runs at a time")
    parser.add_argument("--settle", type=float, default=15, help="seconds between two starts")
    args = parser.parse_args()
    dumped = json.loads((paths.cache() / "specs.json").read_text())
    specs = [RunSpec.model_validate_json(json.dumps(fields)) for fields in dumped]
    if args.run:
        if args.parent:
            processes.end_with(args.parent)
        collect({"run": [spec for spec in specs if spec.id == args.run]})
        return 0
    _check_packages(specs)
    on_card = any(spec.device == "cuda" for spec in specs)
    if on_card:
        import torch

        if not torch.cuda.is_available():
            sys.exit("error: these runs are for a graphics card, and torch sees none here")
    threads = 1 if on_card else max(spec.threads for spec in specs)
    bundles = paths.cache().parent / "records"
    queue = Queue(specs, bundles, args.workers or max(1, cores() // threads), args.settle)
    try:
        with processes.interruptible():
            queue.carry_out()
    except KeyboardInterrupt:
        print("stopped: the same command goes on from here")
        return 130
    print(f"records in {bundles}; failed: {', '.join(queue.failed) or 'none'}")
    return bool(queue.failed)


if __name__ == "__main__":
    sys.exit(main())
