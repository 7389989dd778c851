"""What an executed notebook was made from, and whether that still holds.

The runner puts a hidden cell before and after a notebook: `watch()` notes which published values
and measured speeds are opened (`data/papers`, `data/results/bench`), `footprint()` prints what the
kernel used. From this and from hashes taken *before* the run (so that an edit during a long run
counts as a change) the runner writes a manifest into the executed copy. `reason_to_run` compares a
manifest with the files of today: it reads hashes only and imports nothing heavy, so that a build
with nothing to do takes seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..machine import cores, version_of
from ..paths import BENCH, PAPERS, ROOT
from . import parameters, profiles

VERSION = 1
MARK = "lib.pages.manifest:"  # starts the line that the last hidden cell prints
HIDDEN = "lib-hidden"  # tag of the two cells
PACKAGES = ("torch", "timm", "numpy", "papermill", "jupyter-book")

_opened: set[Path] = set()


def watch() -> None:
    """Notes each published value and each measured speed (PAPERS, BENCH) that is opened, there or
    not, and each folder of theirs that is listed.

    An audit hook sees every reader, whoever wrote it.
    """

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in ("open", "os.listdir", "os.scandir") and isinstance(args[0], (str, bytes)):
            path = Path(os.path.abspath(os.fsdecode(args[0])))
            if any(path.is_relative_to(folder) for folder in (PAPERS, BENCH)):
                _opened.add(path)

    sys.addaudithook(hook)


def footprint() -> None:
    """Prints what this kernel used, for the runner; the last hidden cell calls it."""
    store = sys.modules.get("lib.runs.store")
    modules = [
        Path(module.__file__).resolve()
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "lib" and getattr(module, "__file__", None)
    ]
    this_file = Path(__file__).resolve()  # no notebook depends on it
    used = {
        "modules": sorted(
            {path.relative_to(ROOT).as_posix() for path in modules if path != this_file}
        ),
        "papers": sorted(path.relative_to(ROOT).as_posix() for path in _opened),
        "reads": dict(store.store().reads) if store else {},  # id -> was it there at the last look
        "asked": [[key, name, values] for (key, name), values in profiles.asked.items()],
    }
    print(MARK + json.dumps(used))


def digest(path: Path) -> str | None:
    """Returns the SHA-256 of a file, or of the names in a folder; None where there is none that can
    be read."""
    try:
        names = "\n".join(sorted(os.listdir(path))).encode() if path.is_dir() else None
        return hashlib.sha256(path.read_bytes() if names is None else names).hexdigest()
    except OSError:
        return None


def code_and_papers() -> dict[str, str | None]:
    """Hashes everything that a notebook might use, before it runs."""
    values = (path for folder in (PAPERS, BENCH) for path in (folder, *folder.rglob("*")))
    files = [*(ROOT / "lib").rglob("*.py"), *values]
    return {path.relative_to(ROOT).as_posix(): digest(path) for path in files}


def source_digest(key: str) -> str:
    """Hashes a notebook's cells: what an editor adds around them (kernel, windows) is no change."""
    cells = json.loads(parameters.source(key).read_text(encoding="utf-8"))["cells"]
    content = [
        [cell["cell_type"], "".join(cell["source"]), cell.get("metadata", {}).get("tags", [])]
        for cell in cells
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def records_now(ids: Iterable[str]) -> dict[str, str | None]:
    """Hashes records by their ids, None for those that are not there."""
    from ..runs.store import store

    files = {record: store().find(record) for record in ids}
    return {record: digest(file) if file else None for record, file in files.items()}


def resolved(key: str, name: str) -> dict[str, Any]:
    """Returns a profile's values for a notebook as JSON gives them back: tuples become lists."""
    values = dict(vars(profiles.profile(key, name)))
    del values["notebook"], values["of_base"]  # no parameters
    return json.loads(json.dumps(values))


def make(
    key: str, name: str, given: dict[str, Any], before: dict[str, Any], used: dict[str, Any]
) -> dict[str, Any]:
    """Returns the manifest of a notebook that has just run.

    before: files (hashes of `code_and_papers`) and source (hash) from before the run; seconds that
    it took, and when it finished. used: what `footprint` printed.
    """
    hashes, present = before["files"], [record for record, there in used["reads"].items() if there]
    return {
        "version": VERSION,
        "notebook": key,
        "profile": name,
        "given": given,
        "asked": used["asked"],
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
    """Describes this machine for the status page: processor, cores, threads, versions."""
    from ..runs.environment import processor

    return {
        "processor": processor(),
        "cores": cores(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or cores()),
        "versions": {"python": platform.python_version(), **{p: version_of(p) for p in PACKAGES}},
    }


def executed(key: str) -> Path:
    """Returns the path of the executed copy, which Sphinx renders."""
    return ROOT / "book" / "notebooks" / f"{key}.ipynb"


def failed(key: str) -> Path:
    """Returns the path of the partial copy that a failing notebook leaves."""
    return ROOT / "book" / "notebooks" / f"{key}.failed.ipynb"


def read(key: str) -> dict[str, Any] | None:
    """Reads the manifest of the executed copy; None where there is no readable one."""
    try:
        content = json.loads(executed(key).read_text(encoding="utf-8"))["metadata"]["moe"]
    except (OSError, ValueError, KeyError):
        return None
    return content if content.get("version") == VERSION else None


def reason_to_run(key: str, name: str) -> str | None:
    """Says why a notebook must run again to be shown under a profile; None if it need not."""
    old = read(key)
    if old is None:
        there = executed(key).exists()
        return "executed copy without a valid manifest" if there else "never run"
    if old["profile"] != name or old["given"]:
        given = f" and {old['given']}" if old["given"] else ""
        return f"was run with profile {old['profile']}{given}"
    if old["source"] != source_digest(key):
        return "the notebook changed"
    for other, profile, values in old["asked"]:
        if not profiles.has_profile(other, profile) or resolved(other, profile) != values:
            return f"its parameters changed (profile {profile})"
    for path, value in {**old["modules"], **old["papers"]}.items():
        if digest(ROOT / path) != value:
            return f"{path} changed"
    now = records_now(old["records"])
    changed = [record for record, value in old["records"].items() if now[record] != value]
    if changed:
        return f"{len(changed)} of the records it read changed, {changed[0]} first"
    return None
