"""Processes that a part of `stress.py` has started, and what is left of them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

TAG = "MOE_STRESS"  # in the environment of all processes that a part starts


def tagged(tag: Path) -> list[int]:
    """Numbers of the processes that a part has started and that are at work."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{TAG}={tag}\0".encode() in (folder / "environ").read_bytes():
                if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                    found.append(int(folder.name))
    return found


def orphans(tag: Path, seconds: float = 60.0) -> int:
    """Counts the processes that are still there after a while, and ends them."""
    deadline = time.monotonic() + seconds
    while (left := tagged(tag)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for process in left:
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    return len(left)
