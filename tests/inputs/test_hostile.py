"""Data sets that were made to do harm: no file outside the data set is read, no memory is
wasted."""

from __future__ import annotations

import json
import tracemalloc

import h5py
import numpy as np
import pyarrow as pa
import pytest
from data_folders import encoded, put
from PIL import Image
from pyarrow.parquet import write_table

from lib.inputs.pixels import rgb
from lib.inputs.splits import load_splits
from lib.spec import DataSpec

BANDS = ("Red", "Green", "Blue")
SECRET = np.full((4, 4), 77, np.uint8)  # what lies elsewhere on the machine


def geobench(home, samples=None) -> None:
    """A GEO-Bench folder of ten samples, with other names where they are given."""
    folder = home / "set"
    folder.mkdir()
    names = [f"s{i}" for i in range(10)]
    for name in names:
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            for band in BANDS:
                file[band] = np.zeros((4, 4), np.uint8)
    listed = samples or names
    splits = {"train": listed[:8], "valid": listed[8:9], "test": listed[9:]}
    (folder / "default_partition.json").write_text(json.dumps(splits))
    (folder / "label_map.json").write_text(json.dumps({"0": listed[::2], "1": listed[1::2]}))


@pytest.fixture
def secret(tmp_path):
    """Files beside MOE_DATA that hold SECRET: raw, and as HDF5."""
    (tmp_path / "secret.bin").write_bytes(SECRET.tobytes())
    with h5py.File(tmp_path / "secret.hdf5", "w") as file:
        file["Red"] = SECRET
    return tmp_path


def external_storage(file, secret):
    file.create_dataset(
        "Red", (4, 4), np.uint8, external=[(str(secret / "secret.bin"), 0, h5py.h5f.UNLIMITED)]
    )


def external_link(file, secret):
    file["Red"] = h5py.ExternalLink(str(secret / "secret.hdf5"), "Red")


def soft_link(file, secret):
    file["elsewhere"] = h5py.ExternalLink(str(secret / "secret.hdf5"), "/")
    file["Red"] = h5py.SoftLink("/elsewhere/Red")


def virtual(file, secret):
    layout = h5py.VirtualLayout((4, 4), np.uint8)
    layout[:] = h5py.VirtualSource(str(secret / "secret.hdf5"), "Red", (4, 4))
    file.create_virtual_dataset("Red", layout)


def a_group(file, secret):
    file.create_group("Red")


@pytest.mark.parametrize(
    "how, message",
    [
        (external_storage, "band Red takes its values from other files"),
        (virtual, "band Red takes its values from other files"),
        (external_link, "band Red is no array of this file but a link"),
        (soft_link, "band Red is no array of this file but a link"),
        (a_group, "band Red is no array of this file but a link or a group"),
    ],
)
def test_a_sample_reads_no_other_file(home, secret, how, message):
    geobench(home)
    with h5py.File(home / "set/s3.hdf5", "a") as file:
        del file["Red"]
        how(file, secret)
    source = load_splits(DataSpec(name="set")).train.source
    assert source.image(2).max() == 0
    with pytest.raises(ValueError, match=rf"s3\.hdf5: {message}"):
        source.image(3)


def test_a_small_file_takes_no_large_memory(home):
    geobench(home)
    with h5py.File(home / "set/s3.hdf5", "a") as file:
        del file["Red"]
        # a fill value and no chunk: 2 KB on disk, 3.4 GiB once read
        file.create_dataset("Red", (60_000, 60_000), np.uint8, chunks=(1000, 1000))
    source = load_splits(DataSpec(name="set")).train.source
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"60000 x 60000 pixels, more than the 89,478,485"):
        source.image(3)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", 7, ["s0"], "x\\y"]
)
def test_a_list_of_samples_leads_nowhere_else(home, secret, name):
    geobench(home, [name, *(f"s{i}" for i in range(1, 10))])
    with pytest.raises(ValueError, match="is no name of a sample"):
        load_splits(DataSpec(name="set"))


@pytest.mark.parametrize(
    "line", ["../../secret.png", "cat/../../x.png", "/etc/x.png", "cat", "./x"]
)
def test_a_list_of_images_leads_nowhere_else(home, line):
    images = {f"set/Images/{c}/{n}.jpg": encoded(n) for c in ("cat", "dog") for n in range(9)}
    put(home, images | {"secret.png": encoded(1)})
    names = [f"{c}/{n}.jpg" for c in ("cat", "dog") for n in range(9)]
    (home / "set/TrainImages.txt").write_text("\n".join([*names[1:], line]))
    (home / "set/TestImages.txt").write_text(names[0])
    with pytest.raises(ValueError, match=r"TrainImages\.txt lists .*listed as CLASS/FILE"):
        load_splits(DataSpec(name="set"))


def test_a_picture_runs_no_program(tmp_path):
    """Pillow hands EPS to Ghostscript: such a file is no picture, whatever its name says."""
    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(OSError, match="cannot identify image file"):
        rgb(tmp_path / "x.png")


def test_a_picture_of_too_many_pixels_is_named(home, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    files = {f"set/{c}/{n}.png": encoded(n) for c in ("cat", "dog") for n in range(10)}
    put(home, files)
    source = load_splits(DataSpec(name="set")).train.source
    with pytest.raises(ValueError, match=r"cat/0\.png does not decode: .*decompression bomb"):
        source.image(0)


@pytest.mark.parametrize("how", ["absolute", "up", "through", "working"])
def test_a_table_reads_no_other_file(home, tmp_path, monkeypatch, how):
    put(tmp_path, {"secret.png": encoded(77)})
    monkeypatch.chdir(tmp_path)
    path = {
        "absolute": str(tmp_path / "secret.png"),
        "up": "../../secret.png",
        "through": str(home / "set/../../secret.png"),
        "working": "secret.png",
    }[how]
    (home / "set").mkdir()
    images = [{"bytes": None, "path": path} for _ in range(20)]
    write_table(pa.table({"img": images, "label": [0, 1] * 10}), home / "set/train.parquet")
    source = load_splits(DataSpec(name="set")).train.source
    message = "No such file" if how == "working" else "is outside .*set and is not read"
    for read in (source.image, source.stored, lambda row: source.job(row)()):
        with pytest.raises(ValueError, match=f"row 3 names the file .*{message}"):
            read(3)
