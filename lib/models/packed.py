"""Packed weights: linear maps, MLPs and experts, in the form that the library behind products on
CPU reads.

A plain weight is brought into that form anew for each product, which for few rows takes longer than
the product. A packed copy lies beside the parameter, in no state dict, and is made again as soon as
the parameter has changed. A packed module keeps its class, its parameters and its name; only the
attribute `forward` of the instance is another one, and wherever that has no answer (training, where
gradients are recorded, under a tracer, on another device) the class's own forward runs.

Axis letters: **T** tokens, **R** rows that the experts compute, **I** inputs and **O** outputs of a
linear map, **D** width, **H** hidden width, **E** experts.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..routers.base import Routing
from .experts import Experts
from .rows import Rows

# Rows that a packed form is made for; it takes any number of them.
USUAL_ROWS = 256
# Numbers of a parameter that are compared before each use, beside one whole row: a write through
# `.data`, which torch itself does not count, is seen if it changes one of them.
SAMPLES = 64
# Rows of an expert, on average, up to which packed experts are used where packing gains dense maps
# nothing. On an AVX2 machine (data/results/bench/cpu/short-avx2.json) one image, 257 tokens to 8
# experts, 32 rows each, gained: an upcycled ViT-S took 214 -> 164 ms, 1.64 -> 1.34 times as long as
# the dense model beside it. Layers lost: 23.1 -> 24.2 ms at 136 rows, 81.4 -> 83.0 at 514 and
# 156.5 -> 175.4 at 1,028. Between 32 and 136 nothing was measured.
FEW_ROWS = 64
NUMBER_TYPES = (torch.float32, torch.bfloat16)


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Says whether this torch has packed linear maps of a type for this processor.

    They are no public part of torch, so they are tried out.
    """
    if dtype not in NUMBER_TYPES or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((5, 16), (8, 16), (8,))
    )
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        with torch.inference_mode():
            got = _linear(x, _pack(weight), bias, ("gelu", "none"))
    except (AttributeError, RuntimeError):
        return False
    expected = F.gelu(F.linear(x.float(), weight.float(), bias.float()))
    return torch.allclose(got.float(), expected, rtol=0.02, atol=0.02)


def dense_maps_gain() -> bool:
    """Says whether linear maps and MLPs are faster in packed weights, and not experts alone.

    Without AVX-512 torch's plain products are as fast, a GELU that a product applies takes four
    times as long as torch's own, and a packed ViT-S took a tenth longer than a plain one. Experts
    gain all the same where few tokens read the weights of each (`FEW_ROWS`).
    """
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def pack(model: nn.Module) -> int:
    """Gives the linear maps, MLPs and experts of a model, in place, packed weights; returns how
    many modules have them.

    Only what lies on the CPU, in a type that `can_pack`, tells when it changes (tensors made under
    torch.inference_mode() do not), and is faster so (`dense_maps_gain`), is taken; `unpack` takes
    it back. What is packed already is packed anew.
    """
    modules = [m for m in model.modules() if "forward" not in vars(m) or is_packed(m)]
    for module in modules:
        kind = next((kind for fits, kind in KINDS if fits(module)), None)
        if kind is None or (kind is not PackedExperts and not dense_maps_gain()):
            continue
        weights = kind.watched(module)
        if _can_be_watched(weights) and can_pack(weights[0].dtype):
            module.forward = kind(module)
            module.forward.prepare()
    return sum(map(is_packed, modules))


def unpack(model: nn.Module) -> nn.Module:
    """Takes packed weights away from a model, in place; returns it."""
    for module in filter(is_packed, model.modules()):
        del module.forward
    return model


def is_packed(module: nn.Module) -> bool:
    """Says whether a module runs with packed weights."""
    return isinstance(vars(module).get("forward"), PackedForward)


