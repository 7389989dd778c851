"""What kinds of MLPs timm has, and where each keeps its hidden neurons.

A neuron is a row of the first map, with its bias entry, and a column of the last one. In a gated
MLP (SwiGLU, GLU, GeGLU) it has two rows: hidden = act(gate row x) * (value row x). `maps_of` is the
one place that knows what a kind calls its maps; everything else reads and narrows through it.

Axis letters: **B** images, **N** tokens of an image, **D** width, **H** hidden width, **S** neurons
that stay.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from timm.layers import ConvMlp, GatedMlp, GluMlp, Mlp, SwiGLU
from timm.models.gemma4_vit import Gemma4GatedMlp
from timm.models.inception_next import ConvMlp as InceptionNeXtMlp
from torch import Tensor, nn

from .plain import why_not_plain

Value = Callable[[Tensor], Tensor]  # maps a parameter to a tensor of its shape

# What a block calls the factor of its MLP's output: a parameter, or a module with `gamma` or
# `scale`. Names that in some blocks are of attention (ls1, gamma_1, gamma_xca) are not among them.
LAYER_SCALES = (
    "ls2",
    "gamma_2",
    "gamma2",
    "layer_scale2",
    "layer_scale_2",
    "layer_scale",
    "ls",
    "gamma",
)


class GatedActivation(nn.Module):
    """Multiplies act(gate) with value, of which the first half of an axis is the gate.

    Experts of a gated MLP have it in the place of an activation function.
    """

    def __init__(self, act: nn.Module):
        super().__init__()
        self.act = act

    def forward(self, x: Tensor, dim: int = -1) -> Tensor:
        """Computes (..., H) from (..., 2 H); the axis is `dim`."""
        gate, value = x.chunk(2, dim)
        return self.act(gate) * value


class MlpWeights(NamedTuple):
    """Weights of an MLP: w1 (H, D), b1 (H,), w2 (D, H), b2 (D,); None where it has no bias.

    Gated: w1 (2 H, D) and b1 (2 H,), the gate's rows first.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


def rows_of_neurons(neurons: Tensor, hidden: int, gated: bool) -> Tensor:
    """Lists the rows of w1 that some neurons (S,) of `hidden` have: (S,), or (2 S,) if gated."""
    return torch.cat([neurons, neurons + hidden]) if gated else neurons


def by_neuron(rows: Tensor, gated: bool) -> Tensor:
    """Gives each neuron what it has in w1 or b1: (H, members), of all its rows."""
    if gated:  # (2 H, ...) -> (H, 2 ...)
        return rows.unflatten(0, (2, -1)).transpose(0, 1).flatten(1)
    return rows if rows.ndim > 1 else rows.unsqueeze(-1)


