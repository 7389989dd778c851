"""The command line: `python -m lib COMMAND`, such as `run`, `fill`, `book` or `compress`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from .pages import packing, parameters, profiles
from .paths import ROOT, need_checkout
from .runs import cluster, compress

AT_LEAST_ONE = "at least one run must be computed at a time"


def _parser() -> argparse.ArgumentParser:
    """Describes the commands and their options."""
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    profile = {
        "default": os.environ.get("PROFILE") or "quick",
        "help": f"{', '.join(profiles.PROFILES)} (default: PROFILE in the environment, else quick)",
    }

    compress.add(commands)
    _add_run(commands, profile)
    _add_fill(commands, profile)

    status = commands.add_parser(
        "status", help="what is stale, missing, running, and the command that fills it"
    )
    status.add_argument("--profile", **profile)
    status.set_defaults(do=_status)

    claims = commands.add_parser(
        "claims",
        help="where the claims of the documents stand, from the built pages",
        description="Say where the claims of the ledger stand, from claims.json of the last build.",
    )
    claims.add_argument(
        "--fix-seeds",
        action="store_true",
        help="write into data/papers how many seeds each finished pilot asks for",
    )
    claims.add_argument(
        "--readme",
        action="store_true",
        help="write the answers in short and the state of the claims into README.md",
    )
    claims.set_defaults(do=_claims)

    packing.add(commands, profile)

    book = commands.add_parser("book", help="build the book; the same as jupyter-book build book")
    book.add_argument("--profile", **profile)
    book.set_defaults(do=_book)

    pdf = commands.add_parser(
        "pdf",
        help="print built pages to PDF files, by Chromium",
        description="Print pages of the last build to PDF files in _build/pdf, by Chromium.",
    )
    pdf.add_argument(
        "pages", nargs="*", metavar="PAGE", help="such as moee/routing or verdicts (default: all)"
    )
    pdf.add_argument(
        "--book",
        action="store_true",
        help="all pages as one file with bookmarks, _build/pdf/book.pdf",
    )
    pdf.set_defaults(do=_pdf)
    return parser


def _add_run(commands: Any, profile: dict[str, Any]) -> None:
    """Describes the options of `run`. profile: the settings of --profile."""
    run = commands.add_parser(
        "run",
        help="run one notebook and keep its records",
        description="Run one notebook. Records that are there already are read, not computed.",
    )
    run.add_argument(
        "notebook",
        help="such as vimoe/layer_scan, or the path of its source; with --dry or --records also a "
        "study, such as vimoe",
    )
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
        "--limit",
        metavar="TIME",
        help="most time for a cell of the notebook, such as 90m (default: MOE_LIMIT in the "
        "environment, else a generous one of the profile)",
    )
    run.add_argument(
        "--dry",
        action="store_true",
        help="say which runs it wants, which are there, what they take and what is missing here; "
        "run nothing",
    )
    _add_rate(run)
    run.add_argument(
        "--records",
        action="store_true",
        help="only compute the missing records, here and with progress bars; no notebook. Started "
        "by accelerate launch or torchrun, all processes train each run together",
    )
    run.add_argument(
        "--workers",
        type=int,
        help="with --records: runs computed at a time (default: 1); a cluster uses all its workers",
    )
    cluster.add_options(run)
    run.set_defaults(do=_run)


def _add_rate(command: Any) -> None:
    """Describes the option of a plan that says how fast the machine is."""
    command.add_argument(
        "--rate",
        type=float,
        metavar="X",
        help="with --dry: multiply-adds a second of a card, or of a thread, such as 2e13 (default: "
        "hours by the records of this machine, else by an assumed rate)",
    )


def _add_fill(commands: Any, profile: dict[str, Any]) -> None:
    """Describes the options of `fill`. profile: the settings of --profile."""
    fill = commands.add_parser(
        "fill",
        help="compute what is missing, what decides most an hour first, inside a budget",
        description="Compute missing runs of the book's pages in the order of claims that they "
        "decide an hour, then of arms (names of a page's grid) that no claim needs. Stops in time; "
        "goes on next time.",
    )
    fill.add_argument("--profile", **profile)
    fill.add_argument(
        "--budget", default="1h", metavar="TIME", help="such as 2h, 90m or 1h30m (default: 1h)"
    )
    fill.add_argument(
        "--pages", nargs="+", default=[], metavar="PAGE", help="only these (default: all)"
    )
    fill.add_argument(
        "--workers",
        type=int,
        help="runs computed at a time (default: 1, or as many as a cluster has workers)",
    )
    fill.add_argument(
        "--dry", action="store_true", help="say what would be run, and how long; run nothing"
    )
    _add_rate(fill)
    cluster.add_options(fill)
    fill.set_defaults(do=_fill)


def _run(args: argparse.Namespace) -> int:
    """Runs a notebook, or only plans it (--dry), or only computes its records (--records)."""
    profiles.check_profile(args.profile)
    _check_rate(args)
    keys = parameters.keys_of(args.notebook)
    if len(keys) > 1 and (args.given or not (args.dry or args.records)):
        raise parameters.NotebookError(
            f"{args.notebook} is a study of {len(keys)} pages: plan it with --dry or compute it "
            "with --records, without -p, or name one page"
        )
    key = keys[0]
    given = parameters.from_text(key, dict(args.given))
    if given.pop("profile", args.profile) != args.profile:
        raise parameters.NotebookError("give the profile with --profile, not with -p profile")
    if args.dry:
        return _dry(keys, args.profile, given, args.rate)
    if args.records:
        for key in keys:
            _records(key, args.profile, given, args)
        return 0
    if args.scheduler or args.cluster:
        raise parameters.NotebookError(
            "--scheduler and --cluster are for --records: the notebook itself runs here, and reads "
            "the records when they are there"
        )
    from .pages import build
    from .runs import processes

    if parent := os.environ.pop(build.PARENT, None):  # for this process, not for its kernel
        # as when it is told to end: its kernel ends, too
        processes.end_with(int(parent), lambda: os.kill(os.getpid(), signal.SIGTERM))
    # papermill writes lists, not tuples, into the injected cell
    injected = {
        name: list(value) if isinstance(value, tuple) else value for name, value in given.items()
    }
    out = (args.out or ROOT / "_build" / "runs" / args.profile / f"{key}.ipynb").absolute()
    seconds = build.execute(key, args.profile, injected, out, args.limit)
    print(f"{key} ran in {seconds:.0f} s: {build.shown(out)}")
    return 0


def _dry(keys: list[str], profile: str, given: dict[str, Any], rate: float | None) -> int:
    """Prints what pages ask for; of one page also its runs and what is there of each."""
    from .pages import scale
    from .runs import collect as runs
    from .verdicts import count

    planned = scale.priced(scale.runs_of(keys, profile, **given), profile, rate)
    if len(keys) == 1:
        for name, specs in profiles.plan(keys[0], profile, **given).items():
            print(f"{name}: {count(len(specs), 'run')}")
            for spec in specs:
                print(f"  {spec.id}  {runs.status_of(spec):8} seed {spec.seed}")
        print()
    print(scale.listing(planned))
    print("\n".join(scale.here(planned.runs.values())))
    return 0


def _records(key: str, profile: str, given: dict[str, Any], args: argparse.Namespace) -> None:
    """Computes the runs of a plan that have no record, several at a time where that is asked for,
    or each over all ranks."""
    from .runs import collect as runs

    grid = profiles.plan(key, profile, **given)
    _check_workers(args.workers)
    if _ranks() > 1:
        from .runs import together

        if not together.collect(grid):
            return  # rank 0 says it
    else:
        if args.scheduler or args.cluster:
            opened = cluster.opened(args.scheduler, args.cluster)
        else:
            opened = runs.pool(args.workers) if (args.workers or 1) > 1 else nullcontext()
        with opened as executor:
            runs.collect(grid, executor)
    ids = {spec.id for specs in grid.values() for spec in specs}
    print(f"{key}, {profile}: all {len(ids)} records are there")


def _ranks() -> int:
    """Counts the processes that a launcher (accelerate, torchrun) has started with this command."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def _check_ranks(args: argparse.Namespace) -> None:
    """Raises NotebookError for what several ranks do not do together."""
    if not getattr(args, "records", False):
        raise parameters.NotebookError(
            f"{_ranks()} ranks were started (WORLD_SIZE), and they compute runs together by "
            "`run PAGE --records` alone: start every other command once"
        )
    for option in ("workers", "scheduler", "cluster"):
        if getattr(args, option, None) not in (None, 1):
            raise parameters.NotebookError(
                f"--{option}: {_ranks()} ranks compute one run at a time, together: leave it out"
            )


