"""Class folders: one stated layout, every picture read or named, and no file in two splits."""

from __future__ import annotations

import os

import pytest
from data_folders import encoded, put

from lib.inputs.splits import load_splits
from lib.spec import DataSpec


def loaded(home, files: dict, name: str = "set"):
    """Writes the files and loads them, whole."""
    put(home / name, files)
    return load_splits(DataSpec(name=name, image_size=8))


def many(folder: str, values, suffix: str = "png") -> dict[str, bytes]:
    return {f"{folder}/{value:03}.{suffix}": encoded(value) for value in values}


def greys(split) -> list[int]:
    """The grey of each picture of a split, which says where it came from."""
    return sorted(int(split.source.image(int(row))[0, 0, 0]) for row in split.rows)


def test_image_folders(home):
    for split, count in (("train", 10), ("test", 1)):
        for klass, value in (("cat", 10), ("dog", 100)):
            folder = home / "pets" / split / klass
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number:02}.png").write_bytes(encoded(value + number))
    splits = load_splits(DataSpec(name="pets", image_size=8))
    assert splits.class_names == ["cat", "dog"] and (
        len(splits.train),
        len(splits.val),
        len(splits.test),
    ) == (18, 2, 2)
    seen = sorted(
        int(splits.train.source.image(int(row))[0, 0, 0]) // 100 == klass
        for row, klass in zip(splits.train.rows, splits.train.labels.tolist(), strict=True)
    )
    assert seen == [True] * 18


def test_truncated_image_file_is_named(home):
    for klass in ("a", "b"):
        folder = home / "files" / "train" / klass
        folder.mkdir(parents=True)
        for number in range(10):
            (folder / f"{number}.png").write_bytes(encoded(number))
    (home / "files" / "train" / "a" / "3.png").write_bytes(encoded(3)[:20])
    source = load_splits(DataSpec(name="files", image_size=8)).train.source
    with pytest.raises(ValueError, match=r"files/train/a/3\.png does not decode"):
        source.image(3)


CATS, DOGS = range(10, 30), range(110, 130)
SPLITS = {
    **many("train/cat", CATS),
    **many("train/dog", DOGS),
    **many("test/cat", range(30, 34)),
    **many("test/dog", range(130, 134)),
}


TRAINING = many("train/cat", CATS) | many("train/dog", DOGS)
# é as one character, and as e with an accent, as some disks write it
COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"

# ---------------------------------------------------------------- names mean nothing else


def test_a_class_whose_name_begins_like_a_split(home):
    files = {
        f"{split}/{name}/{n}.png": encoded(value + n)
        for split, value in (("train", 0), ("test", 100))
        for name in ("train_station", "test-track", "valley", "train")
        for n in range(10)
    }
    splits = loaded(home, files)
    assert splits.class_names == ["test-track", "train", "train_station", "valley"]
    assert len(splits.train) + len(splits.val) == 40 and len(splits.test) == 40
    assert max(greys(splits.train)) < 100 <= min(greys(splits.test))


def test_a_picture_whose_name_speaks_of_a_split(home):
    files = many("cat", CATS) | many("dog", DOGS)
    files |= {f"{name}/on a train ride.png": encoded(200) for name in ("cat", "dog")}
    splits = loaded(home, files)
    assert sum(map(len, (splits.train, splits.val, splits.test))) == 42


def test_classes_named_like_splits_beside_others_are_classes(home):
    splits = loaded(home, many("bus", CATS) | many("train", DOGS) | many("test", range(40, 60)))
    assert splits.class_names == ["bus", "test", "train"]
    assert sum(map(len, (splits.train, splits.val, splits.test))) == 60


def test_a_class_train_has_its_pictures_in_itself_or_in_folders_of_its_own(home):
    buses = many("bus/old", CATS) | many("bus/new", CATS)
    for name, trains in {"flat": "train", "nested": "train/steam"}.items():
        splits = loaded(home, buses | many(trains, DOGS), name)
        assert splits.class_names == ["bus", "train"]


