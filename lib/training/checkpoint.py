"""The checkpoint of an unfinished stage: a file to resume from, written whole or not at all, and
verified before it is trusted.

Beside the state it holds its SHA-256, and its origin: run, data, code and environment. One that is
damaged, of another run or of other data is set aside, and training starts anew. One that other code
or another environment made is resumed, since hours of work lie in it: the record says so in
`resumed`, a row each time: step, and differs {name: [before, now]}.
"""

from __future__ import annotations

import hashlib
import time
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import paths

# at least this long between checkpoints, and at least WRITE_SHARE times what writing one took
CHECKPOINT_SECONDS = 60
WRITE_SHARE = 20
# entries of an origin without which a checkpoint is another run's
MUST_BE_EQUAL = ("id", "data")


class Checkpoint:
    """A file, None for no checkpoint, and when it was written last.

    origin: what made it: id of the run, fingerprint of its data, hash of the code, and the entries
    of the environment; what it lacks is not compared. resumed: rows for the record.
    """

    def __init__(self, file: Path | None, origin: Mapping[str, Any] | None = None):
        self.file, self.origin = file, dict(origin or {})
        self.resumed: list[dict[str, Any]] = []
        self.written, self.write_seconds = time.monotonic(), 0.0

    def read(self) -> dict[str, Any] | None:
        """Returns what was saved; None if there is nothing, or with a warning if it is set
        aside."""
        if self.file is None or not self.file.exists():
            return None
        try:
            content = torch.load(self.file, weights_only=True)
            fault = self._fault(content)
        except Exception as error:  # torch raises many kinds on a damaged file
            fault = f"cannot be read ({error})"
        if fault:
            self.set_aside(fault)
            return None
        before = content.get("origin", {})
        names = self.origin.keys() - set(MUST_BE_EQUAL)
        differs = {
            name: [before.get(name), self.origin[name]]
            for name in sorted(names)
            if before.get(name) != self.origin[name]
        }
        self.resumed = list(content.get("resumed", ()))
        if differs:
            self.resumed.append({"step": content["step"], "differs": differs})
        return content

    def _fault(self, content: Any) -> str | None:
        """Says what is wrong with the content of the file, None if nothing is."""
        if not isinstance(content, dict) or "step" not in content:
            return "holds no state of training"
        if "sha256" not in content:
            if damaged := zipfile.ZipFile(self.file).testzip():
                return f"is damaged in {damaged}"
            warnings.warn(
                f"checkpoint {self.file} was written by an older version and does not say by which "
                "code and where: it is resumed, and the record will say so",
                stacklevel=3,
            )
            return None
        if content["sha256"] != _sha256(content):
            return "does not match its SHA-256"
        before = content["origin"]
        for name in MUST_BE_EQUAL:
            if None not in (before.get(name), now := self.origin.get(name)) and before[name] != now:
                return f"was made with another {name}"
        return None

    def set_aside(self, fault: str) -> None:
        """Moves the file away, with a warning: what it holds cannot be resumed."""
        self.resumed = []
        why = f"checkpoint {self.file} {fault}"
        paths.set_aside(
            [self.file], self.file.parent.parent / "damaged", why, "training starts anew"
        )

    def step(self) -> int:
        """Reads how far the training has come, for an estimate: nothing is verified, 0 if it cannot
        be read."""
        try:
            content = torch.load(self.file, weights_only=True, mmap=True, map_location="cpu")
            return int(content["step"])
        except Exception:  # as above; whoever resumes it will say what is wrong
            return 0

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        least = max(CHECKPOINT_SECONDS, WRITE_SHARE * self.write_seconds)
        return self.file is not None and time.monotonic() - self.written > least

    def write(self, state: dict[str, Any]) -> None:
        """Saves `state`; warns if that fails, since a full disk costs the checkpoint, not the
        run."""
        self.written = time.monotonic()
        content = state | {"origin": self.origin, "resumed": self.resumed}
        content["sha256"] = _sha256(content)
        try:
            with paths.written_whole(self.file) as part:
                torch.save(content, part)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
            warnings.warn(
                f"run {self.file.stem}: the checkpoint at step {state['step']} was not written "
                f"({error})",
                stacklevel=2,
            )
        self.write_seconds = time.monotonic() - self.written


def _sha256(content: Mapping[str, Any]) -> str:
    """Computes the SHA-256 over all entries but its own: names, shapes, types and values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{tuple(value.shape)} {value.dtype};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"{len(value)} entries;".encode())
            for name, inner in value.items():
                add(name)
                add(inner)
        elif isinstance(value, (list, tuple)):
            digest.update(f"{len(value)} items;".encode())
            for inner in value:
                add(inner)
        else:
            digest.update(f"{value!r};".encode())

    add({name: value for name, value in content.items() if name != "sha256"})
    return digest.hexdigest()
