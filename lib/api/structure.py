"""The structure of layers that upcycling, pruning, extraction and dropping leave, as plain values.

A kind of layer is a line in `KINDS`, a kind of experts a line in `EXPERTS`, a router a line in
`ROUTERS`: each is described by numbers and words, and built again from them without weights, which
are loaded afterwards.

Axis letters: **E** experts, **E'** those that stay.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention
from torch import nn

from ..models.compete import CompeteLayer
from ..models.copies import CopiesLayer, WholeCopies
from ..models.experts import Experts
from ..models.mlps import maps_of, why_no_neurons
from ..models.moe import MoELayer
from ..models.pruned import PrunedLayer
from ..models.shared_experts import SharedExperts
from ..routers import ROUTER_CLASSES
from ..routers.base import Router
from ..routers.centroid import CentroidRouter
from ..routers.controls import OracleRouter, RandomRouter
from ..routers.forced import ForcedRouter
from ..routers.group import GroupRouter
from ..routers.predictor import PredictorRouter
from ..routers.survivor import SurvivorRouter
from .traits import traits_of

Entry = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """Says which modules are of a kind, and how one is described and built again.

    build: from an entry and the module that stands in its place in an unchanged model.
    """

    fits: Callable[[nn.Module], bool]
    describe: Callable[[nn.Module], Entry]
    build: Callable[[Entry, nn.Module], nn.Module]


def describe(model: nn.Module) -> dict[str, Entry]:
    """Describes each layer of a known kind: {module name: entry}, in values that JSON knows.

    Raises ValueError, by name, for a layer of a known kind that cannot be described.
    """
    structure: dict[str, Entry] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{described}.") for described in structure):
            continue  # a part of a layer that is described as a whole
        kind = _kind_of(module)
        if kind is not None:
            try:
                structure[name] = {"kind": kind} | KINDS[kind].describe(module)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
    return structure


def rebuild(model: nn.Module, structure: Mapping[str, Entry]) -> nn.Module:
    """Gives an unchanged model, in place, the layers of a structure; returns it.

    New layers have no weights yet: they lie on the meta device, and the modes are those of what
    they replace. Raises ValueError, by name, where the model has nothing, or something that the
    layer cannot be built from.
    """
    for name, entry in structure.items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"{name}: the saved model has a layer there and the {type(model).__name__} has "
                "none: give the module as it was first built, of the same depth"
            ) from None
        if entry["kind"] not in KINDS:
            raise ValueError(
                f"{name}: a layer of kind {entry['kind']!r} is unknown here, known are "
                f"{', '.join(KINDS)}: a newer version may have written the file"
            )
        kind = KINDS[entry["kind"]]
        if _kind_of(old) == entry["kind"] and {"kind": entry["kind"]} | kind.describe(old) == entry:
            continue
        try:
            with torch.device("meta"):
                new = kind.build(entry, old)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        model.set_submodule(name, new.train(old.training))
    return model


def _kind_of(module: nn.Module) -> str | None:
    return next((name for name, kind in KINDS.items() if kind.fits(module)), None)


# ---- MLPs and attention, of any width


# attributes that follow from the shapes of what is narrowed; all others must be those of the file
_NUMBERS_OF_WIDTHS = {"in_features", "out_features", "in_channels", "out_channels"}
_NUMBERS_OF_WIDTHS |= {"head_dim", "attn_dim", "scale"}


def _is_narrowed(module: nn.Module) -> bool:
    return isinstance(module, Attention) or not why_no_neurons(module)


def _describe_narrowed(module: nn.Module) -> Entry:
    """Shapes of all parameters and buffers, and all plain attributes of what is inside."""
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    return {"shapes": shapes, "parts": traits_of(module)}


def _build_narrowed(entry: Entry, old: nn.Module) -> nn.Module:
    """A copy of `old` whose tensors have the shapes of the entry, with its numbers of features."""
    classes = {name: part["class"] for name, part in entry["parts"].items()}
    present = {name: type(part).__name__ for name, part in old.named_modules()}
    if classes != present:
        raise ValueError(
            f"the saved layer is a {classes['']} of {', '.join(classes.values())}, and what stands "
            f"there is a {type(old).__name__} of {', '.join(present.values())}: give the module "
            "as it was first built"
        )
    new = copy.deepcopy(old).to("meta")
    names = dict.fromkeys([*entry["shapes"], *new.state_dict()])
    for name in names:
        owner_name, _, last = name.rpartition(".")
        owner, shape = new.get_submodule(owner_name), entry["shapes"].get(name)
        old_tensor = getattr(owner, last)
        if last in owner._buffers:
            owner._buffers[last] = old_tensor.new_empty(shape)
        else:  # a bias may be there in one of the two alone
            owner._parameters[last] = None if shape is None else nn.Parameter(torch.empty(shape))
    for name, part in new.named_modules():
        for number in _NUMBERS_OF_WIDTHS & vars(part).keys() & entry["parts"][name].keys():
            setattr(part, number, entry["parts"][name][number])
    return new


# ---- experts


def _describe_experts(experts: Experts) -> Entry:
    return {"width": experts.width, "widths": list(experts.widths)}


def _build_experts(entry: Entry, mlp: nn.Module) -> Experts:
    return Experts(len(entry["widths"]), entry["width"], entry["widths"], _act_of(mlp))


def _describe_shared_experts(experts: SharedExperts) -> Entry:
    rows = [len(experts.fc1.weight), len(experts.fc2.weight)]
    of_store = {"rows_of_maps": rows, "own_output_weights": experts.own_output_weights}
    return _describe_experts(experts) | of_store


def _build_shared_experts(entry: Entry, mlp: nn.Module) -> SharedExperts:
    width, widths = entry["width"], entry["widths"]
    rows_of_first, rows_of_last = entry["rows_of_maps"]
    output_weights = torch.empty(width, rows_of_last)
    if entry["own_output_weights"]:
        output_weights = [torch.empty(width, neurons) for neurons in widths]
    store = (torch.empty(rows_of_first, width), torch.empty(rows_of_first), output_weights)
    neurons_of_experts = [torch.empty(neurons, dtype=torch.long) for neurons in widths]
    return SharedExperts(store, neurons_of_experts, torch.empty(len(widths), width), _act_of(mlp))


def _act_of(mlp: nn.Module) -> nn.Module:
    """The activation that experts take over from the MLP that they were made of."""
    try:
        return maps_of(mlp).act
    except ValueError as error:
        raise ValueError(f"{error}: give the module as it was first built") from None


def _describe_copies(experts: WholeCopies) -> Entry:
    first = _describe_narrowed(experts.copies[0])
    return {"width": experts.width, "experts": experts.experts, "copy": first}


def _build_copies(entry: Entry, mlp: nn.Module) -> WholeCopies:
    return WholeCopies(_build_narrowed(entry["copy"], mlp), entry["experts"], entry["width"])


# {class name: how to describe such experts, how to build them from an entry and the first MLP}
EXPERTS: dict[str, tuple[Callable[[Any], Entry], Callable[[Entry, nn.Module], nn.Module]]] = {
    "Experts": (_describe_experts, _build_experts),
    "SharedExperts": (_describe_shared_experts, _build_shared_experts),
    "WholeCopies": (_describe_copies, _build_copies),
}

# ---- routers

ROUTERS: dict[str, type[Router]] = {
    router.__name__: router
    for router in (
        *ROUTER_CLASSES.values(),
        GroupRouter,
        SurvivorRouter,
        CentroidRouter,
        PredictorRouter,
        RandomRouter,
        OracleRouter,
        ForcedRouter,
    )
}


def _build_router(entry: Entry, mlp: nn.Module) -> Router:
    settings = {name: value for name, value in entry.items() if name != "class"}
    return _known(ROUTERS, entry["class"], "a router").with_settings(
        settings, None if why_no_neurons(mlp) else _act_of(mlp)
    )


# ---- MoE layers


def _describe_moe(layer: MoELayer) -> Entry:
    of_router, of_experts = type(layer.router).__name__, type(layer.experts).__name__
    _known(ROUTERS, of_router, "a router")
    describe_experts, _ = _known(EXPERTS, of_experts, "experts")
    _known(_LAYERS, type(layer).__name__, "an MoE layer")
    entry = {
        "layer": type(layer).__name__,
        "router": {"class": of_router} | layer.router.settings(),
        "experts": {"class": of_experts} | describe_experts(layer.experts),
        "shared": None if layer.shared is None else _describe_narrowed(layer.shared),
        "dropout": layer.dropout,
        "channels_first": layer.channels_first,
    }
    if isinstance(layer, CompeteLayer):
        entry["rate"] = layer.rate
    return entry


def _build_moe(entry: Entry, mlp: nn.Module) -> MoELayer:
    if isinstance(mlp, MoELayer):
        raise ValueError(
            "the module has another MoE layer there already: give it as it was before upcycling "
            "or extraction"
        )
    of_layer = _known(_LAYERS, entry["layer"], "an MoE layer")
    _, build_experts = _known(EXPERTS, entry["experts"]["class"], "experts")
    experts = build_experts(entry["experts"], mlp)
    shared = None if entry["shared"] is None else _build_narrowed(entry["shared"], mlp)
    router = _build_router(entry["router"], mlp)
    parts = (router, experts, shared, entry["dropout"], entry["channels_first"])
    return of_layer(entry, parts)


def _pruned_layer(entry: Entry, parts: tuple) -> PrunedLayer:
    """Built around plain experts, since E' of some kinds cannot be picked from."""
    router, experts, *others = parts
    numbers = torch.arange(experts.experts)
    stand_in = Experts(experts.experts, experts.width, 1, experts.act)
    layer = PrunedLayer(MoELayer(router, stand_in, *others), numbers)
    layer.experts = experts
    return layer


# {class name: how to make such a layer of an entry and of the parts of a MoELayer}
_LAYERS: dict[str, Callable[[Entry, tuple], MoELayer]] = {
    "MoELayer": lambda entry, parts: MoELayer(*parts),
    "CompeteLayer": lambda entry, parts: CompeteLayer(*parts, rate=entry["rate"]),
    "CopiesLayer": lambda entry, parts: CopiesLayer(*parts),
    "PrunedLayer": _pruned_layer,
}


def _known(registry: Mapping[str, Any], name: str, what: str) -> Any:
    if name not in registry:
        raise ValueError(
            f"{name} is not {what} that a file can describe; these are {', '.join(registry)}"
        )
    return registry[name]


# {word in a file: the kind of layer}
KINDS: dict[str, Kind] = {
    "moe": Kind(lambda module: isinstance(module, MoELayer), _describe_moe, _build_moe),
    "narrowed": Kind(_is_narrowed, _describe_narrowed, _build_narrowed),
}
