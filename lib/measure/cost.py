"""What a model costs: parameters and multiply-adds (MACs), stored and active, by module.

`count` runs the model's own forward on the meta device, on a twin without data, and books each
product as it is called, so fused attention counts like the written-out one. MoE layers are booked
from their configuration, since what they do depends on data. Torch's own counter runs along: a
product that was not booked is an error, never a gap.

Axis letters: **B** images, **N** tokens of an image, **D** width, **H** expert hidden width, **E**
experts, **K** experts a token.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..extraction.runtime_masks import ChannelMask
from ..models.experts import Experts
from ..models.moe import MoELayer
from ..models.pruned import PrunedLayer
from ..models.shared_experts import SharedExperts
from ..routers.base import Router
from .cost_rows import Cost, Row
from .ledger import Ledger, agree

# Modules that hold parameters which are only added or multiplied elementwise: stored and active,
# but no MACs.
ELEMENTWISE = {
    "VisionTransformer",
    "Beit",
    "LayerScale",
    "ConvNeXtBlock",
    "WindowAttention",
    "timm.models.beit.Attention",
    "timm.models.beit.Block",  # full names where the bare name is used for other things too
}


def count(
    model: nn.Module,
    image_size: int,
    images: int = 1,
    *,
    experts_per_image: float | None = None,
    loads: Sequence[Sequence[float]] | None = None,
    unserved: Sequence[float] | None = None,
) -> Cost:
    """Counts a model on `images` square images of `image_size` pixels.

    The model is left as it is and may lie on any device. experts_per_image: where
    `needs_measured_experts`, how many experts an image touches on average, summed
    over all MoE layers and with shared experts counted (the column of ViMoE's Table 4); spread
    evenly over the layers. MACs do not depend on it. loads: of each MoE layer, shallow to deep, the
    share of the assignments by expert: experts of unequal width then count by it. unserved: of each
    MoE layer the share of a token's choices that no expert computes. It lowers the MACs of a
    `PrunedLayer` alone, whose router still chooses experts that are gone, and without it these MACs
    are not known. Raises ValueError for modules that hold parameters in a way unknown here and for
    products that it cannot book, by name.
    """
    twin = _twin(model)
    layers = _replaced_by_stands(twin)
    stands = {name: twin.get_submodule(name) for name in layers}
    ledger = Ledger(twin)
    # The math path writes attention as two plain products, the only form that torch's counter sees
    # on every device.
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as torch_count,
        ledger,
    ):
        _run(twin, images, image_size)
    agree(ledger, torch_count)

    rows = _behind_masks(twin, _dense_rows(twin, ledger))
    share = None
    if experts_per_image is not None:
        _check_share(experts_per_image, list(layers.values()))
        share = experts_per_image / len(layers)
    for i, (name, layer) in enumerate(layers.items()):
        tokens = math.prod(stands[name].shape[:-1])  # (B, ..., D)
        served = 1
        if isinstance(layer, PrunedLayer):
            served = None if unserved is None else 1 - unserved[i]
        load = None if loads is None else loads[i]
        rows += _moe_rows(name, layer, _Seen(images, tokens, share, load, served))
    order = {name: at for at, (name, _) in enumerate(model.named_modules())}
    return Cost(tuple(sorted(rows, key=lambda row: order[row.module])), images)


def check_capacity(model: nn.Module, image_size: int, images: int) -> None:
    """Raises ValueError for a capacity factor by which an expert serves less than one token.

    Every such factor does the same, as an expert serves at least one. images: of the largest batch.
    """
    twin = _twin(model)
    layers = _replaced_by_stands(twin)
    if all(getattr(layer.router, "capacity_factor", None) is None for layer in layers.values()):
        return
    with torch.no_grad():
        _run(twin, 1, image_size)
    for name, layer in layers.items():
        router, tokens = layer.router, math.prod(twin.get_submodule(name).shape[:-1]) * images
        smallest = router.experts / (router.top_k * tokens)
        if router.capacity_factor < smallest:
            raise ValueError(
                f"capacity_factor={router.capacity_factor} lets each of {router.experts} experts "
                f"serve less than one of the {tokens} tokens of a batch at {name}: give at least "
                f"{smallest:.2g}"
            )


def needs_measured_experts(model: nn.Module) -> bool:
    """Says whether only data decide how many experts of some MoE layer an image touches."""
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    return any(layer.router.experts_per_image() is None for layer in layers)


# ---- counting


@dataclass(frozen=True)
class _Seen:
    """What one MoE layer saw, and what was measured of it."""

    images: int
    tokens: int  # of all images
    experts_per_image: float | None  # with the shared expert; None: not measured
    load: Sequence[float] | None  # share of the assignments by expert, (E,); None: not measured
    served: float | None  # share of the choices that an expert computes; None: not measured


class _Stand(nn.Module):
    """Stands in the place of a MoE layer: keeps the input's shape and lets the input through."""

    def forward(self, x: Tensor) -> Tensor:
        self.shape = tuple(x.shape)
        return x


def _replaced_by_stands(twin: nn.Module) -> dict[str, MoELayer]:
    """Puts stands in the places of MoE layers, which it returns by name."""
    layers = {n: module for n, module in twin.named_modules() if isinstance(module, MoELayer)}
    for name in layers:
        twin.set_submodule(name, _Stand())
    return layers


def _run(twin: nn.Module, images: int, image_size: int) -> None:
    """Runs a model on the meta device. Raises ValueError for images that it cannot take, or that
    are so large that their bytes cannot be counted."""
    channels = next((m.in_channels for m in twin.modules() if isinstance(m, nn.Conv2d)), 3)
    try:
        twin(torch.empty(images, channels, image_size, image_size, device="meta"))
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"{type(twin).__name__} does not run on image_size={image_size}: "
            f"{str(error).splitlines()[0] if str(error) else 'it takes other sizes'}"
        ) from error


