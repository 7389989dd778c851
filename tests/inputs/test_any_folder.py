"""Any data folder loads exactly what is on disk, or ends in an error that names file or folder."""

from __future__ import annotations

import io
import os
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import datasets
from data_folders import encoded
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from lib.inputs.splits import load_splits
from lib.spec import DataSpec

FIXED = settings(
    deadline=None,
    derandomize=True,  # the same folders each time
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
NUMBERS = count()  # of data sets, so that nothing is remembered from another one
NAMES = ["cat", "dog", "train", "Test", "val", "train_station", "a [1]", "ünï", "0", "b.png", "x*?"]
SETS = ["set", "photos [1]", "train", "{x}", "über uns"]


@dataclass
class Disk:
    """Holds what a data folder holds: files and links by path, and the pictures among them.

    placed: (split, class, grey) of each picture; odd: what was added that may be refused.
    """

    folder: Path
    placed: list[tuple[str, str, int]] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)

    def write(self, path: str, content: bytes) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return file


def grey_picture(grey: int, form: str) -> bytes:
    """A picture of one grey, in one of the forms below."""
    kind, mode = form.split()
    if mode == "I;16":
        picture = Image.new(mode, (6, 4), grey * 257)
    else:
        picture = Image.new("L", (6, 4), grey).convert(mode)
    out = io.BytesIO()
    picture.save(out, kind, quality=100, lossless=True)
    return out.getvalue()


FORMS = {
    "PNG L": "png",
    "PNG RGB": "PNG",
    "PNG RGBA": "png",
    "PNG LA": "png",
    "PNG P": "png",
    "PNG I;16": "png",
    "TIFF I;16": "tif",
    "TIFF RGB": "tiff",
    "JPEG L": "jpg",
    "BMP RGB": "bmp",
    "GIF L": "gif",
    "WEBP RGB": "webp",
    "PPM RGB": "ppm",
    "PNG L ": "jpeg",  # another ending than its format
    "BMP L": "scan",  # an ending that says nothing
}


def float_picture() -> bytes:
    out = io.BytesIO()
    Image.new("F", (4, 4), 0.5).save(out, "TIFF")
    return out.getvalue()


HARMLESS = {
    "notes.txt": b"nothing",
    "metadata.csv": b"file_name,label",
    ".hidden.png": encoded(7),
    "__MACOSX/x.png": encoded(7),
    "Thumbs.db": b"thumbs",
    "no ending": b"text",
    "a pipe": None,
}
HARMFUL = {
    "empty.jpg": b"",
    "cut.png": encoded(7)[:30],
    "phone.heic": b"ftypheic",
    "no_picture.png": b"text",
    "float.tif": float_picture(),
    "pipe.png": None,
}


def put_pictures(draw, disk: Disk, split: str, of_split: str, names: list[str], most: int) -> None:
    """Places up to `most` pictures of each class, at any depth below it."""
    for name in names:
        for number in range(draw(st.integers(1, most))):
            grey = len(disk.placed) % 250
            form = draw(st.sampled_from(sorted(FORMS)))
            # the first one on top: two classes named like splits, with folders alone, are refused
            depth = draw(st.sampled_from(["", "", "indoor/", "train/", "a/b/c/"])) * (number > 0)
            file = f"{of_split}{name}/{depth}{number:02} on a test ride.{FORMS[form]}"
            disk.write(file, grey_picture(grey, form.strip()))
            disk.placed.append((split, name, grey))


