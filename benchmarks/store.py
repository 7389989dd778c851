"""Times a store of many records, and the check for stale pages: `python -m benchmarks.store`.

Records are copies of one that is computed, with other seeds: valid ids, checksums and arrays. Each
time is taken with a store that has just been opened, as a command finds it. Pages are copies of the
executed copy of one page, each checked in full.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from lib.pages import contents, manifest, profiles
from lib.runs import collect, order
from lib.runs.estimate import Estimates
from lib.runs.index import checksum_of
from lib.runs.store import Record, Store
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec

from . import machine

RUN = RunSpec(
    study="bench",
    data=DataSpec(image_size=14, train=50, val=50, test=50),
    backbone=BackboneSpec(patch=7, width=16, depth=1, heads=2),
    train=TrainSpec(epochs=1.0, batch=25),
    threads=1,
)
PAGE = 100  # runs of one page


def computed(folder: Path) -> Record:
    """Computes the one run whose record is copied."""
    return collect.collect({"": [RUN]}, where=Store(folder / "published", folder / "first"))[""][0]


def copies(record: Record, count: int, where: Store) -> list[RunSpec]:
    """Files `count` copies of a record under seeds from 1 on; returns their specs."""
    folder = where.private / "records" / RUN.study
    folder.mkdir(parents=True, exist_ok=True)
    arrays = record.file.with_suffix(".npz").read_bytes()
    specs = [RUN.but(seed=seed) for seed in range(1, count + 1)]
    for spec in specs:
        content = record.content | {
            "id": spec.id,
            "spec": json.loads(spec.model_dump_json()),
            "semantics": json.loads(json.dumps(spec.canonical())),
        }
        del content["checksum"]
        content["checksum"] = checksum_of(content)
        (folder / f"{spec.id}.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / f"{spec.id}.npz").write_bytes(arrays)
    return specs


def times(where: Store, specs: list[RunSpec]) -> dict[str, float]:
    """Times what is asked of a store of finished runs, in seconds of this process.

    The plan of `fill` lacks ten runs.
    """
    more = [RUN.but(seed=len(specs) + 1 + number) for number in range(10)]

    def load(store: Store) -> None:
        [records] = collect.load({"": specs[:PAGE]}, store).values()
        assert all(record.test["n"] == RUN.data.test for record in records)

    def fill(store: Store) -> None:
        grids = {"page": {"arm": [*specs, *more]}}
        plan = order.missing(grids, store, Estimates.of_store(store), card=False)
        assert len(plan.items) == len(more)

    asked: dict[str, Callable[[Store], object]] = {
        "status of each run": lambda store: [collect.status_of(spec, store) for spec in specs],
        "fill --dry": fill,
        "collect": lambda store: collect.collect({"": specs}, where=store),
        f"load of a page with {PAGE}": load,
    }
    taken = {}
    for name, ask in asked.items():
        store, start = Store(where.published, where.private), time.process_time()
        ask(store)
        taken[name] = time.process_time() - start
        store.index.save()
    return taken


def staleness(pages: int, folder: Path) -> float:
    """Times how long it takes to see that none of so many pages is stale, in seconds."""
    key, profile = "foundations/speed", "quick"
    hashes = {"files": manifest.code_and_papers(), "source": manifest.source_digest(key)}
    before = hashes | {"seconds": 0.0, "finished": "2026-01-01T00:00:00+00:00"}
    values = manifest.resolved(key, profile)
    used = {
        "modules": [file for file in hashes["files"] if file.startswith("lib/")],
        "papers": [file for file in hashes["files"] if not file.startswith("lib/")],
        "reads": {},
        "asked": [[key, profile, values]],
    }
    made = manifest.make(key, profile, {}, before, used)
    original = manifest.executed

    def copy_of(_: str) -> Path:
        return folder / "page.ipynb"

    copy_of(key).write_text(json.dumps({"metadata": {"moe": made}}))
    manifest.executed = copy_of
    try:
        start = time.process_time()
        reasons = {manifest.reason_to_run(key, profile) for _ in range(pages)}
        taken = time.process_time() - start
    finally:
        manifest.executed = original
    assert reasons == {None}, reasons
    return taken


def rows(count: int, pages: int) -> Iterator[tuple[str, str, str]]:
    """Yields what was measured, at the first read and later, in seconds of a processor."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        where = Store(folder / "published", folder / "cache")
        specs = copies(computed(folder), count, where)
        time.sleep(3)  # a record that was just written is not remembered
        first, later = times(where, specs), times(where, specs)
        for asked, seconds in later.items():
            yield f"{count:,} records: {asked}", f"{first[asked]:.2f}", f"{seconds:.2f}"
        size = (where.private / "index.json").stat().st_size
        yield "size of the index, MB", "", f"{size / 1e6:.1f}"
        start = time.process_time()
        for key in contents.in_book():
            profiles.plan(key, profiles.PUBLISHED)
        taken = time.process_time() - start
        yield f"plans of the book, profile {profiles.PUBLISHED}", "", f"{taken:.2f}"
        for number in (len(contents.in_book()), pages):
            yield f"{number} pages: none is stale", "", f"{staleness(number, folder):.2f}"


def main() -> None:
    """Prints the table."""
    options = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    options.add_argument("--records", type=int, default=10_000, help="default: 10,000")
    options.add_argument("--pages", type=int, default=300, help="default: 300")
    given = options.parse_args()
    machine.load_before()
    print(f"{'seconds of a processor':<48} {'first':>8} {'later':>8}")
    for what, first, later in rows(given.records, given.pages):
        print(f"{what:<48} {first:>8} {later:>8}", flush=True)


if __name__ == "__main__":
    main()
