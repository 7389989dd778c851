"""What a model costs: parameters and multiply-adds (MACs), stored and active, by module.

`count` runs the model's own forward on the meta device, on a twin without data, and books each
product as it is called, so fused attention counts like the written-out one. MoE layers are booked
from their configuration, since what they do depends on data. Parameters that no product reads
(norms, position embeddings, class tokens, layer scales) cost memory alone.

Axis letters: **B** images, **N** tokens of an image, **D** width, **H** expert hidden width, **E**
experts, **K** experts a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..extraction.runtime_masks import ChannelMask
from ..models.experts import Experts
from ..models.moe import MoELayer, moe_layers
from ..models.pruned import PrunedLayer
from ..routers.base import Router
from .cost_rows import Cost, Row
from .cost_run import given_images, run
from .ledger import Ledger


def count(
    model: nn.Module,
    image_size: int | tuple[int, int] | None = None,
    images: int = 1,
    *,
    example: Any = None,
    experts_per_image: float | None = None,
    loads: Sequence[Sequence[float]] | None = None,
    unserved: Sequence[float] | None = None,
) -> Cost:
    """Counts a model on `images` images of `image_size` pixels, or on an example of its input.

    image_size: of square images, or (height, width). example: what the model takes, in the place of
    both: a tensor (B, ...), a dict (its arguments by name) or a tuple of arguments; of its tensors
    only shapes and types matter, and the first one's B is the number of images. The model is left
    as it is and may lie on any device; one that does not run without data is copied and run once
    where it lies.

    experts_per_image: where `needs_measured_experts`, how many experts an image touches on average,
    summed over all MoE layers and with shared experts counted (the column of ViMoE's Table 4);
    spread evenly over the layers. MACs do not depend on it. loads: of each MoE layer, shallow to
    deep, the share of the assignments by expert: experts of unequal width then count by it.
    unserved: of each MoE layer the share of a token's choices that no expert computes. It lowers
    the MACs of a `PrunedLayer` alone, whose router still chooses experts that are gone, and without
    it these MACs are not known. Raises ValueError for an input that the model does not take.
    """
    given = given_images(model, image_size, images, example)
    seen = run(model, given)
    rows = _behind_masks(seen.twin, _dense_rows(seen.twin, seen.ledger))
    share = None
    if experts_per_image is not None:
        _check_share(experts_per_image, list(seen.layers.values()))
        share = experts_per_image / len(seen.layers)
    for i, (name, layer) in enumerate(seen.layers.items()):
        served = 1
        if isinstance(layer, PrunedLayer):
            served = None if unserved is None else 1 - unserved[i]
        load = None if loads is None else loads[i]
        rows += _moe_rows(
            name, layer, _OfLayer(given.images, seen.tokens(name), share, load, served)
        )
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    return Cost(tuple(sorted(rows, key=lambda row: order[row.module])), given.images)


def check_capacity(model: nn.Module, image_size: int, images: int) -> None:
    """Raises ValueError for a capacity factor by which an expert serves less than one token.

    Every such factor does the same, as an expert serves at least one. images: of the largest batch.
    """
    layers = moe_layers(model)
    if all(getattr(layer.router, "capacity_factor", None) is None for layer in layers.values()):
        return
    seen = run(model, given_images(model, image_size, 1, None))
    for name, layer in layers.items():
        router, tokens = layer.router, seen.tokens(name) * images
        smallest = router.experts / (router.top_k * tokens)
        if router.capacity_factor < smallest:
            raise ValueError(
                f"capacity_factor={router.capacity_factor} lets each of {router.experts} experts "
                f"serve less than one of the {tokens} tokens of a batch at {name}: give at least "
                f"{smallest:.2g}"
            )


def needs_measured_experts(model: nn.Module) -> bool:
    """Says whether only data decide how many experts of some MoE layer an image touches."""
    layers = moe_layers(model).values()
    return any(layer.router.experts_per_image() is None for layer in layers)


# ---- counting


@dataclass(frozen=True)
class _OfLayer:
    """What came to one MoE layer, and what was measured of it."""

    images: int
    tokens: int  # of all images
    experts_per_image: float | None  # with the shared expert; None: not measured
    load: Sequence[float] | None  # share of the assignments by expert, (E,); None: not measured
    served: float | None  # share of the choices that an expert computes; None: not measured


def _dense_rows(twin: nn.Module, ledger: Ledger) -> list[Row]:
    """Makes the rows of all modules outside of MoE layers, and of shared experts.

    A parameter that several modules share is stored once, by the first.
    """
    rows, counted = [], set()
    for name, module in twin.named_modules():
        parameters = {id(p): p for p in module.parameters(recurse=False) if id(p) not in counted}
        counted |= parameters.keys()
        stored = sum(p.numel() for p in parameters.values())
        macs, elements = ledger.macs.get(name, 0), ledger.elements.get(name, 0)
        if name in ledger.attention:
            rows.append(Row(name, "attention", 0, 0, ledger.attention[name]))
        if stored or macs or elements:
            rows.append(Row(name, _kind(name, module, macs), stored, stored, macs, elements))
    return rows


def _kind(name: str, module: nn.Module, macs: int) -> str:
    """Names the kind of a module by what it does with its parameters."""
    if isinstance(module, nn.LayerNorm):
        return "norm"
    if isinstance(module, nn.modules.conv._ConvNd):
        return "patch" if name.startswith(("patch_embed.", "stem.")) else "conv"
    # a module that multiplies by parameters of its own does what a linear map does
    return "linear" if macs or isinstance(module, nn.Linear) else "other"


def _behind_masks(twin: nn.Module, rows: Sequence[Row]) -> list[Row]:
    """Lowers the second maps whose inputs a `ChannelMask` cuts, and adds what choosing costs.

    The first map is computed whole, since the choice looks at what it gives. A score takes one
    multiply-add a token and neuron.
    """
    masks = {
        name.rpartition(".")[0]: module
        for name, module in twin.named_modules()
        if isinstance(module, ChannelMask)
    }
    lowered, macs = [], {row.module: row.macs for row in rows}
    for row in rows:
        mlp_name, _, part = row.module.rpartition(".")
        if part != "fc2" or mlp_name not in masks:
            lowered.append(row)
            continue
        mlp, mask = twin.get_submodule(mlp_name), masks[mlp_name]
        share = mask.kept / mlp.fc2.in_features
        active = row.active - (1 - share) * mlp.fc2.weight.numel()
        lowered.append(replace(row, active=active, macs=round(row.macs * share)))
        choosing = macs[f"{mlp_name}.fc1"] // mlp.fc1.in_features
        lowered.append(Row(f"{mlp_name}.norm", "router", 0, 0, choosing))
    return lowered


def _moe_rows(name: str, layer: MoELayer, seen: _OfLayer) -> list[Row]:
    """Makes the rows of one MoE layer: router, experts, and what no product reads.

    The rows of its shared expert are those of any module.
    """
    rows = [
        *_router_rows(f"{name}.router", layer.router, seen),
        *_expert_rows(f"{name}.experts", layer, seen),
    ]
    elsewhere = [*layer.router.parameters()]
    if layer.shared is not None:
        elsewhere += layer.shared.parameters()
    elsewhere_ids = {id(parameter) for parameter in elsewhere}
    of_experts = sum(p.numel() for p in layer.parameters() if id(p) not in elsewhere_ids)
    rest = of_experts - sum(row.stored for row in rows if row.kind == "linear")
    return [*rows, Row(name, "other", rest, rest)] if rest else rows


def _router_rows(name: str, router: Router, seen: _OfLayer) -> list[Row]:
    """Makes the router's own row, none for a router that neither stores nor computes anything."""
    stored, macs = router.stored_numbers(), router.decision_macs(seen.tokens, seen.images)
    return [Row(name, "router", stored, stored, macs)] if stored or macs else []


def _expert_rows(name: str, layer: MoELayer, seen: _OfLayer) -> list[Row]:
    """Makes a row for each stack of matrices of the routed experts."""
    router, experts = layer.router, layer.experts
    touched = router.experts_per_image()
    if touched is None and seen.experts_per_image is not None:
        touched = seen.experts_per_image - (layer.shared is not None)
    if not getattr(experts, "token_wise", True):  # each runs on all tokens of an image
        passed = seen.tokens * (experts.experts if touched is None else touched)
    elif seen.served is None:
        passed = None
    else:
        passed = router.expert_rows(seen.tokens, seen.images) * seen.served
    rows = []
    for part in _parts(experts, seen.load):
        active = None if touched is None else min(part.stored, touched * part.numbers_of_one)
        macs = None if passed is None else round(passed * part.macs_of_a_row)
        rows.append(Row(f"{name}{part.name}", "linear", part.stored, active, macs))
    return rows


@dataclass(frozen=True)
class _Part:
    """What a stack of matrices holds, of all experts and of one, and what a row of one costs."""

    name: str  # what follows the name of the experts
    stored: int
    numbers_of_one: float
    macs_of_a_row: float


def _parts(experts: nn.Module, load: Sequence[float] | None) -> list[_Part]:
    """Takes experts apart into their stacks.

    Whole copies of a module are one part: a row passes each matrix of a copy once, a convolution's
    at each of its places.
    """
    if not isinstance(experts, Experts):
        parameters = list(experts.parameters())
        matrices = [p for p in parameters if sum(length > 1 for length in p.shape) > 1]
        stored, products = (sum(p.numel() for p in some) for some in (parameters, matrices))
        return [_Part("", stored, stored / experts.experts, products / experts.experts)]
    width, hidden = experts.width, _mean_hidden(experts, load)
    rows = hidden * experts.rows_of_neuron  # two where experts are gated
    parts = []
    for part, of_one, macs in (
        ("fc1", rows * (width + 1), rows * width),
        ("fc2", hidden * width + width, hidden * width),
    ):
        stack = getattr(experts, part)
        stored = stack.weight.numel() + stack.bias.numel()
        parts.append(_Part(f".{part}", stored, of_one, macs))
    return parts


def _mean_hidden(experts: Experts, load: Sequence[float] | None) -> float:
    """Computes the mean hidden width of the experts, weighted by their load where it is known."""
    if load is not None:
        return sum(share * h for share, h in zip(load, experts.widths, strict=True))
    mean, rest = divmod(sum(experts.widths), experts.experts)
    if not rest:
        return mean  # a whole number, which keeps all counts whole
    return sum(1 / experts.experts * h for h in experts.widths)


def _fewest(layer: MoELayer) -> int:
    """Returns the fewest routed experts that an image touches.

    Expert choice over a batch may leave an image without any, and so may experts that were dropped
    or are full.
    """
    full = getattr(layer.router, "capacity_factor", None) is not None
    return 0 if full or isinstance(layer, PrunedLayer) else getattr(layer.router, "top_k", 0)


def _check_share(experts_per_image: float, layers: Sequence[MoELayer]) -> None:
    """Raises ValueError if the model cannot touch so many experts an image."""
    least = sum(_fewest(layer) + (layer.shared is not None) for layer in layers)
    most = sum(layer.experts.experts + (layer.shared is not None) for layer in layers)
    if not least <= experts_per_image <= most:
        raise ValueError(
            f"experts_per_image={experts_per_image} is summed over all {len(layers)} MoE layers, "
            f"shared experts included: valid is {least} to {most}"
        )
