"""Runs the notebooks of the book: through papermill, each in a process of its own, and only those
that are stale.

`jupyter-book build book` loads this module as a Sphinx extension. Before Sphinx reads a page, the
hook runs what is stale in a bounded pool of processes, writes the executed copies to
`book/notebooks`, and the status table and all verdicts beside the pages. Sphinx itself executes
nothing. A failing notebook ends the build with an error; its partial copy stays as
`<name>.failed.ipynb`, and what the kernel said to its terminal is in `<name>.log`.

`execute` runs one notebook in this process (the kernel is its child); the pool calls it through
`python -m lib run`.
"""

from __future__ import annotations

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..paths import ROOT, written_whole
from . import ledger, manifest, parameters, profiles, status

GENERATED = {
    "status_table.md": status.page,
    "verdicts_table.md": ledger.page,
}  # included by status.md and verdicts.md
HEARTBEAT = 30.0  # seconds between lines about notebooks that take long


class BuildError(RuntimeError):
    """A notebook failed; the message names it, the error and where its partial copy is."""


def write(path: Path, text: str) -> None:
    """Replace a file in one step."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def shown(path: Path) -> str:
    """A path as a reader of the console wants it."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)


# -- one notebook
# ------------------------------------------------------------------------------------------------------


def execute(key: str, profile: str, given: dict[str, Any], out: Path) -> float:
    """Run one notebook through papermill and write its executed copy, with manifest, to `out`.
    Returns seconds."""
    import nbformat  # these two take a second, which a build with nothing to do should not pay
    import papermill

    profiles.profile(key, profile, **given)  # refuses bad input before anything runs
    before: dict[str, Any] = {
        "files": manifest.code_and_papers(),
        "source": manifest.source_digest(key),
    }
    book = nbformat.read(parameters.source(key), as_version=4)
    hidden = {"tags": [manifest.HIDDEN]}
    book.cells.insert(
        0,
        nbformat.v4.new_code_cell(
            "import lib.pages.manifest; lib.pages.manifest.watch()", metadata=hidden
        ),
    )
    book.cells.append(
        nbformat.v4.new_code_cell(
            "import lib.pages.manifest; lib.pages.manifest.footprint()", metadata=hidden
        )
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    part, bad, start = _part(out), out.with_suffix(".failed.ipynb"), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        _own_kernel(Path(folder))
        try:
            papermill.execute_notebook(
                book,
                str(part),
                parameters={"profile": profile, **given},
                kernel_name="python3",
                start_timeout=300,
                cwd=str(parameters.source(key).parent),
                log_output=False,
            )
        except BaseException as error:
            if part.exists():
                write(bad, _cleaned(part, None))
                part.unlink()
            if isinstance(error, Exception):
                raise BuildError(
                    f"{key}: {_short(error)}; the partial notebook is {shown(bad)}"
                ) from error
            raise
    before["seconds"] = round(time.monotonic() - start, 1)
    before["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    used = _footprint(nbformat.read(part, as_version=4))
    write(out, _cleaned(part, manifest.make(key, profile, given, before, used)))
    part.unlink()
    bad.unlink(missing_ok=True)
    return before["seconds"]


def _part(out: Path) -> Path:
    """Where papermill writes while a notebook runs; the dot and the ending keep Sphinx away."""
    return out.with_name(f".{out.stem}.part.ipynb")


def _own_kernel(folder: Path) -> None:
    """Make "python3" mean this interpreter: a kernel spec of that name in the user's home may point
    elsewhere."""
    spec = folder / "kernels" / "python3"
    spec.mkdir(parents=True)
    argv = [
        sys.executable,
        "-m",
        "ipykernel_launcher",
        "--IPKernelApp.log_level=40",
        "-f",
        "{connection_file}",
    ]
    (spec / "kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "Python 3", "language": "python"})
    )
    os.environ["JUPYTER_PATH"] = os.pathsep.join(
        filter(None, [str(folder), os.environ.get("JUPYTER_PATH")])
    )
    os.environ.setdefault(
        "PYDEVD_DISABLE_FILE_VALIDATION", "1"
    )  # the kernel's debugger warns about frozen modules


def _footprint(book: Any) -> dict[str, Any]:
    """What the last hidden cell printed."""
    for output in book.cells[-1].get("outputs", ()):
        for line in output.get("text", "").splitlines():
            if line.startswith(manifest.MARK):
                return json.loads(line.removeprefix(manifest.MARK))
    raise BuildError(
        "the notebook's last cell printed no footprint; does the notebook close or replace stdout?"
    )


def _cleaned(part: Path, moe: dict[str, Any] | None) -> str:
    """The executed notebook without hidden cells and without papermill's absolute paths, with the
    manifest.

    A partial notebook (`moe` is None) keeps its chatter: it is the log of its failure.
    """
    import nbformat

    book = nbformat.read(part, as_version=4)
    book.cells = [c for c in book.cells if manifest.HIDDEN not in c.metadata.get("tags", ())]
    book.metadata.pop("papermill", None)
    for cell in book.cells:
        cell.metadata.pop("papermill", None)
        if "injected-parameters" in cell.metadata.get("tags", ()):
            cell.metadata["tags"].append("hide-input")  # what was asked for stays at hand, folded
        if cell.get("execution_count"):  # the first hidden cell took number 1
            cell.execution_count -= 1
        for output in cell.get("outputs", ()):
            if output.get("execution_count"):
                output.execution_count -= 1
        if moe is not None and cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _chatter(output)]
    if moe is not None:
        book.metadata["moe"] = moe
    return nbformat.writes(book)


def _chatter(output: Any) -> bool:
    """Progress bars and what was written to stderr: moved to the log, which this process's stderr
    is part of."""
    if output.output_type == "stream" and output.name == "stderr":
        print(output.text, file=sys.stderr)
        return True
    kinds = output.get("data", {})
    return (
        "application/vnd.jupyter.widget-view+json" in kinds and "text/html" not in kinds
    )  # a bar; figures carry HTML


def _short(error: Exception) -> str:
    """One line of an error that papermill wraps in a page."""
    name, value = (
        getattr(error, "ename", type(error).__name__),
        getattr(error, "evalue", str(error)),
    )
    return f"{name}: {value}".splitlines()[0][:300]


# -- many notebooks
# ----------------------------------------------------------------------------------------------------


def in_book(toc: Path | None = None) -> list[str]:
    """Keys of the notebooks that the table of contents lists, in its order."""
    toc = toc or ROOT / "_toc.yml"

    def entries(node: Any):
        if isinstance(node, dict):
            yield from (v for k, v in node.items() if k in ("root", "file"))
            node = list(node.values())
        if isinstance(node, list):
            for item in node:
                yield from entries(item)

    listed = [
        str(e).removesuffix(".ipynb")
        for e in entries(yaml.safe_load(toc.read_text(encoding="utf-8")))
    ]
    keys = [e.removeprefix("notebooks/") for e in listed if e.startswith("notebooks/")]
    for key in keys:
        if not (ROOT / "notebooks" / f"{key}.ipynb").is_file():
            raise parameters.NotebookError(
                f"_toc.yml lists notebooks/{key}, but there is no notebooks/{key}.ipynb"
            )
    return keys


def run_stale(
    keys: Sequence[str],
    profile: str,
    say: Callable[[str], None] = print,
    workers: int | None = None,
) -> int:
    """Run those of `keys` that are stale; returns how many ran. Raises BuildError at the end if any
    failed."""
    profiles.check_profile(profile)
    for key in keys:  # all bad input is refused before the first notebook starts
        profiles.profile(key, profile)
    queue = [(key, why) for key in keys if (why := manifest.reason_to_run(key, profile))]
    total, cores = len(queue), manifest.cores()
    workers = max(1, min(workers or cores, total))
    threads = max(1, cores // workers)
    say(
        f"notebooks: {len(keys)} in the book, {total} to run (profile {profile}"
        + (f", {workers} at a time, {threads} thread{'s' * (threads > 1)} each)" if total else ")")
    )
    running: dict[str, tuple[subprocess.Popen, float]] = {}
    done, errors, beat = 0, [], time.monotonic()
    try:
        while queue or running:
            while queue and len(running) < workers:
                key, why = queue.pop(0)
                say(f"  start  {key} ({why})")
                running[key] = _start(key, profile, threads), time.monotonic()
            time.sleep(0.1)
            for key, (process, began) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[key]
                done += 1
                took = f"{time.monotonic() - began:.0f} s"
                if process.returncode == 0:
                    say(f"  done   {key} in {took} [{done}/{total}]")
                else:
                    errors.append(_last_words(key, process.returncode))
                    say(f"  FAILED {key} after {took} [{done}/{total}]: {errors[-1]}")
            if running and time.monotonic() - beat > HEARTBEAT:
                beat = time.monotonic()
                for key, (_, began) in running.items():
                    say(f"  still  {key}, {beat - began:.0f} s: {_last_line(key)}")
    finally:
        _stop([process for process, _ in running.values()])
    if errors:
        raise BuildError(f"{len(errors)} of {total} notebooks failed:\n  " + "\n  ".join(errors))
    return total


def _log(key: str) -> Path:
    return manifest.executed(key).with_suffix(".log")


def _start(key: str, profile: str, threads: int) -> subprocess.Popen:
    log = _log(key)
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "lib",
        "run",
        key,
        "--profile",
        profile,
        "--out",
        str(manifest.executed(key)),
    ]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    with open(
        log, "wb"
    ) as file:  # stdin closed: a notebook that asks a question fails instead of waiting
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **dict.fromkeys(names, str(threads))},
        )


