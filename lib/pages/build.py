"""The build: runs stale notebooks through papermill, each in a process of its own.

`jupyter-book build book` loads this module as a Sphinx extension. Before Sphinx reads a page, the
hook runs what is stale in a bounded pool of processes, writes the executed copies to
`book/notebooks`, and the tables of status, verdicts, coverage and scale beside the pages. Sphinx
itself executes nothing. A failing notebook ends the build with an error; its partial copy stays as
`<name>.failed.ipynb`, and what the kernel said to its terminal is in `<name>.log`.

`execute` runs one notebook in this process (the kernel is its child); the pool calls it through
`python -m lib run`. Builds of one checkout take turns. Whatever ends the build ends its runners: a
signal by way of `finally`, and where it is killed each runner notices that its parent is gone, and
each kernel that its runner is.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..paths import ROOT, written_whole
from ..runs import locks, processes
from . import (
    all_verdicts,
    contents,
    coverage,
    dense_models,
    executed,
    front,
    manifest,
    parameters,
    profiles,
    scale_page,
    status,
)

# included by pages; the last one lies beside them
GENERATED = {
    "status_table.md": status.page,
    "verdicts_table.md": all_verdicts.page,
    "coverage_table.md": coverage.page,
    "scale_table.md": scale_page.page,
    "dense_models_table.md": dense_models.page,
    "state.md": all_verdicts.state,
    "front.md": front.page,
    "contradictions_table.md": front.contradictions,
    "claims.json": all_verdicts.as_json,
}
HEARTBEAT = 30.0  # seconds between lines about notebooks that take long
# a cell that takes longer than this hangs; MOE_LIMIT or `run --limit` says otherwise
LIMITS = {"smoke": "2h", "quick": "2h", "small": "240h", "paper": "2400h"}
PARENT = "MOE_BUILD"  # in the environment of a runner: the process without which it ends


class BuildError(RuntimeError):
    """A notebook failed; the message names it, the error and where its partial copy is."""


def write(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    with written_whole(path) as part:
        part.write_text(text, encoding="utf-8")


def shown(path: Path) -> str:
    """Returns a path as a reader of the console wants it: from the project's root, if below it."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)


# -- one notebook --------------------------------------------------------------


def execute(
    key: str, profile: str, given: dict[str, Any], out: Path, limit: str | None = None
) -> float:
    """Runs one notebook and writes its executed copy, with manifest, to `out`; returns seconds.

    limit: most time for a cell, such as 90m; None = MOE_LIMIT, or what LIMITS says of the profile.
    Raises BuildError if it fails; its partial copy is then beside `out`, as `<name>.failed.ipynb`.
    """
    import nbformat  # this and papermill take a second, which an idle build should not pay

    from ..runs.fill import seconds_of

    profiles.plan(key, profile, **given)  # refuses bad input before anything runs
    limit = limit or os.environ.get("MOE_LIMIT") or LIMITS[profile]
    seconds = seconds_of(limit, "limit")
    # hashes from before the run: an edit during a long one counts as a change
    before: dict[str, Any] = {
        "files": manifest.code_and_papers(),
        "source": manifest.source_digest(key),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    part, failed = _part(out, os.getpid()), out.with_suffix(".failed.ipynb")
    try:
        before["seconds"] = _papermill(key, {"profile": profile, **given}, part, seconds)
    except BaseException as error:
        if part.exists():
            write(failed, executed.cleaned(part, None))
            part.unlink()
        if isinstance(error, Exception):
            raise BuildError(
                f"{key}: {_short(error, limit)}; the partial notebook is {shown(failed)}"
            ) from error
        raise
    before["finished"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    used = executed.footprint(nbformat.read(part, as_version=4))
    write(out, executed.cleaned(part, manifest.make(key, profile, given, before, used)))
    part.unlink()
    failed.unlink(missing_ok=True)
    return before["seconds"]


def _papermill(key: str, values: dict[str, Any], part: Path, limit: float) -> float:
    """Runs a notebook between the two hidden cells, writes it to `part`; returns seconds.

    limit: most seconds for a cell.
    """
    import nbformat
    import papermill

    def hidden(call: str) -> Any:
        code = f"import lib.pages.manifest; lib.pages.manifest.{call}()"
        return nbformat.v4.new_code_cell(code, metadata={"tags": [manifest.HIDDEN]})

    start = time.monotonic()
    notebook = nbformat.read(parameters.source(key), as_version=4)
    notebook.cells = [hidden("watch"), *notebook.cells, hidden("footprint")]
    with tempfile.TemporaryDirectory(prefix="kernel-") as folder:
        _kernel_of_this_python(Path(folder))
        papermill.execute_notebook(
            notebook,
            str(part),
            parameters=values,
            kernel_name="python3",
            start_timeout=300,
            execution_timeout=max(1, round(limit)),
            cwd=str(parameters.source(key).parent),
            log_output=False,
        )
    return round(time.monotonic() - start, 1)


def _part(out: Path, runner: int) -> Path:
    """Returns where papermill writes during a run; the dot and the ending keep Sphinx away.

    runner: number of the process: two that run one notebook do not share the file.
    """
    return out.with_name(f".{out.stem}.{runner}.part.ipynb")


def _kernel_of_this_python(folder: Path) -> None:
    """Makes the kernel "python3" mean this interpreter.

    A kernel spec of that name in the user's home may point elsewhere.
    """
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
    paths = [str(folder), os.environ.get("JUPYTER_PATH")]
    os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, paths))
    # else the kernel's debugger warns about frozen modules
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")