def _twin(model: nn.Module) -> nn.Module:
    """Copies a model, in evaluation mode, to the meta device: all the structure, no memory."""
    memo = {
        id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in model.parameters()
    }
    memo |= {id(b): b.detach().to("meta") for b in model.buffers()}
    return copy.deepcopy(model, memo).eval()


def _dense_rows(twin: nn.Module, ledger: Ledger) -> list[Row]:
    """Makes the rows of all modules outside of MoE layers."""
    rows, unknown = [], []
    for name, module in twin.named_modules():
        stored = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.LayerNorm):
            kind = "norm"
        elif isinstance(module, nn.Linear):
            kind = "linear"
        elif isinstance(module, nn.Conv2d):
            kind = "patch" if name.startswith(("patch_embed.", "stem.")) else "conv"
        elif stored and not _elementwise(module):
            unknown.append(f"{name or 'the model itself'} ({type(module).__name__})")
            continue
        else:
            kind = "other"
        if name in ledger.attention:
            rows.append(Row(name, "attention", 0, 0, ledger.attention[name]))
        if stored or name in ledger.elements:
            rows.append(
                Row(
                    name,
                    kind,
                    stored,
                    stored,
                    ledger.macs.get(name, 0),
                    ledger.elements.get(name, 0),
                )
            )
    if unknown:
        raise ValueError(
            f"modules with parameters that cost.count does not know: {'; '.join(unknown)}. Known "
            "are Linear, Conv2d, LayerNorm, MoELayer and "
            f"{', '.join(sorted(ELEMENTWISE))} of timm"
        )
    return rows


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


def _elementwise(module: nn.Module) -> bool:
    """Says whether a module's parameters are only added or multiplied elementwise."""
    return any(
        c.__name__ in ELEMENTWISE or f"{c.__module__}.{c.__qualname__}" in ELEMENTWISE
        for c in type(module).__mro__
    )


def _moe_rows(name: str, layer: MoELayer, seen: _Seen) -> list[Row]:
    """Makes the rows of one MoE layer: router, experts, shared expert."""
    if type(layer.experts) not in (Experts, SharedExperts):
        kind = type(layer.experts).__name__
        raise ValueError(
            f"{name}: cost.count does not know the experts {kind}, but Experts and SharedExperts: "
            "add their rows there"
        )
    rows = [
        *_router_rows(f"{name}.router", layer.router, seen),
        *_expert_rows(f"{name}.experts", layer, seen),
        *_shared_rows(f"{name}.shared", layer.shared, seen),
    ]
    outside = sum(p.numel() for p in layer.parameters()) - sum(
        p.numel() for p in layer.router.parameters()
    )
    if sum(row.stored for row in rows) != outside + layer.router.stored_numbers():
        raise ValueError(
            f"{name}: parameters beside router, fc1 and fc2 (an activation with parameters?) have "
            "no row in cost.count"
        )
    return rows


def _router_rows(name: str, router: Router, seen: _Seen) -> list[Row]:
    """Makes the router's own row, none for a router that neither stores nor computes anything."""
    stored, macs = router.stored_numbers(), router.decision_macs(seen.tokens, seen.images)
    return [Row(name, "router", stored, stored, macs)] if stored or macs else []


def _expert_rows(name: str, layer: MoELayer, seen: _Seen) -> list[Row]:
    """Makes a row each for the first and the second maps of all routed experts."""
    experts, router, rows = layer.experts, layer.router, []
    passed = None
    if seen.served is not None:
        passed = router.expert_rows(seen.tokens, seen.images) * seen.served
    touched = router.experts_per_image()
    if touched is None and seen.experts_per_image is not None:
        touched = seen.experts_per_image - (layer.shared is not None)
    width, hidden = experts.width, _mean_hidden(experts, seen.load)
    for part, numbers_of_one in (("fc1", hidden * (width + 1)), ("fc2", hidden * width + width)):
        stack = getattr(experts, part)
        stored = stack.weight.numel() + stack.bias.numel()
        active = None if touched is None else min(stored, touched * numbers_of_one)
        macs = None if passed is None else round(passed * hidden * width)
        rows.append(Row(f"{name}.{part}", "linear", stored, active, macs))
    return rows


def _mean_hidden(experts: Experts, load: Sequence[float] | None) -> float:
    """Computes the mean hidden width of the experts, weighted by their load where it is known."""
    if load is not None:
        return sum(share * h for share, h in zip(load, experts.widths, strict=True))
    mean, rest = divmod(sum(experts.widths), experts.experts)
    if not rest:
        return mean  # a whole number, which keeps all counts whole
    return sum(1 / experts.experts * h for h in experts.widths)


def _shared_rows(name: str, shared: nn.Module | None, seen: _Seen) -> list[Row]:
    """Makes a row each for the two maps of the shared expert, if there is one."""
    rows = []
    for part in ("fc1", "fc2") if shared is not None else ():
        linear = getattr(shared, part)
        stored = sum(p.numel() for p in linear.parameters())
        macs = seen.tokens * linear.weight.numel()
        rows.append(Row(f"{name}.{part}", "linear", stored, stored, macs))
    return rows


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
