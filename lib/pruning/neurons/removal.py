"""Layers that can be cut, the groups in them that go together, and their physical removal.

A group is a hidden neuron or a dimension of an attention head. One entry of a dictionary stands for
each set of rival groups:

    "blocks.0.mlp"            (H,)       hidden neurons of a dense MLP: fc1 row and bias entry, fc2 column
    "blocks.0.mlp.experts.2"  (H,)       the same of expert 2 of a MoE layer
    "blocks.0.attn.qk"        (A, C)     dimensions of each head: rows of Q and of K, with their bias entries
    "blocks.0.attn.vo"        (A, C)     rows of V with their bias entries, columns of proj

Output biases, norms, embeddings, routers and the head stay. `fit_shapes` reads off a saved state
what a pruned model looks like. Axis letters: **D** width, **H** hidden width, **E** experts, **A**
heads, **C** dimensions of a head.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from ...models.experts import Experts
from ...models.moe import MoELayer
from ...models.upcycle import REFUSED, block_mlps

PARTS = ("mlp", "attention", "experts")
Pieces = Iterator[
    tuple[str, list[Tensor]]
]  # name of a set of groups, and tensors (..., groups, members)


def remove(model: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """Cut out, in place, all groups but those in `keep`; returns the model. keep: rising indices by
    name, as `keep_indices` makes them; a name that is not there keeps all, and `.qk` and `.vo` of
    one attention keep equally many dimensions a head.

    Parameters are new ones (an optimiser made before holds the old), frozen if the old were.
    Queries take up the factor between the attention's old and new scale, so that removed zeros
    change nothing. Experts left with unequal widths lie flat. Raises ValueError, before anything is
    changed, for unknown names and for indices that do not fit.
    """
    modules = supported(model)
    shapes = shapes_of(modules)
    for key, index in keep.items():
        if key not in shapes:
            raise ValueError(
                f"the model has no groups {key!r} to keep some of; it has {', '.join(shapes) or 'none at all'}"
            )
        _check(key, index, shapes[key], keep)
    for name, module in modules.items():
        cut = _narrowed(name, module, keep)
        if cut is not module:
            model.set_submodule(name, cut)
    return model


def fit_shapes(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Cut the MLPs, experts and attentions of an unpruned model, in place, to their shapes in the
    state of a pruned one.

    Structure only: load the state afterwards. Returns the model. Raises ValueError with the
    module's name, before anything is changed, if the two differ in more than what `remove` takes
    away (depth, number of experts, heads, width).
    """
    modules, names, keep = supported(model), {name for name, _ in model.named_modules()}, {}
    for key in state:
        owner, _, kind = key.rpartition(".")[0].rpartition(".")
        if kind in ("fc1", "qkv") and owner not in names:
            raise ValueError(
                f"{owner}: the state has it and the model does not: build the model as the saved one was built, "
                "of the same depth and with the same MoE layers, before it was pruned"
            )
    for name, module in modules.items():
        full = shapes_of({name: module})
        for key, size in _sizes_in(state, name, module).items():
            if size > full[key][-1]:
                raise ValueError(
                    f"{key}: the state has {size} groups, the model {full[key][-1]}: it must be the unpruned one"
                )
            if size < full[key][-1]:
                keep[key] = torch.arange(size).expand(*full[key][:-1], size)
        # A cut copy without data: any other difference shows in its shapes.
        trial = _narrowed(name, copy.deepcopy(module).to("meta"), keep).state_dict(
            prefix=f"{name}."
        )
        wrong = [
            key for key, held in trial.items() if key not in state or state[key].shape != held.shape
        ]
        if wrong:
            raise ValueError(
                f"{name}: no cut gives the state's {', '.join(wrong)}: {_listed(state, wrong)}, where the model cut "
                f"to it has {_listed(trial, wrong)}"
            )
    return remove(model, keep)


def _sizes_in(state: Mapping[str, Tensor], name: str, module: nn.Module) -> dict[str, int]:
    """How many groups of each set of one module a state holds."""
    part = "qkv" if isinstance(module, Attention) else "fc1"
    weight = state.get(f"{name}.{part}.weight")
    widths = Experts.widths_in(state, f"{name}.") if isinstance(module, Experts) else ()
    if weight is None or widths is None:
        raise ValueError(
            f"{name}: the state has no {type(module).__name__} there: build the model as the saved one was built, "
            "of the same depth and with the same MoE layers, before it was pruned"
        )
    if isinstance(module, Experts):
        if len(widths) != module.experts:
            raise ValueError(
                f"{name}: the state has {len(widths)} experts, the model {module.experts}"
            )
        return {f"{name}.{e}": h for e, h in enumerate(widths)}
    if isinstance(module, Mlp):
        return {name: weight.shape[0]}
    dims, rest = divmod(weight.shape[0], 3 * module.num_heads)
    if rest:
        raise ValueError(
            f"{name}: the state's {weight.shape[0]} rows of qkv are no whole number of dimensions for the model's "
            f"{module.num_heads} heads: build it with the heads of the saved one"
        )
    return {f"{name}.qk": dims, f"{name}.vo": dims}


