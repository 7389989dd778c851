"""Carries out packed runs: `python run.py`, in the folder that holds the parts. Goes on if stopped.

Needs Python 3.11 and torch with torchvision; the other packages come with `pack --wheels`, or are
installed. Records are written to `records`, ready for `python -m lib merge`, as they come. Options:
--workers N (most runs at a time), --settle SECONDS (between two starts).
"""

import hashlib
import importlib.util
import os
import shutil
import sys
import zipfile
from pathlib import Path

# `pack` writes the names and SHA-256 here: this file is its template, and knows no other of lib
PARTS: dict[str, str] = {}
NEEDED = "torch torchvision timm pydantic numpy safetensors tqdm filelock PIL scipy sklearn".split()
HERE = Path(__file__).resolve().parent


def unpack(target: Path) -> None:
    """Checks and joins the parts, and unpacks them to `target`, whole or not at all."""
    scratch = target.with_suffix(".part")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with open(scratch / "joined.zip", "wb") as joined:
        for name, expected in PARTS.items():
            if not (HERE / name).is_file():
                sys.exit(f"error: {name} is not in {HERE}: copy it there, with all {len(PARTS)}")
            data = (HERE / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != expected:
                sys.exit(f"error: {name} is damaged (another SHA-256): copy it again")
            joined.write(data)
    with zipfile.ZipFile(scratch / "joined.zip") as archive:
        archive.extractall(scratch)
    for wheel in scratch.glob("wheels-*/*.whl"):  # a wheel is a zip file of packages
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch / wheel.parent.name.replace("wheels", "packages"))
    (scratch / "joined.zip").unlink()
    scratch.rename(target)


def main() -> None:
    """Unpacks what is not unpacked, and becomes the process that carries out the runs."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the Python there is not the project's
        sys.exit("error: Python 3.11 or newer is needed")
    name = hashlib.sha256("".join(PARTS.values()).encode()).hexdigest()[:8]
    target = HERE / f"unpacked-{name}"
    if not target.is_dir():
        unpack(target)
    version = "{}.{}".format(*sys.version_info)
    paths = [str(target / "code"), str(target / f"packages-{version}")]
    sys.path[:0] = paths
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        sys.exit(
            f"error: this Python lacks {', '.join(absent)}: install them, or pack the runs again "
            f"with --wheels {version} (all but torch and torchvision)"
        )
    os.environ["MOE_CACHE"] = str(target)  # weights of parents lie in it where a store has them
    os.environ["MOE_DATA"] = str(target / "data")
    os.environ["MOE_WEIGHTS"] = str(target / "weights")
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    os.chdir(target / "code")
    os.execv(sys.executable, [sys.executable, "-m", "lib.runs.away", *sys.argv[1:]])


if __name__ == "__main__":
    main()
