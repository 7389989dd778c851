"""Sets models side by side on the same images and on this machine, and says which to take.

    frame = lib.compare({"dense": dense, "small": small}, loader, batches=(1, 32))
    print(frame.T, lib.advice(frame))

Axis letters: **B** images of a batch, **I** images of the whole loader.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..machine import cores
from ..measure.accuracy import paired_difference, top1
from ..measure.cost import count, needs_measured_experts
from ..measure.latency import latencies
from ..measure.memory import packed_in, stored_bytes
from ..measure.served import ServedExperts
from ..measure.timing import check_repeats
from ..models.modes import modes_kept
from ..models.moe import RoutingTape
from .loaders import Batch, Loader, check_finite, check_form, check_loader, length, running_on

INTERVALS = (
    "95% over the images: of top-1 Wilson's; of the difference, paired with the first row, "
    "Bonett and Price's"
)


def compare(
    models: Mapping[str, nn.Module],
    loader: Loader,
    batches: Sequence[int] = (1, 32),
    *,
    repeats: int = 20,
) -> pd.DataFrame:
    """Measures accuracy, size and time of models that take the same images; a row a model.

    models: by name, the one to compare with first. loader: gives pairs of images (B, C, h, w) and
    labels (B,), on the models' device; it is read once for all models. batches: B of the timed
    passes, on the loader's first images, over and over if it has fewer. repeats: timed passes of
    each model at each B, in turn, after three that warm up.

    Columns: `top1` (percent), `difference` (points, to the first row), each with `_low` and `_high`
    of a 95% interval over the images (one model is one seed, so nothing is said of others);
    `params` (stored); `macs` (multiply-adds an image, of experts those that served it); `mb` (10^6
    bytes of a saved file); for each B `ms_B` and `ms_B_q10` (ms an image, median and 10% quantile);
    `dtype`, `device`, and `load`, the load of the machine over the minute before: on a busy machine
    the low quantiles tell more than the medians. `frame.attrs` holds images, batches, repeats,
    threads, cores, device, load (over 1, 5 and 15 minutes) and intervals.

    Models run in evaluation mode, without gradients, each on images of its own dtype; their modes
    are restored. Raises ValueError for no models, models on several devices, packed weights (of a
    quantised model), which no counter sees, a model that fails on the images, a loader that can be
    read only once, has no images or gives anything but such pairs, images on another device or not
    finite, a model whose output is not (B, classes) or not a number, labels beyond its classes,
    less than 20 repeats, and a B below 1.
    """
    device = _checked_device(models)
    batches = _checked_batches(batches)
    check_repeats(repeats)
    check_loader(loader)
    load = os.getloadavg()
    candidates = [_Candidate(name, model) for name, model in models.items()]
    # not inference_mode: what a model caches at its first pass may be needed in training later
    with _evaluation_mode(models.values()), torch.no_grad():
        images = _one_pass(candidates, loader, device, max(batches))
        rows = [candidate.row(candidates[0], images[:1]) for candidate in candidates]
        for size in tqdm(batches, desc="time", unit="batch size", leave=False, delay=5):
            _add_times(rows, candidates, images[:size], repeats)
    for row, candidate in zip(rows, candidates, strict=True):
        row |= {"dtype": str(candidate.dtype).removeprefix("torch.")}
        row |= {"device": str(device), "load": load[0]}
    frame = pd.DataFrame(rows, index=pd.Index(models, name="model"))
    frame.attrs |= {
        "images": len(candidates[0].correct),
        "batches": batches,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "cores": cores(),
        "device": str(device),
        "load": load,
        "intervals": INTERVALS,
    }
    return frame


class _Candidate:
    """Collects what one model answers during the pass over the images."""

    def __init__(self, name: str, model: nn.Module):
        self.name, self.model = name, model
        floating = (p.dtype for p in model.parameters() if p.is_floating_point())
        self.dtype = next(floating, torch.float32)
        self.tape = RoutingTape(model)
        self.served = ServedExperts(self.tape.layers)
        self._correct: list[np.ndarray] = []

    @property
    def correct(self) -> np.ndarray:
        """Says which images the model has right, (I,)."""
        return np.concatenate(self._correct)

    def take(self, images: Tensor, labels: Tensor) -> None:
        """Runs the model on a batch."""
        with self.tape, running_on(images, self.model, name=repr(self.name)):
            logits = self.model(images.to(self.dtype))
        self._check(logits, labels)
        self.served.update(self.tape.routings(), len(labels))
        self._correct.append((logits.argmax(dim=1).cpu() == labels).numpy())

    def _check(self, logits: Any, labels: Tensor) -> None:
        b = len(labels)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != b:
            kind = type(logits).__name__
            shape = f" {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
            raise ValueError(
                f"{self.name!r} gives {kind}{shape} for {b} images: valid is one tensor of logits, "
                f"({b}, classes); wrap the model in a module that returns it"
            )
        if logits.isnan().any():
            raise ValueError(
                f"{self.name!r} gives NaN for some images: its accuracy means nothing; look at its "
                "weights and at the scale of the images"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise ValueError(
                f"{self.name!r} tells {logits.shape[1]} classes apart, and the loader gives labels "
                f"from {int(labels.min())} to {int(labels.max())}: valid is 0 to "
                f"{logits.shape[1] - 1}; give the model a head for them, or map the labels"
            )

    def row(self, first: _Candidate, image: Tensor) -> dict[str, Any]:
        """Makes the part of a row that is no time. image: (1, C, h, w), for its shape."""
        here, versus = top1(self.correct), paired_difference(self.correct, first.correct)
        row = {"top1": here.value, "top1_low": here.low, "top1_high": here.high}
        if self is first:
            row |= dict.fromkeys(("difference", "difference_low", "difference_high"), 0.0)
        else:
            row |= {"difference": versus.value}
            row |= {"difference_low": versus.low, "difference_high": versus.high}
        measured = self.served.measured() if self.tape.layers else {}
        if not needs_measured_experts(self.model):
            measured |= {"experts_per_image": None}
        cost = count(self.model, example=image.to(self.dtype), **measured)
        size = {"params": cost.params_stored, "macs": cost.macs}
        return row | size | {"mb": stored_bytes(self.model) / 1e6}


def _one_pass(
    candidates: Sequence[_Candidate], loader: Loader, device: torch.device, keep: int
) -> Tensor:
    """Runs all models on all images.

    Returns the first `keep` images, over and over if there are fewer.
    """
    first_images: list[Tensor] = []
    # The bar is not given the loader, which it would start a second time.
    with tqdm(desc="compare", unit="batch", total=length(loader), leave=False, delay=5) as bar:
        for batch in loader:
            images, labels = _checked_batch(batch, device)
            bar.update()
            for candidate in candidates:
                candidate.take(images, labels)
            lacking = keep - sum(map(len, first_images))
            if lacking > 0:
                first_images.append(images[:lacking].clone())
    if not first_images:
        raise ValueError("the loader gives no images: give at least one")
    images = torch.cat(first_images)
    return images[torch.arange(keep, device=images.device) % len(images)]


def _add_times(
    rows: Sequence[dict[str, Any]],
    candidates: Sequence[_Candidate],
    images: Tensor,
    repeats: int,
) -> None:
    """Adds to each row what its model takes for an image of a batch like this, in ms."""
    size = len(images)
    of_models = {candidate.name: images.to(candidate.dtype) for candidate in candidates}
    models = {candidate.name: candidate.model for candidate in candidates}
    times = latencies(models, of_models, repeats)
    for row, candidate in zip(rows, candidates, strict=True):
        time = times[candidate.name]
        row |= {f"ms_{size}": time.median / size, f"ms_{size}_q10": time.q10 / size}


@contextmanager
def _evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    modes = {model: model.training for model in models}
    with modes_kept(nn.ModuleList(modes)):
        try:
            for model in modes:
                model.eval()
            yield
        finally:
            for model, mode in modes.items():
                model.train(mode)  # a model may do more than set flags


# ---- the sentence below the table


def advice(
    frame: pd.DataFrame, points: float = 2.0, batch: int | None = None, *, again: str | None = None
) -> str:
    """Names a fast model that loses less than `points` of top-1 to the first row.

    Times are those in batches of `batch` images (the largest of the table if None). Two models are
    level in time if their ranges, from the 10% quantile to the median, overlap. Of the models that
    lose less than `points` and are faster than the first row, not level with it, the one with the
    lowest median is found, and of those that are level with it the one that loses least is taken.
    If there is none it says so, and which comes nearest: the faster one that loses least, or if
    none is faster the one that takes least time. The time that a model is compared with is the
    first row's.

    frame: of `compare`. again: a row of the same layers as the first, which is never taken: what it
    takes less is scatter, so a faster model must be faster than both. Raises ValueError for a table
    with one row, or without times of such a batch.
    """
    judged = frame[frame.index != again]
    ms = f"ms_{_checked_batch_of(judged, batch)}"
    first, others = judged.iloc[0], judged.iloc[1:].sort_values(ms)
    same = frame[frame.index.isin([first.name, again])]
    quickest = same.loc[same[f"{ms}_q10"].idxmin()]
    faster = others[others[ms] < quickest[f"{ms}_q10"]]
    cheap = faster[-faster["difference"] < points]
    where = f"in batches of {ms.removeprefix('ms_')}"
    if len(cheap):
        fastest = cheap.iloc[0]
        level = cheap[cheap[f"{ms}_q10"] <= fastest[ms]]
        best = level.loc[level["difference"].idxmax()]
        sentence = f"Take {best.name}: on this machine, {where}, {_time(best, first, ms)}"
        sentence += f", for {_difference(best)}"
        if -best["difference_low"] >= points:
            sentence += f"; the images do not exclude a loss of {points:g} points"
        if best.name != fastest.name:
            sentence += f"; {fastest.name} ({fastest[ms]:.3g} ms) is level with it in time"
        return sentence + "."
    if len(faster):
        best = faster.loc[faster["difference"].idxmax()]
        nothing = f"nothing here makes {first.name} faster at under {points:g} points"
    else:
        best = others.iloc[0]
        nothing = f"nothing here makes {first.name} faster"
        if best[ms] < first[ms]:
            low = f"{quickest[f'{ms}_q10']:.3g} ms"
            scatter = f"a tenth of the times of {quickest.name} is below {low}"
            nothing += f" by more than times scatter ({scatter})"
    return (
        f"On this machine, {where}, {nothing}: {best.name} comes nearest, as "
        f"{_time(best, first, ms)}, for {_difference(best)}."
    )


def _checked_batch_of(frame: pd.DataFrame, batch: int | None) -> int:
    sizes = [int(name.removeprefix("ms_")) for name in frame if name.removeprefix("ms_").isdigit()]
    if len(frame) < 2:
        raise ValueError(
            f"the table has {len(frame)} row: advice needs one to compare with and at least one "
            "other"
        )
    if not sizes or batch not in (None, *sizes):
        raise ValueError(f"batch={batch}: the table has times of batches of {sizes}")
    return max(sizes) if batch is None else batch


def _time(model: pd.Series, first: pd.Series, ms: str) -> str:
    """Writes the times of both and their ratio."""
    return (
        f"it takes {model[ms]:.3g} ms an image where {first.name} takes {first[ms]:.3g} "
        f"({first[ms] / model[ms]:.2f} times as fast)"
    )


def _difference(model: pd.Series) -> str:
    """Writes the difference of top-1 with its interval."""
    value, low, high = (model[f"difference{end}"] for end in ("", "_low", "_high"))
    return f"{value:+.1f} points of top-1 [{low:+.1f}, {high:+.1f}]"


# ---- what is refused


def _checked_device(models: Mapping[str, nn.Module]) -> torch.device:
    """Returns the one device of all models."""
    if not isinstance(models, Mapping) or not models:
        raise ValueError(
            f"models is {'empty' if isinstance(models, Mapping) else type(models).__name__}: give "
            'at least one by its name, as {"dense": dense, "small": small}'
        )
    device_of = {}
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise ValueError(f"{name!r} is a {type(model).__name__}: valid is an nn.Module")
        if packed := packed_in(model):
            raise ValueError(
                f"{name!r} holds packed weights that are not counted ({packed}, of a quantised "
                "model): params, macs and mb would be those of the rest alone; compare it before "
                "it was quantised"
            )
        for tensor in [*model.parameters(), *model.buffers()]:
            device_of.setdefault(tensor.device, name)
    if len(device_of) > 1:
        places = ", ".join(f"{name!r} on {device}" for device, name in device_of.items())
        raise ValueError(
            f"the models lie on several devices ({places}): times can be compared on one; move "
            "them there, as with model.to(device)"
        )
    return next(iter(device_of), torch.device("cpu"))


def _checked_batches(batches: Sequence[int]) -> tuple[int, ...]:
    sizes = tuple(batches) if isinstance(batches, Iterable) else ()
    if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
        raise ValueError(f"batches={batches}: give numbers of images of 1 or more, as (1, 32)")
    return tuple(dict.fromkeys(sizes))


def _checked_batch(batch: Any, device: torch.device) -> Batch:
    """Returns images (B, C, h, w) on the device and labels (B,) on the CPU."""
    images, labels = check_form(batch)
    if images.device != device:
        raise ValueError(
            f"the loader gives images on {images.device} and the models lie on {device}: move one "
            f"of them, as with model.to({str(images.device)!r})"
        )
    check_finite(images, "loader")
    return images, labels.cpu()
