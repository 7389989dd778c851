"""Folders as their authors publish them, written small: GEO-Bench samples in HDF5, MIT Indoor
lists."""

from __future__ import annotations

import json
import pickle

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from lib.inputs.splits import load_splits
from lib.spec import DataSpec


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


def sample(folder, name, value, bands=("Red", "Green", "Blue"), dtype=np.uint8):
    """A file as geobench's write_sample_hdf5 makes it: one array a band, everything else in one
    pickled attribute."""
    with h5py.File(folder / f"{name}.hdf5", "w") as held:
        for i, band in enumerate(bands):
            held.create_dataset(band, data=np.full((6, 8), value + 10 * i, dtype))
        held.attrs["pickle"] = str(pickle.dumps(Bomb()))


def geobench(home, splits=None, labels=None, **options):
    folder = home / "m-toy"
    folder.mkdir()
    splits = splits or {
        "train": [f"s{i}" for i in range(8)],
        "valid": ["s8", "s9"],
        "test": ["s10", "s11"],
    }
    names = [name for group in splits.values() for name in group]
    labels = labels or {"0": names[::2], "1": names[1::2]}
    for i, name in enumerate(names):
        sample(folder, name, i, **options)
    (folder / "default_partition.json").write_text(json.dumps(splits))
    (folder / "label_map.json").write_text(json.dumps(labels))
    return folder


def test_geobench_folder(home):
    geobench(home)
    splits = load_splits(DataSpec(name="m-toy", image_size=6))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [
        8,
        2,
        2,
    ] and splits.class_names == ["0", "1"]
    assert (
        splits.train.labels.tolist() == [0, 1] * 4
        and splits.test.labels.tolist() == [0, 1]
        and splits.channels == 3
    )
    assert torch.equal(
        splits.test.source.image(1)[:, 0, 0], torch.tensor([11, 21, 31], dtype=torch.uint8)
    )
    assert splits.train.batch(torch.arange(3), DataSpec(name="m-toy", image_size=6)).shape == (
        3,
        3,
        6,
        6,
    )


def test_landsat_names_with_number_and_date(home):
    dated = [f"{name}_2016-01-01" for name in ("05 - NIR", "04 - Red", "03 - Green", "02 - Blue")]
    bands = (*dated, "05 - Vegetation Red Edge", "08A - Vegetation Red Edge_2016-01-01")
    geobench(home, bands=bands)
    assert load_splits(DataSpec(name="m-toy")).train.source.image(0)[:, 0, 0].tolist() == [
        10,
        20,
        30,
    ]


def test_classes_are_in_order_of_their_numbers(home):
    names = [f"s{i}" for i in range(12)]
    geobench(home, labels={str(i): [name] for i, name in enumerate(names)})
    assert load_splits(DataSpec(name="m-toy")).class_names == [str(i) for i in range(12)]


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda f: (f / "label_map.json").write_text("{"), "label_map.json cannot be read as JSON"),
        (lambda f: (f / "label_map.json").unlink(), "label_map.json cannot be read as JSON"),
        (lambda f: (f / "s3.hdf5").unlink(), "sample s3 of the train split has no file s3.hdf5"),
        (
            lambda f: (f / "label_map.json").write_text('{"0": ["s0"]}'),
            "gives no label to sample s1 of the train split",
        ),
        (
            lambda f: (f / "label_map.json").write_text('{"0": ["s0"], "1": ["s0"]}'),
            "sample s0 is in classes 0 and 1",
        ),
        (
            lambda f: (f / "default_partition.json").write_text(
                '{"train": ["s0"], "valid": ["s0"], "test": ["s1"]}'
            ),
            "sample s0 is in train and in valid",
        ),
        (lambda f: (f / "default_partition.json").write_text("{}"), "no samples under .train."),
        (
            lambda f: (f / "default_partition.json").unlink(),
            "default_partition.json cannot be read as JSON",
        ),
        (
            lambda f: (f / "label_map.json").write_text('{"0": "s0"}'),
            "label_map.json must map names to lists of samples",
        ),
        (
            lambda f: (f / "label_map.json").write_text("[]"),
            "label_map.json must map names to lists of samples",
        ),
    ],
)
def test_folder_that_does_not_add_up(home, spoil, says):
    spoil(geobench(home))
    with pytest.raises(ValueError, match=says):
        load_splits(DataSpec(name="m-toy"))


@pytest.mark.parametrize(
    "options, says",
    [
        ({"bands": ("Red", "Green")}, "0 bands of blue among Green, Red"),
        ({"bands": ("Red", "04 - Red_2016-01-01", "Green", "Blue")}, "2 bands of red among"),
        (
            {
                "bands": [
                    f"{c}_{day}"
                    for c in ("Red", "Green", "Blue")
                    for day in ("2016-01-01", "2017-01-01")
                ]
            },
            "2 bands of red, 2 bands of green, 2 bands of blue among .* of one date",
        ),
        ({"dtype": np.float32}, None),
    ],
)
def test_bands(home, options, says):
    geobench(home, **options)
    source = load_splits(DataSpec(name="m-toy")).train.source
    if says is None:
        assert source.image(2).dtype == torch.uint8  # whole numbers of another type
        return
    with pytest.raises(ValueError, match=says):
        source.image(0)