def _stop(processes: list[subprocess.Popen]) -> None:
    """On Ctrl-C or an error in the pool: each runner is interrupted, so that it keeps its part and
    ends its kernel."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _last_line(key: str) -> str:
    """Where a running notebook is: the end of its log, which holds the progress bars."""
    lines = _log(key).read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:120] for line in reversed(lines) if line.strip()), "starting")


def _last_words(key: str, code: int) -> str:
    if code < 0:  # a kill leaves no message of its own
        part = _part(manifest.executed(key))
        if part.exists():
            os.replace(part, manifest.failed(key))
        return f"{key}: ended by signal {-code} ({signal.Signals(-code).name}); log: {shown(_log(key))}"
    said = _log(key).read_text(encoding="utf-8", errors="replace").splitlines()
    error = next(
        (line for line in reversed(said) if line.startswith("error: ")),
        f"error: {key}: {_last_line(key)}",
    )
    return f"{error.removeprefix('error: ')} (log: {shown(_log(key))})"


# -- the Sphinx extension
# ----------------------------------------------------------------------------------------------


def _before_reading(app: Any) -> None:
    from sphinx.errors import ExtensionError

    try:
        keys = in_book(Path(app.srcdir) / "_toc.yml")
        run_stale(
            keys, os.environ.get("PROFILE") or "quick", say=lambda line: print(line, flush=True)
        )
    except (BuildError, parameters.NotebookError) as error:
        raise ExtensionError(str(error)) from error
    for name, page in GENERATED.items():
        target, text = Path(app.srcdir) / name, page(keys)
        if (
            not target.exists() or target.read_text(encoding="utf-8") != text
        ):  # else Sphinx would read the page again
            write(target, text)


def setup(app: Any) -> dict[str, bool]:
    """Called by Sphinx. Early among the builder's hooks: others may look at the pages that this one
    writes."""
    app.connect("builder-inited", _before_reading, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
