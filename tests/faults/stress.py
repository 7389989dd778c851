"""Kills, flipped bytes, full disks, read-only folders and rival builds, in numbers.

    python tests/faults/stress.py                    # 50 kills each of grids, pools and builds
    python tests/faults/stress.py grid store --kills 5

A row a part: kills, and what must be 0: records lost (filed before a kill, or set aside, and gone),
doubled (computed again though filed), different (from those of undisturbed runs), orphans
(processes that a killed one left).
"""

from __future__ import annotations

import argparse
import contextlib
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

from lib.runs import collect as runs  # noqa: E402
from lib.runs.store import Store  # noqa: E402
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec  # noqa: E402

MUST_BE_0 = ("lost", "doubled", "different", "orphans")
TAG = "MOE_STRESS"  # in the environment of all processes that a part starts
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


def start(folder: Path, workers: int = 0, code: str = WORKER, **more) -> subprocess.Popen:
    """Starts a process that collects SPECS into the store of a folder."""
    script = folder / "worker.py"
    script.write_text(code)  # a file: workers of a pool import it anew
    texts = [spec.model_dump_json() for spec in SPECS]
    return subprocess.Popen(
        [sys.executable, str(script), str(folder), str(workers), *texts],
        env={**os.environ, "PYTHONPATH": str(ROOT), TAG: str(folder), "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


def tagged(tag: Path) -> list[int]:
    """Numbers of the processes that a part has started and that are at work."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TAG}={tag}\0".encode() in (folder / "environ").read_bytes():
                if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(folder.name))
    return found


def orphans(tag: Path, seconds: float = 25.0) -> int:
    """Counts the processes that are still there after a while, and ends them."""
    deadline = time.monotonic() + seconds
    while (left := tagged(tag)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    return len(left)


def undisturbed(folder: Path) -> dict[str, dict]:
    """Results of SPECS and their parent, in a process that nobody disturbs."""
    folder.mkdir()
    finished(start(folder))
    return results(folder)


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
    """{id: when its record was written}."""
    files = (folder / "private" / "records").glob("*/*.json")
    return {file.stem: file.stat().st_mtime_ns for file in files}


def differences(folder: Path, sound: dict[str, dict]) -> int:
    """Counts the records that are absent in the end, or other than undisturbed ones."""
    got = results(folder)
    return sum(got.get(run) != result for run, result in sound.items())


# ---- parts


def grid(kills: int, folder: Path, workers: int = 0) -> Counter:
    """Kills a process that computes a grid, at random moments, until it has been killed often
    enough; a grid that is done in between is begun anew."""
    sound, count, number = undisturbed(folder / "sound"), Counter(kills=0), 0
    draw = random.Random(workers)
    while count["kills"] < kills:
        number += 1
        home = folder / str(number)
        home.mkdir()
        filed: dict[str, int] = {}
        while True:
            process = start(home, workers)
            if count["kills"] < kills:
                process.stdout.readline()  # ready: what follows is work
                time.sleep(draw.uniform(0.0, 2.0 + 6.0 * (workers > 0)))
                of_workers = [run for run in tagged(home) if run != process.pid]
                target = draw.choice([process.pid, *of_workers])
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


def pool(kills: int, folder: Path) -> Counter:
    """As `grid`, with two workers: the parent or one of them is killed."""
    return grid(kills, folder, workers=2)


def store(kills: int, folder: Path) -> Counter:
    """Flips bytes in the middle and at the end of every file of a store, one at a time; what is
    lost is a damaged file that was not set aside."""
    sound, count = undisturbed(folder / "sound"), Counter(kills=0)
    where = store_in(folder / "sound")
    where.states.mkdir(exist_ok=True)
    files = [f for f in where.private.rglob("*") if f.is_file() and f.suffix in (".json", ".npz")]
    for file in [*files, *where.states.iterdir()]:
        for share in (0.5, 0.99):
            data = bytearray(file.read_bytes())
            at = int(share * len(data))
            data[at : at + 8] = bytes(byte ^ 0x55 for byte in data[at : at + 8])
            file.write_bytes(data)
            if file.suffix == ".safetensors":  # read by who computes a child
                where.find(SPECS[0].id).unlink()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                runs.collect({"a": [PARENT.but(keep=True), *SPECS]}, where=where)
            aside = [f.read_bytes() for f in where.damaged.glob(f"*/{file.name}")]
            count["files"] += 1
            count["lost"] += bytes(data) not in aside
            count["different"] += differences(folder / "sound", sound)
    return count


def disk(kills: int, folder: Path) -> Counter:
    """Computes a grid where no file may grow beyond a limit, then without a limit."""
    sound, count = undisturbed(folder / "sound"), Counter(kills=0)
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


def read_only(kills: int, folder: Path) -> Counter:
    """Computes a grid by a user who may read the store and write nothing; then by one who may."""
    sound, count = undisturbed(folder / "sound"), Counter(kills=0)
    home = folder / "sound"
    before = stamps(home)
    nobody = {"user": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    for part in [folder, home, *home.rglob("*")]:
        part.chmod(0o555 if part.is_dir() else 0o444)
    for parent in folder.parents:
        if parent != Path(tempfile.gettempdir()) and Path(tempfile.gettempdir()) in parent.parents:
            parent.chmod(0o755)
    code = "import sys; from pathlib import Path; from lib.runs import collect as runs\n"
    code += "from lib.runs.store import Store; from lib.spec import RunSpec\n"
    code += "f = Path(sys.argv[1]); w = Store(f / 'published', f / 'private')\n"
    code += "s = [RunSpec.model_validate_json(t) for t in sys.argv[2:]]\n"
    code += "print(sum(r is not None for r in runs.load({'a': s}, w)['a']), end='')"
    read = subprocess.run(
        [sys.executable, "-c", code, str(home), *(spec.model_dump_json() for spec in SPECS)],
        env={**os.environ, "PYTHONPATH": str(ROOT), TAG: str(folder)},
        text=True,
        capture_output=True,
        **nobody,
    )
    count["lost"] += len(SPECS) - int(read.stdout or 0)
    for part in [folder, home, *home.rglob("*")]:
        part.chmod(0o755 if part.is_dir() else 0o644)
    count["doubled"] += sum(stamps(home).get(run) != stamp for run, stamp in before.items())
    count["different"] += differences(home, sound)
    return count


BUSY = "import time\nfor _ in range(40):\n    time.sleep(0.1)\nprint('well')"


def book_in(folder: Path):
    """A book of two pages that take four seconds each."""
    from conftest import TinyBook

    folder.mkdir(parents=True, exist_ok=True)
    book = TinyBook(folder / "project")
    for key in ("a/one", "a/two"):
        book.notebook(key, BUSY)
    return book


def start_build(book, tag: Path) -> subprocess.Popen:
    """Starts a build of a book; its output goes to a file."""
    code = "from jupyter_book.cli.main import main; main()"
    with open(tag / "said.txt", "a") as said:
        return subprocess.Popen(
            [sys.executable, "-c", code, "build", "book"],
            cwd=book.root,
            env={
                **os.environ,
                "PYTHONPATH": str(book.root),
                "MOE_CACHE": str(book.root / "cache"),
                TAG: str(tag),
            },
            stdout=said,
            stderr=said,
        )


def build(kills: int, folder: Path) -> Counter:
    """Ends builds by one signal or another, at random moments; then lets one end well."""
    book, count, draw = book_in(folder), Counter(kills=0), random.Random(0)
    while count["kills"] < kills:
        process = start_build(book, folder)
        while process.poll() is None and len(tagged(folder)) < 2:  # a runner is there
            time.sleep(0.1)
        time.sleep(draw.uniform(0.0, 12.0))
        if process.poll() is None:
            process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGHUP][count["kills"] % 3])
            count["kills"] += 1
        process.wait(60)
        count["orphans"] += orphans(folder)
        for key in ("one", "two"):  # so that there is something to do
            (book.root / "book" / "notebooks" / "a" / f"{key}.ipynb").unlink(missing_ok=True)
    return count + _ends_well(book, [start_build(book, folder)], folder)


def builds(kills: int, folder: Path) -> Counter:
    """Two builds of one checkout at once: both end well, each notebook is run once."""
    book = book_in(folder)
    count = _ends_well(book, [start_build(book, folder) for _ in range(2)], folder)
    said = (folder / "said.txt").read_text()
    count["doubled"] += said.count("  start  ") - 2
    count["waited"] += said.count("is at work here: waiting for it")
    return count


def _ends_well(book, processes: list[subprocess.Popen], folder: Path) -> Counter:
    """Waits for builds; counts those that fail and pages without the result as lost."""
    count = Counter(kills=0)
    for process in processes:
        count["lost"] += process.wait(600) != 0
    for key in ("one", "two"):
        page = book.root / "book" / "notebooks" / "a" / f"{key}.ipynb"
        count["lost"] += not page.is_file() or "well" not in page.read_text()
    count["orphans"] += orphans(folder)
    return count


PARTS = {part.__name__: part for part in (grid, pool, build, store, disk, read_only, builds)}


def carry_out(name: str, kills: int) -> Counter:
    """Carries one part out in a folder of its own."""
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        return PARTS[name](kills, Path(folder))


def main() -> int:
    """Prints a row a part; the exit status is 1 if anything is not 0 that must be."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--kills", type=int, default=50, help="of each part that kills")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(unknown)}; valid: {', '.join(PARTS)}")
    bad = 0
    for name in args.parts or PARTS:
        began = time.monotonic()
        count = carry_out(name, args.kills)
        entries = {**dict.fromkeys(("kills", *MUST_BE_0), 0), **count}
        row = "  ".join(f"{entry} {number}" for entry, number in entries.items())
        print(f"{name:10} {row}  ({time.monotonic() - began:.0f} s)", flush=True)
        bad += sum(entries[entry] for entry in MUST_BE_0)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
