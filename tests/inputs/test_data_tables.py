"""Tables: parquet folders and the hub. Class names decide, and every file is read or named."""

from __future__ import annotations

import io

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from data_folders import encoded, parquet, put
from PIL import Image
from pyarrow.parquet import write_table

from lib.inputs import sources
from lib.inputs.splits import load_splits
from lib.spec import DataSpec


def test_parquet_folder(home):
    values = list(range(40))
    kinds = ["PNG", "JPEG"]
    parquet(
        home / "toy" / "train-00000-of-00002.parquet",
        [encoded(v, kind=kinds[v % 2]) for v in values[:20]],
        [v % 2 for v in values[:20]],
        ["day", "night"],
    )
    parquet(
        home / "toy" / "train-00001-of-00002.parquet",
        [encoded(v, kind=kinds[v % 2]) for v in values[20:]],
        [v % 2 for v in values[20:]],
        ["day", "night"],
    )
    parquet(
        home / "toy" / "validation-00000-of-00001.parquet",
        [encoded(200), encoded(201)],
        [0, 1],
        ["day", "night"],
    )
    splits = load_splits(DataSpec(name="toy", image_size=8))
    # The test split is cut from training.
    assert (len(splits.train), len(splits.val), len(splits.test)) == (36, 2, 4)
    assert splits.class_names == ["day", "night"] and splits.channels == 3
    # Row r of this data set is the grey r, so an image's own pixel says where it came from.
    assert [
        int(splits.train.source.image(int(row))[0, 0, 0]) for row in splits.train.rows
    ] == splits.train.rows.tolist()
    assert splits.train.labels.tolist() == [row % 2 for row in splits.train.rows.tolist()]
    assert [int(splits.val.source.image(row)[1, 3, 3]) for row in (0, 1)] == [200, 201]
    with pytest.raises(
        ValueError, match="no label column 'fine_label'; its columns are img, label"
    ):
        load_splits(DataSpec(name="toy", label="fine_label"))


def test_plain_label_column_becomes_classes_from_zero(home):
    parquet(
        home / "plain" / "train.parquet",
        [encoded(v) for v in range(20)],
        [4 if v % 2 else 7 for v in range(20)],
    )
    splits = load_splits(DataSpec(name="plain", image_size=8))
    assert splits.class_names == ["4", "7"]
    assert splits.train.labels.tolist() == [
        0 if row % 2 else 1 for row in splits.train.rows.tolist()
    ]
    # A class that training does not know cannot be scored: refused, not counted as wrong.
    parquet(
        home / "plain2" / "train.parquet",
        [encoded(v) for v in range(20)],
        [v % 2 for v in range(20)],
    )
    parquet(home / "plain2" / "test.parquet", [encoded(9)], [2])
    with pytest.raises(
        ValueError, match=r"plain2/test.parquet, row 0: 2 is no class of the training"
    ):
        load_splits(DataSpec(name="plain2"))


def test_truncated_image_names_split_and_row(home):
    images = [encoded(v) for v in range(20)]
    noisy = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(
        noisy, "PNG"
    )
    images[7] = noisy.getvalue()[:600]  # the header reads, the pixels do not
    parquet(home / "torn" / "train.parquet", images, [v % 2 for v in range(20)])
    splits = load_splits(DataSpec(name="torn", image_size=8))
    source = splits.train.source
    assert source.image(6).shape == (3, 8, 8)
    with pytest.raises(
        ValueError,
        match="torn, split train, row 7 does not decode: .*never skipped",
    ):
        source.image(7)


def test_truncated_parquet_file_is_named(home):
    parquet(
        home / "cut" / "train.parquet", [encoded(v) for v in range(20)], [v % 2 for v in range(20)]
    )
    whole = (home / "cut" / "train.parquet").read_bytes()
    (home / "cut" / "test-00000-of-00001.parquet").write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"cut/test-00000-of-00001\.parquet cannot be read"):
        load_splits(DataSpec(name="cut"))


@pytest.mark.parametrize("split", ["val", "valid", "Validation"])
def test_two_splits_of_one_kind_of_the_hub(home, monkeypatch, split):
    file = home / "rows.parquet"
    parquet(file, [encoded(v) for v in range(20)], [v % 2 for v in range(20)], ["a", "b"])
    rows = datasets.Dataset.from_parquet(str(file))
    hub = {"train": rows, "validation": rows, split: rows}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(hub))
    with pytest.raises(ValueError, match=f"two val splits, '{split}' too: copy one"):
        load_splits(DataSpec(name="hub:someone/birds"))