def _listed(state: Mapping[str, Tensor], keys: Sequence[str]) -> str:
    return ", ".join(str(tuple(state[key].shape)) if key in state else "none" for key in keys)


def _check(key: str, index: Tensor, shape: torch.Size, keep: Mapping[str, Tensor]) -> None:
    n = shape[-1]
    if index.shape[:-1] != shape[:-1] or index.ndim != len(shape) or not index.numel():
        raise ValueError(
            f"{key}: indices of shape {tuple(index.shape)} for groups of shape {tuple(shape)}: all axes but the "
            "last must agree, and at least 1 is kept (a layer without neurons or a head without dimensions is none)"
        )
    if index.min() < 0 or index.max() >= n or (index.diff(dim=-1) <= 0).any():
        raise ValueError(
            f"{key}: indices must rise, without doubles, within 0..{n - 1}; got {index.tolist()}"
        )
    name, _, half = key.rpartition(".")
    if half in ("qk", "vo"):
        other = keep.get(f"{name}.{'vo' if half == 'qk' else 'qk'}")
        if other is None or other.shape != index.shape:
            found = "all" if other is None else other.shape[-1]
            raise ValueError(
                f"{name}: {half} keeps {index.shape[-1]} dimensions a head and the other of qk and vo {found}: "
                "timm's heads have one size, so name both, with equally many"
            )


def _narrowed(name: str, module: nn.Module, keep: Mapping[str, Tensor]) -> nn.Module:
    """The module, cut in place, or new Experts in its place; the module as it is if `keep` does not
    name it."""
    if isinstance(module, Experts):
        keys = [f"{name}.{e}" for e in range(module.experts)]
        if not any(key in keep for key in keys):
            return module
        rows = [
            keep.get(key, torch.arange(h)).to(module.fc1.weight.device)
            for key, h in zip(keys, module.widths, strict=True)
        ]
        with torch.no_grad():
            cut = Experts.of(
                [
                    (w1[r], b1[r], w2[:, r], b2)
                    for r, (w1, b1, w2, b2) in zip(rows, module.each(), strict=True)
                ],
                module.act,
            )
        for new, old in zip(cut.parameters(), module.parameters(), strict=True):
            new.requires_grad_(old.requires_grad)
        return cut.train(module.training)
    if isinstance(module, Mlp) and name in keep:
        rows = keep[name].to(module.fc1.weight.device)
        _resize(module.fc1, lambda held: held[rows])
        _resize(module.fc2, lambda held: held[:, rows] if held.ndim == 2 else held)
    if isinstance(module, Attention) and f"{name}.qk" in keep:
        _narrow_attention(module, keep[f"{name}.qk"], keep[f"{name}.vo"])
    return module


def _narrow_attention(attention: Attention, qk: Tensor, vo: Tensor) -> None:
    heads, old, new = attention.num_heads, attention.head_dim, qk.shape[-1]
    where = [index.to(attention.qkv.weight.device) for index in (qk, qk, vo)]
    head = torch.arange(heads, device=where[0].device).unsqueeze(1)
    # The fused form divides by the root of the new head size, whatever `scale` says.
    factor = (new / old) ** 0.5

    def of_qkv(held: Tensor) -> Tensor:
        q, k, v = (
            part[head, index]
            for part, index in zip(held.unflatten(0, (3, heads, old)), where, strict=True)
        )
        return torch.stack([q * factor, k, v]).flatten(0, 2)

    def of_proj(held: Tensor) -> Tensor:
        return (
            held.unflatten(1, (heads, old))[:, head, where[2]].flatten(1)
            if held.ndim == 2
            else held
        )

    _resize(attention.qkv, of_qkv)
    _resize(attention.proj, of_proj)
    attention.head_dim, attention.attn_dim, attention.scale = (
        new,
        heads * new,
        attention.scale / factor,
    )


def _resize(linear: nn.Linear, cut: Callable[[Tensor], Tensor]) -> None:
    for name, held in list(linear.named_parameters()):
        setattr(
            linear,
            name,
            nn.Parameter(cut(held.detach()).contiguous(), requires_grad=held.requires_grad),
        )
    linear.out_features, linear.in_features = linear.weight.shape


# ---- layers and their groups


