"""One RunSpec carried out: data, model, steps, training, evaluation and probes; a record as a dict
with its arrays.

Nothing here knows the store or its locks: `collect` calls `execute`, in this process or in a
worker.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import paths
from ..spec import RunSpec
from . import states
from .environment import code_hash, environment

if TYPE_CHECKING:  # torch is not needed before a run is computed
    from torch import Tensor, nn

    from ..inputs.splits import Splits

Arrays = dict[str, np.ndarray]
MORE_MEMORY = (
    ". The run does not fit the card: take more cards, each of which gets its share of a batch "
    "(accelerate launch), or a smaller train.batch, a smaller image_size or dtype='bfloat16', "
    "which make runs of their own"
)


def execute(
    spec: RunSpec, state_folder: str, checkpoint: str | None = None
) -> tuple[dict[str, Any], Arrays]:
    """Runs one spec; returns its record as a dict, with its arrays. Writes nothing but checkpoint
    and final weights.

    The parent's weights are read from `state_folder`, the own ones written there if `spec.keep`. A
    failure is returned as a failed record, never raised, except KeyboardInterrupt, the loss of
    another rank, and ValueError for a number of reading processes (MOE_LOADERS) that is none.
    Training is shared with the other ranks where there are some (`together`).
    """
    from ..inputs.loading import asked_for

    asked_for()
    head = _head(spec, environment(spec))
    try:
        from ..training.bfloat16 import products

        with products(spec):
            origin = {"id": spec.id, "code": head["code"], **head["environment"]}
            run = _Run(spec, Path(state_folder), Path(checkpoint) if checkpoint else None, origin)
            entries, arrays = run.carried_out()
        return head | {"status": "ok"} | entries, arrays
    except Exception as error:
        return head | {"status": "failed", "error": _reason(error)}, {}


def prepared(spec: RunSpec, state_folder: str) -> nn.Module:
    """Makes the model of a run as its training finds it: built from its parent, its steps taken.

    state_folder: where the parent's weights are read. Raises FileNotFoundError where they are not.
    """
    from ..inputs.splits import load_splits
    from ..training.bfloat16 import products

    run = _Run(spec, Path(state_folder), None, {})
    with products(spec):
        set_up(spec)
        splits = load_splits(spec.data)
        parent, _ = states.read(spec.init, run.states) if spec.init else (None, None)
        model = run._model(splits, parent)
        run._take_steps(model, splits)
    return model


def failed(spec: RunSpec, error: Exception) -> tuple[dict[str, Any], Arrays]:
    """Returns the failed record of a run that was lost: with its worker, or since that could not
    start it. Where it ran is left open."""
    return _head(spec, {}) | {"status": "failed", "error": _reason(error)}, {}


def _head(spec: RunSpec, place: dict[str, Any]) -> dict[str, Any]:
    """The entries that every record has. place: its `environment`."""
    return {
        "id": spec.id,
        "spec": spec.model_dump(mode="json"),
        "semantics": spec.canonical(),
        "environment": place,
        "code": code_hash(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _reason(error: Exception) -> dict[str, Any]:
    """The `error` entry of a failed record."""
    from ..training.loop import Diverged

    diverged = isinstance(error, Diverged)
    at = {"step": error.step, "last": error.last} if diverged else {}
    kind, message = type(error).__name__, str(error)
    if "OutOfMemoryError" in f"{kind} {message}":  # on this card, or on that of another rank
        message += MORE_MEMORY
    return at | {
        "kind": kind,
        "message": message,
        "traceback": traceback.format_exc(limit=-6),
    }


class NotFinite(RuntimeError):
    """A number of the record is NaN or infinite."""


def _refuse_not_finite(entries: dict[str, Any]) -> None:
    """Raises NotFinite naming a number of a record that is not finite: JSON has none such."""
    inside = [((name,), value) for name, value in entries.items()]
    while inside:
        path, value = inside.pop()
        if isinstance(value, float) and not math.isfinite(value):
            raise NotFinite(
                f"{'.'.join(map(str, path))} is {value}, and a record holds finite numbers alone. "
                "For some image the model gives values that are not finite: a lower lr or a longer "
                "warmup may help, or dtype='float32'; of a run without training, look at the "
                "weights that it starts from"
            )
        pairs = enumerate(value) if isinstance(value, list) else ()
        pairs = value.items() if isinstance(value, dict) else pairs
        inside += [((*path, name), part) for name, part in pairs]


@dataclass
class _Run:
    """A run under way: what it reads, and the entries of its record as they are made."""

    spec: RunSpec
    states: Path  # folder of final weights
    checkpoint: Path | None
    origin: dict[str, Any]  # of its checkpoint
    entries: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)
    seconds_before: float = 0.0  # that processes which were interrupted have trained

    def carried_out(self) -> tuple[dict[str, Any], Arrays]:
        """Returns the entries of the record and its arrays."""
        from ..inputs.sources import fingerprint_of
        from ..inputs.splits import load_splits
        from ..inputs.weights import sha256_state
        from ..measure.probes import ProbeInputs, probed
        from ..measure.routing import RoutingProbe
        from ..measure.timing import peak_rss_mib
        from ..training.evaluate import evaluate

        began = time.perf_counter()
        set_up(self.spec)
        splits = load_splits(self.spec.data)
        self.entries = {"classes": splits.class_names, "history": [], "curve": {}, "val": {}}
        data = self.spec.data
        if seen := fingerprint_of(data.name, data.label, paths.data_home()):
            self.entries["data"] = seen
        parent, parent_sha256 = None, None
        if self.spec.init is not None:
            parent, parent_sha256 = states.read(self.spec.init, self.states)
        model = self._model(splits, parent)
        masks = self._take_steps(model, splits)
        weights = {"start": sha256_state(model.state_dict()), "parent": parent_sha256}
        trained, teacher = model, None
        if self.spec.train is not None:
            teacher = self._teacher(splits, parent)
            model = self._train(trained, splits, teacher, masks)
        routing = RoutingProbe(len(splits.class_names), self.spec.image_loads)
        test = evaluate(model, splits.test, self.spec, routing.update)
        _refuse_not_finite({"test": test.entry})
        self.timing["eval_images_per_s"] = test.images_per_s
        resident = partial(self._resident_mib, trained, splits)
        inputs = ProbeInputs(self.spec, model, trained, teacher, splits, test, routing, resident)
        result = probed(inputs)
        self.entries |= {"moe": []} | result.entries
        _refuse_not_finite(self.entries)  # before weights are kept that runs may start from
        weights["final"] = sha256_state(model.state_dict())
        if self.spec.keep:
            states.save(model, self.spec, self.states, weights["final"])
        self.timing["peak_rss_mib"] = peak_rss_mib()
        self.entries |= {"cost": _cost(model, self.spec, self.entries["moe"])}
        self.timing["run_seconds"] = time.perf_counter() - began + self.seconds_before
        return self.entries | {"weights": weights, "timing": self.timing}, result.arrays

    def _resident_mib(self, model: nn.Module, splits: Splits) -> dict[str, float]:
        from .resident import resident_mib

        return resident_mib(model, self.spec, len(splits.class_names), splits.channels)

    def _model(self, splits: Splits, parent: dict[str, Tensor] | None) -> nn.Module:
        """The model before the steps of the run, where it is computed."""
        from ..models.backbone import build
        from .restore import fit

        classes, channels = len(splits.class_names), splits.channels
        structure = partial(fit, spec=self.spec.init)
        return build(self.spec, classes, channels, parent, structure).to(self.spec.device)

    def _take_steps(self, model: nn.Module, splits: Splits) -> dict[str, Tensor]:
        """Carries the steps out in place, with their entries; returns the masks of unstructured
        pruning."""
        from ..models.step import StepInputs
        from ..training.evaluate import evaluate
        from .steps import steps_of

        spec, masks = self.spec, {}

        def read(needed: RunSpec) -> dict[str, Tensor]:
            return states.read(needed, self.states)[0]

        inputs = StepInputs(spec, splits.train, len(splits.class_names), read, self.checkpoint)
        for step in steps_of(spec):
            result = step.apply(model, inputs)
            masks |= result.masks
            if result.report is not None:
                self.entries[step.name] = result.report
            if step.validated and spec.train is None:
                self.entries["val"] = evaluate(model, splits.val, spec).entry
        return masks

    def _teacher(self, splits: Splits, parent: dict[str, Tensor] | None) -> nn.Module | None:
        """The parent as it was, where it is distilled; else None."""
        spec = self.spec
        if not spec.train.has_teacher:
            return None
        from .restore import restored

        teacher = restored(spec.init, parent, len(splits.class_names), splits.channels)
        return teacher.to(spec.device).eval()

    def _train(
        self,
        model: nn.Module,
        splits: Splits,
        teacher: nn.Module | None,
        masks: dict[str, Tensor],
    ) -> nn.Module:
        """Trains in place, with the entries that this makes; returns the model to evaluate."""
        from ..training import ranks
        from ..training.checkpoint import Checkpoint
        from .together import fit

        together = ranks.of(self.spec, model)
        origin = self.origin | {"data": self.entries.get("data"), "ranks": together.count}
        checkpoint = Checkpoint(self.checkpoint, origin)
        spec, began = self.spec, time.perf_counter()
        with _tensorboard(self.states.parent / "tensorboard" / spec.id) as report:
            model, progress = fit(model, splits, spec, checkpoint, report, teacher, masks, together)
        # progress.seconds counts the steps of all processes, without validation: where it is longer
        # than this process was here, the rest was spent before the checkpoint
        self.seconds_before = max(0.0, progress.seconds - (time.perf_counter() - began))
        if checkpoint.resumed:
            self.entries["resumed"] = checkpoint.resumed
        last = progress.history[-1]
        names = [name for name in ("top1", "loss") if f"val_{name}" in last]
        val = {"n": len(splits.val)} | {name: last[f"val_{name}"] for name in names}
        self.entries |= {"history": progress.history, "curve": progress.curve, "val": val}
        if together.count > 1:
            self.timing["ranks"] = together.count
        self.timing["train_seconds"] = progress.seconds
        self.timing["train_images_per_s"] = progress.images / max(progress.seconds, 1e-9)
        return model


def set_up(spec: RunSpec) -> None:
    """Sets what holds for the whole process: threads, arithmetic, and where the peak of its memory
    is counted from."""
    import torch

    from ..measure.timing import peak_rss_mib

    torch.set_num_threads(spec.threads)
    # float32 is float32 on a graphics card, too: by default convolutions round more
    torch.backends.cudnn.allow_tf32 = False
    peak_rss_mib(reset=True)


def _cost(model: nn.Module, spec: RunSpec, layers: list[dict[str, Any]]) -> dict[str, float]:
    """The `cost` entry. layers: the `moe` entry, for what only data decide."""
    from ..measure.cost import count, needs_measured_experts
    from ..models.moe import RoutingTape

    by_data = needs_measured_experts(model)
    shared = sum(getattr(layer, "shared", None) is not None for layer in RoutingTape(model).layers)
    touched = sum(row["experts_per_image"] for row in layers) + shared
    counted = count(
        getattr(model, "encoder", model),
        spec.data.image_size,
        experts_per_image=touched if by_data else None,
        loads=[row["load"] for row in layers] if spec.extracted else None,
        unserved=[row["dropped"] for row in layers] if spec.reduced else None,
    )
    return {
        "params_stored": counted.params_stored,
        "params_active": counted.params_active,
        "macs": counted.macs,
    }


@contextlib.contextmanager
def _tensorboard(folder: Path) -> Iterator[Callable[[dict], None] | None]:
    """A hook for `loop.fit` that writes history rows as TensorBoard scalars; None if that is not
    installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with SummaryWriter(str(folder)) as writer:

        def report(row: dict) -> None:
            at = round(1000 * row["epoch"])  # a whole number is asked for: 1/1000 epoch
            for name in row.keys() - {"epoch"}:
                writer.add_scalar(name, row[name], at)
            writer.flush()

        yield report
