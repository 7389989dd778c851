"""What an executed notebook was made from, and whether that still holds.

The runner puts a hidden cell before and after a notebook: `watch()` notes which files under
`data/papers` are opened, `footprint()` prints what the kernel used. From this and from hashes taken
*before* the run (so that an edit during a long run counts as a change) the runner writes a manifest
into the executed copy. `reason_to_run` compares a manifest with the files of today: it reads hashes
only and imports nothing heavy, so that a build with nothing to do takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from ..paths import PAPERS, ROOT
from . import parameters, profiles

VERSION = 1
MARK = "lib.pages.manifest:"  # starts the line that the last hidden cell prints
HIDDEN = "lib-hidden"  # tag of the two cells
PACKAGES = ("torch", "timm", "numpy", "papermill", "jupyter-book")

_opened: set[str] = set()


def watch() -> None:
    """Note each file under data/papers that this process opens. An audit hook sees every reader,
    whoever wrote it."""
    papers = str(PAPERS) + os.sep

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.abspath(os.fsdecode(args[0]))
            if path.startswith(papers):
                _opened.add(path)

    sys.addaudithook(hook)


def footprint() -> None:
    """Print what this kernel used, for the runner. Called in the last hidden cell."""
    store = sys.modules.get("lib.runs.store")
    files = {
        getattr(m, "__file__", None)
        for n, m in list(sys.modules.items())
        if n.split(".")[0] == "lib"
    }
    used = {
        "modules": sorted(
            Path(f).resolve().relative_to(ROOT).as_posix() for f in files if f and f != __file__
        ),
        "papers": sorted(
            Path(f).relative_to(ROOT).as_posix() for f in _opened if Path(f).is_file()
        ),
        "reads": dict(store.store().reads) if store else {},  # id -> was it there at the last look
        "asked": [[key, name, values] for (key, name), values in profiles.asked.items()],
    }
    print(MARK + json.dumps(used))


def digest(path: Path) -> str | None:
    """SHA-256 of a file, or None where there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def code_and_papers() -> dict[str, str | None]:
    """Hashes of everything a notebook might use, taken before it runs."""
    files = [*(ROOT / "lib").rglob("*.py"), *(p for p in PAPERS.rglob("*") if p.is_file())]
    return {path.relative_to(ROOT).as_posix(): digest(path) for path in files}


def source_digest(key: str) -> str:
    """Hash of a notebook's cells. What an editor adds around them (kernel, window state) is no
    change."""
    cells = json.loads(parameters.source(key).read_text(encoding="utf-8"))["cells"]
    kept = [
        [c["cell_type"], "".join(c["source"]), c.get("metadata", {}).get("tags", [])] for c in cells
    ]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()


def records_now(ids: Iterable[str]) -> dict[str, str | None]:
    """Hashes of records, None for those that are not there."""
    from ..runs.store import store

    found = ((record, store().find(record)) for record in ids)
    return {record: digest(path) if path else None for record, path in found}


def resolved(key: str, name: str) -> dict[str, Any]:
    """A profile's values for a notebook in the form that JSON gives back (tuples become lists)."""
    values = {k: v for k, v in vars(profiles.profile(key, name)).items() if k != "notebook"}
    return json.loads(json.dumps(values))


def make(
    key: str, name: str, given: dict[str, Any], before: dict[str, Any], used: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of a notebook that has just run. `before`: hashes taken at the start, with key
    and seconds."""
    hashes, present = before["files"], [record for record, there in used["reads"].items() if there]
    return {
        "version": VERSION,
        "notebook": key,
        "profile": name,
        "given": given,
        "asked": [[k, n, values] for k, n, values in used["asked"]],
        "source": before["source"],
        "modules": {path: hashes.get(path) for path in used["modules"]},
        "papers": {path: hashes.get(path) for path in used["papers"]},
        # absent means absent when it was read: a record that came since must make the page stale
        "records": {**dict.fromkeys(used["reads"]), **records_now(present)},
        "seconds": before["seconds"],
        "finished": before["finished"],
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Processor, threads and versions of this environment, for the status page."""
    from ..runs.environment import processor

    return {
        "processor": processor(),
        "cores": cores(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores()),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def executed(key: str) -> Path:
    """The executed copy that Sphinx renders."""
    return ROOT / "book" / "notebooks" / f"{key}.ipynb"


def failed(key: str) -> Path:
    """The partial copy that a failing notebook leaves."""
    return ROOT / "book" / "notebooks" / f"{key}.failed.ipynb"


def read(key: str) -> dict[str, Any] | None:
    """The manifest of the executed copy, None where there is no readable one."""
    try:
        found = json.loads(executed(key).read_text(encoding="utf-8"))["metadata"]["moe"]
    except (OSError, ValueError, KeyError):
        return None
    return found if found.get("version") == VERSION else None


def reason_to_run(key: str, name: str) -> str | None:
    """Why a notebook must run again before it is shown under a profile; None where its executed
    copy still holds."""
    old = read(key)
    if old is None:
        return (
            "never run" if not executed(key).exists() else "executed copy without a valid manifest"
        )
    if old["profile"] != name or old["given"]:
        return f"was run with profile {old['profile']}" + (
            f" and {old['given']}" if old["given"] else ""
        )
    if old["source"] != source_digest(key):
        return "the notebook changed"
    for other, profile, values in old["asked"]:
        if not profiles.has_profile(other, profile) or resolved(other, profile) != values:
            return f"its parameters changed (profile {profile})"
    for path, value in {**old["modules"], **old["papers"]}.items():
        if digest(ROOT / path) != value:
            return f"{path} changed"
    changed = [
        record
        for record, value in records_now(old["records"]).items()
        if value != old["records"][record]
    ]
    return f"{len(changed)} of the records it read changed, {changed[0]} first" if changed else None
