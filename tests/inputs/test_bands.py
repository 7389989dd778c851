"""GEO-Bench samples as m-forestnet and m-pv4ger have them: bands are chosen by name."""

from __future__ import annotations

import json
import shutil

import h5py
import numpy as np
import pytest
from data_folders import encoded, put
from pydantic import ValidationError

from lib.inputs import sources
from lib.inputs.splits import load_splits
from lib.runs.pack import pack
from lib.spec import DataSpec, RunSpec

# as their converters write them, which need not be the order in a file
FORESTNET = ["02 - Blue", "03 - Green", "04 - Red", "05 - NIR", "06 - SWIR1", "07 - SWIR2"]
PV4GER = ["Red", "Green", "Blue"]
VALUE_OF = {"red": 30, "green": 20, "blue": 10, "nir": 40, "swir1": 50, "swir2": 60}


def written(home, name, bands, classes=3, date=""):
    """A set of 8 training, 3 validation and 3 test samples."""
    folder = home / name
    folder.mkdir()
    splits = {"train": range(9), "valid": range(9, 12), "test": range(12, 15)}
    partition = {split: [f"sample_{i}" for i in numbers] for split, numbers in splits.items()}
    label_map = {
        str(c): [f"sample_{i}" for i in range(15) if i % classes == c] for c in range(classes)
    }
    for i in range(15):
        with h5py.File(folder / f"sample_{i}.hdf5", "w") as sample:
            for band in bands:
                value = VALUE_OF[band.split(" - ")[-1].lower()] + i
                sample.create_dataset(band + date, data=np.full((6, 6), value, np.uint8))
            sample.attrs["pickle"] = "not read"
    (folder / "default_partition.json").write_text(json.dumps(partition))
    (folder / "label_map.json").write_text(json.dumps(label_map))
    return folder


def colours(split, row=0):
    return split.source.image(int(split.rows[row]))[:, 0, 0].tolist()


@pytest.mark.parametrize(
    "name, bands, date", [("m-forestnet", FORESTNET, "_2016-01-01"), ("m-pv4ger", PV4GER, "")]
)
def test_red_green_and_blue_are_found_by_name(home, name, bands, date):
    written(home, name, bands, date=date)
    splits = load_splits(DataSpec(name=name, image_size=6))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (9, 3, 3)
    assert splits.class_names == ["0", "1", "2"] and splits.test.labels.tolist() == [0, 1, 2]
    assert colours(splits.train, 2) == [32, 22, 12] and colours(splits.test) == [42, 32, 22]


def test_other_bands_are_taken_in_the_order_of_the_spec(home):
    written(home, "m-forestnet", FORESTNET, date="_2016-01-01")
    spec = DataSpec(name="m-forestnet", image_size=6, bands=("swir1", "nir", "red"))
    assert colours(load_splits(spec).train) == [50, 40, 30]
    assert colours(load_splits(spec.but(bands=None)).train) == [30, 20, 10]
    assert load_splits(spec).train.batch([0], spec).shape == (1, 3, 6, 6)


def test_bands_that_a_sample_has_not_are_named(home):
    written(home, "m-pv4ger", PV4GER)
    splits = load_splits(DataSpec(name="m-pv4ger", bands=("nir", "red", "green")))
    with pytest.raises(ValueError, match="sample_0.hdf5 has 0 bands of nir among Blue, Green, Red"):
        splits.train.source.image(0)


def test_a_broken_a_missing_and_a_surplus_sample(home):
    folder = written(home, "m-forestnet", FORESTNET)
    whole = (folder / "sample_3.hdf5").read_bytes()
    (folder / "sample_3.hdf5").write_bytes(whole[: len(whole) // 2])
    source = load_splits(DataSpec(name="m-forestnet")).train.source
    with pytest.raises(ValueError, match="sample_3.hdf5 does not read as HDF5"):
        source.image(3)
    (folder / "sample_3.hdf5").unlink()
    sources.forget()
    with pytest.raises(ValueError, match="sample_3 of the train split has no file sample_3.hdf5"):
        load_splits(DataSpec(name="m-forestnet"))
    (folder / "sample_3.hdf5").write_bytes(whole)
    shutil.copy(folder / "sample_3.hdf5", folder / "sample_99.hdf5")  # in no split: it is not read
    sources.forget()
    splits = load_splits(DataSpec(name="m-forestnet"))
    assert len(splits.train) + len(splits.val) + len(splits.test) == 15
    partition = json.loads((folder / "default_partition.json").read_text())
    partition["test"].append("sample_99")
    (folder / "default_partition.json").write_text(json.dumps(partition))
    sources.forget()
    with pytest.raises(ValueError, match="gives no label to sample sample_99 of the test split"):
        load_splits(DataSpec(name="m-forestnet"))


def test_pictures_have_no_bands_by_name(home):
    put(home, {f"birds/{c}/{n}.png": encoded(n + 90 * c) for c in (0, 1) for n in range(10)})
    with pytest.raises(ValueError, match="birds has no bands=.*only GEO-Bench samples"):
        load_splits(DataSpec(name="birds", bands=("nir", "red", "green")))


@pytest.mark.parametrize(
    "bands, says",
    [
        (("red", "green", "blue"), "leave it at None for red, green, blue"),
        (("nir", "nir", "red"), "name three different ones"),
        (("NIR", "red", "green"), "write names in small letters"),
        (("nir",), "bands"),
    ],
)
def test_bands_of_a_spec(bands, says):
    with pytest.raises(ValidationError, match=says):
        DataSpec(name="m-forestnet", bands=bands)
    with pytest.raises(ValidationError, match="and mnist5k is none: leave it at None"):
        DataSpec(bands=("nir", "red", "green"))


def test_ids_of_specs_without_bands_are_what_they_were():
    assert "bands" not in DataSpec(name="m-forestnet").canonical()
    assert DataSpec(name="m-forestnet", bands=["nir", "red", "green"]).bands[0] == "nir"  # as YAML


def test_other_bands_do_not_travel_as_colours(home, tmp_path):
    written(home, "m-forestnet", FORESTNET)
    data = DataSpec(name="m-forestnet", image_size=16, bands=("nir", "red", "green"))
    with pytest.raises(ValueError, match="m-forestnet with bands=.* is not packed"):
        pack([RunSpec(data=data)], tmp_path / "parts", 2**20)
