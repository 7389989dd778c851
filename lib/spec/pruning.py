"""Describes what is removed from a trained model before a run trains: neurons or whole experts."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from .base import Positive, Share, Spec


class PruneSpec(Spec):
    """Describes the removal of hidden neurons and attention dimensions before training.

    Source: Leiden thesis, section 4.
    """

    # of the neurons of each MLP and expert, and of the dimensions of each head, that are removed;
    # with one order over the model, of all weights and biases in them
    share: Share = 0.5
    # layer: the same share in each layer, head and expert; model: the lowest scores for a weight go
    # first, wherever they are (so the text of the thesis)
    order: Literal["layer", "model"] = "layer"
    # the score; neurons with the lowest are removed
    kind: Literal["taylor", "molchanov", "magnitude", "random"] = "taylor"
    # None = all that the model has
    parts: tuple[Literal["mlp", "attention", "experts"], ...] | None = None
    # each expert is scored by images of its own class group, or all by the same ones; the images
    # are forced through it
    by_class: bool = True
    images: Positive = 80  # calibration images, of each class group where experts have them
    batches: Positive = 1  # into which the images are divided; scores are averaged over them
    structured: bool = True  # False: single weights become zero and stay so, nothing gets smaller

    @model_validator(mode="after")
    def _consistent(self):
        if self.batches > self.images:
            raise ValueError(f"batches={self.batches} cannot be cut out of images={self.images}")
        if not self.structured and self.kind != "taylor":
            raise ValueError(
                "structured=False scores single weights by (gradient x weight)^2: "
                f"set kind='taylor', got {self.kind!r}"
            )
        if not self.structured and self.order != "layer":
            raise ValueError(
                f"order={self.order!r} ranks neurons and head dimensions, which structured=False "
                "does not remove: set order='layer' or structured=True"
            )
        return self


class DropSpec(Spec):
    """Describes the dropping of whole experts from the parent's mixture before training.

    Source: 2405.16646, and rival scores.
    """

    # of the experts of each layer (and member) that are dropped; must be a whole number of experts
    share: Share = 0.5
    # experts with the lowest are dropped; changes are counted from the parent's own parent; dern
    # and merge recombine dropped experts with those that stay
    score: Literal[
        "router_norm_change",
        "router_norm_change_abs",
        "router_change",
        "router_norm",
        "weight_change",
        "load",
        "gate_sum",
        "mean_gate",
        "ean",
        "reap",
        "man",
        "msan",
        "random",
        "dern",
        "merge",
    ] = "router_norm_change"
    # what a token gets that chose a dropped expert
    missing: Literal["zero_update", "reroute"] = "zero_update"
    images: Positive = 512  # class-balanced calibration images, for the scores that are measured

    @model_validator(mode="after")
    def _consistent(self):
        if self.score in ("dern", "merge") and self.missing != "reroute":
            raise ValueError(f"score={self.score!r} leaves a smaller router: set missing='reroute'")
        return self

    @property
    def compares(self) -> bool:
        """Tells whether the score needs the model before finetuning."""
        return self.score in (
            "router_norm_change",
            "router_norm_change_abs",
            "router_change",
            "weight_change",
        )
