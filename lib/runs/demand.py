"""What runs ask of a machine before they start: images, multiply-adds, memory, hours and disk.

    demand = demand_of(spec, sizes)  # of one run
    total = total_of(asked, runs, demands, seconds)

The rule for multiply-adds: a training image counts a forward pass and BACKWARD more for the
backward pass, also where only a head or the routers learn; a validation image counts a forward
pass before the first epoch and after each; a test image counts one. A teacher adds a forward pass
for each training image. Of a masked pretraining the encoder counts in proportion to the patches
that it sees, the decoder in whole. What pruning, extraction and dropping take away is not taken
off, and what their calibration and the probes add (some thousand images) is not added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from ..inputs import published
from ..spec import MaskSpec, RunSpec
from .estimate import passes
from .model_size import ModelSize, model_size

BYTES = 4  # of a number in float32, in which weights, gradients and moments are kept
MOMENTS = 2  # that AdamW keeps of each trained weight
# bytes that autograd saves for the backward pass for each number that a layer gives out: the
# medians of the committed records, which lie between 2.5 and 6.6
SAVED_BYTES = {"bfloat16": 3.5, "float32": 4.3}
# of a record: its JSON, and its arrays for each test image, as in the committed ones
RECORD_BYTES, RECORD_BYTES_OF_IMAGE = 20_000, 3


@dataclass(frozen=True)
class Demand:
    """Holds what one run asks for.

    images: of training, validation and test. basis: where these numbers come from. steps: of the
    optimiser. macs: multiply-adds of all passes, see above. memory: bytes at the fullest moment of
    a training step, or of an evaluation. disk: bytes of the record and, if they are kept, weights.
    """

    images: tuple[int, int, int]
    basis: str
    epochs: float
    steps: int
    trained: float
    macs: float
    memory: float
    disk: float


Sizes = Callable[[RunSpec], tuple[tuple[int, int, int], str]]


def published_sizes(spec: RunSpec) -> tuple[tuple[int, int, int], str] | None:
    """Returns the images of a run by published sizes, and says so; None where none are known."""
    images = published.images_of(spec.data)
    return None if images is None else (images, "published")


def demand_of(spec: RunSpec, sizes: Sizes, is_kept: bool = False) -> Demand:
    """Computes what one run asks for.

    sizes: gives the images of a run and where they come from. is_kept: whether another run starts
    from its weights. Raises ValueError for a model that cannot be built.
    """
    images, basis = sizes(spec)
    model, train = model_size(spec), spec.train
    epochs = 0.0 if train is None else train.epochs
    trained = epochs * images[0]
    macs = passes(spec, images) * model.macs
    if train is not None and train.mask is not None:
        macs = passes(spec, images) * _masked_macs(spec, model, train.mask)
    if train is not None and train.has_teacher:
        macs += trained * model_size(spec.init).macs
    steps = 0 if train is None else math.ceil(epochs * math.ceil(images[0] / train.batch))
    disk = RECORD_BYTES + RECORD_BYTES_OF_IMAGE * images[2]
    if spec.keep or is_kept:
        disk += BYTES * model.parameters
    return Demand(images, basis, epochs, steps, trained, macs, memory_of(spec), disk)


def _masked_macs(spec: RunSpec, model: ModelSize, mask: MaskSpec) -> float:
    """Counts the multiply-adds of an image in masked pretraining.

    The encoder sees 1 - ratio of the patches. A decoder block of width W multiplies 12 W^2 for each
    of N patches (attention 4, MLP 8) and 2 N^2 W for attention.
    """
    side = spec.backbone.patch or 16
    patches, width = (spec.data.image_size // side) ** 2, mask.width
    block = 12 * patches * width**2 + 2 * patches**2 * width
    ends = patches * width * ((spec.backbone.width or width) + 3 * side**2)
    return (1 - mask.ratio) * model.macs + mask.depth * block + ends


def memory_of(spec: RunSpec) -> float:
    """Computes the bytes that a run holds at its fullest moment, as `step_mib` of
    `lib.measure.memory` counts those of training on data.

    Training: weights, gradients and moments of all parameters (of none but the weights where a head
    or the routers learn), what autograd saves, an average of the weights, a teacher. Evaluation:
    weights, and a tenth of what a layer-by-layer pass gives out. What pruning takes away is not
    taken off. Raises ValueError for a model that cannot be built.
    """
    from ..training.evaluate import BATCH

    model = model_size(spec)
    weights = BYTES * model.parameters
    saved = SAVED_BYTES[spec.dtype] * model.outputs
    if spec.train is None:
        return weights + BATCH * saved / 10
    if spec.train.trainable == "head":
        return weights + spec.train.batch * saved / 10
    whole = weights * (2 + MOMENTS) if spec.train.trainable != "routers" else weights
    whole += weights * (spec.train.ema is not None)
    if spec.train.has_teacher:
        whole += BYTES * model_size(spec.init).parameters
    return whole + spec.train.batch * saved


# ---- of many runs


@dataclass(frozen=True)
class Total:
    """Holds the sum over runs, each counted once. memory: of the largest. hours: by device."""

    runs: int
    parents: int
    epochs: float
    trained: float
    macs: float
    memory: float
    hours: Mapping[str, float]
    disk: float


def with_parents(specs: Iterable[RunSpec]) -> dict[str, RunSpec]:
    """Lists runs and all that they start from by id, those that are asked for first."""
    specs = list(specs)
    runs = {spec.id: spec for spec in specs}
    for spec in specs:
        for ancestor in spec.lineage[1:]:
            runs.setdefault(ancestor.id, ancestor)
    return runs


def demands_of(runs: Mapping[str, RunSpec], sizes: Sizes) -> dict[str, Demand]:
    """Computes the demand of each run; runs of which no model can be built are left out.

    runs: by id, with their parents, whose weights are kept.
    """
    kept = {needed.id for spec in runs.values() for needed in spec.needed_runs}
    demands = {}
    for run, spec in runs.items():
        try:
            demands[run] = demand_of(spec, sizes, run in kept)
        except ValueError:  # `failing` says why
            continue
    return demands


def total_of(
    asked: Collection[str],
    runs: Mapping[str, RunSpec],
    demands: Mapping[str, Demand],
    seconds: Mapping[str, float],
) -> Total:
    """Adds up demands. asked: ids that are no mere parents. seconds: that each run takes, by id."""
    hours: dict[str, list[float]] = {}
    for run in demands:
        hours.setdefault(runs[run].device, []).append(seconds[run] / 3600)
    listed = demands.values()  # added up by fsum: the same in any order
    return Total(
        runs=len(asked),
        parents=len(runs) - len(asked),
        epochs=math.fsum(demand.epochs for demand in listed),
        trained=math.fsum(demand.trained for demand in listed),
        macs=math.fsum(demand.macs for demand in listed),
        memory=max((demand.memory for demand in listed), default=0.0),
        hours={device: math.fsum(of_device) for device, of_device in hours.items()},
        disk=math.fsum(demand.disk for demand in listed),
    )


def seconds_at(rate: float, spec: RunSpec, demand: Demand) -> float:
    """Returns the seconds of a run at a rate: multiply-adds a second of a card or of a thread."""
    return demand.macs / (rate * (spec.threads if spec.device == "cpu" else 1))


def failing(specs: Iterable[RunSpec]) -> dict[str, int]:
    """Counts the runs that would be refused before any work, by what is said of them.

    The device is not looked at: `at_hand` and the caller say what is missing here.
    """
    from .checks import check
    from .estimate import without_seeds

    said: dict[str, str | None] = {}
    counts: dict[str, int] = {}
    for spec in specs:
        key = without_seeds(spec).id
        if key not in said:
            try:
                check(spec)
                said[key] = None
            except ValueError as error:
                said[key] = " ".join(str(error).split())
        if said[key]:
            counts[said[key]] = counts.get(said[key], 0) + 1
    return counts
