"""Files records: one JSON file and one npz file a run, written whole and checked on every read.

Published records lie in data/results/<study>/ and are committed; all others in the cache. A record
is looked up by the id of its spec alone, so two studies share a run. What cannot be trusted (a
damaged record, or where a new one is filed one of another version of the specs) is moved to the
folder `damaged` of the cache, named in a warning, and counts as absent; it is never deleted and
never overwritten. Only the record of a failed try gives way to the next try's.

What was verified and has not changed since (`index`) is not opened again before its content is
asked for. At each read there remain: the marks of both files, and, where the content is read, its
checksum.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .. import paths
from ..spec import RunSpec
from .index import Facts, Index, checksum_of, marks_of

# entries that may differ where a result is the same
TIMING = ("timing", "created", "environment", "code", "checksum", "spec", "arrays", "resumed")
# what reading and verifying a record raises where it is damaged
DAMAGE = (OSError, ValueError, RecursionError)
LONGEST_INTEGER = 19  # digits, of 2**63


class Record:
    """Holds what came out of a run.

    content: the JSON, read when it is first asked for where it is not given; its top-level entries
    read as attributes (`record.test["top1"]`).

    Entries: id, status ("ok" | "failed"), history (a row an epoch), curve (smoothed training loss),
    val and test (n, top1 in %, loss in nats), moe (a row an MoE layer, shallow to deep), cost,
    memory (MiB of a training step, by kind), prune (prunable weights before and after, pruned runs
    only), drop (scores of experts by layer, where some were dropped), timing (with `ranks`, where
    several trained it together), weights (SHA-256 at start and end), data (the fingerprint of the
    data set, see `lib.inputs.fingerprint`), resumed (a row each time that training went on with
    other code or on another machine, see `lib.training.checkpoint`), environment, code, created,
    error (failed runs only).
    """

    def __init__(self, spec: RunSpec, content: dict[str, Any] | None, file: Path):
        self.spec, self.file = spec, file
        if content is not None:
            self.content = content

    def __repr__(self) -> str:
        return f"Record(spec={self.spec!r}, file={self.file!r})"

    @functools.cached_property
    def content(self) -> dict[str, Any]:
        """Reads and verifies the JSON. Raises RuntimeError where it was sound a moment before."""
        try:
            return verified(self.file)
        except DAMAGE as error:
            raise RuntimeError(
                f"record {self.file} has just been damaged ({error}): start again, and its run is "
                "computed anew"
            ) from error

    def __getattr__(self, name: str) -> Any:
        # what copy and pickle look for before there is a content, or a file to read it from
        if name.startswith("__") or name in ("spec", "file"):
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
        self.damaged = private / "damaged"
        self.index = Index(private / "index.json")
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

    def is_done(self, run: str) -> bool:
        """Tells whether a run has a finished record, without noting the read."""
        return self.status(run) == "ok"

    def status(self, run: str) -> str | None:
        """Returns how a run ended, "ok" or "failed", without noting the read; None if it did not.

        A record that the index knows is not opened.
        """
        if (known := self.index.facts(run)) is not None:
            return known[1]["status"]
        record = self.peek(run)
        return None if record is None else record.status

    def can_be_started_from(self, run: str) -> bool:
        """Tells whether a run has a finished record and its weights are there.

        Weights without a record are not enough: who wrote them was killed before it was filed.
        """
        return self.state(run).is_file() and self.is_done(run)

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
        known = self.index.facts(spec.id)
        record = self.peek(spec.id) if known is None else Record(spec, None, known[0])
        self.reads[spec.id] = record is not None
        return record

    def facts(self) -> Iterator[tuple[str, Facts]]:
        """Yields run and facts of every sound record; damaged ones are left out, and stay."""
        for root in (self.private / "records", self.published):
            for file in root.glob("*/*.json"):
                known = self.index.facts(file.stem)
                if known is None:
                    known = file, self._read(file)
                if known[1] is not None:
                    yield file.stem, known[1]

    def _read(self, file: Path) -> Facts | None:
        """Reads and verifies a record, remembers its facts and returns them; None if it is not
        sound."""
        marks = marks_of(file)
        try:
            content = verified(file)
            _check_arrays(content, file)
        except DAMAGE:  # or it is just being replaced
            return None
        spec = spec_of(content)
        return self._noted(file, marks, content, spec)

    def _noted(
        self, file: Path, marks: list[Any] | None, content: dict[str, Any], spec: RunSpec | None
    ) -> Facts:
        """Returns the facts of a verified record. Those of finished ones that these specs made are
        remembered."""
        from .estimate import facts_of  # which imports this module

        facts = facts_of(content, spec)
        if facts["status"] == "ok" and spec is not None and spec.id == file.stem:
            self.index.note(file.stem, file, marks, facts)
        return facts

    def peek(self, run: str) -> Record | None:
        """Reads a record as `get` does, by id and without noting the read."""
        file = self.find(run)
        if file is None:
            return None
        marks = marks_of(file)
        try:
            content = verified(file)
            _check_arrays(content, file)
        except FileNotFoundError:  # another process has just replaced a failed record
            return None
        except DAMAGE as error:
            self._set_aside(file, f"is damaged ({error})")
            return None
        spec = spec_of(content)
        if spec is not None and spec.id == run:
            self._noted(file, marks, content, spec)
            return Record(spec, content, file)
        if spec is not None and "semantics" not in content:
            self._set_aside(file, f"is damaged (its spec is that of run {spec.id})")
            return None
        warnings.warn(
            f"record {file.name} of {file.parent.name} was made by another version of the specs "
            "and is left alone",
            stacklevel=2,
        )
        return None

    def _set_aside(self, file: Path, why: str) -> None:
        """Moves a record and its arrays to a folder of their own, with a warning."""
        paths.set_aside(
            [file, file.with_suffix(".npz")],
            self.damaged,
            f"record {file.name} of {file.parent.name} {why}",
            "its run will be computed again",
        )

    def publish(self, spec: RunSpec) -> None:
        """Copies a record from the cache to the published ones unless it is there, arrays first."""
        known = self.index.facts(spec.id)
        if known is not None and known[0].is_relative_to(self.published):
            return
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
        rebuilt for its weights. A failed one is replaced. Arrays are written first, then the JSON
        that names their hash, so a JSON never points at nothing.
        """
        is_published = spec.publish and content["status"] == "ok"
        root = self.published if is_published else self.private / "records"
        file = root / spec.study / f"{spec.id}.json"
        old = self.peek(spec.id)
        if old is not None and old.status == "ok":
            if content["status"] != "ok":  # it could not be rebuilt: reported
                return Record(spec, content, old.file)
            self._compare(old, content)
            return old
        if old is not None and old.file != file:
            old.file.unlink(missing_ok=True)  # a failed record of an earlier try
        left_alone = self.find(spec.id) if old is None else None
        if left_alone is not None and (left_alone == file or content["status"] == "ok"):
            self._set_aside(left_alone, "was made by another version of the specs")
        if arrays:
            arrays_file = file.with_suffix(".npz")
            with paths.written_whole(arrays_file) as part, open(part, "wb") as out:
                np.savez_compressed(out, **arrays)
            hashes = {"file": _sha(arrays_file.read_bytes()), "content": _content(arrays)}
            content = content | {"arrays": hashes}
        content = content | {"checksum": checksum_of(content)}
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