@dataclass(frozen=True)
class MlpMaps:
    """Says which maps an MLP is made of, and reads or narrows its hidden neurons through them.

    Maps are linear, on tensors (..., D), or convolutions of one pixel, on (B, D, height, width);
    their weights are handed out as matrices.
    """

    mlp: nn.Module
    first: str  # name of the map of the values
    last: str
    gate: str | None = None  # name of the gate's map; equals `first` where one map has both halves
    gate_is_second: bool = False  # of these two halves

    @property
    def gated(self) -> bool:
        """Says whether a neuron has a gate row."""
        return self.gate is not None

    @property
    def names(self) -> list[str]:
        """Lists the names of the maps."""
        separate_gate = [] if self.gate in (None, self.first) else [self.gate]
        return [*separate_gate, self.first, self.last]

    @property
    def last_map(self) -> nn.Module:
        """Returns the map from hidden activations to outputs."""
        return self.mlp.get_submodule(self.last)

    @property
    def channels_first(self) -> bool:
        """Says whether inputs are (B, D, height, width)."""
        return isinstance(self.last_map, nn.Conv2d)

    @property
    def width(self) -> int:
        """Returns D of the inputs."""
        return self.mlp.get_submodule(self.first).weight.shape[1]

    @property
    def outputs(self) -> int:
        """Returns D of the outputs."""
        return self.last_map.weight.shape[0]

    @property
    def hidden(self) -> int:
        """Returns H."""
        return self.last_map.weight.shape[1]

    @property
    def act(self) -> nn.Module:
        """Returns the function between the maps: (..., H) or, gated, (..., 2 H) -> (..., H)."""
        return GatedActivation(self.mlp.act) if self.gated else self.mlp.act

    def weights(self, value: Value = Tensor.detach) -> MlpWeights:
        """Returns the weights as matrices, as views where they lie as `MlpWeights` has them.

        value: what to take in the place of a parameter, of its shape.
        """
        w1, b1 = self._first_rows("weight", value), self._first_rows("bias", value)
        bias = self.last_map.bias
        w2, b2 = value(self.last_map.weight).flatten(1), None if bias is None else value(bias)
        return MlpWeights(w1, b1, w2, b2)

    def tensors_of_neurons(self, value: Value = Tensor.detach) -> list[Tensor]:
        """Lists what the neurons consist of: tensors (H, members)."""
        w1, b1, w2, _ = self.weights(value)
        biases = [] if b1 is None else [by_neuron(b1, self.gated)]
        return [by_neuron(w1, self.gated), *biases, w2.t()]

    def matrices(self, value: Value = Tensor.detach) -> list[tuple[str, Tensor]]:
        """Lists (name of a map, its weight as a matrix), as views."""
        return [
            (name, value(self.mlp.get_submodule(name).weight).flatten(1)) for name in self.names
        ]

    def keep(self, neurons: Tensor) -> None:
        """Removes, in place, all neurons but some (S,); new parameters are frozen if old were."""
        neurons = neurons.to(self.last_map.weight.device)
        rows = rows_of_neurons(neurons, self.hidden, self.gate == self.first)
        for name in self.names:
            linear = self.mlp.get_submodule(name)
            for kind, old in list(linear.named_parameters(recurse=False)):
                tensor = old.detach()
                if name != self.last:
                    tensor = tensor[rows]
                elif kind == "weight":
                    tensor = tensor[:, neurons]
                new = nn.Parameter(tensor.contiguous(), requires_grad=old.requires_grad)
                setattr(linear, kind, new)
            _name_sizes(linear)

    def with_weights(self, weights: MlpWeights) -> nn.Module:
        """Copies the MLP and gives the copy these weights, of any hidden width."""
        w1, b1, w2, b2 = weights
        firsts = {self.first: (w1, b1)}
        if self.gated:
            halves = [(None, None) if part is None else part.chunk(2) for part in (w1, b1)]
            gates, values = zip(*halves, strict=True)
            firsts = {self.gate: gates, self.first: values}
        if self.gate == self.first:
            in_order = (values, gates) if self.gate_is_second else (gates, values)
            firsts = {self.first: [_joined(parts) for parts in zip(*in_order, strict=True)]}
        tensors = firsts | {self.last: (w2, b2)}
        return self._copy_with(
            {
                f"{name}.{kind}": tensor
                for name, pair in tensors.items()
                for kind, tensor in zip(("weight", "bias"), pair, strict=True)
            }
        )

    def with_shapes_of(self, state: Mapping[str, Tensor], prefix: str = "") -> nn.Module:
        """Copies the MLP and gives the copy the maps of a state dict, of any hidden width."""
        names = [f"{name}.{kind}" for name in self.names for kind in ("weight", "bias")]
        return self._copy_with({name: state.get(prefix + name) for name in names})

    def hidden_in(self, state: Mapping[str, Tensor], prefix: str = "") -> int | None:
        """Reads H from the shapes in a state dict; None if it has no such MLP."""
        weight = state.get(f"{prefix}{self.last}.weight")
        return None if weight is None else weight.shape[1]

    def freeze_alike(self, first: nn.Module, last: nn.Module) -> None:
        """Freezes, in place, what two new maps have of frozen parameters of this MLP alone."""
        for new, names in ((first, self.names[:-1]), (last, [self.last])):
            for kind in ("weight", "bias"):
                olds = [_learns(self.mlp.get_submodule(name), kind) for name in names]
                getattr(new, kind).requires_grad_(any(olds))

    def tokens_last(self, x: Tensor) -> Tensor:
        """Turns what goes in or out of a map into (B, ..., D)."""
        return x.movedim(1, -1) if self.channels_first else x

    def _first_rows(self, kind: str, value: Value) -> Tensor | None:
        """The weight (H, D) or bias (H,) of the first map; gated: of both, the gate's first."""
        names = [self.first] if self.gate in (None, self.first) else [self.gate, self.first]
        parameters = [getattr(self.mlp.get_submodule(name), kind) for name in names]
        if any(parameter is None for parameter in parameters):
            return None
        parts = [value(parameter) for parameter in parameters]
        parts = [part.flatten(1) if kind == "weight" else part for part in parts]
        if self.gate == self.first and self.gate_is_second:
            parts = reversed(parts[0].chunk(2))
        return _joined(list(parts))

    def _copy_with(self, tensors: Mapping[str, Tensor | None]) -> nn.Module:
        """A copy whose maps have these parameters, matrices or as the maps have them."""
        twin = copy.deepcopy(self.mlp)
        for name, tensor in tensors.items():
            owner, _, kind = name.rpartition(".")
            linear = twin.get_submodule(owner)
            if tensor is not None:
                learns = _learns(linear, kind)
                pixel = (1, 1) if kind == "weight" and self.channels_first else ()
                shape = (*tensor.shape[:2], *pixel)
                tensor = tensor.detach().clone().contiguous().view(shape)
                tensor = nn.Parameter(tensor, requires_grad=learns)
            setattr(linear, kind, tensor)
            _name_sizes(linear)
        return twin


