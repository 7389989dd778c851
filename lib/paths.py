"""Where things lie, found from the place of this file: nothing depends on the working directory.

In a checkout all of it lies in its folders; where a wheel is installed, what is written lies in the
user's cache folder.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LIB = Path(__file__).resolve().parent
ROOT = LIB.parent  # the checkout; the folder of packages where this one is installed
INSTALLED = (LIB / "papers").is_dir()  # only a wheel has the published values inside
PAPERS = LIB / "papers" if INSTALLED else ROOT / "data" / "papers"


def _written() -> Path:
    """Returns the folder of all that is written: `data`, or one of the user's caches."""
    if not INSTALLED:
        return ROOT / "data"
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser().absolute() / "moe_vision"


PROBES = _written() / "probes"
RESULTS = _written() / "results"
# measured speeds, a folder deeper than records, which the store looks for in <study>/<id>.json
BENCH = RESULTS / "bench"


def cache() -> Path:
    """Returns the folder for downloads, checkpoints and records that are not published.

    MOE_CACHE, or data/cache of the checkout; ~/.cache/moe_vision/cache where there is none.
    """
    return Path(os.environ.get("MOE_CACHE") or _written() / "cache").expanduser().absolute()


def need_checkout(what: str) -> None:
    """Raises FileNotFoundError where the package is installed without the book.

    what: the thing that needs the book's notebooks, as a sentence begins with it.
    """
    if INSTALLED:
        raise FileNotFoundError(
            f"{what} needs a checkout of the project, with its notebooks, and only the package is "
            f"installed here ({LIB}): clone the repository and `pip install -e .` there"
        )


def data_home() -> Path | None:
    """Returns MOE_DATA, the folder of the data sets, as an absolute path; None if it is not set.

    Raises FileNotFoundError if it is set and not a folder.
    """
    given = os.environ.get("MOE_DATA")
    if not given:
        return None
    tried = [Path(given).expanduser().absolute()]
    if not INSTALLED:
        # it may be meant from the checkout's root: notebooks run in other folders
        tried.append((ROOT / given).absolute())
    for home in tried:
        if home.is_dir():
            return home.resolve()
    places = " and ".join(dict.fromkeys(map(str, tried)))
    raise FileNotFoundError(
        f"MOE_DATA={given!r} is not a folder (looked at {places}): "
        "set it to the folder that holds the data sets, or unset it"
    )


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`, which becomes `target` if the block ends well.

    It is synced to disk and renamed then, and removed otherwise: a kill, a power cut or a full disk
    at any moment leaves either the old file or the new one, never a part.
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


def marks_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """Returns what tells a file from one that took its place: size, times of change, number.

    A copy may keep the time of what it replaces, but not the number, nor the time of change, of its
    entry.
    """
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def set_aside(files: Sequence[Path], folder: Path, why: str, then: str) -> None:
    """Moves files that cannot be trusted to a new folder inside `folder`, with a warning.

    Nothing is deleted. files: those of one thing, of which some may be absent; why: which thing it
    is and what is wrong with it; then: what happens without it. Where they cannot be moved, the
    warning says so, and they stay.
    """
    aside = folder / f"{time.time_ns()}"
    try:
        aside.mkdir(parents=True, exist_ok=True)
        for file in filter(os.path.lexists, files):
            _move(file, aside / file.name)
        place = f"it was moved to {aside}"
    except FileNotFoundError:
        place = "another process has moved it aside"
    except OSError as error:
        place = f"it could not be moved to {folder} ({error})"
    if aside.is_dir() and not any(aside.iterdir()):
        aside.rmdir()
    warnings.warn(f"{why}; {place} and {then}", stacklevel=3)


def _move(file: Path, target: Path) -> None:
    """Renames a file or folder; copies it only where the target lies on another disk."""
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.move(file, target)