def _short(error: Exception, limit: str) -> str:
    """Returns one line of an error that papermill wraps in a page. limit: of time for a cell."""
    if type(error).__name__ == "CellTimeoutError":
        return (
            f"a cell was not done after {limit}, the limit (give more with MOE_LIMIT or "
            "`python -m lib run --limit`)"
        )
    name = getattr(error, "ename", type(error).__name__)
    value = getattr(error, "evalue", str(error))
    return f"{name}: {value}".splitlines()[0][:300]


# -- many notebooks ------------------------------------------------------------


def run_stale(
    keys: Sequence[str],
    profile: str,
    say: Callable[[str], None] = print,
    workers: int | None = None,
) -> int:
    """Runs those of `keys` that are stale, a bounded number at a time; returns how many ran.

    workers: processes at a time, by default one a core; the cores' threads are shared out. Raises
    BuildError at the end if any failed, NotebookError before the first one starts.
    """
    profiles.check_profile(profile)
    for key in keys:  # all bad input is refused before the first notebook starts
        profiles.profile(key, profile)
    queue = [(key, why) for key in keys if (why := manifest.reason_to_run(key, profile))]
    total, cores = len(queue), manifest.cores()
    workers = max(1, min(workers or cores, total))
    threads = max(1, cores // workers)
    size = f", {workers} at a time, {threads} thread{'s' * (threads > 1)} each" if total else ""
    say(f"notebooks: {len(keys)} in the book, {total} to run (profile {profile}{size})")
    errors = _run_all(queue, profile, say, workers, threads)
    if errors:
        raise BuildError(f"{len(errors)} of {total} notebooks failed:\n  " + "\n  ".join(errors))
    return total


def _run_all(
    queue: list[tuple[str, str]],
    profile: str,
    say: Callable[[str], None],
    workers: int,
    threads: int,
) -> list[str]:
    """Runs a queue of (key, why), `workers` at a time; returns what the failed ones said."""
    waiting, total = list(queue), len(queue)
    running: dict[str, tuple[subprocess.Popen, float]] = {}  # key -> process, when it started
    done, errors, last_said = 0, [], time.monotonic()
    stack = contextlib.ExitStack()
    stack.enter_context(processes.interruptible())
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                key, why = waiting.pop(0)
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
                    errors.append(_last_words(key, process))
                    say(f"  FAILED {key} after {took} [{done}/{total}]: {errors[-1]}")
            if running and time.monotonic() - last_said > HEARTBEAT:
                last_said = time.monotonic()
                for key, (_, began) in running.items():
                    say(f"  still  {key}, {last_said - began:.0f} s: {_last_line(key)}")
    finally:
        _stop([process for process, _ in running.values()])
        stack.close()
    return errors


def _log(key: str) -> Path:
    return manifest.executed(key).with_suffix(".log")


def _start(key: str, profile: str, threads: int) -> subprocess.Popen:
    """Starts `python -m lib run` for a notebook, its terminal in the log."""
    log, out = _log(key), str(manifest.executed(key))
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "lib", "run", key, "--profile", profile, "--out", out]
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    with open(log, "wb") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,  # a notebook that asks a question fails instead of waiting
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C comes from this process alone, and once
            env={
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                PARENT: str(os.getpid()),
                **dict.fromkeys(names, str(threads)),
            },
        )