def put_odd_things(draw, disk: Disk) -> None:
    """Adds odd files and links anywhere, and sometimes an empty folder."""
    folders = sorted({file.parent for file in disk.folder.rglob("*") if file.is_file()})
    files = HARMLESS | HARMFUL
    names = st.sampled_from([*HARMLESS, *HARMLESS, *HARMFUL])
    for name in draw(st.lists(names, max_size=2, unique=True)):
        where = draw(st.sampled_from([disk.folder, *folders]))
        if files[name] is None:
            os.mkfifo(where / name)
        else:
            disk.write(str((where / name).relative_to(disk.folder)), files[name])
        disk.odd += [name] * (name in HARMFUL)
    kinds = ["none", "moved"] * 4 + ["twice", "nowhere", "circle", "empty", "stray"]
    kind = draw(st.sampled_from(kinds))
    where = draw(st.sampled_from(folders))
    if kind == "moved" and where != disk.folder:  # to another disk, with a link in its place
        elsewhere = disk.folder.with_name(f"moved {next(NUMBERS)}")
        where.rename(elsewhere)
        where.symlink_to(elsewhere)
    if kind in ("none", "moved"):
        return
    disk.odd.append(kind)
    pictures = sorted(file for file in where.iterdir() if file.is_file())
    if kind == "twice":
        os.symlink(pictures[0], folders[0] / "link.png")
    elif kind == "nowhere":
        os.symlink(where / "gone.png", where / "link.png")
    elif kind == "circle":
        os.symlink(folders[0], where / "link")
    elif kind == "empty":
        (where.parent / "nothing").mkdir()
    else:
        disk.write("stray.png", encoded(9))


def greys_by_class(name: str) -> tuple[Counter, dict[str, int]]:
    """Loads all pictures: how often each (class, grey) is there, and the sizes of the splits."""
    splits = load_splits(DataSpec(name=name, image_size=8))
    seen: Counter = Counter()
    for split in (splits.train, splits.val, splits.test):
        for row, label in zip(split.rows, split.labels.tolist(), strict=True):
            pixels = split.source.image(int(row))
            assert pixels.shape[0] == 3 and int(pixels.max()) == int(pixels.min())
            seen[splits.class_names[label], int(pixels.max())] += 1
    return seen, {split: len(getattr(splits, split)) for split in ("train", "val", "test")}


def load_or_refuse(disk: Disk, name: str) -> str:
    """Loads a folder and holds it against what was placed; returns "loaded" or "refused"."""
    try:
        seen, sizes = greys_by_class(name)
    except (ValueError, FileNotFoundError) as error:
        of_training = [split for split, *_ in disk.placed if split == "train"]
        few = len(of_training) < 10 or len({name for _, name, _ in disk.placed}) < 2
        assert disk.odd or few, f"refused without a reason: {error}"
        assert name in str(error), f"names neither file nor folder: {error}"
        return "refused"
    assert seen == Counter((name, grey) for _, name, grey in disk.placed), disk.odd
    for split in ("val", "test"):  # those that the folder has are taken as they are
        there = sum(of == split for of, *_ in disk.placed)
        assert sizes[split] == there or not there
    return "loaded"


def test_class_folders(home, capsys):
    counts: Counter = Counter()

    @settings(FIXED, max_examples=170)
    @given(st.data())
    def any_folder(data):
        draw = data.draw
        name = f"{draw(st.sampled_from(SETS))} {next(NUMBERS)}"
        disk = Disk(home / name)
        names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4, unique=True))
        splits = draw(st.sampled_from([(), (), ("train",), ("train", "test"), ("train", "valid")]))
        if not splits and all(n.lower() in ("train", "test", "val") for n in names):
            names += ["bird"]  # else they are splits
        for their_split in splits or ("",):
            split = {"valid": "val", "": "train"}.get(their_split, their_split)
            of_split = f"{their_split}/" if their_split else ""
            put_pictures(draw, disk, split, of_split, names, 12 if split == "train" else 3)
        put_odd_things(draw, disk)
        counts[load_or_refuse(disk, name)] += 1

    any_folder()
    with capsys.disabled():
        print(f"\nclass folders: {dict(counts)}")
    assert counts.total() >= 170 and min(counts["loaded"], counts["refused"]) > 30


# ---------------------------------------------------------------- tables

ODD_ROWS = ["none"] * 4 + ["null label", "no image", "-1", "cut image"]
ODD_TABLES = ["none"] * 5 + ["part absent", "cut file", "unlabeled", "deeper", "no train"]


