"""The commands `pack` and `merge`: missing runs of pages go to a machine without network, and their
records come back."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from ..verdicts import agree, count
from . import parameters, profiles

LEAST_PART = 10**5  # bytes of a file; smaller ones would be thousands


def add(commands: Any, profile: dict[str, Any]) -> None:
    """Adds both commands to those of the command line. profile: the settings of --profile."""
    pack = commands.add_parser("pack", help="pack missing runs for a machine without network")
    pack.add_argument("notebooks", nargs="+", metavar="PAGE", help="such as vimoe/layer_scan")
    pack.add_argument("--profile", **profile)
    pack.add_argument("-o", "--out", type=Path, required=True, help="a new folder")
    pack.add_argument("--part", default="60M", help="largest size of a file (default: 60M)")
    pack.add_argument("--wheels", metavar="3.12", help="bring packages for that Python along")
    pack.set_defaults(do=_pack)

    merge = commands.add_parser("merge", help="file the records that packed runs brought back")
    merge.add_argument("files", nargs="+", type=Path, metavar="FILE")
    merge.add_argument("--profile", **profile)
    merge.set_defaults(do=_merge)


def _pack(args: argparse.Namespace) -> int:
    """Packs the missing runs of some pages for a machine without network."""
    from ..runs import collect as runs
    from ..runs.pack import pack
    from . import missing

    part = re.fullmatch(r"(\d+)([kMG]?)", args.part)
    unit = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
    part_bytes = int(part[1]) * unit[part[2]] if part else 0
    if part_bytes < LEAST_PART:  # "60" was meant to be 60M
        raise parameters.NotebookError(
            f"--part {args.part}: give a size such as 60M, 500k or 1G, at least 100k"
        )
    if args.out.exists() and not args.out.is_dir():
        raise parameters.NotebookError(f"{args.out} is a file: give a new folder with -o")
    keys = [parameters.key_of(name) for name in args.notebooks]
    plans = [profiles.plan(key, args.profile) for key in keys]
    specs = runs.missing_runs({str(n): sum(plan.values(), []) for n, plan in enumerate(plans)})
    # what `fill` would compute first, on a machine that has a card; before it what is under way
    # here, which may be a parent
    ordered = [item.spec.id for item in missing.plan(args.profile, keys, card=True).items]
    specs.sort(key=lambda spec: ordered.index(spec.id) if spec.id in ordered else -1)
    if not specs:
        print("no run is missing: nothing to pack")
        return 0
    files = pack(specs, args.out, part_bytes, args.wheels)
    print(
        f"{count(len(specs), 'run')} in {count(len(files), 'file')} of {args.out}: copy them, "
        "`python run.py` there"
    )
    return 0


def _merge(args: argparse.Namespace) -> int:
    """Files the records that packed runs brought back, and says what is missing.

    Raises RuntimeError, once the others are filed, that says what was refused and why.
    """
    from ..runs.merge import merge
    from . import contents

    profiles.check_profile(args.profile)
    pages = [key for key in contents.in_book() if profiles.has_profile(key, args.profile)]
    specs = [sum(profiles.plan(key, args.profile).values(), []) for key in pages]
    merged = merge(args.files, dict(zip(pages, specs, strict=True)))
    are = agree("are", len(merged.filed))
    # which runs were packed stands in the files, so nobody knows it of one that is refused
    missing = ", ".join(merged.missing) or ("none that is known of" if merged.refused else "none")
    print(f"{count(len(merged.filed), 'record')} {are} there; still missing: {missing}", flush=True)
    if merged.refused:
        raise RuntimeError("\n".join(merged.refused))
    return 0
