"""Times a store of many records, and the staleness check of many pages.

Records are copies of one that is computed, with other seeds: valid ids, checksums and arrays.
"""

from __future__ import annotations

import json
from pathlib import Path

from lib.runs import collect
from lib.runs.store import Record, Store, _checksum
from lib.spec import BackboneSpec, DataSpec, RunSpec, TrainSpec

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
        content["checksum"] = _checksum(content)
        (folder / f"{spec.id}.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / f"{spec.id}.npz").write_bytes(arrays)
    return specs
