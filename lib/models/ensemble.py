"""An efficient ensemble of sparse mixtures (E3; Allingham et al. 2022, 2110.03360): one network, M
predictions.

The experts of each MoE layer are split into M groups of E / M. The batch is tiled M times before
the first MoE layer, member m is routed among the experts of group m alone, and the members' class
probabilities are averaged. Patches, attention and all blocks before the first MoE layer are shared,
so the stored size is that of one model.

Axis letters: **M** members, **B** images, **N** tokens of an image, **C** classes, **E** experts,
**D** width, **K** experts a token; **R** rows that a router decides on, M*B*N or M*B.
"""

from __future__ import annotations

import math

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..routers.group import GroupRouter, check_members
from .moe import MoELayer, moe_layers
from .upcycle import before_blocks


class Ensemble(nn.Module):
    """Runs a timm ViT with MoE layers as M members; made by `ensemble`. The model is `vit`.

    Under a RoutingTape each routing is of M*B images, member by member: labels and probes need M
    copies of the batch.
    """

    def __init__(self, vit: VisionTransformer, members: int):
        super().__init__()
        self.vit, self.size = vit, members
        self.first = next(
            i
            for i, block in enumerate(vit.blocks)
            if isinstance(getattr(block, "mlp", None), MoELayer)
        )

    def members(self, images: Tensor) -> Tensor:
        """Computes the logits of each member, for a loss on each.

        images: (B, channels, height, width) -> (M, B, C).
        """
        vit = self.vit
        x = before_blocks(vit, images)
        for i, block in enumerate(vit.blocks):
            x = block(x.repeat(self.size, 1, 1) if i == self.first else x)
        logits = vit.forward_head(vit.norm(x))
        return logits.view(self.size, len(images), -1)

    def forward(self, images: Tensor) -> Tensor:
        """Computes the logarithms of the members' mean probabilities, valid as logits.

        images: (B, channels, height, width) -> (B, C).
        """
        log_probs = self.members(images).float().log_softmax(dim=-1)  # (M, B, C)
        return log_probs.logsumexp(dim=0) - math.log(self.size)


def ensemble(model: nn.Module, members: int) -> Ensemble:
    """Makes an ensemble of M members out of `model`, replacing its routers in place.

    Raises ValueError if it is no timm ViT, checkpoints its blocks, has no MoE layer, or has one
    whose router is not top-k, whose experts M does not divide, or whose K is more than the E / M
    experts of a group. Nothing is changed when it raises.
    """
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"{type(model).__name__} cannot be an ensemble: "
            "the batch is tiled between the blocks of a timm VisionTransformer"
        )
    if model.grad_checkpointing:
        raise ValueError(
            "an ensemble runs the blocks one by one, without checkpointing: "
            "set_grad_checkpointing(False) first"
        )
    layers = moe_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no MoE layer to split into groups: upcycle it first"
        )
    for name, layer in layers.items():
        check_members(name, layer.router, members)
    for layer in layers.values():
        layer.router = GroupRouter.of(layer.router, members)
    whole = Ensemble(model, members)
    whole.training = model.training
    return whole
