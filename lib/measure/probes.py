"""What a run reports of its model once it is trained: a table of probes, by name.

A probe says when it is wanted and returns its entries and arrays of the record. Axis letters: **P**
pictured images, **M** MoE layers, **C** classes, **E** experts, **N** tokens of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..inputs.splits import Splits
from ..models.mae import MaskedAutoencoder
from ..models.moe import RoutingTape, without_experts
from ..spec import RunSpec
from ..training.evaluate import Evaluation, evaluate, whole_type
from . import memory, pictures
from .routing import RoutingProbe

PROBE_IMAGES = 12  # fixed test images whose pictures and token-to-expert maps every record keeps


@dataclass(frozen=True)
class ProbeInputs:
    """What a probe may look at: a run, its trained model, and the evaluation of its test split."""

    spec: RunSpec
    model: nn.Module  # that is evaluated: under `train.ema` the average of the trained one
    trained: nn.Module
    teacher: nn.Module | None
    splits: Splits
    test: Evaluation
    routing: RoutingProbe  # filled by that evaluation
    # MiB that training steps add to a process of their own; asked of whoever carries the run out
    resident_mib: Callable[[], dict[str, float]]

    @cached_property
    def index(self) -> Tensor:
        """(P,) the fixed images: evenly spread over the test split, or pairs of a class."""
        test = self.splits.test
        if self.spec.probe_pairs:
            return pairs_of_a_class(test.labels, PROBE_IMAGES // 2)
        return torch.linspace(0, len(test) - 1, min(PROBE_IMAGES, len(test))).long()


@dataclass(frozen=True)
class ProbeResult:
    """Entries of the record's JSON and arrays of its npz, by name."""

    entries: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """One part of a record. wanted: whether a run's record has it, from its spec and model.
    measure: makes it."""

    wanted: Callable[[RunSpec, nn.Module], bool]
    measure: Callable[[ProbeInputs], ProbeResult]


def pairs_of_a_class(labels: Tensor, pairs: int) -> Tensor:
    """Chooses images, evenly spread, and after each the next one of its class.

    labels: (n,). Returns their (P,) places, P at most twice `pairs`: after the last image of a
    class comes its first one, and no image comes twice.
    """
    chosen: dict[int, None] = {}  # a set that keeps its order
    for place in torch.linspace(0, len(labels) - 1, min(pairs, len(labels))).long().tolist():
        of_class = (labels == labels[place]).nonzero().flatten().tolist()
        partner = of_class[(of_class.index(place) + 1) % len(of_class)]
        chosen |= {place: None, partner: None}
    return torch.tensor(list(chosen))


def probed(inputs: ProbeInputs) -> ProbeResult:
    """Carries out the probes that the run wants, in the order of the table; returns their joint
    result."""
    joint = ProbeResult()
    for probe in PROBES.values():
        if probe.wanted(inputs.spec, inputs.model):
            result = probe.measure(inputs)
            joint.entries.update(result.entries)
            joint.arrays.update(result.arrays)
    return joint


# ---- when a probe is wanted


def _always(spec: RunSpec, model: nn.Module) -> bool:
    return True


def _trained(spec: RunSpec, model: nn.Module) -> bool:
    return spec.train is not None


def _routed(spec: RunSpec, model: nn.Module) -> bool:
    return bool(RoutingTape(model).layers)


def _reconstructs(spec: RunSpec, model: nn.Module) -> bool:
    return isinstance(model, MaskedAutoencoder)


def _checkered(spec: RunSpec, model: nn.Module) -> bool:
    return spec.colour_probe and _routed(spec, model) and not _reconstructs(spec, model)


def _pictured(spec: RunSpec, model: nn.Module) -> bool:
    return _routed(spec, model) or _reconstructs(spec, model) or spec.cam_probe


# ---- what a probe measures


def _memory(inputs: ProbeInputs) -> ProbeResult:
    spec, split = inputs.spec, inputs.splits.train
    mib = memory.first_step_mib(inputs.trained, split, spec, inputs.teacher)
    if spec.resident:
        mib |= inputs.resident_mib()
    return ProbeResult({"memory": mib})


def _predictions(inputs: ProbeInputs) -> ProbeResult:
    dtype = whole_type(len(inputs.splits.class_names), torch.int16)
    arrays = {"test_label": inputs.splits.test.labels.to(dtype).numpy()}
    if inputs.test.predictions is not None:
        arrays["test_pred"] = inputs.test.predictions.numpy()
    return ProbeResult({"test": inputs.test.entry}, arrays)


def _experts_off(inputs: ProbeInputs) -> ProbeResult:
    with without_experts(inputs.model):
        result = evaluate(inputs.model, inputs.splits.test, inputs.spec)
    return ProbeResult({"experts_off": {"n": result.n, "top1": result.top1}})


def _depth(inputs: ProbeInputs) -> ProbeResult:
    from . import features  # scikit-learn is slow to import, and few runs want it

    return ProbeResult({"depth": features.by_depth(inputs.model, inputs.splits, inputs.spec)})


def _reconstructions(inputs: ProbeInputs) -> ProbeResult:
    split = inputs.splits.test
    return ProbeResult(
        arrays=pictures.reconstructions(inputs.model, split, inputs.spec, inputs.index)
    )


def _routing_counts(inputs: ProbeInputs) -> ProbeResult:
    return ProbeResult({"moe": inputs.routing.summary()}, inputs.routing.arrays())


def _token_maps(inputs: ProbeInputs) -> ProbeResult:
    maps = pictures.token_maps(inputs.model, inputs.splits.test, inputs.spec, inputs.index)
    return ProbeResult(arrays={"token_expert": maps.numpy()})


def _checkerboard(inputs: ProbeInputs) -> ProbeResult:
    maps = pictures.checkerboard(inputs.model, inputs.spec, inputs.splits.channels)
    return ProbeResult(arrays={"checker_expert": maps.numpy()})


def _gradcam(inputs: ProbeInputs) -> ProbeResult:
    blocks = {"cam": -1} | ({"cam_first": 0} if inputs.spec.cam_first else {})
    split = inputs.splits.test
    return ProbeResult(
        arrays={
            name: pictures.gradcam(inputs.model, split, inputs.spec, inputs.index, block)
            for name, block in blocks.items()
        }
    )


def _probe_index(inputs: ProbeInputs) -> ProbeResult:
    rows = inputs.splits.test.rows[inputs.index.numpy()]
    arrays = {"probe_index": rows.astype(np.int32)}
    if inputs.spec.probe_pairs:  # places in the test split, which are known where they are spread
        arrays["probe_place"] = inputs.index.numpy().astype(np.int32)
    return ProbeResult(arrays=arrays)


PROBES: dict[str, Probe] = {
    "memory": Probe(_trained, _memory),
    "predictions": Probe(_always, _predictions),
    "experts off": Probe(lambda spec, model: spec.experts_off, _experts_off),
    "depth": Probe(lambda spec, model: spec.depth_probe, _depth),
    "reconstructions": Probe(_reconstructs, _reconstructions),
    "routing counts": Probe(_routed, _routing_counts),
    "token maps": Probe(_routed, _token_maps),
    "checkerboard": Probe(_checkered, _checkerboard),
    "GradCAM": Probe(lambda spec, model: spec.cam_probe, _gradcam),
    "probe images": Probe(_pictured, _probe_index),
}
