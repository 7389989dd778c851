"""Memory of one training step, by what it holds: weights, gradients, optimiser state, activations.

The accounting is exact and machine-independent; the resident set that `timing.peak_rss_mib` reads is the measured counterpart,
with the interpreter, libraries, data and the allocator's slack in it. Axis letters: **B** images.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

MIB = 2**20
STATES = 2  # AdamW keeps two moments of each trained weight


def step_mib(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """MiB by kind at the fullest moment of a step, after the forward pass: `weights` (with buffers), `gradients`, `optimiser`,
    `activations`, `total`.

    loss: runs the forward pass of one batch on the model and returns the scalar that is differentiated. Activations are what
    autograd saved for the backward pass, each piece of memory once, parameters and buffers left out; casts of weights, which a
    pass in bfloat16 saves, are in. Gradients are counted as if all were there at once, as after the backward pass.
    The loss's graph is freed; no gradient is made.
    """
    held = [*model.parameters(), *model.buffers()]
    own = {tensor.untyped_storage().data_ptr() for tensor in held}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss()
    del value
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    parts = {"weights": sum(t.numel() * t.element_size() for t in held), "gradients": trained, "optimiser": STATES * trained,
             "activations": sum(saved.values())}
    return {name: size / MIB for name, size in (parts | {"total": sum(parts.values())}).items()}