def test_a_split_of_the_hub_by_any_letters(home, monkeypatch):
    file = home / "rows.parquet"
    parquet(file, [encoded(v) for v in range(20)], [v % 2 for v in range(20)], ["a", "b"])
    rows = datasets.Dataset.from_parquet(str(file))
    hub = datasets.DatasetDict({"Train": rows, "TEST": rows.select(range(4)), "extra": rows})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: hub)
    splits = load_splits(DataSpec(name="hub:someone/birds", image_size=8))
    assert [len(split) for split in (splits.train, splits.val, splits.test)] == [18, 2, 4]
    del hub["Train"]
    sources.forget()
    with pytest.raises(ValueError, match="no split named train, only TEST, extra"):
        load_splits(DataSpec(name="hub:someone/birds"))


@pytest.mark.parametrize("name", ["hub:someone/birds", "hub:birds"])
def test_hub_without_network_teaches(home, monkeypatch, name):
    # Read at import, so the variable would come too late.
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError) as caught:
        load_splits(DataSpec(name=name))
    text = str(caught.value)
    assert (
        str(home.parent / "cache" / "datasets") in text
        and "run once with network" in text
        and "MOE_DATA/birds" in text
    )


# ---------------------------------------------------------------- names decide


def named(file, names: list[str], order: list[str], start: int = 0, count: int = 20) -> None:
    """A file whose row r is the grey r, of class `names[r % 2]`; it lists its names in `order`."""
    values = range(start, start + count)
    labels = [order.index(names[value % len(names)]) for value in values]
    parquet(file, [encoded(value) for value in values], labels, order)


def class_of_grey(split, names: list[str]) -> set[tuple[int, str]]:
    """{(grey % 2, class name)} of a split."""
    greys = [int(split.source.image(int(row))[0, 0, 0]) for row in split.rows]
    return {
        (grey % 2, names[label]) for grey, label in zip(greys, split.labels.tolist(), strict=True)
    }


def test_files_that_list_the_classes_in_another_order(home):
    named(home / "set/train-00000-of-00002.parquet", ["cat", "dog"], ["cat", "dog"])
    named(home / "set/train-00001-of-00002.parquet", ["cat", "dog"], ["dog", "cat"], start=20)
    named(home / "set/test.parquet", ["cat", "dog"], ["bird", "dog", "cat"], start=50)
    splits = load_splits(DataSpec(name="set", image_size=8))
    assert splits.class_names == ["cat", "dog"] and len(splits.test) == 20
    for split in (splits.train, splits.val, splits.test):
        assert class_of_grey(split, splits.class_names) == {(0, "cat"), (1, "dog")}


def test_text_and_names_are_one_thing(home):
    named(home / "set/train.parquet", ["cat", "dog"], ["cat", "dog"])
    rows = {"img": [{"bytes": encoded(v), "path": None} for v in (0, 1)], "label": ["cat", "dog"]}
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("string")})
    test = datasets.Dataset.from_dict(rows, features=features)
    test.to_parquet(str(home / "set/test.parquet"))
    splits = load_splits(DataSpec(name="set", image_size=8))
    assert splits.test.labels.tolist() == [0, 1]


def test_a_later_training_file_may_know_more_classes(home):
    named(home / "set/train-00000-of-00002.parquet", ["cat", "dog"], ["cat", "dog"])
    named(home / "set/train-00001-of-00002.parquet", ["owl", "cat"], ["owl", "cat"], start=20)
    splits = load_splits(DataSpec(name="set", image_size=8))
    assert splits.class_names == ["cat", "dog", "owl"]


def plain(file, labels: pa.Array | list) -> None:
    """A file as a program writes it that knows nothing of the `datasets` library."""
    images = [{"bytes": encoded(value), "path": None} for value in range(len(labels))]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_table(pa.table({"img": images, "label": labels}), file)


@pytest.mark.parametrize(
    "labels, names",
    [
        ([3, 1] * 10, ["1", "3"]),
        (["b", "a"] * 10, ["a", "b"]),
        ([True, False] * 10, ["False", "True"]),
        (pa.array(pd.Categorical(["b", "a"] * 10)), ["a", "b"]),
    ],
)
def test_plain_columns(home, labels, names):
    plain(home / "set/train.parquet", labels)
    splits = load_splits(DataSpec(name="set", image_size=8))
    assert splits.class_names == names and len(splits.train) == 16
    assert {
        (row % 2) != label
        for row, label in zip(splits.train.rows, splits.train.labels.tolist(), strict=True)
    } == {True}


@pytest.mark.parametrize(
    "labels, message",
    [
        ([0, 1, None] * 7, r"set/train\.parquet, row 2 has no label"),
        (
            [0.0, 1.5] * 10,
            r"train\.parquet: the label column holds double, and a label is one whole",
        ),
        ([[0], [1]] * 10, r"the label column holds list<"),
        ([{"a": 1}] * 20, r"the label column holds struct<"),
        ([b"a", b"b"] * 10, r"the label column holds binary"),
    ],
)
def test_columns_that_hold_no_class_a_row(home, labels, message):
    plain(home / "set/train.parquet", labels)
    with pytest.raises(ValueError, match=message):
        load_splits(DataSpec(name="set"))


