"""Physical removal of neurons and attention dimensions, and shapes of pruned models.

`remove` makes layers smaller; `fit_shapes` gives an unpruned model the shapes that a saved state
of a pruned one has. Both go by the sets of groups of `groups`.

Axis letters: **D** width, **H** hidden width, **E** experts, **A** heads, **C** dimensions of a
head before removal, **C'** after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from timm.layers import Attention
from torch import Tensor, nn

from ...models.experts import Experts
from ...models.mlps import maps_of, rows_of_neurons
from .groups import shapes_of, supported


def remove(model: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """Removes, in place, all groups but those in `keep`; returns the model.

    keep: rising indices by name of a set, as `keep_indices` makes them. A set without an entry
    keeps all its groups; `.qk` and `.vo` of one attention keep equally many dimensions a head.

    Parameters are new ones (an optimiser made before holds the old), frozen if the old were.
    Queries take up the factor between the old and the new scale of the attention, so that removed
    zeros change nothing. Experts left with unequal widths lie flat. Raises ValueError, before
    anything is changed, for unknown names and for indices that do not fit.
    """
    modules = supported(model)
    shapes = shapes_of(modules)
    for set_name, index in keep.items():
        if set_name not in shapes:
            raise ValueError(
                f"the model has no groups {set_name!r} to keep some of; it has "
                f"{', '.join(shapes) or 'none at all'}"
            )
        _check(set_name, index, shapes[set_name], keep)
    for name, module in modules.items():
        narrowed = _narrowed(name, module, keep)
        if narrowed is not module:
            model.set_submodule(name, narrowed)
    return model


def _check(set_name: str, index: Tensor, shape: torch.Size, keep: Mapping[str, Tensor]) -> None:
    """Raises ValueError if the indices of a set do not fit the shape (..., n) of its scores."""
    groups = shape[-1]
    if index.shape[:-1] != shape[:-1] or index.ndim != len(shape) or not index.numel():
        raise ValueError(
            f"{set_name}: indices of shape {tuple(index.shape)} for groups of shape "
            f"{tuple(shape)}: all axes but the last must agree, and at least 1 is kept (a layer "
            "without neurons or a head without dimensions is none)"
        )
    if index.min() < 0 or index.max() >= groups or (index.diff(dim=-1) <= 0).any():
        raise ValueError(
            f"{set_name}: indices must rise, without doubles, within 0..{groups - 1}; got "
            f"{index.tolist()}"
        )
    attention, _, half = set_name.rpartition(".")
    if half in ("qk", "vo"):
        other = keep.get(f"{attention}.{'vo' if half == 'qk' else 'qk'}")
        if other is None or other.shape != index.shape:
            other_size = "all" if other is None else other.shape[-1]
            raise ValueError(
                f"{attention}: {half} keeps {index.shape[-1]} dimensions a head and the other of "
                f"qk and vo {other_size}: timm's heads have one size, so name both, with equally "
                "many"
            )


# ---- layers made narrower


def _narrowed(name: str, module: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """Returns the module, narrowed in place, or new Experts to put in its place.

    A module whose sets have no entry in `keep` is returned as it is.
    """
    if isinstance(module, Experts):
        return _narrowed_experts(name, module, keep)
    if isinstance(module, Attention):
        if f"{name}.qk" in keep:
            _narrow_attention(module, keep[f"{name}.qk"], keep[f"{name}.vo"])
    elif name in keep:
        maps_of(module).keep(keep[name])
    return module


def _narrowed_experts(name: str, experts: Experts, keep: Mapping[str, Tensor]) -> Experts:
    set_names = [f"{name}.{e}" for e in range(experts.experts)]
    if not any(set_name in keep for set_name in set_names):
        return experts
    neurons_of_experts = [
        keep.get(set_name, torch.arange(width)).to(experts.fc1.weight.device)
        for set_name, width in zip(set_names, experts.widths, strict=True)
    ]
    parts = []
    with torch.no_grad():
        for neurons, (w1, b1, w2, b2) in zip(neurons_of_experts, experts.each(), strict=True):
            rows = rows_of_neurons(neurons, w2.shape[1], experts.gated)
            parts.append((w1[rows], b1[rows], w2[:, neurons], b2))
        narrowed = Experts.of(parts, experts.act)
    for new, old in zip(narrowed.parameters(), experts.parameters(), strict=True):
        new.requires_grad_(old.requires_grad)
    return narrowed.train(experts.training)


def _narrow_attention(attention: Attention, keep_qk: Tensor, keep_vo: Tensor) -> None:
    """Keeps, in place, the (A, C') dimensions `keep_qk` of Q and K, and `keep_vo` of V and proj."""
    heads, old_dim, new_dim = attention.num_heads, attention.head_dim, keep_qk.shape[-1]
    device = attention.qkv.weight.device
    keep_qk, keep_vo = keep_qk.to(device), keep_vo.to(device)
    head = torch.arange(heads, device=device).unsqueeze(1)  # (A, 1), beside the (A, C') indices
    # The fused form divides by the root of the new head size, whatever `scale` says.
    factor = (new_dim / old_dim) ** 0.5

    def of_qkv(tensor: Tensor) -> Tensor:
        q, k, v = tensor.unflatten(0, (3, heads, old_dim))  # (3 A C, ...) -> three of (A, C, ...)
        narrowed = torch.stack([q[head, keep_qk] * factor, k[head, keep_qk], v[head, keep_vo]])
        return narrowed.flatten(0, 2)  # (3, A, C', ...) -> (3 A C', ...)

    def of_proj(tensor: Tensor) -> Tensor:
        if tensor.ndim == 1:  # the output bias
            return tensor
        return tensor.unflatten(1, (heads, old_dim))[:, head, keep_vo].flatten(1)  # (D, A C')

    _resize(attention.qkv, of_qkv)
    _resize(attention.proj, of_proj)
    attention.head_dim, attention.attn_dim = new_dim, heads * new_dim
    attention.scale = attention.scale / factor


def _resize(linear: nn.Linear, narrow: Callable[[Tensor], Tensor]) -> None:
    """Replaces the weight and the bias of a linear map by what `narrow` makes of each."""
    for name, old in list(linear.named_parameters()):
        new = nn.Parameter(narrow(old.detach()).contiguous(), requires_grad=old.requires_grad)
        setattr(linear, name, new)
    linear.out_features, linear.in_features = linear.weight.shape


# ---- shapes of a saved state


def fit_shapes(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Narrows an unpruned model, in place, to the shapes in the state of a pruned one; returns it.

    Structure only: load the state afterwards. Raises ValueError with the module's name, before
    anything is changed, if the two differ in more than what `remove` takes away (depth, number of
    experts, heads, width).
    """
    modules, names = supported(model), {name for name, _ in model.named_modules()}
    for key in state:
        owner, _, layer = key.rpartition(".")[0].rpartition(".")
        if layer in ("fc1", "fc1_x", "qkv") and owner not in names:
            raise ValueError(
                f"{owner}: the state has it and the model does not: build the model as the saved "
                "one was built, of the same depth and with the same MoE layers, before it was "
                "pruned"
            )
    keep: dict[str, Tensor] = {}
    for name, module in modules.items():
        shapes = shapes_of({name: module})
        for set_name, size in _sizes_in(state, name, module).items():
            *leading, groups = shapes[set_name]
            if size > groups:
                raise ValueError(
                    f"{set_name}: the state has {size} groups, the model {groups}: it must be the "
                    "unpruned one"
                )
            if size < groups:  # any groups, since their weights are loaded over
                keep[set_name] = torch.arange(size).expand(*leading, size)
        _check_state(state, name, module, keep)
    return remove(model, keep)


def _check_state(
    state: Mapping[str, Tensor], name: str, module: nn.Module, keep: Mapping[str, Tensor]
) -> None:
    """Raises ValueError if the module, narrowed to `keep`, differs in shape from the state."""
    # A narrowed copy without data: any other difference shows in its shapes.
    narrowed = _narrowed(name, copy.deepcopy(module).to("meta"), keep)
    expected = narrowed.state_dict(prefix=f"{name}.")
    wrong = [
        key
        for key, tensor in expected.items()
        if key not in state or state[key].shape != tensor.shape
    ]
    if wrong:
        raise ValueError(
            f"{name}: no removal gives the state's {', '.join(wrong)}: {_shapes_in(state, wrong)}, "
            f"where the model pruned to it has {_shapes_in(expected, wrong)}"
        )


def _shapes_in(state: Mapping[str, Tensor], keys: Sequence[str]) -> str:
    return ", ".join(str(tuple(state[key].shape)) if key in state else "none" for key in keys)


def _sizes_in(state: Mapping[str, Tensor], name: str, module: nn.Module) -> dict[str, int]:
    """Maps the name of each set of one module to the number of groups that a state has of it."""
    if isinstance(module, Attention):
        weight = state.get(f"{name}.qkv.weight")
        size_in_state = None if weight is None else weight.shape[0]
    elif isinstance(module, Experts):
        size_in_state = Experts.widths_in(state, f"{name}.")
    else:
        size_in_state = maps_of(module).hidden_in(state, f"{name}.")
    if size_in_state is None:
        raise ValueError(
            f"{name}: the state has no {type(module).__name__} there: build the model as the saved "
            "one was built, of the same depth and with the same MoE layers, before it was pruned"
        )
    if isinstance(module, Experts):
        if len(size_in_state) != module.experts:
            raise ValueError(
                f"{name}: the state has {len(size_in_state)} experts, the model {module.experts}"
            )
        return {f"{name}.{e}": width for e, width in enumerate(size_in_state)}
    if not isinstance(module, Attention):
        return {name: size_in_state}
    dims, rest = divmod(size_in_state, 3 * module.num_heads)
    if rest:
        raise ValueError(
            f"{name}: the state's {size_in_state} rows of qkv are no whole number of dimensions "
            f"for the model's {module.num_heads} heads: build it with the heads of the saved one"
        )
    return {f"{name}.qk": dims, f"{name}.vo": dims}
