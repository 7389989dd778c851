"""Refuses a run that cannot be carried out, before any work."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import TYPE_CHECKING

from ..spec import BackboneSpec, MaskSpec, MoESpec, RunSpec

if TYPE_CHECKING:
    from torch import nn


def check(spec: RunSpec) -> None:
    """Builds the model on no device, so that what does not fit is refused before any work.

    Raises ValueError naming the field, for L beyond the depth, a patch that does not divide the
    image, an unknown backbone, a step that cannot be carried out; or naming the architecture that
    does not run on images of that size.
    """
    from ..measure.cost import check_capacity
    from ..training import evaluate
    from ..training.streams import check_stream
    from .steps import steps_of

    architecture = (spec.backbone, spec.data.image_size, spec.moe)
    model = _skeleton(*architecture)
    for step in steps_of(spec):
        step.check(model, spec)
    if spec.train is not None and spec.train.distil_stream:
        check_stream(model)
    # An MoE layer gives back tokens of the shape that it took, as the MLP in its place did: a model
    # with such layers runs where its backbone does. Only an ensemble is another model as a whole.
    ensemble = spec.moe if spec.moe is not None and spec.moe.members > 1 else None
    mask = None if spec.train is None else spec.train.mask
    _check_whole(spec.backbone, spec.data.image_size, ensemble, mask)
    _check_probes(spec, model)
    if spec.moe is not None and spec.moe.capacity_factor is not None:
        trained = spec.train.batch if spec.train is not None else 0
        check_capacity(model, spec.data.image_size, max(trained, evaluate.BATCH))
    if spec.init is not None:
        check(spec.init)


# The runs of a page are hundreds, their architectures a few.
@lru_cache(maxsize=64)
def _skeleton(backbone: BackboneSpec, image_size: int, moe: MoESpec | None) -> nn.Module:
    """The backbone with its MoE layers, to look at, not to change."""
    from ..models.backbone import skeleton

    return skeleton(backbone, image_size, classes=2, moe=moe)


@lru_cache(maxsize=1024)
def _check_whole(
    backbone: BackboneSpec, image_size: int, moe: MoESpec | None, mask: MaskSpec | None
) -> None:
    """Raises ValueError if a masked autoencoder, or an ensemble where one is given as `moe`, cannot
    be made of the backbone, or if the whole does not run on images of that size."""
    import torch

    from ..measure import cost
    from ..models.ensemble import ensemble
    from ..models.mae import MaskedAutoencoder

    model = copy.deepcopy(_skeleton(backbone, image_size, moe))
    if mask is not None:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            MaskedAutoencoder(model, mask)
    if moe is not None:
        model = ensemble(model, moe.members)
    cost.count(model, image_size)  # of a masked autoencoder the encoder's, as in its record


def _check_probes(spec: RunSpec, model: nn.Module) -> None:
    """Raises ValueError for a probe that would find after the training that its model is another.

    model: the backbone of the run; an ensemble and a masked autoencoder are made of it.
    """
    from timm.models.vision_transformer import VisionTransformer

    from ..models.tokens import returns_tokens

    kind = type(model).__name__
    if spec.moe is not None and spec.moe.members > 1:
        kind = f"an ensemble of it (moe.members={spec.moe.members})"
    if spec.train is not None and spec.train.mask is not None:
        kind = "a masked autoencoder of it (train.mask)"
    is_backbone = kind == type(model).__name__
    if spec.cam_probe and not (is_backbone and isinstance(model, VisionTransformer)):
        raise ValueError(
            "cam_probe=True needs the patch grid of a timm VisionTransformer, and the model is "
            f"{kind}: set it to False, or take one"
        )
    if spec.depth_probe and not (is_backbone and returns_tokens(model)):
        raise ValueError(
            "depth_probe=True needs a model that returns the tokens after each block, as a timm "
            f"VisionTransformer or Eva does, and the model is {kind}: set it to False, or take one"
        )


def check_device(spec: RunSpec) -> None:
    """ValueError if a run has to be computed on a device that is not there, or by more ranks than
    this machine has cards; its record, where there is one, needs none."""
    import torch

    if spec.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"run {spec.id} is planned for device='cuda' and this machine has none: give "
            "device='cpu', which makes runs of their own (on a command line -p device cpu), or "
            "take a profile made for the CPU"
        )
    if spec.device == "cuda":
        from ..training.ranks import check_cards

        check_cards()