def prunable(model: nn.Module, parts: Sequence[str] | None = None) -> dict[str, nn.Module]:
    """The layers that can be cut, by name, of the asked-for PARTS (None: of all that the model
    has).

    Raises ValueError for an unknown part, for one that the model lacks, and for a layer that cannot
    be cut, by name.
    """
    if unknown := set(parts or ()) - set(PARTS):
        raise ValueError(
            f"parts={', '.join(sorted(unknown))} is unknown: valid are {', '.join(PARTS)}"
        )
    found = [each for each in _candidates(model) if parts is None or each[0] in parts]
    if absent := [part for part in parts or () if part not in {each[0] for each in found}]:
        raise ValueError(f"{type(model).__name__} has no {' and no '.join(absent)} to prune")
    for part, name, module in found:
        if reason := _refusal(part, module):
            raise ValueError(
                f"{name} ({type(module).__name__}) cannot be pruned: {reason}. Leave it out with parts="
            )
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no block MLP, experts or attention to prune: a timm ViT has"
        )
    return {name: module for _, name, module in found}


def parts_in(model: nn.Module) -> tuple[str, ...]:
    """Those of PARTS that the model has, whether they can be cut or not."""
    found = {part for part, _, _ in _candidates(model)}
    return tuple(part for part in PARTS if part in found)


def supported(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be cut, by name; others are passed over in silence."""
    return {name: module for part, name, module in _candidates(model) if not _refusal(part, module)}


def _candidates(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    for name, mlp in block_mlps(model):
        if not isinstance(mlp, MoELayer):
            yield "mlp", name, mlp
            continue
        yield "experts", f"{name}.experts", mlp.experts
        if getattr(mlp, "shared", None) is not None:
            yield "mlp", f"{name}.shared", mlp.shared
    for name, module in model.named_modules():
        if name.endswith(".attn"):
            yield "attention", name, module


def _refusal(part: str, module: nn.Module) -> str | None:
    """Why a layer cannot be cut, or None."""
    kind = type(module)
    if part == "experts":
        return None if kind is Experts else "only lib's own Experts are known"
    if part == "mlp":
        if (
            kind is not Mlp
            or not isinstance(module.fc1, nn.Linear)
            or not isinstance(module.fc2, nn.Linear)
        ):
            return f"it is {REFUSED.get(kind.__name__, 'another kind')}; known is timm.layers.Mlp with Linear fc1 and fc2"
        return (
            None
            if isinstance(module.norm, nn.Identity)
            else "a norm inside it depends on all hidden neurons at once"
        )
    if kind is not Attention:
        return "known is timm.layers.Attention, with qkv and proj"
    if not isinstance(module.q_norm, nn.Identity) or not isinstance(module.k_norm, nn.Identity):
        return "it normalises queries and keys over all dimensions of a head (qk_norm)"
    if not isinstance(module.norm, nn.Identity):
        return "it normalises over all dimensions of all heads before proj (scale_norm)"
    return None if module.gate is None else "it is gated, and the gate has rows of its own"


def groups_of(
    name: str,
    module: nn.Module,
    value: Callable[[Tensor], Tensor] = Tensor.detach,
    *,
    expert: int | None = None,
) -> Pieces:
    """What the groups of a module hold: `value` of each parameter, a tensor of its shape, cut up;
    of `expert` alone if given."""
    if isinstance(module, Experts):
        for e, (w1, b1, w2, _) in enumerate(module.each(value)):
            if expert in (None, e):
                yield f"{name}.{e}", [w1, b1.unsqueeze(-1), w2.t()]
    elif isinstance(module, Mlp):
        bias = [] if module.fc1.bias is None else [value(module.fc1.bias).unsqueeze(-1)]
        yield name, [value(module.fc1.weight), *bias, value(module.fc2.weight).t()]
    else:
        split = (3, module.num_heads, module.head_dim)
        q, k, v = ([part] for part in value(module.qkv.weight).unflatten(0, split))
        if module.qkv.bias is not None:
            for own, bias in zip(
                (q, k, v), value(module.qkv.bias).unflatten(0, split), strict=True
            ):
                own.append(bias.unsqueeze(-1))
        yield f"{name}.qk", q + k
        yield f"{name}.vo", [*v, value(module.proj.weight).t().unflatten(0, split[1:])]


def matrices_of(
    name: str,
    module: nn.Module,
    value: Callable[[Tensor], Tensor] = Tensor.detach,
    *,
    expert: int | None = None,
) -> Pieces:
    """The same with each matrix by itself, its entries being the groups; of experts these are
    slices of their parameters."""
    if isinstance(module, Experts):
        for e, (w1, _, w2, _) in enumerate(module.each(value)):
            if expert in (None, e):
                yield f"{name}.{e}.fc1", [w1]
                yield f"{name}.{e}.fc2", [w2]
        return
    for part in ("fc1", "fc2") if isinstance(module, Mlp) else ("qkv", "proj"):
        yield f"{name}.{part}", [value(getattr(module, part).weight)]


def shapes_of(modules: Mapping[str, nn.Module]) -> dict[str, torch.Size]:
    """The shape of the scores of each set of groups: (H,) or (A, C)."""
    return {
        key: pieces[0].shape[:-1]
        for name, module in modules.items()
        for key, pieces in groups_of(name, module)
    }
