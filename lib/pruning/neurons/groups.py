"""Layers whose neurons can be removed, and the groups of weights in them that go together.

A group is a hidden neuron or a dimension of an attention head. Groups of one layer that compete
with each other form a set; dictionaries of scores and of kept indices have one entry a set:

    name of the set           shape    a group holds
    "blocks.0.mlp"            (H,)     of a dense MLP: fc1 row, fc1 bias entry, fc2 column; of a
                                       gated one a row and an entry of the gate, too
    "blocks.0.mlp.experts.2"  (H,)     the same of expert 2 of an MoE layer
    "blocks.0.attn.qk"        (A, C)   rows of Q and of K, with their bias entries, of a head
    "blocks.0.attn.vo"        (A, C)   rows of V with their bias entries, columns of proj

Output biases, norms, embeddings, routers and the classifier belong to no group and stay.

Axis letters: **D** width, **H** hidden width, **E** experts, **A** heads, **C** dimensions of a
head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ...models.experts import Experts
from ...models.mlps import by_neuron, maps_of, why_no_neurons
from ...models.moe import MoELayer
from ...models.plain import check_unshared, why_not_plain
from ...models.upcycle import block_mlps, chosen_mlps

PARTS = ("mlp", "attention", "experts")
# Name of a set, and the tensors (..., groups, members) that its groups hold.
NamedSets = Iterator[tuple[str, list[Tensor]]]


def prunable(
    model: nn.Module,
    parts: Sequence[str] | None = None,
    ignore: Collection[str] = (),
    *,
    modules: Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """Lists the layers whose neurons can be removed, by name.

    parts: of `PARTS`; None stands for all that the model has. ignore: names that are left out.
    modules: patterns of names of MLPs to take instead of the blocks' own, as of `chosen_mlps`.
    Raises ValueError for an unknown part, for one that the model lacks, for a pattern that fits no
    name, and for a layer that cannot be pruned or shares parameters with another, by name.
    """
    if unknown := set(parts or ()) - set(PARTS):
        raise ValueError(
            f"parts={', '.join(sorted(unknown))} is unknown: valid are {', '.join(PARTS)}"
        )
    candidates = [
        candidate
        for candidate in _candidates(model, modules)
        if (parts is None or candidate[0] in parts) and candidate[1] not in ignore
    ]
    present = {part for part, _, _ in candidates}
    if absent := [part for part in parts or () if part not in present]:
        raise ValueError(
            f"{type(model).__name__} has no {' and no '.join(absent)} to prune: it has "
            f"{', '.join(parts_in(model)) or 'none of ' + ', '.join(PARTS)}"
            + ("; MLPs of other names are given by modules=" if "mlp" in absent else "")
        )
    for part, name, module in candidates:
        if reason := _refusal(part, module):
            raise ValueError(
                f"{name} ({type(module).__name__}) cannot be pruned: {reason}. Leave it out with "
                "parts= or ignore="
            )
    if not candidates:
        raise ValueError(
            f"{type(model).__name__} has no block MLP, experts or attention to prune: a timm ViT "
            "has"
        )
    found = {name: module for _, name, module in candidates}
    check_unshared(model, found.items())
    return found


def names_of(
    model: nn.Module, parts: Sequence[str], modules: Sequence[str] | None = None
) -> list[str]:
    """Lists the names of all layers of these parts, whether they can be pruned or not.

    modules: as of `prunable`.
    """
    return [name for part, name, _ in _candidates(model, modules) if part in parts]


def parts_in(model: nn.Module) -> tuple[str, ...]:
    """Lists those of `PARTS` that the model has, whether they can be pruned or not."""
    present = {part for part, _, _ in _candidates(model)}
    return tuple(part for part in PARTS if part in present)


def supported(model: nn.Module) -> dict[str, nn.Module]:
    """Lists the layers whose neurons can be removed, by name, and leaves out all others.

    MLPs that are none of the blocks' own, and experts in their place, are among them: they are
    pruned where they are named.
    """
    of_blocks = {
        name: module for part, name, module in _candidates(model) if not _refusal(part, module)
    }
    others = {
        name: module
        for name, module in model.named_modules()
        if not why_no_neurons(module) or not _refusal("experts", module)
    }
    return of_blocks | {name: others[name] for name in others if name not in of_blocks}


def _candidates(
    model: nn.Module, modules: Sequence[str] | None = None
) -> Iterator[tuple[str, str, nn.Module]]:
    """Yields (part, name, module) of each layer of a kind that is pruned, if only its form fits."""
    for name, mlp in block_mlps(model) if modules is None else chosen_mlps(model, modules):
        if isinstance(mlp, nn.Identity):  # a block without an MLP
            continue
        if not isinstance(mlp, MoELayer):
            yield "mlp", name, mlp
            continue
        yield "experts", f"{name}.experts", mlp.experts
        if mlp.shared is not None:
            yield "mlp", f"{name}.shared", mlp.shared
    for name, module in model.named_modules():
        if name.endswith(".attn"):
            yield "attention", name, module


def _refusal(part: str, module: nn.Module) -> str | None:
    """Says why a layer cannot be pruned; None if it can."""
    if part == "mlp":
        reason = why_no_neurons(module)
        return reason and f"it {reason}"
    if part == "attention":
        return _refusal_of_attention(module)
    return None if type(module) is Experts else "only lib's own Experts are known"


def _refusal_of_attention(module: nn.Module) -> str | None:
    if type(module) is not Attention:
        return "known is timm.layers.Attention, with qkv and proj"
    if not isinstance(module.q_norm, nn.Identity) or not isinstance(module.k_norm, nn.Identity):
        return "it normalises queries and keys over all dimensions of a head (qk_norm)"
    if not isinstance(module.norm, nn.Identity):
        return "it normalises over all dimensions of all heads before proj (scale_norm)"
    if module.gate is not None:
        return "it is gated, and the gate has rows of its own"
    reason = why_not_plain(module)
    return reason and f"it {reason}"


def groups_of(
    name: str,
    module: nn.Module,
    value: Callable[[Tensor], Tensor] = Tensor.detach,
    *,
    expert: int | None = None,
) -> NamedSets:
    """Yields each set of groups of a module with the tensors that its groups hold.

    name: of the module. value: maps a parameter to a tensor of its shape, for example to its
    product with the gradient. expert: the only one to be listed, of a module of Experts.
    """
    if isinstance(module, Experts):
        for e, (w1, b1, w2, _) in enumerate(module.each(value)):
            if expert in (None, e):
                rows = [by_neuron(part, module.gated) for part in (w1, b1)]
                yield f"{name}.{e}", [*rows, w2.t()]
    elif not isinstance(module, Attention):
        yield name, maps_of(module).tensors_of_neurons(value)
    else:
        split = (3, module.num_heads, module.head_dim)
        # (3 A C, D) -> Q, K and V, each a list of tensors (A, C, members).
        q, k, v = ([weight] for weight in value(module.qkv.weight).unflatten(0, split))
        if module.qkv.bias is not None:
            biases = value(module.qkv.bias).unflatten(0, split)
            for tensors, bias in zip((q, k, v), biases, strict=True):
                tensors.append(bias.unsqueeze(-1))
        yield f"{name}.qk", q + k
        yield f"{name}.vo", [*v, value(module.proj.weight).t().unflatten(0, split[1:])]


def matrices_of(
    name: str,
    module: nn.Module,
    value: Callable[[Tensor], Tensor] = Tensor.detach,
    *,
    expert: int | None = None,
) -> NamedSets:
    """Yields each weight matrix of a module as a set of its own, whose groups are its entries.

    Arguments as of `groups_of`; the names are "blocks.0.mlp.fc1", "blocks.0.mlp.experts.2.fc1",
    "blocks.0.attn.qkv". Matrices of experts are views of their stacked parameters.
    """
    if isinstance(module, Experts):
        for e, (w1, _, w2, _) in enumerate(module.each(value)):
            if expert in (None, e):
                yield f"{name}.{e}.fc1", [w1]
                yield f"{name}.{e}.fc2", [w2]
        return
    if isinstance(module, Attention):
        matrices = [(layer, value(getattr(module, layer).weight)) for layer in ("qkv", "proj")]
    else:
        matrices = maps_of(module).matrices(value)
    for layer, matrix in matrices:
        yield f"{name}.{layer}", [matrix]


def weights_of_groups(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Maps the name of each set of groups to the number of weights and biases in one group."""
    return {
        set_name: sum(tensor.shape[-1] for tensor in tensors)
        for name, module in modules.items()
        for set_name, tensors in groups_of(name, module)
    }


def shapes_of(modules: Mapping[str, nn.Module]) -> dict[str, torch.Size]:
    """Maps the name of each set of groups to the shape of its scores: (H,) or (A, C)."""
    return {
        set_name: tensors[0].shape[:-1]
        for name, module in modules.items()
        for set_name, tensors in groups_of(name, module)
    }