def write_table(draw, file: Path, rows: list[tuple[int, str]], style: str, odd: str) -> None:
    """Writes rows of (grey, class) as a parquet file, the labels in one of three styles."""
    names = sorted({name for _, name in rows} | {"cat", "dog"})
    if style == "names":
        names = draw(st.permutations(names))
        feature = datasets.ClassLabel(names=names)
        labels: list = [names.index(name) for _, name in rows]
    else:
        feature = datasets.Value("string")
        labels = [name for _, name in rows]
    images: list = [{"bytes": grey_picture(grey, "PNG RGB"), "path": None} for grey, _ in rows]
    at = draw(st.integers(0, len(rows) - 1))
    if odd == "null label":
        labels[at] = None
    elif odd == "no image":
        images[at] = None
    elif odd == "-1" and style == "names":
        labels[at] = -1
    elif odd == "cut image":
        images[at] = {"bytes": images[at]["bytes"][:30], "path": None}
    features = datasets.Features({"img": datasets.Image(), "label": feature})
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({"img": images, "label": labels}, features=features).to_parquet(
        str(file)
    )


def file_names(split: str, parts: int) -> list[str]:
    if parts == 1:
        return [f"{split}.parquet"]
    return [f"{split}-{number:05}-of-{parts:05}.parquet" for number in range(parts)]


def put_odd_table(draw, disk: Disk, folder: Path, kind: str) -> None:
    files = sorted(folder.glob("*.parquet"))
    if kind == "part absent":
        split = next(f for f in files if f.name.startswith("train"))
        split.rename(folder / "train-00000-of-00009.parquet")
    elif kind == "cut file":
        files[0].write_bytes(files[0].read_bytes()[:100])
    elif kind == "unlabeled":
        write_table(draw, folder / "unlabeled.parquet", [(1, "cat")], "names", "-1")
    elif kind == "deeper":
        write_table(draw, folder / "more" / "train.parquet", [(1, "cat")], "names", "none")
    elif kind == "no train":
        for file in files:
            file.rename(folder / file.name.replace("train", "extra"))
    if kind not in ("none", "unlabeled", "deeper"):  # these two are not looked at, and not refused
        disk.odd.append(kind)


def test_tables(home, capsys):
    counts: Counter = Counter()

    @settings(FIXED, max_examples=30)
    @given(st.data())
    def any_table(data):
        draw = data.draw
        name = f"{draw(st.sampled_from(SETS))} {next(NUMBERS)}"
        disk = Disk(home / name)
        folder = disk.folder / draw(st.sampled_from(["", "data"]))
        style = draw(st.sampled_from(["names", "text"]))
        for split in draw(st.sampled_from([("train",), ("train", "test"), ("train", "test")])):
            parts = draw(st.sampled_from([1, 1, 2]))
            for file in file_names(split, parts):
                size = draw(st.integers(10, 14)) if split == "train" else draw(st.integers(1, 4))
                of_class = ["cat", "dog", *draw(st.lists(st.sampled_from(["cat", "dog", "ünï"])))]
                # a class that training knows, in every file
                rows = [
                    (len(disk.placed) % 250 + number, of_class[number % len(of_class)])
                    for number in range(size)
                ]
                odd = draw(st.sampled_from(ODD_ROWS))
                write_table(draw, folder / file, rows, style, odd)
                disk.placed += [(split, name_of, grey) for grey, name_of in rows]
                if odd != "none":
                    disk.odd.append(odd)
        if {n for s, n, _ in disk.placed if s == "test"} - {
            n for s, n, _ in disk.placed if s == "train"
        }:
            disk.odd.append("a class without training pictures")
        put_odd_table(draw, disk, folder, draw(st.sampled_from(ODD_TABLES)))
        counts[load_or_refuse(disk, name)] += 1

    any_table()
    with capsys.disabled():
        print(f"\ntables: {dict(counts)}")
    assert counts.total() >= 30 and min(counts["loaded"], counts["refused"]) >= 5
