"""The record store: one JSON file and one npz file a run, written whole or not at all, checked on
every read.

Published records lie in data/results/<study>/ and are committed; all others in the cache. A record
is looked up by the id of its spec alone, so two studies share a run. Nothing is ever overwritten in
place or deleted: a damaged record is moved aside.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from .. import paths
from ..spec import RunSpec

TIMING = (
    "timing",
    "created",
    "environment",
    "code",
    "checksum",
    "spec",
    "arrays",
)  # not part of a result


@dataclass(frozen=True, eq=False)
class Record:
    """What came out of a run. `content` is the JSON; its top-level entries read as attributes
    (`record.test["top1"]`).

    Entries: id, status ("ok" | "failed"), history (a row an epoch), curve (smoothed training loss),
    val and test (n, top1 in percent, loss in nats), moe (a row a MoE layer, shallow to deep), cost,
    memory (MiB of a training step, by kind), prune (prunable weights before and after, pruned runs
    only), drop (scores of experts by layer, where some were dropped), timing, weights (SHA-256 at
    start and end), environment, code, created, error (failed runs only).
    """

    spec: RunSpec
    content: dict[str, Any] = field(repr=False)
    file: Path

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for before there is a content
            raise AttributeError(name)
        try:
            return self.content[name]
        except KeyError:
            raise AttributeError(
                f"record {self.content.get('id')} has no {name!r}; it has {', '.join(self.content)}"
            ) from None

    @property
    def class_names(self) -> list[str]:
        """Names of the classes, in label order."""
        return self.content["classes"]

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Predictions and routing counts; see `lib.measure.routing.RoutingProbe.arrays` for shapes."""
        with np.load(self.file.with_suffix(".npz"), allow_pickle=False) as held:
            return {name: held[name] for name in held.files}

    def result(self) -> dict[str, Any]:
        """Everything that must be equal bit for bit when the same spec runs twice: no times, no
        dates, no machine."""
        kept = {name: value for name, value in self.content.items() if name not in TIMING}
        return kept | {"arrays": self.content.get("arrays", {}).get("content")}


class Store:
    """Where records lie. `published` holds committed ones, `private` (the cache) the rest, with
    weights and locks."""

    def __init__(self, published: Path, private: Path):
        self.published, self.private = published, private
        self.states = private / "states"
        self.reads: dict[str, bool] = {}  # id -> was it there; what a notebook's manifest lists

    def lock(self, run: str) -> Path:
        """The lock file of a run."""
        return self.private / "locks" / run

    def checkpoint(self, run: str) -> Path:
        """The checkpoint of an unfinished run."""
        return self.private / "checkpoints" / f"{run}.pt"

    def state(self, run: str) -> Path:
        """The final weights of a run that was kept."""
        return self.states / f"{run}.safetensors"

    def find(self, run: str) -> Path | None:
        """The JSON file of a run, published or private."""
        for root in (self.published, self.private / "records"):
            for file in root.glob(f"*/{run}.json"):
                return file
        return None

    def get(self, spec: RunSpec) -> Record | None:
        """The record of a spec, or None. A record that fails its checksum is moved aside and counts
        as absent."""
        record = self.peek(spec.id)
        self.reads[spec.id] = record is not None
        return record

    def peek(self, run: str) -> Record | None:
        """As `get`, by id and without noting the read."""
        file = self.find(run)
        if file is None:
            return None
        trouble = None
        try:
            content = json.loads(file.read_text())
            trouble = _damage(content, file, run)
        except FileNotFoundError:  # another process has just replaced a failed record
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            trouble = str(error)
        if trouble is None:
            try:
                return Record(
                    RunSpec.model_validate_json(json.dumps(content["spec"])), content, file
                )
            except ValidationError as error:
                warnings.warn(
                    f"record {file.name} of {file.parent.name} was made by another version of the specs and is left "
                    f"alone: {error}",
                    stacklevel=2,
                )
                return None
        aside = self.private / "damaged" / f"{time.time_ns()}"
        aside.mkdir(parents=True)
        for part in (file, file.with_suffix(".npz")):
            if part.exists():
                part.replace(aside / part.name)
        warnings.warn(
            f"record {file.name} of {file.parent.name} is damaged ({trouble}); it was moved to {aside} and its "
            "run will be computed again",
            stacklevel=2,
        )
        return None

    def publish(self, spec: RunSpec) -> None:
        """Copy a record from the cache to the published ones unless it is there, arrays first."""
        record = self.peek(spec.id)
        if record is None or record.file.is_relative_to(self.published):
            return
        for suffix in (".npz", ".json"):
            source = record.file.with_suffix(suffix)
            if source.is_file():
                with paths.written_whole(self.published / spec.study / source.name) as part:
                    part.write_bytes(source.read_bytes())

    def put(self, content: dict[str, Any], arrays: dict[str, np.ndarray], spec: RunSpec) -> Record:
        """File a record: arrays first, then the JSON that names their hash, so a JSON never points
        at nothing."""
        root = (
            self.published
            if spec.publish and content["status"] == "ok"
            else self.private / "records"
        )
        file = root / spec.study / f"{spec.id}.json"
        known, old = self.find(spec.id), self.peek(spec.id)
        if old is not None and old.status == "ok":
            if content["status"] != "ok":
                return Record(
                    spec, content, old.file
                )  # a parent that could not be rebuilt: reported, its record stands
            self._compare(old, content)
            return old  # a rebuilt parent: its record stands, its weights are new
        if known is not None and known != file:
            known.unlink(missing_ok=True)  # a failed record of an earlier try
        if arrays:
            with paths.written_whole(file.with_suffix(".npz")) as part, open(part, "wb") as out:
                np.savez_compressed(out, **arrays)
            content = content | {
                "arrays": {
                    "file": _sha(file.with_suffix(".npz").read_bytes()),
                    "content": _content(arrays),
                }
            }
        content = content | {"checksum": _checksum(content)}
        with paths.written_whole(file) as part:
            part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        return Record(spec, content, file)

    @staticmethod
    def _compare(old: Record, new: dict[str, Any]) -> None:
        if old.weights["final"] != new["weights"]["final"]:
            warnings.warn(
                f"run {old.id} was rebuilt and its weights differ from those of its record (another machine or library "
                "version): runs that start from it say so in weights.parent",
                stacklevel=2,
            )


@functools.cache
def _store(published: Path, private: Path) -> Store:
    return Store(published, private)


def store() -> Store:
    """The project's store, with the cache that MOE_CACHE names now."""
    return _store(paths.RESULTS, paths.cache())


def _damage(content: Any, file: Path, run: str) -> str | None:
    if not isinstance(content, dict) or "checksum" not in content:
        return "no checksum"
    if content["checksum"] != _checksum(
        {name: value for name, value in content.items() if name != "checksum"}
    ):
        return "its checksum does not match its content"
    if content.get("id") != run:
        return f"it holds run {content.get('id')}"
    if "arrays" in content:
        beside = file.with_suffix(".npz")
        if not beside.is_file():
            return f"{beside.name} is absent"
        if _sha(beside.read_bytes()) != content["arrays"]["file"]:
            return f"{beside.name} does not match its checksum"
    return None


def _checksum(content: dict[str, Any]) -> str:
    return _sha(
        json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    )


def _content(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over names, types, shapes and values: independent of compression."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape};".encode() + array.tobytes())
    return digest.hexdigest()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