def test_numbers_outside_the_names(home):
    parquet(home / "set/train.parquet", [encoded(v) for v in range(20)], [0, 1] * 10, ["a", "b"])
    parquet(home / "set/test.parquet", [encoded(1), encoded(2)], [1, -1], ["a", "b"])
    with pytest.raises(
        ValueError, match=r"test\.parquet, row 1: label -1 is none of its 2 classes"
    ):
        load_splits(DataSpec(name="set"))


def test_numbers_beside_names_are_refused(home):
    named(home / "set/train.parquet", ["cat", "dog"], ["cat", "dog"])
    plain(home / "set/test.parquet", [0, 1])
    with pytest.raises(ValueError, match=r"test\.parquet, row 0: 0 is no class.*compared by name"):
        load_splits(DataSpec(name="set"))


def test_numbers_beside_text_are_refused(home):
    plain(home / "set/train-00000-of-00002.parquet", [0, 1] * 10)
    plain(home / "set/train-00001-of-00002.parquet", ["0", "1"] * 10)
    with pytest.raises(ValueError, match=r"int in .*00000-of-00002.* and str in .*00001-of-00002"):
        load_splits(DataSpec(name="set"))


# ---------------------------------------------------------------- which files


@pytest.mark.parametrize(
    "training, test, message",
    [
        ([7] * 20, [7], r"set/train\.parquet: all training rows are of the one class 7"),
        (["a"] * 20, ["a", "b"], r"one class 'a', and at least two are needed"),
    ],
)
def test_one_class_is_none_to_tell_apart(home, training, test, message):
    plain(home / "set/train.parquet", training)
    plain(home / "set/test.parquet", test)
    with pytest.raises(ValueError, match=message):
        load_splits(DataSpec(name="set"))


def test_a_class_without_training_rows(home):
    names = ["cat", "dog", "owl"]
    parquet(home / "set/train.parquet", [encoded(v) for v in range(20)], [0, 1] * 10, names)
    assert load_splits(DataSpec(name="set")).class_names == names  # in no row, it does no harm
    parquet(home / "set/test.parquet", [encoded(1), encoded(2)], [0, 2], names)
    message = r"test\.parquet, row 1: 'owl' is no class of the training split, .* are cat, dog \("
    with pytest.raises(ValueError, match=message):
        load_splits(DataSpec(name="set"))
    parquet(home / "one/train.parquet", [encoded(v) for v in range(20)], [1] * 20, names)
    with pytest.raises(ValueError, match="all training rows are of the one class 'dog'"):
        load_splits(DataSpec(name="one"))


def test_texts_are_compared_as_they_are_printed(home):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    plain(home / "set/train.parquet", [composed, "tea"] * 10)
    plain(home / "set/test.parquet", ["tea", decomposed])
    splits = load_splits(DataSpec(name="set"))
    assert splits.class_names == [composed, "tea"] and splits.test.labels.tolist() == [1, 0]
    plain(home / "mixed/train.parquet", [composed, decomposed] * 10)
    with pytest.raises(ValueError, match="two classes that print alike, '.*' and '.*': write them"):
        load_splits(DataSpec(name="mixed"))
    named(home / "names/train.parquet", [composed, decomposed], [composed, decomposed])
    with pytest.raises(ValueError, match="two classes that print alike"):
        load_splits(DataSpec(name="names"))


def test_text_of_another_type_of_arrow(home):
    plain(home / "set/train.parquet", pa.array(["b", "a"] * 10, pa.string_view()))
    assert load_splits(DataSpec(name="set")).class_names == ["a", "b"]


def test_of_two_image_columns_none_is_guessed(home):
    image = [{"bytes": encoded(value), "path": None} for value in range(20)]
    (home / "set").mkdir()
    columns = {"mask": image, "image": image, "label": [0, 1] * 10}
    write_table(pa.table(columns), home / "set/train.parquet")
    with pytest.raises(ValueError, match=r"2 columns hold images, mask, image, and nothing says"):
        load_splits(DataSpec(name="set"))


def test_two_image_columns_of_the_hub(home, monkeypatch):
    features = {
        "image": datasets.Image(),
        "mask": datasets.Image(),
        "label": datasets.Value("int64"),
    }
    image = [{"bytes": encoded(value), "path": None} for value in range(20)]
    rows = {"image": image, "mask": image, "label": [0, 1] * 10}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"train": table})
    with pytest.raises(ValueError, match="hub:me/set, split train: 2 columns hold images"):
        load_splits(DataSpec(name="hub:me/set"))


