"""Where things lie. Found from this file's own place, so nothing depends on the working directory."""

from __future__ import annotations

import os
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAPERS = ROOT / "data" / "papers"
RESULTS = ROOT / "data" / "results"


def cache() -> Path:
    """The folder for downloads, checkpoints and unpublished records: MOE_CACHE, or data/cache of
    the project."""
    return Path(os.environ.get("MOE_CACHE") or ROOT / "data" / "cache").expanduser().absolute()


def data_home() -> Path | None:
    """MOE_DATA as an absolute path, or None if unset. Raises FileNotFoundError if it is set and not
    a folder."""
    given = os.environ.get("MOE_DATA")
    if not given:
        return None
    tried = [Path(given).expanduser().absolute(), (ROOT / given).absolute()]
    for home in (
        tried
    ):  # a relative path may be meant from the project's root: notebooks run in other folders
        if home.is_dir():
            return home.resolve()
    raise FileNotFoundError(
        f"MOE_DATA={given!r} is not a folder (looked at {' and '.join(map(str, tried))}): "
        "set it to the folder that holds the data sets, or unset it"
    )


@contextmanager
def written_whole(target: Path):
    """Yield a temporary path beside `target`; on success sync it to disk and rename it, on failure
    remove it.

    A kill, a power cut or a full disk at any moment leaves either the old file or the new one,
    never a part.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        yield part
        with open(part, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(part, target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        part.unlink(missing_ok=True)
