"""Makes a model smaller in every way that is asked for, and sets the outcomes side by side."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..models.modes import modes_kept
from .compare import advice, compare
from .drop import drop_experts
from .extract import extract
from .finetune import finetune
from .loaders import Batch, Loader, batches_of, check_loader, check_model, check_runs
from .modules import copied
from .prune import prune
from .save import restore, save
from .upcycle import upcycle

AGAIN = "dense again"  # the control: trained as long as the others, and nothing else
# method: the name of its model in a table
METHODS = {
    "upcycle": "upcycled",
    "drop": "experts dropped",
    "prune": "pruned, ridge",
    "taylor": "pruned, Taylor",
    "extract": "extracted",
}


@dataclass(frozen=True)
class Rules:
    """Says how far a model is compressed.

    active: share of the neurons that stay, or that a token passes, and of the experts that stay.
    experts, layers: of the mixture; its layers are counted from the last block. epochs: further
    passes over the training images, of each model; 0 = none. images: those that scores and
    corrections are computed from.
    """

    active: float = 0.5
    experts: int = 4
    layers: int = 2
    epochs: float = 1.0
    images: int = 512
    seed: int = 0


@dataclass(frozen=True)
class Compressed:
    """Holds models by their names in the table of `compare`, the dense one first, and why others
    were refused."""

    models: dict[str, nn.Module]
    refused: dict[str, str]
    table: pd.DataFrame = field(repr=False)

    @property
    def made(self) -> list[str]:
        """Lists the models that methods made."""
        return [name for name in self.models if name not in ("dense", AGAIN)]

    def advice(self, points: float = 2.0) -> str:
        """Says in a sentence which model to take, beside the dense one as it was measured.

        points: of top-1 that it may lose.
        """
        if not set(self.table.index[1:]) - {AGAIN}:
            return "No method that was asked for can be applied to this model."
        return advice(self.table, points, again=AGAIN)


def checked(methods: Sequence[str] | None) -> tuple[str, ...]:
    """Returns keys of METHODS, all for None, in their order; raises ValueError for other words."""
    if unknown := [method for method in methods or () if method not in METHODS]:
        raise ValueError(f"unknown method {', '.join(unknown)}: valid are {', '.join(METHODS)}")
    return tuple(method for method in METHODS if methods is None or method in methods)


class _Reading(Exception):
    """A method begins to read images: what it asks of a model's layers is fulfilled."""


class _Unread:
    """Stands for a loader where images are not to be read."""

    def __iter__(self) -> Iterator[Batch]:
        raise _Reading


def refusals(
    model: nn.Module, methods: Sequence[str] | None = None, rules: Rules | None = None
) -> dict[str, str]:
    """Says which methods a model does not admit, {name in a table: why}, by its layers alone.

    model: trained or not, also on the meta device; it is left as it is. methods: keys of METHODS;
    None = all. Raises ValueError for an unknown method, and if the model admits none of them.
    """
    methods, refused = checked(methods), {}
    check_model(model)
    shapes = copied(model).to("meta")  # no weights: copies of it cost nothing
    makers = _makers(shapes, _Unread(), replace(rules or Rules(), epochs=0))
    for method in methods:
        try:
            makers[method]()
        except ValueError as error:
            refused[METHODS[method]] = str(error)
        except Exception:  # it reads images, or fails in a way that its run will tell of
            continue
    if refused and len(refused) == len(methods):
        names_of: dict[str, list[str]] = {}
        for name, why in refused.items():
            names_of.setdefault(why, []).append(name)
        whys = "; ".join(f"{' and '.join(names)}: {why}" for why, names in names_of.items())
        raise ValueError(f"no method that was asked for fits this {type(model).__name__}. {whys}")
    return refused


def compress(
    dense: nn.Module,
    train: Loader,
    test: Loader,
    methods: Sequence[str] | None = None,
    rules: Rules | None = None,
    *,
    batches: Sequence[int] = (1, 32),
) -> Compressed:
    """Compresses a trained model by each method, and compares accuracy, size and time.

    The model itself is left as it is. train, test: loaders; nothing is chosen on test images.
    methods: keys of METHODS; None = all. batches: sizes of batches whose latency is measured. A
    method that the model does not admit, or that fails, is left out, and says why in `refused`.
    Raises ValueError for an unknown method, a model that admits none or does not run on the test
    images, before anything is trained, and for what `finetune` and `compare` refuse.
    """
    rules = rules or Rules()
    check_loader(train, "train")
    refused = refusals(dense, methods, rules)
    methods = [method for method in checked(methods) if METHODS[method] not in refused]
    with torch.random.fork_rng(devices=[]):  # read last of all, and then it would be too late
        check_runs(dense, next(batches_of(test, dense, "test", "test")), "test")
    makers = _makers(dense, train, rules)
    models = {"dense": dense}
    if rules.epochs:
        models[AGAIN] = _tuned(copied(dense), dense, train, rules)
    for method in methods:
        try:
            models[METHODS[method]] = makers[method]()
        except ValueError as error:
            refused[METHODS[method]] = str(error)
        except Exception as error:  # what is finished is not lost to whatever a method meets
            refused[METHODS[method]] = f"failed, {type(error).__name__}: {error}"
    return Compressed(models, refused, compare(models, test, batches=batches))


