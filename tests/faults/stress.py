"""Kills, flipped bytes, full disks, read-only folders and rival builds, in numbers.

    python tests/faults/stress.py                    # 50 kills each of grids, pools and builds
    python tests/faults/stress.py grid store --kills 5 --seed 1
    make faults PARTS="pool disk"                    # some minutes a part, so one after the other

A row a part: kills, and what must be 0: finished records lost (filed before a kill, or set aside,
and gone), doubled (computed again though filed), different (from those of undisturbed runs),
orphans (processes that a killed one left). A seed says when and what is killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from stress_builds import build, builds  # noqa: E402
from stress_processes import TAG, orphans, tagged  # noqa: E402

from lib.runs import collect as runs  # noqa: E402
from lib.runs.store import Store  # noqa: E402
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec  # noqa: E402

MUST_BE_0 = ("lost", "doubled", "different", "orphans")
PARENT = RunSpec(
    data=DataSpec(train=64, val=20, test=30),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2),
    train=TrainSpec(epochs=2.0, batch=16),
    threads=1,
)
SPECS = [PARENT.but(init=PARENT, seed=seed) for seed in (1, 2, 3)]
WORKER = """
import sys
from pathlib import Path
from lib.runs import collect as runs
from lib.runs.store import Store
from lib.spec import RunSpec
from lib.training import checkpoint

if __name__ == "__main__":
    checkpoint.CHECKPOINT_SECONDS = checkpoint.WRITE_SHARE = 0  # one after every step
    folder, workers, *texts = sys.argv[1:]
    specs = [RunSpec.model_validate_json(text) for text in texts]
    where = Store(Path(folder) / "published", Path(folder) / "private")
    print("ready", flush=True)
    if workers == "0":
        runs.collect({"a": specs}, where=where)
    else:
        with runs.pool(int(workers)) as pool:
            runs.collect({"a": specs}, pool, where)
"""
LIMITED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""


def store_in(folder: Path) -> Store:
    """The store that the worker's command line means by a folder."""
    return Store(folder / "published", folder / "private")