def test_names_are_compared_as_they_are_printed(home):
    files = many(f"train/{COMPOSED}", CATS) | many("train/tea", DOGS)
    splits = loaded(home, files | many(f"test/{DECOMPOSED}", [50]) | many("test/tea", [150]))
    assert splits.class_names == [COMPOSED, "tea"]
    assert splits.test.labels.tolist() == [0, 1] and greys(splits.test) == [50, 150]
    again = loaded(home, many(DECOMPOSED, CATS) | many("tea", DOGS), "copied")
    assert again.class_names == splits.class_names


def test_nested_folders_belong_to_the_class_on_top(home):
    places = ("church/indoor", "church/outdoor/night", "library/indoor", "library")
    files = {f"{place}/{n}.png": encoded(n) for place in places for n in range(10)}
    splits = loaded(home, files)
    assert splits.class_names == ["church", "library"]
    assert sum(map(len, (splits.train, splits.val, splits.test))) == 40


@pytest.mark.parametrize("name", ["photos [1]", "a*b?", "ünï côdé", "with space", "{x}", "train"])
def test_any_name_of_a_data_set(home, name):
    assert len(loaded(home, SPLITS, name).test) == 8


@pytest.mark.parametrize("word", ["val", "valid", "validation", "Validation", "dev"])
def test_names_of_the_validation_split(home, word):
    splits = loaded(home, SPLITS | many(f"{word}/cat", [50]) | many(f"{word}/dog", [150]))
    assert greys(splits.val) == [50, 150] and len(splits.train) == 40


# ---------------------------------------------------------------- every picture, or an error


def test_files_that_are_no_pictures_are_left_alone(home):
    extra = dict.fromkeys(
        ["README.md", "metadata.csv", "train/labels.json", "train/cat/notes.txt", ".DS_Store"],
        b"some text",
    )
    extra |= {
        "train/cat/._010.png": b"resource fork",
        ".git/x.png": b"",
        "train/cat/Thumbs.db": b"x",
    }
    extra |= {"__MACOSX/train/cat/x.png": encoded(3), "train/dog/no_ending": b"text all the same"}
    splits = loaded(home, SPLITS | extra)
    assert greys(splits.train) + greys(splits.val) and len(splits.train) + len(splits.val) == 40


@pytest.mark.parametrize("folder", ["@eaDir", "__MACOSX"])
def test_what_systems_put_beside_pictures_is_no_picture(home, folder):
    thumbnails = {f"train/cat/{folder}/1.png/thumbnail.jpg": encoded(9), f"{folder}/1.png": b""}
    splits = loaded(home, SPLITS | thumbnails)
    assert len(splits.train) + len(splits.val) == 40 and splits.class_names == ["cat", "dog"]


def test_a_picture_is_known_by_its_content_where_its_name_says_nothing(home):
    files = SPLITS | {"train/cat/IMG_0001": encoded(31), "train/dog/scan.image": encoded(131)}
    splits = loaded(home, files | {"train/cat/upper.JPG": encoded(32, kind="JPEG")})
    assert len(splits.train) + len(splits.val) == 43


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"stray.png": encoded(1)}, r"set/stray\.png lies in no class folder.*SPLIT/CLASS"),
        ({"train/stray.png": encoded(1)}, r"set/train/stray\.png lies in no class folder"),
        ({"train/cat/photo.HEIC": b"x"}, r"photo\.HEIC: pictures of kind \.heic are not read"),
        ({"train/cat/drawing.svg": b"<svg/>"}, r"drawing\.svg: pictures of kind \.svg"),
        ({"train/cat/none.png": b""}, r"cat/none\.png is empty"),
        ({"train/cat/gone.png": "nowhere.png"}, r"gone\.png cannot be looked at.*link to a file"),
        ({"train/bird/readme.txt": b"soon"}, r"train/bird holds no picture, and every folder"),
        ({"test/bird/1.png": encoded(1)}, r"test/bird: class bird has no training picture"),
        ({"val/cat/1.png": encoded(1), "dev/cat/1.png": encoded(2)}, r"are both the val split"),
    ],
)
def test_what_is_not_read_is_named(home, extra, message):
    with pytest.raises(ValueError, match=message):
        loaded(home, SPLITS | extra)


