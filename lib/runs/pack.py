"""Packs runs for a machine without network or shared disk: code, specs, images, weights, wheels.

What is written is a zip file cut into parts, and `run.py`, made of `unpack.py`, which knows their
SHA-256. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .. import paths
from ..inputs import packed, weights
from ..inputs.sources import Opened, sources_of
from ..inputs.splits import load_splits
from ..spec import RunSpec
from .collect import check
from .store import Store, store

# what lib imports when it carries out a run; torch, its rivals in size, has to be there already
ROOTS = "timm pydantic numpy safetensors tqdm filelock pillow scikit-learn scipy hdbscan".split()
THERE = ("torch", "torchvision", "triton", "nvidia", "cuda")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack(
    specs: Sequence[RunSpec],
    folder: Path,
    part_bytes: int,
    python: str | None = None,
    where: Store | None = None,
) -> list[Path]:
    """Writes the parts of the runs and their script to a new folder, and returns the files.

    specs: parents first, as `missing_runs` lists them; python: of the wheels, such as 3.12; None
    packs none. Raises ValueError for a folder that is not empty, before any work, and what `check`,
    `load_splits` and `fetch` raise for runs that cannot be carried out.
    """
    if part_bytes < 1:
        raise ValueError(f"part={part_bytes} bytes: parts must have at least one")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder, so that no old part stays")
    for spec in specs:
        check(spec)
    where = where or store()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        _pack_images(specs, scratch / "data")
        started = {spec.backbone for spec in specs if spec.init is None and spec.backbone.weights}
        for weights_name, architecture in {(spec.weights, spec.name) for spec in started}:
            weights.pack(scratch / "weights", weights_name, architecture)
        if python:
            _download_wheels(python, scratch / f"wheels-{python}")
        # filed where the plan says when they are merged, so not published there
        dumped = [spec.but(publish=False).model_dump(mode="json") for spec in specs]
        (scratch / "specs.json").write_text(json.dumps(dumped))
        files = {str(file.relative_to(scratch)): file for file in scratch.rglob("*")}
        modules = paths.LIB.rglob("*.py")
        files |= {f"code/{file.relative_to(paths.ROOT)}": file for file in modules}
        packed_ids = {spec.id for spec in specs}
        parents = {parent.id for spec in specs for parent in spec.needed_runs} - packed_ids
        for parent in parents:  # its record, too: without one its weights would not be trusted
            files[f"states/{parent}.safetensors"] = where.state(parent)
            record = where.peek(parent).file
            both = (file for file in (record, record.with_suffix(".npz")) if file.is_file())
            files |= {f"records/{record.parent.name}/{file.name}": file for file in both}
        joined = scratch / "joined.zip"
        with zipfile.ZipFile(joined, "w", zipfile.ZIP_DEFLATED) as archive:
            for member, file in sorted(files.items()):
                archive.write(file, member)  # folders, too
        return _cut(joined, folder, part_bytes)


def _cut(joined: Path, folder: Path, part_bytes: int) -> list[Path]:
    """Cuts the zip file into parts and writes the script that knows their SHA-256."""
    sha256_of_part: dict[str, str] = {}
    with open(joined, "rb") as handle:
        while data := handle.read(part_bytes):
            name = f"part-{len(sha256_of_part):03d}"
            (folder / name).write_bytes(data)
            sha256_of_part[name] = hashlib.sha256(data).hexdigest()
    template = Path(__file__).with_name("unpack.py").read_text()
    declared = "PARTS: dict[str, str] = "
    script = template.replace(declared + "{}", declared + json.dumps(sha256_of_part, indent=4))
    (folder / "run.py").write_text(script)
    return [folder / name for name in (*sha256_of_part, "run.py")]


def _pack_images(specs: Sequence[RunSpec], home: Path) -> None:
    """Writes a file for each data set, with the rows that the runs read.

    Raises ValueError for images of chosen bands.
    """
    opened: dict[str, dict[str, Opened]] = {}  # by data set and label column
    rows: dict[str, dict[str, set[int]]] = {}  # by data set and stored split
    for data in {spec.data.id: spec.data for spec in specs}.values():
        if data.bands is not None:
            raise ValueError(
                f"data set {data.name} with bands={data.bands} is not packed: copy its folder "
                "to MOE_DATA there, and pack the other runs"
            )
        by_label = opened.setdefault(data.name, {})
        by_label[data.label] = sources_of(data.name, data.label, paths.data_home())
        rows_of_split = rows.setdefault(data.name, {})
        splits = load_splits(data)
        for split in (splits.train, splits.val, splits.test):
            rows_of_split.setdefault(split.stored, set()).update(split.rows.tolist())
    for name, by_label in opened.items():
        packed.write(packed.file_of(home, name), by_label, rows[name])


def _download_wheels(python: str, folder: Path) -> None:
    """Downloads the wheels of what lib needs, in the versions of here, for another Python."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(folder)]
    command += ["--only-binary=:all:", "--python-version", python]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    done = subprocess.run([*command, *_pinned(python)], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(
            f"pip has no wheels for Python {python}: {done.stderr.strip()[-600:]}. "
            "Pack without --wheels, and install the packages there"
        )


def _pinned(python: str) -> list[str]:
    """Lists name==version of ROOTS and of all that they need, but what is THERE."""
    from packaging.requirements import Requirement

    pins: dict[str, str] = {}
    names = list(ROOTS)
    while names:
        name = names.pop().lower()
        if name in pins or name.startswith(THERE):
            continue
        pins[name] = f"{name}=={importlib.metadata.version(name)}"
        for text in importlib.metadata.requires(name) or ():
            need = Requirement(text)
            of_python = {"python_version": python, "extra": ""}
            if need.marker is None or need.marker.evaluate(of_python):
                names.append(need.name)
    return sorted(pins.values())