class PackedForward(ABC):
    """Stands in the place of a module's `forward`: the contract of the kinds below.

    A copy of the module, by deepcopy or pickle, has its own, and packs its weights anew. A shallow
    one (copy.copy, replicas of nn.DataParallel) shares it, and so runs the module it was made of.
    """

    is_of_class = True  # the function is that of the class: `why_not_plain` lets it pass

    def __init__(self, module: nn.Module):
        self.module = module
        self._packed: dict[torch.dtype, Any] = {}
        self._state: list[Any] = []
        self._samples: list[tuple[Callable[[], bytes], bytes]] = []

    @staticmethod
    @abstractmethod
    def watched(module: nn.Module) -> list[Tensor]:
        """Lists the tensors that the packed form is made of."""

    @abstractmethod
    def make(self, dtype: torch.dtype) -> Any:
        """Makes the packed form."""

    def prepare(self) -> None:
        """Packs for the parameters' own type, before the first use."""
        with torch.no_grad():
            self.packed(self.watched(self.module)[0].dtype)

    def packed(self, dtype: torch.dtype) -> Any:
        """Returns the packed form for a type, made anew if a parameter has changed since."""
        tensors = self.watched(self.module)
        state = [_state(tensor) for tensor in tensors]
        if state != self._state or any(read() != seen for read, seen in self._samples):
            self._packed.clear()
            self._state = state
            self._samples = [(read, read()) for read in map(_sample, tensors)]
        if dtype not in self._packed:
            self._packed[dtype] = self.make(dtype)
        return self._packed[dtype]

    def type_for(self, x: Tensor) -> torch.dtype | None:
        """Says in what type x is multiplied; None where the class's own forward is to run."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
            return None
        if self.module.training:
            self._packed.clear()
            return None
        weights = self.watched(self.module)
        if x.device.type != "cpu" or not _can_be_watched(weights) or _is_watched_by_a_mode():
            return None
        if x.shape[-1:] != weights[0].shape[-1:]:
            return None  # torch says what is wrong with it
        dtype = weights[0].dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        elif x.dtype != dtype:
            return None  # the same
        return dtype if can_pack(dtype) else None

    def plain(self, *args: Any) -> Any:
        """Runs the class's own forward."""
        return type(self.module).forward(self.module, *args)

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedForward:
        return type(self)(copy.deepcopy(self.module, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.module,)


class PackedLinear(PackedForward):
    """Runs an `nn.Linear`."""

    @staticmethod
    def watched(module: nn.Module) -> list[Tensor]:
        return [module.weight]

    def make(self, dtype: torch.dtype) -> Tensor:
        return _pack(self.module.weight.to(dtype))

    def __call__(self, x: Tensor) -> Tensor:
        """Computes (..., O) from (..., I)."""
        dtype = self.type_for(x)
        return self.plain(x) if dtype is None else self.run(x.to(dtype))

    def run(self, x: Tensor, act: tuple[str, str] = ("none", "")) -> Tensor:
        """Computes the same, in the type of x, and applies an activation of `_fused`."""
        bias = self.module.bias
        bias = None if bias is None else bias.to(x.dtype)
        return _linear(x, self.packed(x.dtype), bias, act)


class PackedMlp(PackedForward):
    """Runs a `timm.layers.Mlp` of packed maps, with the activation applied by the first of them.

    Where somebody listens to its parts (hooks) they are called one by one.
    """

    @staticmethod
    def watched(module: nn.Module) -> list[Tensor]:
        return [module.fc1.weight, module.fc2.weight]

    def make(self, dtype: torch.dtype) -> None:
        """Makes nothing: the maps have packed weights of their own."""

    def __call__(self, x: Tensor) -> Tensor:
        """Computes (..., D) from (..., D)."""
        mlp = self.module
        first, last = vars(mlp.fc1).get("forward"), vars(mlp.fc2).get("forward")
        if not (isinstance(first, PackedLinear) and isinstance(last, PackedLinear)):
            return self.plain(x)
        # a norm may have been put in since, or dropout switched on
        only_maps = all(map(_does_nothing, (mlp.drop1, mlp.norm, mlp.drop2)))
        dtype, act = self.type_for(x), _fused(mlp.act)
        if dtype is None or act is None or not only_maps or _has_listeners(mlp):
            return self.plain(x)
        return last.run(first.run(x.to(dtype), act))


class PackedExperts(PackedForward):
    """Runs `Experts` in stacked, unequal or shared weights.

    Where each has many rows and dense maps gain nothing (`FEW_ROWS`), or somebody listens to their
    parts, the class's own forward runs.
    """

    @staticmethod
    def watched(module: nn.Module) -> list[Tensor]:
        parameters = [module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias]
        index = module._buffers.get("index")  # of the neurons, where experts share a store
        return parameters if index is None else [*parameters, index]

    def make(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        weights = self.module.each(lambda parameter: parameter.detach().to(dtype))
        return [(_pack(w1), b1, _pack(w2), b2) for w1, b1, w2, b2 in weights]

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """Computes for each token the weighted sum over its assignments: (T, D) -> (T, D)."""
        dtype, assignments = self.type_for(x), len(routing.expert)
        gains = dense_maps_gain() or assignments <= FEW_ROWS * self.module.experts
        if dtype is None or not gains or _has_listeners(self.module):
            return self.plain(x, routing)
        rows = Rows.of(routing, len(x), multiple_for(assignments, self.module.experts))
        act, outputs = _fused(self.module.act), []
        inputs = rows.gather(x.to(dtype)).split(rows.lengths)
        for part, (w1, b1, w2, b2) in zip(inputs, self.packed(dtype), strict=True):
            if len(part):
                if act is None:
                    hidden = self.module.act(_linear(part, w1, b1, ("none", "")))
                else:
                    hidden = _linear(part, w1, b1, act)
                outputs.append(_linear(hidden, w2, b2, ("none", "")))
        outputs = torch.cat(outputs) if outputs else x.new_empty(0, x.shape[1], dtype=dtype)
        return rows.sum_by_token(outputs, routing.weight.to(dtype))


# (which modules, how they are run); the first that fits counts
KINDS: list[tuple[Callable[[nn.Module], bool], type[PackedForward]]] = [
    (lambda module: type(module) is nn.Linear, PackedLinear),
    (lambda module: isinstance(module, Experts), PackedExperts),
    (
        # with a norm between its maps (BEiT-3), each of them is packed for itself
        lambda module: (
            type(module).forward is Mlp.forward
            and type(module.fc1) is type(module.fc2) is nn.Linear
            and isinstance(module.norm, nn.Identity)
        ),
        PackedMlp,
    ),
]


def multiple_for(assignments: int, experts: int) -> int:
    """Chooses what the numbers of rows of packed experts are rounded up to.

    The library behind products on CPU builds a kernel for each new number of rows, so there should
    be few of them. Half of what is rounded up to is filling, on average: at most one row in 32.
    """
    of_an_expert = assignments / experts
    return next((m for m in (64, 16, 4) if of_an_expert >= 16 * m), 1)


# ---- what torch has


def _pack(weight: Tensor) -> Tensor:
    """Packs a matrix (O, I)."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), USUAL_ROWS)


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, act: tuple[str, str]) -> Tensor:
    """Computes act(x weight' + bias), (..., I) -> (..., O)."""
    name, algorithm = act
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, name, [], algorithm)


def _fused(act: nn.Module) -> tuple[str, str] | None:
    """Names an activation that a product can apply; None if it cannot, or is slower at it."""
    if type(act) is nn.GELU and dense_maps_gain():
        return "gelu", act.approximate
    return ("relu", "") if type(act) is nn.ReLU else None


def _state(tensor: Tensor) -> tuple[Any, ...]:
    """What torch changes about a tensor when somebody writes to it or replaces it."""
    return id(tensor), tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape


def _can_be_watched(weights: list[Tensor]) -> bool:
    """Says whether weights lie on the CPU, hold numbers, and have a version that tells of writes,
    which tensors made under torch.inference_mode() have not."""
    return all(w.device.type == "cpu" and w.numel() and not w.is_inference() for w in weights)


def _sample(tensor: Tensor) -> Callable[[], bytes]:
    """Returns what reads some numbers of a tensor off its memory: some by chance, so that no
    regular pattern passes between them, and a whole row, which a change of any column touches."""
    # from the longest stride to the shortest, so that nothing is copied where it is transposed
    axes = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    rows = tensor.detach().permute(axes)
    rows = rows.reshape(-1, rows.shape[-1])
    rows = (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()
    flat, row = rows.reshape(-1), rows[len(rows) // 2]
    places = np.random.default_rng(0).integers(len(flat), size=SAMPLES)
    return lambda: flat[places].tobytes() + row.tobytes()


def _is_watched_by_a_mode() -> bool:
    """Says whether something counts or replaces the operations that torch runs."""
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack())


def _does_nothing(part: nn.Module) -> bool:
    """Says whether a module passes on what it gets: no norm, no dropout that is switched on."""
    is_dropout = type(part) is nn.Dropout and not (part.training and part.p)
    return is_dropout or type(part) is nn.Identity


def _has_listeners(module: nn.Module) -> bool:
    """Says whether a hook on a part of an MLP, of experts, or on all modules, would go unheard."""
    hooks = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    for part in module.children():
        hooks += [part._forward_hooks, part._forward_pre_hooks]
    return any(hooks)
