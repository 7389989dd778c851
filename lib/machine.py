"""What this machine has: cores that may be used, and versions of packages."""

from __future__ import annotations

import os
from importlib import metadata


def cores() -> int:
    """Counts the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def version_of(package: str, absent: str = "not installed") -> str:
    """Returns the version of a package, or what is said where it is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return absent
