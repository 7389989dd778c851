"""Files records: one JSON file and one npz file a run, written whole and checked on every read.

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

# entries that may differ where a result is the same
TIMING = ("timing", "created", "environment", "code", "checksum", "spec", "arrays")


@dataclass(frozen=True, eq=False)
class Record:
    """Holds what came out of a run.

    content: the JSON; its top-level entries read as attributes (`record.test["top1"]`).

    Entries: id, status ("ok" | "failed"), history (a row an epoch), curve (smoothed training loss),
    val and test (n, top1 in percent, loss in nats), moe (a row a MoE layer, shallow to deep), cost,
    memory (MiB of a training step, by kind), prune (prunable weights before and after, pruned runs
    only), drop (scores of experts by layer, where some were dropped), timing, weights (SHA-256 at
    start and end), data (the fingerprint of the data set, see `lib.inputs.fingerprint`),
    environment, code, created, error (failed runs only).
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
        """Lists the names of the classes, in label order."""
        return self.content["classes"]

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Reads predictions and routing counts.

        For shapes see `lib.measure.routing.RoutingProbe.arrays`. Raises FileNotFoundError for a
        record without arrays.
        """
        with np.load(self.file.with_suffix(".npz"), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}

    def result(self) -> dict[str, Any]:
        """Gives what must be equal bit for bit when the same spec runs twice.

        No times, no dates, no machine; of the arrays, their hash.
        """
        result = {name: value for name, value in self.content.items() if name not in TIMING}
        return result | {"arrays": self.content.get("arrays", {}).get("content")}


class Store:
    """Finds and files records.

    published: the folder of committed ones; private: the cache, with all others, weights and locks.
    """

    def __init__(self, published: Path, private: Path):
        self.published, self.private = published, private
        self.states = private / "states"
        # {id: whether it was there} of all that was read; a notebook's manifest lists it
        self.reads: dict[str, bool] = {}

    def lock(self, run: str) -> Path:
        """Names the lock file of a run."""
        return self.private / "locks" / run

    def checkpoint(self, run: str) -> Path:
        """Names the checkpoint of an unfinished run."""
        return self.private / "checkpoints" / f"{run}.pt"

    def state(self, run: str) -> Path:
        """Names the file of a run's final weights, where its spec keeps them."""
        return self.states / f"{run}.safetensors"

    def find(self, run: str) -> Path | None:
        """Finds the JSON file of a run, published or private."""
        for root in (self.published, self.private / "records"):
            for file in root.glob(f"*/{run}.json"):
                return file
        return None

    def get(self, spec: RunSpec) -> Record | None:
        """Reads the record of a spec, or gives None, and notes the read.

        A record that fails its checksum is moved aside and counts as absent.
        """
        record = self.peek(spec.id)
        self.reads[spec.id] = record is not None
        return record

    def peek(self, run: str) -> Record | None:
        """Reads a record as `get` does, by id and without noting the read."""
        file = self.find(run)
        if file is None:
            return None
        try:
            content = json.loads(file.read_text())
            damage = _damage(content, file, run)
        except FileNotFoundError:  # another process has just replaced a failed record
            return None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            damage = str(error)
        if damage is not None:
            self._move_aside(file, damage)
            return None
        try:
            spec = RunSpec.model_validate_json(json.dumps(content["spec"]))
        except ValidationError as error:
            warnings.warn(
                f"record {file.name} of {file.parent.name} was made by another version of the "
                f"specs and is left alone: {error}",
                stacklevel=2,
            )
            return None
        return Record(spec, content, file)

    def _move_aside(self, file: Path, damage: str) -> None:
        """Moves a damaged record and its arrays to a folder of their own, with a warning."""
        aside = self.private / "damaged" / f"{time.time_ns()}"
        aside.mkdir(parents=True)
        for part in (file, file.with_suffix(".npz")):
            if part.exists():
                part.replace(aside / part.name)
        warnings.warn(
            f"record {file.name} of {file.parent.name} is damaged ({damage}); "
            f"it was moved to {aside} and its run will be computed again",
            stacklevel=3,
        )

    def publish(self, spec: RunSpec) -> None:
        """Copies a record from the cache to the published ones unless it is there, arrays first."""
        record = self.peek(spec.id)
        if record is None or record.file.is_relative_to(self.published):
            return
        for suffix in (".npz", ".json"):
            source = record.file.with_suffix(suffix)
            if source.is_file():
                with paths.written_whole(self.published / spec.study / source.name) as part:
                    part.write_bytes(source.read_bytes())

    def put(self, content: dict[str, Any], arrays: dict[str, np.ndarray], spec: RunSpec) -> Record:
        """Files a record and returns it.

        A finished record of the run stands, whatever is given: the run was a parent that was
        rebuilt for its weights. Arrays are written first, then the JSON that names their hash, so a
        JSON never points at nothing.
        """
        is_published = spec.publish and content["status"] == "ok"
        root = self.published if is_published else self.private / "records"
        file = root / spec.study / f"{spec.id}.json"
        old_file, old = self.find(spec.id), self.peek(spec.id)
        if old is not None and old.status == "ok":
            if content["status"] != "ok":  # it could not be rebuilt: reported
                return Record(spec, content, old.file)
            self._compare(old, content)
            return old
        if old_file is not None and old_file != file:
            old_file.unlink(missing_ok=True)  # a failed record of an earlier try
        if arrays:
            arrays_file = file.with_suffix(".npz")
            with paths.written_whole(arrays_file) as part, open(part, "wb") as out:
                np.savez_compressed(out, **arrays)
            hashes = {"file": _sha(arrays_file.read_bytes()), "content": _content(arrays)}
            content = content | {"arrays": hashes}
        content = content | {"checksum": _checksum(content)}
        with paths.written_whole(file) as part:
            part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        return Record(spec, content, file)

    @staticmethod
    def _compare(old: Record, new: dict[str, Any]) -> None:
        """Warns where a rebuilt parent has other weights than its record."""
        if old.weights["final"] != new["weights"]["final"]:
            warnings.warn(
                f"run {old.id} was rebuilt and its weights differ from those of its record "
                "(another machine or library version): runs that start from it say so in "
                "weights.parent",
                stacklevel=2,
            )


@functools.cache
def _store(published: Path, private: Path) -> Store:
    return Store(published, private)


def store() -> Store:
    """Gives the project's store, with the cache that MOE_CACHE names now."""
    return _store(paths.RESULTS, paths.cache())


def _damage(content: Any, file: Path, run: str) -> str | None:
    """Says what is wrong with the content of a record's file, None if nothing is."""
    if not isinstance(content, dict) or "checksum" not in content:
        return "no checksum"
    hashed = {name: value for name, value in content.items() if name != "checksum"}
    if content["checksum"] != _checksum(hashed):
        return "its checksum does not match its content"
    if content.get("id") != run:
        return f"it holds run {content.get('id')}"
    if "arrays" in content:
        arrays_file = file.with_suffix(".npz")
        if not arrays_file.is_file():
            return f"{arrays_file.name} is absent"
        if _sha(arrays_file.read_bytes()) != content["arrays"]["file"]:
            return f"{arrays_file.name} does not match its checksum"
    return None


def _checksum(content: dict[str, Any]) -> str:
    """Computes the SHA-256 over a record's content, whatever white space its file has."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return _sha(text.encode())


def _content(arrays: dict[str, np.ndarray]) -> str:
    """Computes the SHA-256 over names, types, shapes and values: independent of compression."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape};".encode() + array.tobytes())
    return digest.hexdigest()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
