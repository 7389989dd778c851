"""The checkpoint of an unfinished stage: a file to resume from, written whole or not at all."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import torch

from .. import paths

# at least this long between checkpoints, and at least WRITE_SHARE times what writing one took
CHECKPOINT_SECONDS = 60
WRITE_SHARE = 20


class Checkpoint:
    """A file, None for no checkpoint, and when it was written last."""

    def __init__(self, file: Path | None):
        self.file = file
        self.written, self.write_seconds = time.monotonic(), 0.0

    def read(self) -> dict[str, Any] | None:
        """Returns what was saved; None if there is nothing, or with a warning if it is damaged."""
        if self.file is None or not self.file.is_file():
            return None
        try:
            return torch.load(self.file, weights_only=True)
        except Exception as error:  # torch raises many kinds on a damaged file
            warnings.warn(
                f"checkpoint {self.file} cannot be read ({error}): training starts anew",
                stacklevel=2,
            )
            return None

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        least = max(CHECKPOINT_SECONDS, WRITE_SHARE * self.write_seconds)
        return self.file is not None and time.monotonic() - self.written > least

    def write(self, state: dict[str, Any]) -> None:
        """Saves `state`; warns if that fails, since a full disk costs the checkpoint, not the
        run."""
        self.written = time.monotonic()
        try:
            with paths.written_whole(self.file) as part:
                torch.save(state, part)
        except OSError as error:
            warnings.warn(
                f"run {self.file.stem}: the checkpoint at step {state['step']} was not written "
                f"({error})",
                stacklevel=2,
            )
        self.write_seconds = time.monotonic() - self.written