@pytest.mark.parametrize(
    "files, message",
    [
        (many("cat", CATS), r"set has 1 class folders \(cat\): at least two are needed"),
        (many("train/cat", CATS), r"set/train has 1 class folders \(cat\)"),
        (many(".", CATS), r"010\.png lies in no class folder.*the layout is CLASS/picture"),
        ({"notes.txt": b"x"}, r"set has 0 class folders \(none\)"),
        (many("val/cat", CATS) | many("val/dog", DOGS), r"has the splits val and no train"),
        (
            many("cat", [1, 2, 3, 4]) | many("dog", [5, 6, 7, 8]),
            r"set has no test split.*8 training",
        ),
        (
            SPLITS | many("extra/bird", CATS),
            r"split folders with classes in them \(test, train\) and extra beside them",
        ),
        (
            TRAINING | many("holdout/cat", CATS) | many("holdout/dog", DOGS),
            r"set/train and \S*set/holdout both hold a folder cat: they look like two splits",
        ),
        (
            TRAINING | many("evaluation/dog/far", DOGS),
            r"set/evaluation both hold a folder dog.*Name it val or test",
        ),
        (
            many(f"{COMPOSED}", CATS) | many(f"{DECOMPOSED}", CATS) | many("tea", DOGS),
            r"two folders whose names print alike, caf\xe9 \('caf\\xe9' is the second\)",
        ),
        (
            many(f"test/{COMPOSED}", CATS) | many(f"test/{DECOMPOSED}", CATS) | TRAINING,
            r"set/test holds two folders whose names print alike",
        ),
    ],
)
def test_layouts_that_are_refused(home, files, message):
    with pytest.raises(ValueError, match=message):
        loaded(home, files)


def test_a_folder_that_cannot_be_listed_is_named(home, monkeypatch):
    put(home / "set", SPLITS)
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(ValueError, match=r"train/dog cannot be listed: Permission denied"):
        load_splits(DataSpec(name="set"))


# ---------------------------------------------------------------- no file twice


@pytest.mark.parametrize(
    "link, target",
    [
        ("test/cat/same.png", "train/cat/010.png"),  # a training picture in the test split
        ("train/dog/same.png", "train/cat/010.png"),  # one picture, two labels
        ("test/bird", "train/cat"),  # a whole folder
        ("train/cat/again", "train/cat"),  # in a circle
        ("train/cat/up", "train"),
    ],
)
def test_a_file_found_twice_is_refused(home, link, target):
    with pytest.raises(ValueError, match="one and the same|no training picture"):
        loaded(home, SPLITS | {link: target})


def test_a_hard_link_is_the_same_file_too(home):
    put(home / "set", SPLITS)
    os.link(home / "set/train/cat/010.png", home / "set/test/cat/010.png")
    with pytest.raises(ValueError, match=r"train/cat/010\.png.*one and the same file"):
        load_splits(DataSpec(name="set"))


def test_links_to_other_places_are_followed(home):
    put(home / "elsewhere", {"cats/a.png": encoded(60), "b.png": encoded(61)})
    put(home / "set", SPLITS)
    (home / "set/train/cat/more").symlink_to(home / "elsewhere/cats")
    (home / "set/train/cat/b.png").symlink_to(home / "elsewhere/b.png")
    splits = load_splits(DataSpec(name="set", image_size=8))
    assert {60, 61} < set(greys(splits.train) + greys(splits.val))
