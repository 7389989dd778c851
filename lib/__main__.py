"""The command line: `python -m lib run | status | book`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .pages import parameters, profiles
from .paths import ROOT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lib", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    profile = {
        "default": os.environ.get("PROFILE") or "quick",
        "help": f"{', '.join(profiles.PROFILES)} (default: PROFILE in the environment, else quick)",
    }

    run = commands.add_parser(
        "run",
        help="run one notebook and keep its records",
        description="Run one notebook. Records that are there already are read, not computed.",
    )
    run.add_argument("notebook", help="such as vimoe/layer_scan, or the path of its source")
    run.add_argument("--profile", **profile)
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="given",
        help="override a parameter; lists as 2,4,8",
    )
    run.add_argument(
        "-o", "--out", type=Path, help="executed copy (default: _build/runs/PROFILE/NOTEBOOK.ipynb)"
    )
    run.add_argument(
        "--dry",
        action="store_true",
        help="say which runs it wants and which are there; run nothing",
    )
    run.add_argument(
        "--records",
        action="store_true",
        help="only compute the missing records, here and with progress bars; no notebook",
    )
    run.add_argument(
        "--workers",
        type=int,
        default=1,
        help="with --records: runs computed at a time (default: 1)",
    )
    run.set_defaults(do=_run)

    status = commands.add_parser(
        "status", help="what is stale, missing, running, and the command that fills it"
    )
    status.add_argument("--profile", **profile)
    status.set_defaults(do=_status)

    book = commands.add_parser("book", help="build the book; the same as jupyter-book build book")
    book.add_argument("--profile", **profile)
    book.set_defaults(do=_book)
    return parser


def _run(args: argparse.Namespace) -> int:
    key = parameters.key_of(args.notebook)
    profiles.check_profile(args.profile)
    typed = parameters.from_text(key, dict(args.given))
    if typed.pop("profile", args.profile) != args.profile:
        raise parameters.NotebookError("give the profile with --profile, not with -p profile")
    if args.dry:
        return _dry(key, args.profile, typed)
    if args.records:
        return _records(key, args.profile, typed, args.workers)
    from .pages import build

    # papermill writes lists, not tuples, into the injected cell
    given = {
        name: list(value) if isinstance(value, tuple) else value for name, value in typed.items()
    }
    out = (args.out or ROOT / "_build" / "runs" / args.profile / f"{key}.ipynb").absolute()
    seconds = build.execute(key, args.profile, given, out)
    print(f"{key} ran in {seconds:.0f} s: {build.shown(out)}")
    return 0


def _dry(key: str, profile: str, given: dict) -> int:
    from .runs import collect as runs

    for name, specs in profiles.plan(key, profile, **given).items():
        print(f"{name}: {len(specs)} run{'s' * (len(specs) != 1)}")
        for spec in specs:
            print(f"  {spec.id}  {runs.status_of(spec):8} seed {spec.seed}")
    return 0


def _records(key: str, profile: str, given: dict, workers: int) -> int:
    from contextlib import nullcontext

    from .runs import collect as runs

    grid = profiles.plan(key, profile, **given)
    if workers < 1:
        raise parameters.NotebookError(
            f"--workers {workers}: at least one run must be computed at a time"
        )
    with runs.pool(workers) if workers > 1 else nullcontext() as executor:
        runs.collect(grid, executor)
    print(
        f"{key}, {profile}: all {len({spec.id for specs in grid.values() for spec in specs})} records are there"
    )
    return 0


def _status(args: argparse.Namespace) -> int:
    from .pages import build, status

    print(status.table(build.in_book(), profiles.check_profile(args.profile)))
    return 0


def _book(args: argparse.Namespace) -> int:
    code = "from jupyter_book.cli.main import main; main()"  # jupyter-book 1 has no `python -m`
    env = {**os.environ, "PROFILE": profiles.check_profile(args.profile)}
    return subprocess.call([sys.executable, "-c", code, "build", "book"], cwd=ROOT, env=env)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status 0: done; 1: a notebook or a run failed; 2: bad input; 130: interrupted."""
    args = _parser().parse_args(argv)
    try:
        return args.do(args)
    except RuntimeError as error:  # a notebook failed, or collect names runs that failed
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print(
            "error: interrupted; records and checkpoints written so far are kept",
            file=sys.stderr,
            flush=True,
        )
        return 130
    except ValueError as error:  # NotebookError, and what specs say about bad values
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