def _learns(linear: nn.Module, kind: str) -> bool:
    """Says whether a parameter of a map is trained; of a bias that it lacks its weight decides."""
    parameter = getattr(linear, kind)
    return (linear.weight if parameter is None else parameter).requires_grad


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    if parts[0] is None:
        return None
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _name_sizes(linear: nn.Module) -> None:
    """Writes the sizes of a map's weight into the attributes that torch keeps them in."""
    names = ("out_features", "in_features")
    if isinstance(linear, nn.Conv2d):
        names = ("out_channels", "in_channels")
    for name, size in zip(names, linear.weight.shape, strict=False):
        setattr(linear, name, size)


# ---- kinds


def maps_of(mlp: nn.Module) -> MlpMaps:
    """Finds the maps of an MLP. Raises ValueError, with what `why_no_neurons` says."""
    if reason := why_no_neurons(mlp):
        raise ValueError(f"the MLP {reason}")
    return _maps(mlp)


def why_no_neurons(mlp: nn.Module) -> str | None:
    """Says why hidden neurons of an MLP cannot be taken apart; None if they can.

    Pruning, extraction and experts in stacked weights take the same MLPs, with biases or without.
    """
    kind, maps = type(mlp).__name__, _maps(mlp)
    if maps is None:
        return (
            f"({kind}) is no MLP whose hidden neurons are known; what is taken is timm.layers.Mlp, "
            "ConvMlp, GluMlp, SwiGLU, or GatedMlp without a spatial gate, of linear maps or 1x1 "
            "convolutions"
        )
    if not isinstance(getattr(mlp, "norm", nn.Identity()), nn.Identity):
        return "has a norm inside the MLP, which depends on all hidden neurons at once"
    return why_not_plain(mlp)