def _makers(dense: nn.Module, train: Loader, rules: Rules) -> dict[str, Callable[[], nn.Module]]:
    """Lists for each method the function that makes its model, trained further."""
    share, drawn = rules.active, {"images": rules.images, "seed": rules.seed}

    @functools.cache  # experts are dropped of the same mixture
    def mixture() -> nn.Module:
        generator = torch.Generator().manual_seed(rules.seed)
        fields = {"layers": rules.layers, "experts": rules.experts, "router": "token"}
        model = upcycle(dense, generator=generator, **fields)
        return _tuned(model, dense, train, rules)

    def tuned(make: Callable[..., nn.Module], **options: Any) -> nn.Module:
        return _tuned(make(dense, train, **options, **drawn), dense, train, rules)

    return {
        "upcycle": mixture,
        "drop": lambda: drop_experts(mixture(), train, keep=share, **drawn),
        "prune": lambda: tuned(prune, keep=share),
        "taylor": lambda: tuned(prune, keep=share, score="taylor"),
        "extract": lambda: tuned(extract, active=share),
    }


def _tuned(model: nn.Module, dense: nn.Module, train: Loader, rules: Rules) -> nn.Module:
    """Trains a model further, in place, towards the labels and the outputs of the dense one."""
    if not rules.epochs:
        return model
    options = {"epochs": rules.epochs, "seed": rules.seed, "inplace": True}
    return finetune(model, train, teacher=dense, **options)


# ---- what is left behind


def save_all(outcome: Compressed, path: Path, **describes: Any) -> dict[str, Path]:
    """Saves each model but the dense one, and returns the files by model.

    path: of a single model; of several small-extracted.safetensors and the like, for
    small.safetensors. describes: options of `save`.
    """
    names = outcome.made
    files = {name: path for name in names}
    if len(names) > 1:
        files = {name: path.with_stem(f"{path.stem}-{_file_word(name)}") for name in names}
    for name, file in files.items():
        save(outcome.models[name], file, **describes)
    return files


def reloaded(outcome: Compressed, files: Mapping[str, Path], images: Tensor) -> pd.DataFrame:
    """Restores each saved model, and returns a row a model: whether it computes what it did.

    files: by model, of `save_all`; images: (B, channels, height, width). Columns: model; file, its
    name; mb, its size in 10^6 bytes; equal, whether all logits of the images are equal to the bit.
    """
    rows = []
    for name, file in files.items():
        kept, again = outcome.models[name], restore(file).to(images.device)
        with modes_kept(kept), torch.no_grad():
            equal = torch.equal(again(images), kept.eval()(images))
        row = {"model": name, "file": file.name, "mb": file.stat().st_size / 1e6, "equal": equal}
        rows.append(row)
    return pd.DataFrame(rows, columns=["model", "file", "mb", "equal"])


def _file_word(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower())


def summary(outcome: Compressed, files: Mapping[str, Path], points: float = 2.0) -> str:
    """Writes the table, what was refused, the advice, the files, and the lines that reload one.

    points: of accuracy that a faster model may cost.
    """
    parts = [_columns(outcome.table), *(f"{k}: {why}" for k, why in outcome.refused.items())]
    parts.append(outcome.advice(points))
    return "\n\n".join([*parts, *([listed(files)] if files else [])])


def listed(files: Mapping[str, Path]) -> str:
    """Writes where each model lies, of one or more, and the lines that reload the first."""
    parts = [f"{name}: {file}" for name, file in files.items()]
    return "\n\n".join([*parts, reloading(next(iter(files.values())))])


def _columns(table: pd.DataFrame) -> str:
    """Writes a table of `compare` with a column a model, and a line on how it was measured."""
    said, large = table.attrs, ("params", "macs")
    shown = table.drop(columns=["dtype", "device", "load"])
    shown = shown.assign(**{name: shown[name] / 1e6 for name in large})
    shown = shown.rename(columns={name: f"{name} (10^6)" for name in large})
    measured = (
        f"intervals: {said['intervals']}; ms an image: of {said['repeats']} passes in turn on "
        f"{said['device']}, threads: {said['threads']}, load before: {said['load'][0]:.1f}"
    )
    return f"{shown.T.to_string(float_format='{:.4g}'.format)}\n{measured}"


def reloading(file: Path | str) -> str:
    """Writes the three lines that reload a saved model in a fresh process."""
    lines = ("import moe_vision", f'model = moe_vision.restore("{file}")', "logits = model(images)")
    return "\n".join(lines)
