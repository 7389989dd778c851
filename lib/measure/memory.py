"""Memory of training steps: by what it holds, and as the resident set that the system sees.

The accounting is exact and machine-independent. The resident set is measured in a process of its
own, which does nothing but train, so that neither earlier runs nor scoring count. Axis letters:
**B** images.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import paths
from ..spec import RunSpec
from .timing import peak_rss_mib

MIB = 2**20
STATES = 2  # AdamW keeps two moments of each trained weight
# after the second one nothing new is allocated: weights, gradients, moments and activations are all
# there
STEPS = 4


def step_mib(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, float]:
    """MiB by kind at the fullest moment of a step, after the forward pass: `weights` (with
    buffers), `gradients`, `optimiser`, `activations`, `total`.

    loss: runs the forward pass of one batch on the model and returns the scalar that is
    differentiated. Activations are what autograd saved for the backward pass, each piece of memory
    once, parameters and buffers left out; casts of weights, which a pass in bfloat16 saves, are in.
    Gradients are counted as if all were there at once, as after the backward pass. The loss's graph
    is freed; no gradient is made.
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
    parts = {
        "weights": sum(t.numel() * t.element_size() for t in held),
        "gradients": trained,
        "optimiser": STATES * trained,
        "activations": sum(saved.values()),
    }
    return {name: size / MIB for name, size in (parts | {"total": sum(parts.values())}).items()}


def resident_mib(model: nn.Module, spec: RunSpec, classes: int, channels: int) -> dict[str, float]:
    """`resident`: MiB by which a few training steps of the run `spec` raise the peak of the
    resident set of a fresh process; with spec.device="cuda" also `cuda`, the largest MiB that
    torch's allocator held on the device during these steps.

    model: as it is trained, pruned where it is pruned; the process gets its weights, and nothing
    that a score or a search for them held. The interpreter, the libraries and the images stand
    before it and do not count; the allocator's slack does. Raises RuntimeError with the process's
    own words if it fails.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state.safetensors"
        save_file(
            {
                name: tensor.detach().contiguous().cpu()
                for name, tensor in model.state_dict().items()
            },
            state,
        )
        (Path(folder) / "spec.json").write_text(spec.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-m", "lib.measure.memory", folder, str(classes), str(channels)],
            cwd=paths.ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(
            f"the process that measures the resident set of run {spec.id} failed: {done.stderr.strip()[-600:]}"
        )
    return json.loads(done.stdout)


def _trained(folder: Path, classes: int, channels: int) -> dict[str, float]:
    """What `resident_mib` measures, in the process that it is measured in."""
    from safetensors.torch import load_file

    from ..inputs.splits import load_splits
    from ..models.moe import RoutingTape
    from ..pruning import surgery
    from ..training import loop
    from ..training.bfloat16 import products
    from ..training.losses import losses

    spec = RunSpec.model_validate_json((folder / "spec.json").read_text())
    torch.set_num_threads(spec.threads)
    split = load_splits(spec.data).train
    index = torch.arange(min(spec.train.batch, len(split)))
    images, labels = (
        split.batch(index, spec.data).to(spec.device),
        split.labels[index].to(spec.device),
    )
    peak_rss_mib(reset=True)
    before = peak_rss_mib()
    model = (
        surgery.restored(spec, load_file(folder / "state.safetensors"), classes, channels)
        .to(spec.device)
        .train()
    )
    if spec.train.trainable != "all":
        loop.freeze(model, spec.train.trainable)
    optim, tape = loop.optimiser(model, spec), RoutingTape(model)
    with products(spec):
        for _ in range(STEPS):
            optim.zero_grad(set_to_none=True)
            losses(model, images, labels, spec.but(train={"distil": "none"}), tape)[
                "loss"
            ].backward()
            optim.step()
    found = {"resident": peak_rss_mib() - before}
    return (
        found | {"cuda": torch.cuda.max_memory_allocated() / MIB}
        if spec.device == "cuda"
        else found
    )


if __name__ == "__main__":
    json.dump(_trained(Path(sys.argv[1]), *map(int, sys.argv[2:])), sys.stdout)
