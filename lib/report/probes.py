"""Finds the probe images of a record, in the data set or in `data/probes`.

The project comes with no images. Who has a data set whose licence allows it to be given on writes
its probe images, one file a data set and side in pixels, for builds on machines without it:

    MOE_DATA=... python -m lib.report.probes

Axis letters: **P** probe images, **S** side of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .. import paths
from ..spec import DataSpec
from ..verdicts.masks import probe_labels

__all__ = ["absent_images", "probe_images", "probe_names", "test_images", "write"]

# data set: licence and source of its images
LICENSED = {
    "eurosat": (
        "MIT License, Copyright (c) 2023 Patrick Helber",
        "EuroSAT RGB (Helber et al. 2019), https://github.com/phelber/EuroSAT, "
        "https://doi.org/10.5281/zenodo.7711810; resized",
    )
}


def probe_images(record: Any, count: int | None = None) -> list[np.ndarray] | None:
    """Reads the record's first `count` probe images, channels first; all of them for None.

    None where neither the data set nor `data/probes` has them. Raises ValueError where the latter
    has other images under their index.
    """
    # here, since it needs torch: images are read only to be looked at, and no number needs them
    from ..inputs.splits import load_splits

    try:
        source = load_splits(record.spec.data).test.source
    except FileNotFoundError:
        return _written(record, count)
    return [source.image(int(row)).numpy() for row in record.arrays["probe_index"][:count]]


def test_images(record: Any, places: Sequence[int]) -> list[np.ndarray]:
    """Reads images of the record's test split by their places in it, channels first.

    Raises FileNotFoundError without the data set, ValueError where it has other labels than the
    record.
    """
    from ..inputs.splits import load_splits

    test = load_splits(record.spec.data).test
    if not np.array_equal(test.labels.numpy(), record.arrays["test_label"]):
        raise ValueError(
            f"data set {record.spec.data.name} gives its test images other labels than record "
            f"{record.id}: it is not the copy that the record was made with"
        )
    return [test.source.image(int(test.rows[place])).numpy() for place in places]


def probe_names(record: Any) -> list[str]:
    """Lists the class of each probe image, as a page prints it; needs no data set.

    Images are numbered where the record has no labels, as after pretraining.
    """
    if "test_label" not in record.arrays:
        return [f"image {i}" for i in range(len(record.arrays["probe_index"]))]
    names = [str(record.class_names[label]).replace("_", " ") for label in probe_labels(record)]
    return [f"class {name}" if name.isdigit() else name for name in names]


def absent_images(record: Any) -> str:
    """Says in a caption that a figure lacks the images; "" where they are at hand."""
    if probe_images(record, 1) is not None:
        return ""
    return f" The images are not shown: they need the data set {record.spec.data.name} (MOE_DATA)."


def _file(data: DataSpec) -> Path:
    return paths.PROBES / f"{data.name}-{data.image_size}.npz"


def _written(record: Any, count: int | None) -> list[np.ndarray] | None:
    """Looks for the record's images in `data/probes`, by index, and checks the class of each."""
    file = _file(record.spec.data)
    if not file.is_file() or "test_label" not in record.arrays:
        return None
    with np.load(file, allow_pickle=False) as stored:
        place_of_row = {int(row): place for place, row in enumerate(stored["index"])}
        rows = record.arrays["probe_index"].tolist()
        if not set(rows) <= set(place_of_row):
            return None
        places = [place_of_row[row] for row in rows]
        images, labels = stored["images"][places], stored["labels"][places]
    if (labels != _labels_in_data_set(record)).any():
        raise ValueError(
            f"{file} holds the images {rows}, but with other classes than record {record.id}: "
            "write it anew with MOE_DATA=... python -m lib.report.probes"
        )
    return list(images[:count])


def _labels_in_data_set(record: Any) -> np.ndarray:
    """Returns (P,) the class of each probe image, before a spec numbers some classes anew."""
    return probe_labels(record) + (record.spec.data.classes or (0,))[0]


def write() -> list[Path]:
    """Writes the probe images of all committed records whose data set may be given on.

    Raises FileNotFoundError where a data set is absent, ValueError where an image has another class
    than in a record.
    """
    return [_write(data, records) for data, records in _records_by_data().values()]


def _records_by_data() -> dict[Path, tuple[DataSpec, list[Any]]]:
    """Groups the committed records that have probe images by the file that holds these."""
    from ..runs.store import store

    groups: dict[Path, tuple[DataSpec, list[Any]]] = {}
    for file in sorted(store().published.glob("*/*.json")):
        record = store().peek(file.stem)
        # the arrays of other records are not even opened
        if record is None or record.spec.data.name not in LICENSED:
            continue
        if {"probe_index", "test_label"} <= set(record.arrays):
            data = record.spec.data
            groups.setdefault(_file(data), (data, []))[1].append(record)
    return groups


def _write(data: DataSpec, records: list[Any]) -> Path:
    """Writes one file: the (P, 3, S, S) uint8 images that the models of some records saw."""
    from ..inputs.augment import augmented
    from ..inputs.splits import load_splits

    source = load_splits(data.but(classes=None)).test.source
    rows = np.unique([record.arrays["probe_index"] for record in records])
    for record in records:
        wanted = record.arrays["probe_index"]
        if (source.labels[wanted] != _labels_in_data_set(record)).any():
            raise ValueError(
                f"data set {data.name} gives the probe images {wanted.tolist()} other classes than "
                f"record {record.id}: it is not the copy that the records were made with"
            )
    pixels = augmented([source.image(int(row)) for row in rows], "none", data.image_size, None)
    licence, origin = LICENSED[data.name]
    with paths.written_whole(_file(data)) as part, open(part, "wb") as handle:
        np.savez_compressed(
            handle,
            images=(255 * pixels).round().numpy().astype(np.uint8),
            index=rows,
            labels=source.labels[rows],
            licence=licence,
            source=origin,
        )
    return _file(data)


if __name__ == "__main__":
    for written in write():
        print(f"{written}: {written.stat().st_size // 1024} KiB")
