"""Descriptions of what is cut out of a trained model before a run trains: neurons, whole experts,
or a mixture out of MLPs.

Axis letters: **D** width, **H** hidden width, **E** experts, **K** clusters.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from .base import Positive, Share, Spec


class PruneSpec(Spec):
    """What is cut out of the model before it trains: hidden neurons and attention dimensions
    (Leiden thesis, section 4)."""

    # that goes, of the neurons of each MLP and expert and of the dimensions of each head
    share: Share = 0.5
    # the score; the lowest go first
    kind: Literal["taylor", "molchanov", "magnitude", "random"] = "taylor"
    # None = all that the model has experts: each by images of its own class group, or all by the
    # same ones; forced through it
    parts: tuple[Literal["mlp", "attention", "experts"], ...] | None = None
    by_class: bool = True
    images: Positive = 80  # calibration images, of each class group where experts have them
    batches: Positive = 1  # that the images are cut into; scores are averaged over them
    structured: bool = True  # False: single weights become zero and stay so, nothing gets smaller

    @model_validator(mode="after")
    def _consistent(self):
        if self.batches > self.images:
            raise ValueError(f"batches={self.batches} cannot be cut out of images={self.images}")
        if not self.structured and self.kind != "taylor":
            raise ValueError(
                "structured=False scores single weights by (gradient x weight)^2: set kind='taylor', "
                f"got {self.kind!r}"
            )
        return self


class DropSpec(Spec):
    """Whole experts taken out of the parent's mixture before the run trains (2405.16646, and rival
    scores)."""

    share: Share = 0.5  # of the experts of each layer (and member) that goes; must come out whole
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
    # the lowest go; changes are counted from the parent's own parent; dern and merge recombine what
    # goes with what stays
    # what a token gets that chose a dropped expert
    missing: Literal["zero_update", "reroute"] = "zero_update"
    images: Positive = 512  # class-balanced calibration images, of the scores that are measured

    @model_validator(mode="after")
    def _consistent(self):
        if self.score in ("dern", "merge") and self.missing != "reroute":
            raise ValueError(f"score={self.score!r} leaves a smaller router: set missing='reroute'")
        return self

    @property
    def compares(self) -> bool:
        """Whether the score needs the model before finetuning."""
        return self.score in (
            "router_norm_change",
            "router_norm_change_abs",
            "router_change",
            "weight_change",
        )