def _fill(args: argparse.Namespace) -> int:
    """Computes what is missing inside a budget of time, or says what it would do (--dry)."""
    from .pages import contents, missing
    from .runs import fill
    from .runs.store import store

    began = time.monotonic()
    _check_rate(args)
    profile, budget = profiles.check_profile(args.profile), fill.seconds_of(args.budget)
    _check_workers(args.workers)
    book = contents.in_book()
    keys = [parameters.key_of(page) for page in args.pages]
    for key in keys:
        if not profiles.has_profile(key, profile):
            raise parameters.NotebookError(
                f"{key} has no runs under the profile {profile}: give another --profile "
                f"({', '.join(p for p in profiles.PROFILES if profiles.has_profile(key, p))})"
            )
    keys.sort(key=lambda key: book.index(key) if key in book else len(book))
    if args.dry:
        plan = missing.plan(profile, keys or book)
        print(missing.listing(plan, budget, args.workers or 1))
        print(missing.price(plan, profile, keys or book, args.rate))
        return 0
    with fill.workers_of(args.scheduler, args.workers, args.cluster) as (executor, workers):
        plan = missing.plan(profile, keys or book, getattr(executor, "has_card", None))
        rest = budget - (time.monotonic() - began)
        outcome = fill.fill(plan, rest, executor, workers, store())
        print(missing.summary(plan, outcome))
    if outcome.failures:
        raise RuntimeError("\n".join(outcome.failures))
    return 0