def verified(file: Path) -> dict[str, Any]:
    """Reads the JSON of a record and verifies it; its arrays are not looked at.

    Raises one of DAMAGE, whose message says what is wrong.
    """
    text = file.read_text(encoding="utf-8")
    content = json.loads(text, parse_int=_integer, parse_constant=_refuse_number)
    if fault := _fault(content, file.stem):
        raise ValueError(fault)
    return content


def spec_of(content: dict[str, Any]) -> RunSpec | None:
    """Reads the spec of a verified record; None if another version of the specs made it."""
    try:
        return RunSpec.model_validate_json(json.dumps(content["spec"]))
    except (ValueError, TypeError, ArithmeticError, LookupError, RecursionError):
        return None


def _fault(content: Any, run: str) -> str | None:
    """Says what is wrong with the content of a record's file, None if nothing is."""
    if not isinstance(content, dict) or "checksum" not in content:
        return "no checksum"
    hashed = {name: value for name, value in content.items() if name != "checksum"}
    if content["checksum"] != checksum_of(hashed):
        return "its checksum does not match its content"
    if content.get("id") != run:
        return f"it holds run {content.get('id')}"
    if not isinstance(content.get("spec"), dict):
        return "it has no spec"
    if "semantics" in content and checksum_of(content["semantics"])[: len(run)] != run:
        return "what its spec meant when it was made hashes to another id"
    status, error = content.get("status"), content.get("error")
    if status not in ("ok", "failed"):
        return f"its status is {status!r}"
    if status == "failed" and not (isinstance(error, dict) and {"kind", "message"} <= set(error)):
        return "it failed and does not say why"
    return None


def _check_arrays(content: dict[str, Any], file: Path) -> None:
    """Raises ValueError if the arrays of a record are absent, or not those that its JSON names."""
    if "arrays" not in content:
        return
    arrays_file, hashes = file.with_suffix(".npz"), content["arrays"]
    if not arrays_file.is_file():
        raise ValueError(f"{arrays_file.name} is absent")
    if not isinstance(hashes, dict) or _sha(arrays_file.read_bytes()) != hashes.get("file"):
        raise ValueError(f"{arrays_file.name} does not match its checksum")


def _integer(digits: str) -> int:
    """Reads an integer of a record. Raises ValueError where a float could not hold it."""
    if len(digits) > LONGEST_INTEGER + digits.startswith("-"):
        raise ValueError(f"it holds an integer of {len(digits)} digits")
    return int(digits)


def _refuse_number(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number of JSON")


def _content(arrays: dict[str, np.ndarray]) -> str:
    """Computes the SHA-256 over names, types, shapes and values: independent of compression."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape};".encode() + array.tobytes())
    return digest.hexdigest()


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
