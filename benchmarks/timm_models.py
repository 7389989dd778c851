"""Counts on which of timm's transformers upcycling, pruning and extraction work, and why not on the
others: `python -m benchmarks.timm_models`.

Each name of the families below is built on the meta device, shapes without numbers. Upcycling
swaps all its MLPs for two experts, pruning removes half of the neurons of each, and extraction asks
whether the neurons of each can be taken apart. That what works computes what it should is tested,
one model a kind, in tests/models/test_mlp_kinds.py.
"""

from __future__ import annotations

import argparse
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import timm
import torch
from torch import nn

from lib.extraction.record import mlps_of
from lib.models.upcycle import chosen_mlps, upcycle
from lib.pruning.neurons.groups import prunable, shapes_of
from lib.pruning.neurons.removal import remove

# Modules of timm whose models have blocks of a mixing of tokens and an MLP.
FAMILIES = (
    "beit cait coat convit convnext crossvit csatv2 davit deepseek_vit deit edgenext "
    "efficientformer efficientformer_v2 efficientvit_mit efficientvit_msra eva focalnet gcvit "
    "gemma4_vit hiera hieradet_sam2 iformer inception_next levit lowformer maxxvit metaformer "
    "mlp_mixer mobilevit mvitv2 naflexvit nest nextvit pit pvt_v2 qwen3_vit repvit sequencer shvit "
    "swiftformer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt twins "
    "visformer vision_transformer vision_transformer_hybrid vision_transformer_relpos "
    "vision_transformer_sam vitamin volo xcit"
).split()
# {family: MLPs that are not called .mlp}, for modules=
OTHER_NAMES = {
    "efficientvit_msra": ["stages.*.blocks.*.ffn*.m"],
    "mlp_mixer": ["blocks.*.mlp_channels"],
    "repvit": ["stages.*.blocks.*.channel_mixer"],
    "sequencer": ["stages.*.blocks.*.mlp_channels"],
    "shvit": ["stages.*.blocks.*.ffn.m"],
    "swiftformer": ["stages.*.blocks.*.linear"],
}
GOALS = {"upcycling": 0.9, "pruning": 0.8, "extraction": 0.8}


def upcycled(model: nn.Module, modules: list[str] | None = None) -> None:
    """Swaps all MLPs for MoE layers."""
    chosen = len(chosen_mlps(model, modules))
    upcycle(model, modules=modules, layers=chosen, experts=2, router="token")


def pruned(model: nn.Module, modules: list[str] | None = None) -> None:
    """Removes half of the neurons of all MLPs."""
    shapes = shapes_of(prunable(model, ("mlp",), modules=modules))
    remove(model, {name: torch.arange(max(1, shape[0] // 2)) for name, shape in shapes.items()})


def looked_into(model: nn.Module, modules: list[str] | None = None) -> None:
    """Asks whether experts can be extracted from all MLPs."""
    mlps_of(model, modules=modules)


Action = Callable[[nn.Module, list[str] | None], None]
# In this order on one model: extraction only asks, and a pruned model is upcycled as any.
ACTIONS: dict[str, Action] = {
    "extraction": looked_into,
    "pruning": pruned,
    "upcycling": upcycled,
}


def names() -> Iterator[tuple[str, str]]:
    """Yields (family, name) of each model."""
    return ((family, name) for family in FAMILIES for name in timm.list_models(module=family))


def outcome(action: Action, model: nn.Module, modules: list[str] | None) -> str:
    """Tries an action on a model: "works", or why not, without the name of a layer."""
    try:
        action(model, None)
        return "works"
    except ValueError as error:
        reason = _reason(str(error))
    if modules is None:
        return reason
    try:
        action(model, modules)
    except ValueError as error:
        return _reason(str(error))
    return "works with modules="


def outcomes_of(family: str, name: str) -> dict[str, str]:
    """Maps each action to its outcome on a model."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception as error:  # what timm itself cannot build on the meta device
        return dict.fromkeys(ACTIONS, f"timm does not build it: {type(error).__name__}")
    modules = OTHER_NAMES.get(family)
    return {what: outcome(action, model, modules) for what, action in ACTIONS.items()}


def _reason(message: str) -> str:
    """The part of an error that is the same for all models of a kind."""
    for pattern, reason in (
        (r"has no block MLP|has no mlp to prune", "no MLP called .mlp"),
        (r"\((\w+)\) is no MLP whose", "neurons of {} are not known"),
        (r"norm inside the MLP", "a norm inside the MLP"),
        (r"\((\w+)\) maps \d+ channels", "the MLP changes the width"),
        (r"\((\w+)\) takes ", "{} takes more than tokens"),
        (r"has no linear map", "no linear map"),
    ):
        if match := re.search(pattern, message):
            return reason.format(*match.groups())
    return message


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.timm_models", description=__doc__)
    options.add_argument("--every", type=int, default=1, help="look at each n-th name alone")
    given = options.parse_args()
    warnings.simplefilter("ignore")  # whole copies, and what timm says of old names
    chosen = list(names())[:: given.every]
    counts = {what: Counter() for what in GOALS}
    for family, name in chosen:
        for what, reason in outcomes_of(family, name).items():
            counts[what][reason] += 1
    print(f"{len(chosen)} names in {len({family for family, _ in chosen})} families of timm")
    for what, goal in GOALS.items():
        works = sum(n for reason, n in counts[what].items() if reason.startswith("works"))
        share = works / len(chosen)
        mark = "pass" if share >= goal else "SHORT"
        print(f"\n{what}: {works} ({share:.1%}), goal {goal:.0%}  {mark}")
        for reason, n in counts[what].most_common():
            print(f"  {n:>4}  {reason}")


if __name__ == "__main__":
    main()