def test_values_and_files_that_do_not_read(home):
    folder = geobench(home)
    sample(folder, "s0", 4000, dtype=np.int16)
    (folder / "s1.hdf5").write_bytes(b"not HDF5")
    (folder / "s3.hdf5").write_bytes((folder / "s3.hdf5").read_bytes()[:-64])
    sample(folder, "s4", 0.5, dtype=np.float32)
    sample(folder, "s5", np.nan, dtype=np.float32)
    with h5py.File(folder / "s6.hdf5", "a") as held:
        del held["Blue"]
        held["Blue"] = np.zeros((3, 4), np.uint8)
    source = load_splits(DataSpec(name="m-toy")).train.source
    with pytest.raises(ValueError, match="s0.hdf5 holds values from 4000 to 4020 of type int16"):
        source.image(0)
    for row in (1, 3):
        with pytest.raises(ValueError, match=f"s{row}.hdf5 does not read as HDF5"):
            source.image(row)
    for row in (4, 5):
        with pytest.raises(ValueError, match=f"s{row}.hdf5 holds values from .* of type float32"):
            source.image(row)
    with pytest.raises(
        ValueError, match=r"s6.hdf5 has bands of shape \(6, 8\), \(6, 8\), \(3, 4\)"
    ):
        source.image(6)


@pytest.mark.parametrize(
    "name, write",
    [("m-toy", lambda home: geobench(home)), ("mit-indoor", lambda home: indoor(home))],
)
def test_one_label_column(home, name, write):
    write(home)
    with pytest.raises(ValueError, match=f"data set {name} has no label column 'fine_label'"):
        load_splits(DataSpec(name=name, label="fine_label"))


# ---------------------------------------------------------------- MIT Indoor


def indoor(home):
    folder = home / "mit-indoor"
    lists = {"TrainImages.txt": [], "TestImages.txt": []}
    for c, name in enumerate(("bakery", "wine cellar")):
        (folder / "Images" / name).mkdir(parents=True)
        for i in range(12):
            file = f"{name}/{i}.jpg"
            mode = "L" if i == 3 else "RGB"  # some of the real files are grey
            Image.new(mode, (10, 8), 100 * c + i if mode == "L" else (100 * c, i, 7)).save(
                folder / "Images" / file
            )
            lists["TestImages.txt" if i >= 10 else "TrainImages.txt"].append(file)
    for name, lines in lists.items():
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder


def test_mit_indoor_folder(home):
    indoor(home)
    splits = load_splits(DataSpec(name="mit-indoor", image_size=8))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [18, 2, 4]
    assert splits.class_names == ["bakery", "wine cellar"]
    assert splits.test.labels.tolist() == [0, 0, 1, 1] and splits.test.source.image(0).shape == (
        3,
        8,
        10,
    )
    assert splits.train.source.image(3).shape == (3, 8, 10)


@pytest.mark.parametrize(
    "spoil, says",
    [
        (
            lambda f: (f / "Images" / "bakery" / "2.jpg").unlink(),
            "lists bakery/2.jpg, which is not in .*; 1 such in all",
        ),
        (lambda f: (f / "TestImages.txt").unlink(), "has no TestImages.txt"),
        (lambda f: (f / "TrainImages.txt").unlink(), "has no TrainImages.txt"),
        (lambda f: (f / "TestImages.txt").write_text("\n"), "TestImages.txt lists no image"),
        (
            lambda f: (f / "TestImages.txt").write_text("bakery/1.jpg\n"),
            "bakery/1.jpg is in the training and in the test list",
        ),
        (
            lambda f: (f / "TrainImages.txt").write_text("bakery/1.jpg\n"),
            "class wine cellar has no training image",
        ),
        (
            lambda f: (f / "TestImages.txt").write_text("bakery/10.jpg\nbakery/10.jpg\n"),
            "TestImages.txt lists bakery/10.jpg twice",
        ),
    ],
)
def test_lists_that_do_not_add_up(home, spoil, says):
    spoil(indoor(home))
    with pytest.raises(ValueError, match=says):
        load_splits(DataSpec(name="mit-indoor"))


def test_pictures_that_no_list_names_are_not_read(home):
    (indoor(home) / "Images" / "bakery" / "99.jpg").write_bytes(b"no picture")
    (home / "mit-indoor" / "Images" / "pantry").mkdir()
    splits = load_splits(DataSpec(name="mit-indoor", image_size=8))
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [18, 2, 4]
    assert splits.class_names == ["bakery", "wine cellar"]


def test_pictures_of_other_kinds_under_the_name_jpg(home):
    folder = indoor(home)
    pictures = {"0": ("GIF", "P"), "1": ("PNG", "RGBA"), "2": ("PNG", "L"), "4": ("TIFF", "CMYK")}
    for name, (kind, mode) in pictures.items():
        picture = Image.new("RGB", (5, 4), (40, 40, 40))
        picture = picture.quantize(4) if mode == "P" else picture.convert(mode)
        picture.save(folder / "Images" / "bakery" / f"{name}.jpg", kind)
    source = load_splits(DataSpec(name="mit-indoor")).train.source
    for name in pictures:
        assert torch.equal(source.image(int(name)), torch.full((3, 4, 5), 40, dtype=torch.uint8)), (
            name
        )
    # wine cellar/7.jpg
    assert abs(source.image(10 + 7).float().mean((1, 2)) - torch.tensor([100.0, 7, 7])).max() < 4


def test_a_damaged_picture_is_named(home):
    folder = indoor(home)
    (folder / "Images" / "bakery" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bakery/0.jpg does not decode"):
        load_splits(DataSpec(name="mit-indoor")).train.source.image(0)