def _stop(processes: list[subprocess.Popen]) -> None:
    """Tells runners to end after Ctrl-C or an error, so that each keeps its part, ends its
    kernel."""
    for process in processes:
        process.terminate()  # a shell that starts a build in the background has it ignore SIGINT
    for process in processes:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()


def _last_line(key: str) -> str:
    """Says where a running notebook is: the end of its log, which holds the progress bars."""
    lines = _log(key).read_text(encoding="utf-8", errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:120] for line in reversed(lines) if line.strip()), "starting")


def _last_words(key: str, process: subprocess.Popen) -> str:
    """Says why a notebook failed, by the exit status of its process and its log."""
    log, code = shown(_log(key)), process.returncode
    if code < 0:  # a kill leaves no message of its own
        part = _part(manifest.executed(key), process.pid)
        if part.exists():
            os.replace(part, manifest.failed(key))
        return f"{key}: ended by signal {-code} ({signal.Signals(-code).name}); log: {log}"
    lines = _log(key).read_text(encoding="utf-8", errors="replace").splitlines()
    error = next(
        (line for line in reversed(lines) if line.startswith("error: ")),
        f"error: {key}: {_last_line(key)}",
    )
    return f"{error.removeprefix('error: ')} (log: {log})"


# -- the Sphinx extension ------------------------------------------------------


@contextlib.contextmanager
def _only_build() -> Iterator[None]:
    """Waits until no other build is at work in this checkout, and keeps others out."""
    lock, builder = ROOT / "_build" / ".lock", ROOT / "_build" / ".builder"

    def say() -> None:
        who = builder.read_text() if builder.is_file() else "unknown"
        print(f"another build (process {who}) is at work here: waiting for it", flush=True)

    with locks.held(lock, say):
        write(builder, str(os.getpid()))
        yield


def _before_reading(app: Any) -> None:
    """Runs what is stale and writes the generated pages, before Sphinx reads any."""
    from sphinx.errors import ExtensionError

    turn = contextlib.ExitStack()
    turn.enter_context(_only_build())
    app.connect("build-finished", lambda *_: turn.close())
    try:
        keys = contents.in_book(Path(app.srcdir) / "_toc.yml")
        run_stale(
            keys, os.environ.get("PROFILE") or "quick", say=lambda line: print(line, flush=True)
        )
    except (BuildError, parameters.NotebookError) as error:
        turn.close()
        raise ExtensionError(str(error)) from error
    for name, page in GENERATED.items():
        target, text = Path(app.srcdir) / name, page(keys)
        # a file that is written anew would make Sphinx read the page again
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            write(target, text)
    published = Path(app.outdir) / "claims.json"
    published.parent.mkdir(parents=True, exist_ok=True)
    write(published, (Path(app.srcdir) / published.name).read_text(encoding="utf-8"))


def setup(app: Any) -> dict[str, bool]:
    """Registers the hook with Sphinx, early: other hooks may look at the pages that it writes."""
    app.connect("builder-inited", _before_reading, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
