"""Pictures and tables for tests of data sets."""

from __future__ import annotations

import io
from pathlib import Path

import datasets
from PIL import Image

datasets.disable_progress_bars()


def encoded(value: int, size=(8, 8), kind: str = "PNG") -> bytes:
    """A grey image as a file's bytes; size is (width, height)."""
    out = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(out, kind)
    return out.getvalue()


def parquet(file: Path, images: list[bytes], labels: list, names: list[str] | None = None) -> None:
    """A parquet file in the layout of the hub: `img` and `label`."""
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"img": datasets.Image(), "label": label})
    rows = {"img": [{"bytes": image, "path": None} for image in images], "label": labels}
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(file))


def put(folder: Path, files: dict[str, bytes | str]) -> None:
    """Writes files by their path below a folder; text is a link to another of them."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            file.symlink_to(folder / content)
        else:
            file.write_bytes(content)
