"""Parts of `stress.py`: builds that are ended at random moments, and two builds at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from conftest import TinyBook
from stress_processes import TAG, orphans, tagged

BUSY = "import time\nfor _ in range(40):\n    time.sleep(0.1)\nprint('w' + 'ell')"


def book_in(folder: Path) -> TinyBook:
    """A book of two pages that take four seconds each."""
    folder.mkdir(parents=True, exist_ok=True)
    book = TinyBook(folder / "project")
    for key in ("a/one", "a/two"):
        book.notebook(key, BUSY)
    return book


def start_build(book: TinyBook, tag: Path) -> subprocess.Popen:
    """Starts a build of a book; its output goes to a file."""
    code = "from jupyter_book.cli.main import main; main()"
    with open(tag / "said.txt", "a") as said:
        return subprocess.Popen(
            [sys.executable, "-c", code, "build", "book"],
            cwd=book.root,
            env={
                **os.environ,
                "PYTHONPATH": str(book.root),
                "MOE_CACHE": str(book.root / "cache"),
                TAG: str(tag),
            },
            stdout=said,
            stderr=said,
        )


def build(kills: int, folder: Path, draw: random.Random) -> Counter:
    """Ends builds by one signal or another, at random moments; then lets one end well."""
    book, count = book_in(folder), Counter(kills=0)
    while count["kills"] < kills:
        process = start_build(book, folder)
        while process.poll() is None and len(tagged(folder)) < 2:  # a runner is there
            time.sleep(0.1)
        time.sleep(draw.uniform(0.0, 12.0))
        if process.poll() is None:
            process.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGHUP][count["kills"] % 3])
            count["kills"] += 1
        process.wait(300)
        count["orphans"] += orphans(folder)
        for key in ("one", "two"):  # so that there is something to do
            (book.root / "book" / "notebooks" / "a" / f"{key}.ipynb").unlink(missing_ok=True)
    return count + _ends_well(book, [start_build(book, folder)], folder)


def builds(kills: int, folder: Path, draw: random.Random) -> Counter:
    """Two builds of one checkout at once: both end well, each notebook is run once."""
    book = book_in(folder)
    count = _ends_well(book, [start_build(book, folder) for _ in range(2)], folder)
    said = (folder / "said.txt").read_text()
    count["doubled"] += said.count("  start  ") - 2
    count["waited"] += said.count("is at work here: waiting for it")
    return count


def _ends_well(book: TinyBook, processes: list[subprocess.Popen], folder: Path) -> Counter:
    """Waits for builds; counts those that fail and pages without the result as lost."""
    count = Counter(kills=0)
    for process in processes:
        count["lost"] += process.wait(600) != 0
    for key in ("one", "two"):
        page = book.root / "book" / "notebooks" / "a" / f"{key}.ipynb"
        count["lost"] += not page.is_file() or "well" not in page.read_text()
    count["orphans"] += orphans(folder)
    return count
