"""Drops whole experts of a mixture."""

from __future__ import annotations

import torch
from torch import nn

from ..models.modes import ambient_modes_off
from ..models.plain import check_unshared
from ..pruning.experts import drop as experts
from ..pruning.experts.dropping import routed
from ..pruning.experts.scores import MEASURED
from ..spec import DropSpec
from .loaders import Loader, calibration_images, check_loader, check_model
from .modules import checked_seed, note, rules_of, to_change


@ambient_modes_off()
def drop_experts(
    model: nn.Module,
    loader: Loader | None,
    keep: float = 0.5,
    *,
    score: str = "load",
    missing: str = "reroute",
    before: nn.Module | None = None,
    images: int = 512,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Drops the experts with the lowest scores in each MoE layer; returns the smaller model.

    keep: share of each layer's experts that stays; a whole number of them.
    score: measured on images, "load" (tokens of an expert), "gate_sum", "mean_gate", "ean", "reap",
    "man", "msan" (2606.15716); from the weights alone, "router_norm" and "random"; from the change
    since `before`, "router_norm_change" (2405.16646), "router_norm_change_abs", "router_change" and
    "weight_change"; or "merge" (2407.09590) and "dern" (2509.10377), which merge experts into
    others. Scores from weights read no image: loader may be None.
    missing: what a token gets that chose a dropped expert. "reroute": the best of those that stay;
    "zero_update": nothing, as published for changes of norms.
    before: the model before it was finetuned, for scores that compare.
    images: calibration images, class-balanced, drawn by `seed` in one pass over the loader.

    Modes (also a caller's), types and `inplace` as in `prune`. `model.dropping` gets a row a layer:
    experts before and after, and which stayed. Raises ValueError for what does not fit, by name: no
    MoE layer, one that shares parameters, a router without a row an expert, fewer experts than a
    token chooses.
    """
    rules = _rules(keep, score, missing, before)
    seed = checked_seed(seed)
    smaller = to_change(model, inplace, "dropping")
    layers = routed(smaller)
    check_unshared(smaller, layers.items())
    counts = {name: layer.router.experts for name, layer in layers.items()}
    for name, count in counts.items():
        if abs(keep * count - round(keep * count)) > 1e-6 or round(keep * count) < 1:
            raise ValueError(
                f"keep={keep} of the {count} experts of {name} is {keep * count:g}: give a share "
                f"that leaves a whole number of them, a multiple of 1/{count} above 0"
            )
    batches = []
    if score in MEASURED or score in experts.MERGING:
        check_loader(loader)
        batches = [part for part, _ in calibration_images(loader, smaller, images, seed)]
    dropped = experts.drop(
        smaller,
        rules,
        batches,
        before=None if before is None else before.state_dict(),
        generator=torch.Generator().manual_seed(seed),
    )
    # a layer of zero updates still has as many rows in its router
    rows = [
        {
            "layer": name,
            "score": score,
            "missing": missing,
            "before": count,
            "after": smaller.get_submodule(name).experts.experts,
            "kept": dropped.staying[name].tolist() if name in dropped.staying else None,
        }
        for name, count in counts.items()
    ]
    return note(smaller, "dropping", rows)


def _rules(keep: float, score: str, missing: str, before: nn.Module | None) -> DropSpec:
    """The rules that the words stand for; ValueError where they do not fit each other."""
    if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r}: the share of experts that stays is above 0, at most 1")
    rules = rules_of(DropSpec, share=1.0 - keep, score=score, missing=missing)
    if rules.compares and before is None:
        raise ValueError(
            f"score={score!r} compares with the model before finetuning: pass before=, a copy of "
            "it that was kept"
        )
    if before is not None and not rules.compares:
        raise ValueError(f"before= is for scores that compare, and score={score!r} does not")
    if before is not None:
        check_model(before, "before")
    return rules
