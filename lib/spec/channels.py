"""Describes hidden neurons that are chosen while a model runs, by the images at hand.

ToaSt (2602.15720) calls them channels and chooses them from a batch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .base import Positive, Spec

# fields that say something for one pool alone
_USED = {"image": (), "batch": ("order", "batch"), "calibration": ("images",)}


class ChannelSpec(Spec):
    """Describes the evaluation of a trained model with a part of each MLP's hidden neurons.

    No weight changes. The neurons with the highest scores stay, everywhere the same number.
    """

    active: Annotated[float, Field(gt=0, le=1)]  # share of a layer's neurons that a token passes
    # whose activations choose them: those of each image, of each batch of evaluated images, or of
    # training images, once for all
    pool: Literal["image", "batch", "calibration"] = "batch"
    # of the evaluated images, by which they come into batches; class: their labels decide it
    order: Literal["shuffled", "class"] = "shuffled"
    batch: Positive = 128  # evaluated images that share a choice; ToaSt's measurements: 128
    images: Positive = 1000  # class-balanced training images of pool="calibration"

    @model_validator(mode="after")
    def _no_idle_fields(self):
        used = ("active", "pool", *_USED[self.pool])
        fields = type(self).model_fields.items()
        idle = [name for name, f in fields if name not in used and getattr(self, name) != f.default]
        if idle:
            raise ValueError(
                f"pool={self.pool!r} does not look at {', '.join(idle)}: leave it at its default, "
                "or choose the pool that does (batch: order and batch; calibration: images)"
            )
        return self