@pytest.mark.parametrize("ending", ["PARQUET", "Parquet"])
def test_endings_in_any_letters(home, ending):
    named(home / f"set/train.{ending}", ["cat", "dog"], ["cat", "dog"])
    assert load_splits(DataSpec(name="set")).class_names == ["cat", "dog"]
    named(home / f"deep/a/b/train.{ending}", ["cat", "dog"], ["cat", "dog"])
    named(home / f"deeper/b/train.{ending}", ["cat", "dog"], ["cat", "dog"])
    with pytest.raises(ValueError, match=rf"b/train\.{ending} is not looked at"):
        load_splits(DataSpec(name="deeper"))


def test_a_split_that_nobody_asked_for_is_not_looked_at(home):
    named(home / "set/train.parquet", ["cat", "dog"], ["cat", "dog"])
    parquet(home / "set/unlabeled.parquet", [encoded(1)], [-1], ["cat", "dog"])
    (home / "set/broken.parquet").write_bytes(b"no table")
    assert len(load_splits(DataSpec(name="set", image_size=8)).train) == 16


@pytest.mark.parametrize("word", ["dev", "valid", "Validation", "val"])
def test_names_of_a_validation_table(home, word):
    named(home / "set/training.parquet", ["cat", "dog"], ["cat", "dog"])
    named(home / f"set/{word}.parquet", ["cat", "dog"], ["cat", "dog"], count=6)
    splits = load_splits(DataSpec(name="set", image_size=8))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 6, 2)


def test_the_layout_of_the_hub(home):
    named(home / "set [1]/data/train-00000-of-00001.parquet", ["cat", "dog"], ["cat", "dog"])
    named(
        home / "set [1]/data/validation-00000-of-00001-0123abcd.parquet",
        ["cat", "dog"],
        ["cat", "dog"],
        start=40,
    )
    splits = load_splits(DataSpec(name="set [1]", image_size=8))
    assert (len(splits.train), len(splits.val), len(splits.test)) == (18, 20, 2)


@pytest.mark.parametrize(
    "files, message",
    [
        (
            ["train-00000-of-00003", "train-00002-of-00003"],
            r"split train.*part 1 of 3 is not there",
        ),
        (["train", "train-00000-of-00001"], r"no whole set .*they overlap"),
        (["train-00000-of-00001", "train-00000-of-00002", "train-00001-of-00002"], "they overlap"),
        (["train", "train_extra"], r"train_extra\.parquet is not read: files are named SPLIT"),
        (["train", "test2"], r"test2\.parquet is not read"),
        (["unlabeled"], r"no split named train, only unlabeled\.parquet"),
        (["train", "data/train"], r"parquet files of its own and in data"),
        (["default/train"], r"default/train\.parquet is not looked at"),
    ],
)
def test_files_that_are_no_whole_set(home, files, message):
    for file in files:
        named(home / f"set/{file}.parquet", ["cat", "dog"], ["cat", "dog"])
    with pytest.raises(ValueError, match=message):
        load_splits(DataSpec(name="set"))


def test_a_row_without_an_image_is_named(home):
    images = [
        None if value == 3 else {"bytes": encoded(value), "path": None} for value in range(20)
    ]
    (home / "set").mkdir()
    write_table(pa.table({"img": images, "label": [0, 1] * 10}), home / "set/train.parquet")
    source = load_splits(DataSpec(name="set")).train.source
    with pytest.raises(ValueError, match=r"set, split train, row 3 has no image"):
        source.image(3)


def named_files(home, path: str) -> None:
    """A table whose rows name files, all that of a path."""
    images = [{"bytes": None, "path": path} for _ in range(20)]
    (home / "set").mkdir(exist_ok=True)
    write_table(pa.table({"img": images, "label": [0, 1] * 10}), home / "set/train.parquet")


def test_a_row_may_name_a_file_of_the_data_set(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(home, {"set/pictures/a.png": encoded(40)})
    for path in ("pictures/a.png", str(home / "set/pictures/../pictures/a.png")):
        named_files(home, path)
        source = load_splits(DataSpec(name="set")).train.source
        assert int(source.image(3)[0, 0, 0]) == int(source.job(3)()[0, 0, 0]) == 40


@pytest.mark.parametrize(
    ("path", "says"),
    [(path, "set, split train, row 3 has no image") for path in (None, "")]
    + [(path, "row 3 names the file .*which does not read") for path in ("gone.png", ".", "a\0b")],
)
def test_a_row_without_an_image_that_reads(home, path, says):
    named_files(home, path)
    source = load_splits(DataSpec(name="set")).train.source
    for read in (source.image, source.stored):
        with pytest.raises(ValueError, match=says):
            read(3)
