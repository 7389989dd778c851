"""Loaders of a caller: checked by name, read in one pass, drawn from by class.

A loader is anything that can be iterated again and again and gives (images, labels): a
torch DataLoader, or a list of batches. Nothing is moved from one device to another here, except by
`on_device`, which is asked to.

Axis letters: **B** images, **C** channels.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.modes import modes_kept
from ..routers.manual import labelled
from .architecture import images_built_for

Batch = tuple[Tensor, Tensor]  # images (B, C, height, width) and labels (B,)
Loader = Iterable[Batch]

CALIBRATION_BATCH = 64  # images that a model sees at a time while it is calibrated


def on_device(loader: Loader, device: str | torch.device) -> Loader:
    """Wraps a loader into one whose images and labels lie on a device; they are moved as it is
    read."""
    return _Moved(loader, device)


class _Moved:
    def __init__(self, loader: Loader, device: str | torch.device):
        check_loader(loader)
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.loader:
            images, labels = _pair(batch)
            yield images.to(self.device), labels.to(self.device)

    def __len__(self) -> int:
        return len(self.loader)  # TypeError where the loader itself has none


def check_loader(loader: Any, argument: str = "loader") -> None:
    """Raises ValueError for what cannot be read, or only once, before anything is read from it."""
    what = type(loader).__name__
    if loader is None or isinstance(loader, (str, bytes, dict, Tensor, nn.Module)):
        raise ValueError(
            f"{argument} is a {what}: give what can be iterated and yields (images, labels), such "
            "as a torch DataLoader or a list of batches"
        )
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ValueError(
            f"{argument} is a {what}, which cannot be iterated: give a torch DataLoader or a list "
            "of batches (images, labels)"
        )
    # not found out by iter(loader), which may draw a number or start processes
    if hasattr(loader, "__next__"):
        raise ValueError(
            f"{argument} is a {what}, which can be read once only, and it is read several times: "
            f"give the DataLoader itself, or list({argument}) where the batches fit into memory"
        )


def check_model(model: Any, argument: str = "model") -> torch.device:
    """Returns the device that all of a model lies on; ValueError for several, or for no model."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{argument} is a {type(model).__name__}: give a torch.nn.Module")
    devices = sorted({str(tensor.device) for tensor in model.parameters()})
    if len(devices) != 1:
        lies = f"lie on {' and '.join(devices)}" if devices else "are none"
        raise ValueError(
            f"the parameters of {argument} {lies}: it must lie on one device, "
            "model.to('cpu') or model.to('cuda')"
        )
    return torch.device(devices[0])


def batches_of(
    loader: Loader, model: nn.Module, title: str, argument: str = "loader"
) -> Iterator[Batch]:
    """Yields the batches of a loader in one pass, each checked against the model, with a progress
    bar.

    Raises ValueError as `check_loader` and `check_batch`, and for a loader without a batch.
    """
    check_loader(loader, argument)
    count = 0
    with tqdm(total=length(loader), unit="batch", desc=title, leave=False, delay=5) as bar:
        for batch in loader:
            yield check_batch(batch, model, argument)
            count += 1
            bar.update()
    if not count:
        raise ValueError(f"{argument} gave no batch: it must hold images")


def length(loader: Any) -> int | None:
    """Counts the batches of a loader without reading it; None where it does not know them."""
    try:
        return len(loader)
    except TypeError:  # of a stream without a length
        return None


def check_batch(batch: Any, model: nn.Module, argument: str = "loader") -> Batch:
    """Returns the images and labels of a batch for a model; ValueError that says what they must
    be, where they must lie and of which type, and for images that are not finite."""
    images, labels = check_form(batch, argument)
    _check_place(images, labels, model, argument)
    check_finite(images, argument)
    # of tensors that were made under inference_mode no gradient can be computed; a copy is another
    images, labels = (part.clone() if part.is_inference() else part for part in (images, labels))
    return images, labels


def check_form(batch: Any, argument: str = "loader") -> Batch:
    """Returns the images and labels of a batch; ValueError that says what a batch must be."""
    images, labels = _pair(batch, argument)
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise ValueError(
            f"{argument} gave ({type(images).__name__}, {type(labels).__name__}): both must be "
            "tensors, images (B, C, height, width) and labels (B,); a data set of single images "
            f"becomes such a loader by torch.utils.data.DataLoader({argument}, batch_size=64)"
        )
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise ValueError(
            f"{argument} gave images of shape {tuple(images.shape)} and type {images.dtype}: they "
            "must be normalised floats (B, C, height, width)"
        )
    if labels.shape != images.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"{argument} gave labels of shape {tuple(labels.shape)} and type {labels.dtype} for "
            f"{len(images)} images: they must be whole numbers ({len(images)},), the classes"
        )
    return images, labels.long()


def _pair(batch: Any, argument: str = "loader") -> tuple[Any, Any]:
    """Takes a batch apart that must be a pair."""
    if isinstance(batch, dict):
        raise ValueError(
            f"{argument} gave a dict with {', '.join(map(str, batch))}: give (images, labels), "
            f"[(batch['image'], batch['label']) for batch in {argument}] if these are its names"
        )
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        count = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(
            f"{argument} gave a {type(batch).__name__}{count}: give pairs (images, labels), and "
            "leave out what else it has"
        )
    return batch[0], batch[1]


