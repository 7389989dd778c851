"""Finds out on which of timm's transformers upcycling, pruning and extraction work, and why not on
the others.

    python -m benchmarks.timm_models                          # all: writes the file of the page
    python -m benchmarks.timm_models eva02_tiny_patch14_224   # one or a few: prints outcomes

Each name of the families below is built on the meta device, shapes without numbers. Upcycling
swaps all its MLPs for two experts, pruning removes half of the neurons of each, and extraction asks
whether the neurons of each can be taken apart. That what works computes what it should is tested,
one model a kind, in tests/models/test_mlp_kinds.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from fnmatch import fnmatch

import timm
import torch
from torch import nn
from tqdm import tqdm

from lib.extraction.record import mlps_of
from lib.machine import cores
from lib.models.upcycle import chosen_mlps, upcycle
from lib.paths import written_whole
from lib.pruning.neurons.groups import prunable, shapes_of
from lib.pruning.neurons.removal import remove
from lib.report import timm_models as page

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
# share of the names that each is to work on
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
    """Tries an action on a model: how it works, or why not, without the name of a layer."""
    try:
        return _tried(action, model, None)
    except ValueError as error:
        reason = _reason(str(error))
    if modules is None:
        return reason
    try:
        return _tried(action, model, modules) + page.NAMED
    except ValueError as error:
        return _reason(str(error))


def _tried(action: Action, model: nn.Module, modules: list[str] | None) -> str:
    """Says how an action works on a model; raises ValueError where it is refused."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        action(model, modules)
    whole = any("whole copies" in str(warning.message) for warning in warned)
    return page.COPIES if whole else page.WORKS


def outcomes_of(family: str, name: str) -> dict[str, str]:
    """Maps each action to its outcome on a model."""
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except Exception as error:  # what timm itself cannot build on the meta device
        return dict.fromkeys(ACTIONS, f"timm does not build it: {type(error).__name__}")
    modules = OTHER_NAMES.get(family)
    return {what: outcome(action, model, modules) for what, action in ACTIONS.items()}


def rows_of(chosen: Sequence[tuple[str, str]], workers: int) -> Iterator[list[str]]:
    """Yields family, name and the outcome of each method for models, in their order.

    chosen: (family, name) of each.
    """
    spawned = multiprocessing.get_context("spawn")  # a fork would share the threads of torch
    with ProcessPoolExecutor(workers, spawned, torch.set_num_threads, (1,)) as pool:
        outcomes = pool.map(outcomes_of, *zip(*chosen, strict=True))
        for place, found in zip(chosen, outcomes, strict=True):
            yield [*place, *(found[method] for method in page.METHODS)]


def _reason(message: str) -> str:
    """The part of an error that is the same for all models of a kind."""
    for pattern, reason in (
        (r"has no block MLP|has no mlp to prune", "no MLP called .mlp"),
        (r"\((\w+)\) is no MLP whose", "no known neurons: {}"),
        (r"norm inside the MLP", "a norm inside the MLP"),
        (r"\((\w+)\) maps \d+ channels", "the MLP changes the width"),
        (r"\(\w+\) takes ", "the MLP takes more than its tokens"),
        (r"has no linear map", "no linear map"),
    ):
        if match := re.search(pattern, message):
            return reason.format(*match.groups())
    return message


def as_json(rows: Sequence[list[str]]) -> str:
    """Writes the file that the page reads, a line a model."""
    said = {
        "timm": timm.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "goals": GOALS,
        "columns": page.COLUMNS,
    }
    head = json.dumps(said, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{head},\n "rows": [\n{lines}\n]}}\n'


def main() -> None:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.timm_models",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument("names", nargs="*", help="names of timm, or patterns such as 'vit_tiny*'")
    options.add_argument("--workers", type=int, default=cores(), help="processes (default: cores)")
    given = options.parse_args()
    wanted = given.names or ["*"]
    chosen = [place for place in names() if any(fnmatch(place[1], name) for name in wanted)]
    if not chosen:
        options.error(f"none of the {len(list(names()))} models is called {' or '.join(wanted)}")
    rows = list(tqdm(rows_of(chosen, given.workers), total=len(chosen), unit=" models"))
    if given.names:
        for row in rows:
            print(f"{row[1]}:", "; ".join(map(": ".join, zip(page.METHODS, row[2:], strict=True))))
        return
    with written_whole(page.FILE) as part:
        part.write_text(as_json(rows))
    outcomes = page.read()
    print(page.in_short(outcomes))
    for frame in (page.shares(outcomes), page.refusals(outcomes)):
        print(f"\n{frame.to_string(index=False, float_format='{:.1f}'.format)}")


if __name__ == "__main__":
    main()
