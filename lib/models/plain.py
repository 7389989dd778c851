"""What an MLP must be, beside its kind, for another module to take its place: its class and its own
parameters say what it computes, and nothing else holds on to them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

# what holds another model, by name, since the module of one of them takes long to import
WRAPPERS = {
    "DistributedDataParallel": "model.module",
    "DataParallel": "model.module",
    "OptimizedModule": "model._orig_mod",
}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def why_not_plain(mlp: nn.Module) -> str | None:
    """Says why class and parameters do not tell what an MLP computes; None if they do."""
    for name, part in mlp.named_modules():
        forward = vars(part).get("forward")
        # packed weights compute what the class's forward does
        if forward is not None and not getattr(forward, "is_of_class", False):
            return (
                f"has a forward of its own{_at(name)}, set on the instance and not by its class, "
                "which would be lost: delete it (del module.forward), or write a subclass"
            )
        if not isinstance(part, nn.Linear | nn.Conv2d):
            continue
        if type(part).forward not in (nn.Linear.forward, nn.Conv2d.forward):
            return (
                f"has a {type(part).__name__}{_at(name)}, whose class computes something of its "
                "own, which would be lost: merge it into a plain layer of torch.nn first"
            )
        for kind in ("weight", "bias"):
            if kind not in part._parameters:
                place = f"{name}.{kind}" if name else kind
                return f"has a {place} that is computed from other parameters: {made_plain(kind)}"
    return None


def check_unwrapped(model: nn.Module) -> None:
    """Raises ValueError for a wrapper, which goes on with what it knew of the model it wraps: old
    parameters, compiled passes, names."""
    kind = type(model).__name__
    if kind in WRAPPERS:
        raise ValueError(
            f"a {kind} wraps a model: give {WRAPPERS[kind]}, and wrap what is returned"
        )


def made_plain(kind: str) -> str:
    """Says how a computed weight becomes a parameter. kind: what the layer calls it."""
    return (
        f"torch.nn.utils.parametrize.remove_parametrizations(layer, {kind!r}) makes it one after "
        "spectral_norm and the like, torch.nn.utils.remove_weight_norm after weight_norm, "
        f"torch.nn.utils.prune.remove(layer, {kind!r}) after torch.nn.utils.prune"
    )


def check_hooks(name: str, mlp: nn.Module) -> None:
    """Raises ValueError for an MLP with hooks, which experts made of it would not carry."""
    for part_name, part in mlp.named_modules():
        if any(getattr(part, hooks) for hooks in _HOOKS):
            raise ValueError(
                f"{name} has hooks{_at(part_name)}, which experts made of it would not carry: "
                "remove them (handle.remove()), and register them anew on what is returned"
            )


def check_unshared(model: nn.Module, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raises ValueError for a layer, by name, whose parameters the model has elsewhere, too.

    Only one of the two places would be changed.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for name, layer in layers:
        for parameter in layer.parameters():
            others = [n for n in names.get(id(parameter), ()) if not n.startswith(f"{name}.")]
            if others:
                raise ValueError(
                    f"{name} shares parameters with {others[0]}, and only one of them would be "
                    "changed: give each its own first, model.set_submodule(name, "
                    "copy.deepcopy(model.get_submodule(name)))"
                )


def _at(name: str) -> str:
    return f" at {name}" if name else ""