def _check_place(images: Tensor, labels: Tensor, model: nn.Module, argument: str) -> None:
    """Raises ValueError where images, labels and model are not on one device and of one type."""
    device = check_model(model)
    for what, tensor in (("images", images), ("labels", labels)):
        if tensor.device.type != device.type or device.index not in (None, tensor.device.index):
            raise ValueError(
                f"{argument} gave {what} on {tensor.device}, and the model is on {device}; nothing "
                f"is moved unasked: lib.on_device({argument}, '{device}') moves them as they are "
                "read"
            )
    types = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if images.dtype not in types:
        wanted = next(iter(types))
        raise ValueError(
            f"{argument} gave images of {images.dtype}, and the model computes in {wanted}: "
            f"images.to({wanted}), or change the model's type"
        )


def check_finite(images: Tensor, argument: str) -> None:
    """Raises ValueError for images whose outputs would be blamed on the model."""
    finite = images.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        raise ValueError(
            f"{argument} gave images with numbers that are not finite (NaN or infinite), "
            f"{int((~finite).sum())} of the {len(images)} of a batch: leave these images out, or "
            "mend them"
        )


@contextmanager
def running_on(
    images: Tensor, model: nn.Module, argument: str = "loader", name: str | None = None
) -> Iterator[None]:
    """Says of what a model raises inside, by ValueError, which images it was given and which it is
    built for.

    name: of the model in the error; None is that of its class.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        built_for = images_built_for(model)
        raise ValueError(
            f"{name or type(model).__name__} fails on images {tuple(images.shape)} of {argument}: "
            f"{str(error).rstrip('.')}. Give it images of what it is built for"
            f"{f' ({built_for})' if built_for else ''}, as torchvision.transforms.Resize makes "
            "them, or build it for these (img_size= and in_chans= of timm.create_model)"
        ) from error


@torch.no_grad()
def check_runs(model: nn.Module, batch: Batch, argument: str = "loader") -> None:
    """Raises ValueError, as `running_on`, unless a model runs on the first image of a batch."""
    images, labels = (part[:1] for part in batch)
    with modes_kept(model), labelled(model, labels), running_on(images, model, argument):
        model.eval()(images)


def check_logits(logits: Any, labels: Tensor, model: nn.Module) -> Tensor:
    """Returns the output of a model; ValueError unless it is (B, classes) and has the labels'
    classes."""
    kind = type(model).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
        given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{kind} returns {given} for {len(labels)} images: it must return logits "
            f"({len(labels)}, classes); wrap it in a module that does"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"the loader has labels from {int(labels.min())} to {int(labels.max())}, and {kind} "
            f"has {logits.shape[1]} classes, valid is 0 to {logits.shape[1] - 1}: give the model a "
            "head for these classes, model.reset_classifier(classes) in timm"
        )
    return logits


def calibration_images(loader: Loader, model: nn.Module, images: int, seed: int) -> list[Batch]:
    """Draws at most `images` images from a loader, equally many of each class up to one.

    One pass; at no moment more than `images` images are held. seed: of the draw, and of a loader
    that shuffles by torch's global generator, which is left as it was. Returns batches of
    `CALIBRATION_BATCH`. Raises ValueError as `batches_of`, for images of different shapes, and for
    such that the model does not run on.
    """
    if images < 1:
        raise ValueError(f"images={images}: at least 1 image is needed to calibrate on")
    drawn = _Drawn(images, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for batch in batches_of(loader, model, "read images"):
            drawn.add(*batch)
        batches = drawn.batches()
        check_runs(model, batches[0])
    return batches


class _Drawn:
    """A class-balanced random sample of a stream of images.

    Every image gets a random key, and of each class those with the smallest keys stay. Once all
    places are taken, the largest class gives one up for each image that is added; of equally large
    ones the class that got it. So a class that gave up never grows again, and its sample is that
    of its smallest keys.
    """

    def __init__(self, most: int, seed: int):
        self.most, self.count = most, 0
        self.generator = torch.Generator().manual_seed(seed)
        # {class: [(key, image)]}, rising keys
        self.of_class: dict[int, list[tuple[float, Tensor]]] = {}

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Adds a batch."""
        keys = torch.rand(len(labels), generator=self.generator).tolist()
        for key, image, label in zip(keys, images, labels.tolist(), strict=True):
            mine = self.of_class.setdefault(label, [])
            largest = max(map(len, self.of_class.values()))
            gives_up = mine if len(mine) + 1 >= largest else None
            if self.count == self.most and gives_up is mine and mine and key >= mine[-1][0]:
                continue  # it would be the one that goes
            # a copy: a view would keep its whole batch
            insort(mine, (key, image.detach().clone()), key=_key)
            self.count += 1
            if self.count > self.most:
                (gives_up or max(self.of_class.values(), key=len)).pop()
                self.count -= 1

    def batches(self) -> list[Batch]:
        """Hands the sample over in batches of nearly equal size: the first image of each class,
        then the second of each, and so on."""
        entries = [
            (rank, label, image)
            for label, entries in self.of_class.items()
            for rank, (_, image) in enumerate(entries)
        ]
        entries.sort(key=lambda entry: entry[:2])
        shapes = sorted({tuple(image.shape) for *_, image in entries})
        if len(shapes) > 1:
            raise ValueError(
                f"the loader has images of different shapes, {', '.join(map(str, shapes))}: "
                "resize them to one"
            )
        images = torch.stack([image for *_, image in entries])
        labels = torch.tensor([label for _, label, _ in entries], device=images.device)
        parts = -(-len(entries) // CALIBRATION_BATCH)
        return list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))


def _key(entry: tuple[float, Tensor]) -> float:
    return entry[0]