def start(
    folder: Path, workers: int = 0, code: str = WORKER, specs: list[RunSpec] | None = None
) -> subprocess.Popen:
    """Starts a process that collects runs, SPECS if none are given, into the store of a folder."""
    script = folder / "worker.py"
    script.write_text(code)  # a file: workers of a pool import it anew
    texts = [spec.model_dump_json() for spec in specs or SPECS]
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(workers), *texts],
        env={**os.environ, "PYTHONPATH": str(ROOT), TAG: str(folder), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def undisturbed(folder: Path, workers: int = 0) -> tuple[dict[str, dict], float]:
    """Results of SPECS and their parent, in a process that nobody disturbs, and its seconds."""
    folder.mkdir()
    process = start(folder, workers)
    process.stdout.readline()  # ready: what follows is work
    began = time.monotonic()
    finished(process)
    return results(folder), time.monotonic() - began


def finished(process: subprocess.Popen) -> None:
    """Waits for a process that has to end well."""
    _, error = process.communicate(timeout=600)
    if process.returncode:
        raise RuntimeError(error[-3000:])


def results(folder: Path) -> dict[str, dict]:
    """{id: result} of all finished records of SPECS and their parent."""
    where = store_in(folder)
    records = {spec.id: where.peek(spec.id) for spec in (PARENT, *SPECS)}
    return {run: record.result() for run, record in records.items() if record is not None}


def stamps(folder: Path) -> dict[str, int]:
    """{id: when it was written} of all finished records; a failed one gives way to the next."""
    files = (folder / "private" / "records").glob("*/*.json")
    return {
        file.stem: file.stat().st_mtime_ns
        for file in files
        if json.loads(file.read_text())["status"] == "ok"
    }


def differences(folder: Path, sound: dict[str, dict]) -> int:
    """Counts the records that are absent in the end, or other than undisturbed ones."""
    got = results(folder)
    return sum(got.get(run) != result for run, result in sound.items())


# ---- parts


def grid(kills: int, folder: Path, draw: random.Random, workers: int = 0) -> Counter:
    """Kills a process that computes a grid, at random moments, until it has been killed often
    enough; a grid that is done in between is begun anew."""
    sound, seconds = undisturbed(folder / "sound", workers)
    count, number = Counter(kills=0), 0
    while count["kills"] < kills:
        number += 1
        home = folder / str(number)
        home.mkdir()
        filed: dict[str, int] = {}
        while True:
            process = start(home, workers)
            if count["kills"] < kills:
                process.stdout.readline()
                moment = draw.uniform(0.0, seconds)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(moment)
                of_workers = [run for run in tagged(home) if run != process.pid]
                target = draw.choice([process.pid, *sorted(of_workers)])
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(target, signal.SIGKILL)
                        count["kills"] += 1
            process.communicate(timeout=600)
            count["orphans"] += orphans(home)
            now = stamps(home)
            count["lost"] += len(filed.keys() - now.keys())
            count["doubled"] += sum(now.get(run, stamp) != stamp for run, stamp in filed.items())
            filed = now
            if process.returncode == 0:
                break
        count["different"] += differences(home, sound)
    return count


def pool(kills: int, folder: Path, draw: random.Random) -> Counter:
    """As `grid`, with two workers: the parent or one of them is killed."""
    return grid(kills, folder, draw, workers=2)


def store(kills: int, folder: Path, draw: random.Random) -> Counter:
    """Flips bytes in the middle and at the end of every file of a store, one at a time, then of a
    checkpoint; what is lost is a damaged file that was not set aside."""
    sound, count = undisturbed(folder / "sound")[0], Counter(kills=0)
    where = store_in(folder / "sound")
    where.states.mkdir(exist_ok=True)
    files = [f for f in where.private.rglob("*") if f.is_file() and f.suffix in (".json", ".npz")]
    for file in [*files, *where.states.iterdir()]:
        for share in (0.5, 0.99):
            damaged = flipped(file, share)
            if file.suffix == ".safetensors":  # read by who computes a child
                where.find(SPECS[0].id).unlink()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runs.collect({"a": [PARENT.but(keep=True), *SPECS]}, where=where)
            count["files"] += 1
            count["lost"] += not is_aside(file, damaged, where)
            count["different"] += differences(folder / "sound", sound)
    for share in (0.5, 0.99):
        home = folder / f"checkpoint {share}"
        home.mkdir()
        process, where = start(home), store_in(home)
        while not where.checkpoint(PARENT.id).is_file() and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        damaged = flipped(where.checkpoint(PARENT.id), share)
        finished(start(home))
        count["files"] += 1
        count["lost"] += not is_aside(where.checkpoint(PARENT.id), damaged, where)
        count["different"] += differences(home, sound)
    return count


def flipped(file: Path, share: float) -> bytes:
    """Flips bits of eight bytes of a file, at a share of its length; returns its new content."""
    data = bytearray(file.read_bytes())
    at = int(share * len(data))
    data[at : at + 8] = bytes(byte ^ 0x55 for byte in data[at : at + 8])
    file.write_bytes(data)
    return bytes(data)


def is_aside(file: Path, content: bytes, where: Store) -> bool:
    """Tells whether a damaged file was set aside as it was."""
    return content in [aside.read_bytes() for aside in where.damaged.glob(f"*/{file.name}")]


def disk(kills: int, folder: Path, draw: random.Random) -> Counter:
    """Computes a grid where no file may grow beyond a limit, then without a limit."""
    sound, count = undisturbed(folder / "sound")[0], Counter(kills=0)
    for limit in (0, 500, 3000, 20_000):
        home = folder / str(limit)
        home.mkdir()
        work = "    checkpoint.CHECKPOINT_SECONDS"
        code = WORKER.replace(work, LIMITED_LINES.format(limit=limit) + work)
        start(home, code=code).communicate(timeout=600)
        before = stamps(home)
        finished(start(home))
        now = stamps(home)
        count["full"] += 1
        count["lost"] += len(before.keys() - now.keys())
        count["doubled"] += sum(now.get(run) != stamp for run, stamp in before.items())
        count["different"] += differences(home, sound)
        count["orphans"] += orphans(home)
    return count


LIMITED_LINES = "".join(f"    {line}\n" for line in LIMITED.strip().splitlines())


READER = """
import os, sys
from pathlib import Path
from lib.runs import collect as runs
from lib.runs.store import Store
from lib.spec import RunSpec

folder, *texts = sys.argv[1:]
specs = [RunSpec.model_validate_json(text) for text in texts]
where = Store(Path(folder) / "published", Path(folder) / "private")
for part in where.private.rglob("*"):
    assert not os.access(part, os.W_OK), f"{part} can be written: permissions do not bind this user"
print(sum(record is not None for record in runs.load({"a": specs}, where)["a"]), flush=True)
print(len(runs.collect({"a": specs}, where=where)["a"]), flush=True)
try:
    runs.collect({"a": [specs[0].but(seed=9)]}, where=where)
except PermissionError as error:
    print(error.filename, flush=True)
"""


def bound_by_permissions() -> None:
    """Takes from a process of root, before it starts, the right to pass over permissions."""
    drop, passing_over, reading_all = 24, 1, 2  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, _READ_SEARCH
    for right in (passing_over, reading_all):
        ctypes.CDLL(None).prctl(drop, right, 0, 0, 0)


def read_only(kills: int, folder: Path, draw: random.Random) -> Counter:
    """Reads a store that must not be written, and asks for a run that it lacks; then computes it
    where it may be written. What cannot be read counts as lost."""
    sound, count = undisturbed(folder / "sound")[0], Counter(kills=0)
    home = folder / "sound"
    before, files = stamps(home), sorted(home.rglob("*"))
    for part in [home, *files]:
        part.chmod(0o555 if part.is_dir() else 0o444)
    reader = subprocess.run(
        [sys.executable, "-c", READER, str(home), *(spec.model_dump_json() for spec in SPECS)],
        env={**os.environ, "PYTHONPATH": str(ROOT), TAG: str(folder)},
        text=True,
        capture_output=True,
        preexec_fn=bound_by_permissions if os.geteuid() == 0 else None,
    )
    for part in [home, *files]:
        part.chmod(0o755 if part.is_dir() else 0o644)
    if reader.returncode:
        raise RuntimeError(reader.stderr[-3000:])
    loaded, collected, refused = reader.stdout.splitlines()
    count["lost"] += 2 * len(SPECS) - int(loaded) - int(collected)
    count["refused"] += Path(refused).is_relative_to(home)
    count["lost"] += not count["refused"]
    count["different"] += sorted(home.rglob("*")) != files  # something was left there
    more = [SPECS[0].but(seed=9)]
    finished(start(home, specs=more))
    count["lost"] += store_in(home).peek(more[0].id) is None
    now = stamps(home)
    count["doubled"] += sum(now.get(run) != stamp for run, stamp in before.items())
    count["different"] += differences(home, sound)
    return count


PARTS = {part.__name__: part for part in (grid, pool, build, store, disk, read_only, builds)}


def carry_out(name: str, kills: int, seed: int = 0) -> Counter:
    """Carries one part out in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        return PARTS[name](kills, Path(folder), random.Random(seed))


def main() -> int:
    """Prints a row a part; the exit status is 1 if anything is not 0 that must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--kills", type=int, default=50, help="of each part that kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}; valid: {', '.join(PARTS)}")
    bad = 0
    for name in args.parts or PARTS:
        began = time.monotonic()
        count = carry_out(name, args.kills, args.seed)
        entries = {**dict.fromkeys(("kills", *MUST_BE_0), 0), **count}
        row = "  ".join(f"{entry} {number}" for entry, number in entries.items())
        print(f"{name:10} {row}  ({time.monotonic() - began:.0f} s)", flush=True)
        bad += sum(entries[entry] for entry in MUST_BE_0)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
