"""Memory of a training step by what it holds: exact, and under one version of this package the same
on every machine.

The resident set that the system sees is `lib.runs.resident`'s. Axis letters: **B** images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..inputs.splits import Split
from ..models.moe import RoutingTape
from ..spec import RunSpec
from ..training.losses import losses

MIB = 2**20
MOMENTS = 2  # that AdamW keeps of each trained weight


def stored_bytes(model: nn.Module) -> int:
    """Counts the bytes of the tensors in a model's state, of which a saved file consists.

    Tensors that share their memory whole (tied weights) are stored once.
    """
    stored = {}
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            at = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)
            stored[at] = tensor.numel() * tensor.element_size()
    return sum(stored.values())


def packed_in(model: nn.Module) -> str | None:
    """Names a module whose weights lie in a packed object and not in tensors; None if none does."""
    for name, module in model.named_modules():
        if any(isinstance(value, torch.ScriptObject) for value in vars(module).values()):
            return name
    return None


def step_mib(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """Counts the MiB that a training step holds at its fullest moment, after the forward pass.

    By kind: `weights` (with buffers), `gradients`, `optimiser`, `activations`, `total`. loss: runs
    the forward pass of one batch on the model and returns the scalar that is differentiated.
    Activations are what autograd saved for the backward pass, each piece of memory once, parameters
    and buffers left out; casts of weights, which a pass in bfloat16 saves, are in. Gradients are
    counted as if all were there at once, as after the backward pass. The loss's graph is freed; no
    gradient is made.
    """
    stored = [*model.parameters(), *model.buffers()]
    stored_at = {tensor.untyped_storage().data_ptr() for tensor in stored}
    saved_bytes: dict[int, int] = {}  # by address, so that views of one memory count once

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in stored_at:
            saved_bytes[storage.data_ptr()] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with torch.enable_grad(), hooks:
        value = loss()
    del value
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    parts = {
        "weights": sum(t.numel() * t.element_size() for t in stored),
        "gradients": trained,
        "optimiser": MOMENTS * trained,
        "activations": sum(saved_bytes.values()),
    }
    return {name: size / MIB for name, size in (parts | {"total": sum(parts.values())}).items()}


def first_step_mib(
    model: nn.Module, split: Split, spec: RunSpec, teacher: nn.Module | None
) -> dict[str, float]:
    """Counts what a training step on the first images of a split holds, as `step_mib` does."""
    images, labels = first_batch(split, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # router noise decides how many rows an expert saves
        model.train()
        tape = RoutingTape(model)
        return step_mib(model, lambda: losses(model, images, labels, spec, tape, teacher)["loss"])


def first_batch(split: Split, spec: RunSpec) -> tuple[Tensor, Tensor]:
    """(B, C, S, S) images without augmentation and (B,) labels, where the run computes."""
    index = torch.arange(min(spec.train.batch, len(split)))
    images = split.batch(index, spec).to(spec.device)
    return images, split.labels[index].to(spec.device)