def _check_rate(args: argparse.Namespace) -> None:
    """Raises NotebookError for a --rate where nothing is only planned."""
    if args.rate is not None and not args.dry:
        raise parameters.NotebookError(
            f"--rate {args.rate:g} prices a plan and computes nothing: give --dry with it, or "
            "leave it out"
        )


def _check_workers(workers: int | None) -> None:
    """Raises NotebookError for a number of --workers below 1."""
    if workers is not None and workers < 1:
        raise parameters.NotebookError(f"--workers {workers}: {AT_LEAST_ONE}")


def _status(args: argparse.Namespace) -> int:
    """Prints what is stale, missing and running."""
    from .pages import contents, status

    print(status.table(contents.in_book(), profiles.check_profile(args.profile)))
    return 0


def _claims(args: argparse.Namespace) -> int:
    """Prints where the claims stand; writes second stages of seeds and the README's state."""
    from .pages import all_verdicts, front, stages

    listed = all_verdicts.read()
    if args.fix_seeds:
        for claim, seeds in stages.fix(listed).items():
            print(f"{claim}: {seeds} seeds in all")
    if args.readme:
        all_verdicts.write_readme(listed, front.in_short(listed))
    print(all_verdicts.overview(listed))
    return 0


def _book(args: argparse.Namespace) -> int:
    """Becomes the process that builds the book, under a profile."""
    code = "from jupyter_book.cli.main import main; main()"  # jupyter-book 1 has no `python -m`
    env = {**os.environ, "PROFILE": profiles.check_profile(args.profile)}
    sys.stdout.flush()
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, "-c", code, "build", "book"], env)


def _pdf(args: argparse.Namespace) -> int:
    """Prints built pages to PDF files."""
    from .pages import build, pdf

    if args.book:
        print(build.shown(pdf.print_book()), flush=True)
        return 0
    for file in pdf.print_pages(args.pages):
        print(build.shown(file), flush=True)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status; the first line on stderr says what failed.

    0: done; 1: a notebook or a run failed; 2: bad input; 130: interrupted.
    """
    from .runs.processes import interruptible

    args = _parser().parse_args(argv)
    try:
        with interruptible():
            if args.command != "compress":
                need_checkout(f"the command {args.command}")
            if _ranks() > 1:
                _check_ranks(args)
            return args.do(args)
    except RuntimeError as error:  # of a notebook; of `collect`: "run <id>: <kind>: <message>"
        return _failed(str(error), 1)
    except KeyboardInterrupt:
        return _failed("interrupted; records and checkpoints written so far are kept", 130)
    except (ValueError, OSError) as error:
        # NotebookError, what specs say about bad values, data or weights that are not there, and
        # files that cannot be written
        return _failed(" ".join(str(error).split()), 2)


def _failed(message: str, code: int) -> int:
    # the build looks for the prefix in the log of a notebook that failed
    print(f"error: {message}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
