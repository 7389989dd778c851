"""Counts what a run's model multiplies, stores and saves for its backward pass, without data.

Before anything is pruned or extracted, which only data decide. Counts are cached in the process:
the runs of the book are thousands, their architectures a few dozen.

Axis letters: **N** tokens of an image, **D** width, **H** hidden width.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from ..spec import BackboneSpec, MoESpec, RunSpec

# fields of MoESpec that decide how much a layer multiplies; the others decide how it learns
COUNTED = ("experts", "top_k", "router", "pool", "shared", "members", "group", "choices", "slots")
# models of these names have blocks that are all alike
ALIKE = ("vit_", "deit_")


class ModelSize(NamedTuple):
    """Holds multiply-adds of an image, stored parameters, and numbers that its layers give out.

    outputs: of all layers that compute something, for one image; what a backward pass needs is made
    of them. Of MoE layers it is in proportion to the multiply-adds.
    """

    macs: float
    parameters: float
    outputs: float


def model_size(spec: RunSpec) -> ModelSize:
    """Counts the model of a run.

    Models that differ in the number of MoE layers share a count of one such layer. Raises
    ValueError for a model that cannot be built.
    """
    backbone = spec.backbone.but(weights=None, grid=None, drop_path=0.0)
    moe, image_size = spec.moe, spec.data.image_size
    dense = _counted(backbone, image_size, None)
    if moe is None:
        return dense
    of_layer = {field: getattr(moe, field) for field in COUNTED}
    one_layer = MoESpec(layers=1, balance="none", groups=moe.groups, **of_layer)
    # where blocks are alike, what a layer adds shows in a model of one block
    shallow = backbone.but(depth=1) if backbone.name.startswith(ALIKE) else backbone
    without, with_one = (_counted(shallow, image_size, layer) for layer in (None, one_layer))
    macs = dense.macs + moe.layers * (with_one.macs - without.macs)
    parameters = dense.parameters + moe.layers * (with_one.parameters - without.parameters)
    return ModelSize(macs, parameters, dense.outputs * macs / dense.macs)


@functools.cache
def _counted(backbone: BackboneSpec, image_size: int, moe: MoESpec | None) -> ModelSize:
    from ..measure.cost import count
    from ..models.backbone import skeleton

    model = skeleton(backbone, image_size, classes=2, moe=moe)
    cost = count(model, image_size)
    outputs = _outputs(model, image_size) if moe is None else 0.0
    return ModelSize(cost.macs, cost.params_stored, outputs)


def _outputs(model, image_size: int) -> float:
    """Adds up the numbers that the innermost modules of a model give out for an image.

    Those that only hand on what they get (dropout and drop path in evaluation) are left out. model:
    on the meta device.
    """
    import torch

    numbers = []

    def add(_, inputs, output) -> None:
        if not (inputs and output is inputs[0]):
            numbers.append(output.numel())

    hooks = [
        module.register_forward_hook(add)
        for module in model.modules()
        if not any(True for _ in module.children())
    ]
    with torch.no_grad():
        model.eval()(torch.empty(1, 3, image_size, image_size, device="meta"))
    for hook in hooks:
        hook.remove()
    return float(sum(numbers))