def _maps(mlp: nn.Module) -> MlpMaps | None:
    """The maps of an MLP of a kind that is known, whether it has a norm inside or not.

    Kinds are told by their forward: a subclass that computes something else is not known.
    """
    forward, maps = type(mlp).forward, None
    plain = (Mlp.forward, ConvMlp.forward, InceptionNeXtMlp.forward)
    if forward in plain or (forward is GatedMlp.forward and isinstance(mlp.gate, nn.Identity)):
        maps = MlpMaps(mlp, "fc1", "fc2")
    elif forward is GluMlp.forward:
        maps = MlpMaps(mlp, "fc1", "fc2", gate="fc1", gate_is_second=mlp.gate_last)
    elif forward is SwiGLU.forward:
        maps = MlpMaps(mlp, "fc1_x", "fc2", gate="fc1_g")
    elif forward is Gemma4GatedMlp.forward and not mlp.up_proj.use_clipped:
        maps = MlpMaps(mlp, "up_proj.linear", "down_proj.linear", gate="gate_proj.linear")
    if maps is None:
        return None
    modules = [mlp.get_submodule(name) for name in maps.names]
    linear = all(isinstance(module, nn.Linear) for module in modules)
    return maps if linear or all(map(_is_one_pixel, modules)) else None


def _is_one_pixel(module: nn.Module) -> bool:
    """Says whether a module is a convolution that maps each pixel alone."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride == (1, 1)
        and not any(module.padding)
        and module.groups == 1
    )


def dropout_inside(mlp: nn.Module) -> list[float]:
    """Lists the chances of the dropouts inside an MLP that drop anything."""
    return [module.p for module in mlp.modules() if isinstance(module, nn.Dropout) and module.p]


def layer_scale_of(model: nn.Module, name: str) -> Tensor:
    """Returns (D,) or (1,), the factor of an MLP's output on its way into the residual stream.

    name: of the MLP in the model. Blocks call it by one of `LAYER_SCALES`; 1 where they have none.
    """
    block = model.get_submodule(name.rpartition(".")[0])
    for attribute in LAYER_SCALES:
        scale = getattr(block, attribute, None)
        if isinstance(scale, nn.Module):
            scale = getattr(scale, "gamma", getattr(scale, "scale", None))
        if isinstance(scale, Tensor):
            return scale.detach().float().flatten()
    parameter = next(model.get_submodule(name).parameters())
    return parameter.new_ones(1, dtype=torch.float32)


# ---- kinds that are only copied


def why_not_copied(mlp: nn.Module) -> str | None:
    """Says why an MLP cannot be an expert as a whole; None if it can."""
    kind, maps = type(mlp).__name__, _outer_maps(mlp)
    if not maps:
        return f"({kind}) has no linear map and no convolution, so it has no experts to be made of"
    needed = [
        name
        for name, parameter in inspect.signature(mlp.forward).parameters.items()
        if parameter.default is parameter.empty
    ]
    if len(needed) != 1:
        return f"({kind}) takes {', '.join(needed)}, and an expert gets tokens alone"
    if reason := why_not_plain(mlp):
        return reason
    inputs, outputs = maps[0].weight.shape[1], maps[-1].weight.shape[0]
    if maps[0].weight.ndim > 2:
        inputs *= maps[0].groups
    if inputs != outputs:
        return (
            f"({kind}) maps {inputs} channels to {outputs}: experts take the place of an MLP that "
            "keeps the width"
        )
    return None


def width_of(mlp: nn.Module) -> int:
    """Reads D of an MLP that `why_not_copied` has nothing against."""
    return _outer_maps(mlp)[-1].weight.shape[0]


def takes_channels_first(mlp: nn.Module) -> bool:
    """Says whether an MLP takes (B, D, height, width): its first map is a convolution."""
    return isinstance(_outer_maps(mlp)[0], nn.Conv2d)


def is_token_wise(mlp: nn.Module) -> bool:
    """Says whether an MLP is known to compute each token alone, on (..., D), a norm included."""
    maps = _maps(mlp)
    return maps is not None and not maps.channels_first


def _outer_maps(mlp: nn.Module) -> list[nn.Module]:
    """The linear maps and convolutions of an MLP, in the order of their definition."""
    return [module for module in mlp.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
