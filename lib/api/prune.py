"""Prunes neurons and head dimensions of a model, by its activations or by its gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..extraction.extract import check, extract_layers
from ..models.mlps import maps_of, why_no_neurons
from ..models.modes import ambient_modes_off
from ..models.moe import MoELayer
from ..models.names import matches, matching
from ..models.upcycle import block_mlps, chosen_mlps
from ..pruning.neurons import prune as gradients
from ..pruning.neurons.groups import PARTS, names_of, prunable, shapes_of
from ..pruning.neurons.scores import Importance
from ..routers.manual import labelled
from ..spec import ExtractSpec, PruneSpec
from .loaders import Batch, Loader, calibration_images, check_loader, check_logits
from .modules import checked_seed, note, rules_of, to_change

OF_ACTIVATIONS = ("weighted", "variance", "update")
OF_WEIGHTS = (Importance.MAGNITUDE.value, Importance.RANDOM.value)  # no image is looked at
SCORES = (*OF_ACTIVATIONS, *(kind.value for kind in Importance))
REPAIRS = ("ridge", "mean", "none")
# share of the residual stream's error so far that a layer is asked to make up for: all of it is
# fitted to noise (`CorrectionSpec.catch_up`)
CATCH_UP = 0.5


@ambient_modes_off()
def prune(
    model: nn.Module,
    loader: Loader,
    keep: float | Mapping[str, float] = 0.5,
    *,
    score: str = "weighted",
    repair: str | None = None,
    parts: Sequence[str] = ("mlp",),
    across: str = "layer",
    round_to: int = 1,
    ignore: Sequence[str] = (),
    modules: Sequence[str] | None = None,
    images: int = 512,
    seed: int = 0,
    inplace: bool = False,
) -> nn.Module:
    """Removes hidden neurons (and head dimensions) of a model, and returns the smaller model.

    keep: share of the neurons that stays, above 0 and at most 1; or {pattern of names: share}, of
    which the first that fits a layer counts, and layers that none fits stay whole.
    score: "weighted" (variance of a neuron times the squared norm of its output weights),
    "variance" (VBP, 2507.12988) and "update" (the error after repair) look at activations;
    "taylor" and "molchanov" (1906.10771) at gradients of the loss; "magnitude" and "random" read no
    image, and loader may be None.
    repair: of what the removed neurons of MLPs gave. "ridge" (their best linear prediction from
    those that stay; CORP, 2602.05243), "mean" (a bias) or "none"; None is "ridge" for scores of
    activations, and "none" for the others, which know no other.
    parts: "mlp", "attention" and "experts" of MoE layers; the latter two by gradients or weights.
    across: the share holds in each "layer", or over the "model", whose layers then compete.
    round_to: the neurons that stay are rounded up to a multiple of it, as some kernels want them.
    ignore: patterns of names of layers that stay whole, such as "blocks.0" or "*.attn". modules:
    patterns of MLPs to take instead of the blocks' own, such as "blocks.*.mlp_channels".
    images: calibration images, class-balanced, drawn by `seed` in one pass over the loader, all of
    which is read: give a part of it where that takes long.

    A timm VisionTransformer is repaired layer after layer towards its own residual stream, other
    models all layers at once. The model's modes and types stay as they are, and it is left alone
    unless `inplace`. A caller's autocast, no_grad and inference_mode are left inside: the outcome
    is that of a call without them. `model.pruning` gets a row a layer: what was there before and is
    after. Raises ValueError for what does not fit, by name.
    """
    repair = _repair(score, repair)
    _check(keep, parts, across, round_to)
    seed = checked_seed(seed)
    pruned = to_change(model, inplace, "pruning")
    names = _names(pruned, score, parts, modules)
    whole = matching(names, ignore, "ignore")
    counts = _Counts(keep, across, round_to, names)
    if score in OF_ACTIVATIONS:
        rows = _by_activations(pruned, loader, counts, score, repair, whole, modules, images, seed)
    else:
        rows = _without_repair(pruned, loader, counts, score, parts, whole, modules, images, seed)
    return note(pruned, "pruning", rows)


def _repair(score: str, repair: str | None) -> str:
    """The word that None stands for; ValueError for unknown words, or a pair that does not fit."""
    if score not in SCORES:
        raise ValueError(f"score={score!r} is unknown: valid are {', '.join(SCORES)}")
    if repair not in (None, *REPAIRS):
        raise ValueError(f"repair={repair!r} is unknown: valid are {', '.join(REPAIRS)}")
    of_activations = score in OF_ACTIVATIONS
    if repair is None:
        return "ridge" if of_activations else "none"
    if not of_activations and repair != "none":
        raise ValueError(
            f"repair={repair!r} goes with scores of activations, {', '.join(OF_ACTIVATIONS)}: with "
            f"score={score!r} leave repair out"
        )
    if score == "update" and repair != "ridge":
        raise ValueError(
            f"score='update' is the error that ridge regression leaves: leave repair={repair!r} out"
        )
    return repair


def _names(
    model: nn.Module, score: str, parts: Sequence[str], modules: Sequence[str] | None
) -> list[str]:
    """The layers of the parts that the score can look at; ValueError for none."""
    if score not in OF_ACTIVATIONS:
        # the second refuses by name
        return names_of(model, parts, modules) or list(prunable(model, parts, modules=modules))
    if set(parts) != {"mlp"}:
        raise ValueError(
            f"score={score!r} chooses neurons of MLPs by their activations, and parts="
            f"{tuple(parts)} has other parts: set score='taylor', or parts=('mlp',)"
        )
    names = [name for name, mlp in chosen_mlps(model, modules) if not isinstance(mlp, MoELayer)]
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no dense block MLP for score={score!r}: for the neurons "
            "of experts set parts=('experts',) and score='taylor'"
        )
    return names


def _check(
    keep: float | Mapping[str, float], parts: Sequence[str], across: str, round_to: int
) -> None:
    shares = keep.values() if isinstance(keep, Mapping) else [keep]
    for share in shares:
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"keep={share!r}: the share that stays is above 0 and at most 1")
    if not keep:
        raise ValueError("keep={} names no layer: give a share, or {pattern: share}")
    if isinstance(parts, str) or not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts={parts!r}: give a tuple of {', '.join(PARTS)}")
    if across not in ("layer", "model"):
        raise ValueError(f"across={across!r} is unknown: valid are 'layer' and 'model'")
    if across == "model" and isinstance(keep, Mapping):
        raise ValueError(
            "across='model' lets layers compete for one share, and keep gives each its own: give "
            "one number, or across='layer'"
        )
    if not isinstance(round_to, int) or round_to < 1:
        raise ValueError(f"round_to={round_to!r}: give a whole number of at least 1")


class _Counts:
    """How many neurons of a layer stay, out of `keep` and `round_to`."""

    def __init__(
        self, keep: float | Mapping[str, float], across: str, round_to: int, names: Iterable[str]
    ):
        self.by_model, self.round_to = across == "model", round_to
        self.keep = keep if isinstance(keep, Mapping) else {"*": keep}
        self.sizes: dict[str, int] = {}  # of the layers that were counted, before
        for pattern in self.keep:
            matching(names, [pattern], "keep")

    def share_of(self, name: str) -> float:
        """Returns the share of a layer, or of the model, that stays; 1 where no pattern fits."""
        fitting = [share for pattern, share in self.keep.items() if matches(name, pattern)]
        return float(fitting[0]) if fitting else 1.0

    def keeps_all(self, name: str, mlp: nn.Module) -> bool:
        """Says whether nothing of an MLP is removed, rounded up as it is."""
        share = self.share_of(name)
        if share == 1 or self.by_model or why_no_neurons(mlp):
            return share == 1
        hidden = maps_of(mlp).hidden
        return self(name, hidden, hidden) == hidden

    def __call__(self, name: str, size: int, wanted: int) -> int:
        """Counts what stays of `size`; wanted: as many as the order over the model leaves."""
        self.sizes[name] = size
        if not self.by_model:
            wanted = max(1, round(self.share_of(name) * size))
        if name.endswith((".qk", ".vo")):  # dimensions of a head
            return wanted
        return min(size, math.ceil(wanted / self.round_to) * self.round_to)


# ---------------------------------------------------------------- by activations, with repair


def _by_activations(
    model: nn.Module,
    loader: Loader,
    counts: _Counts,
    score: str,
    repair: str,
    whole: Sequence[str],
    modules: Sequence[str] | None,
    images: int,
    seed: int,
) -> list[dict]:
    mlps = dict(chosen_mlps(model, modules))
    ignored = {
        name
        for name, mlp in mlps.items()
        # what loses nothing needs no repair, which would only change it
        if name in whole or isinstance(mlp, MoELayer) or counts.keeps_all(name, mlp)
    }
    check_loader(loader)
    if ignored == mlps.keys():
        return []
    rules = _static_rules(model, counts, score, repair, modules)
    check(model, rules, ignored, modules)  # before the images are read
    batches = calibration_images(loader, model, images, seed)
    reports = extract_layers(
        model,
        [part for part, _ in batches],
        rules,
        seed,
        ignore=ignored,
        modules=modules,
        resize=counts,
        title="prune",
    )
    return [
        {
            "layer": report["layer"],
            "part": "mlp",
            "score": score,
            "repair": repair,
            "before": counts.sizes[report["layer"]],
            "after": report["widths"][0],
            "error": report["error"],
        }
        for report in reports
    ]


def _static_rules(
    model: nn.Module,
    counts: _Counts,
    score: str,
    repair: str,
    modules: Sequence[str] | None,
) -> ExtractSpec:
    """The rules of static pruning: the same neurons for all tokens."""
    in_sequence = repair != "none" and modules is None and follows_stream(model)
    if score == "update" and counts.by_model and not in_sequence:
        raise ValueError(
            "score='update' with across='model' ranks errors in the residual stream of a timm "
            f"VisionTransformer, and {type(model).__name__} is none: set across='layer', or "
            "score='weighted'"
        )
    return rules_of(
        ExtractSpec,
        clusters={"of": "nothing"},
        neurons={
            # of a layer it is counted where its size is known
            "active": counts.share_of("") if counts.by_model else 1.0,
            "score": score,
            "budget": "model" if counts.by_model else "layer",
        },
        correction={
            "method": repair,
            "sequential": in_sequence,
            "catch_up": CATCH_UP if in_sequence else 1.0,
        },
    )


def follows_stream(model: nn.Module) -> bool:
    """Tells whether layers of a model can be repaired in sequence, along its residual stream.

    So in a timm VisionTransformer whose blocks norm before their MLP and add its output at once.
    """
    return (
        isinstance(model, VisionTransformer)
        and type(model).forward_features is VisionTransformer.forward_features
        and all(type(block).forward is Block.forward for block in model.blocks)
        and all(name.startswith("blocks.") for name, _ in block_mlps(model))
    )


# ---------------------------------------------------------------- by gradients or weights


def _without_repair(
    model: nn.Module,
    loader: Loader | None,
    counts: _Counts,
    score: str,
    parts: Sequence[str],
    whole: Sequence[str],
    modules: Sequence[str] | None,
    images: int,
    seed: int,
) -> list[dict]:
    before = shapes_of(prunable(model, parts, whole, modules=modules))
    part_of_set = {
        set_name: part
        for part in parts
        for set_name in before
        if any(matches(set_name, name) for name in names_of(model, (part,), modules))
    }
    batches: list[Batch] = []
    if score not in OF_WEIGHTS:
        batches = calibration_images(loader, model, images, seed)
    order = "model" if counts.by_model else "layer"
    share = 1 - counts.share_of("") if counts.by_model else 0.0
    rules = rules_of(PruneSpec, share=share, order=order, kind=score, parts=tuple(parts))
    with tqdm(unit="batch", desc="score neurons", leave=False, delay=5) as bar:
        bar.total = len(batches) * len(gradients.pools(model, rules))
        gradients.prune(
            model,
            rules,
            batches,
            generator=torch.Generator().manual_seed(seed),
            loss=_loss_with(bar.update),
            ignore=whole,
            modules=modules,
            resize=counts,
        )
    after = shapes_of(prunable(model, parts, whole, modules=modules))
    return [
        {
            "layer": set_name,
            "part": part_of_set[set_name],
            "score": score,
            "repair": "none",
            "before": shape[-1],
            "after": after[set_name][-1],
        }
        for set_name, shape in before.items()
        if after[set_name] != shape
    ]


def _loss_with(tell: Callable[[], object]) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The loss of scores; tell: is called once a batch."""

    def loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        tell()
        with labelled(model, labels):
            logits = check_logits(model(images), labels, model)
        return F.cross_entropy(logits, labels)

    return loss
