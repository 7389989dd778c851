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
from ..inputs.splits import Split, load_splits
from ..models.moe import RoutingTape
from ..spec import RunSpec
from ..training.bfloat16 import products
from ..training.loop import optimiser
from ..training.losses import losses
from .timing import peak_rss_mib

MIB = 2**20
MOMENTS = 2  # that AdamW keeps of each trained weight
# after the second one nothing new is allocated: weights, gradients, moments and activations are all
# there
STEPS = 4


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
    images, labels = _first_batch(split, spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # router noise decides how many rows an expert saves
        model.train()
        tape = RoutingTape(model)
        return step_mib(model, lambda: losses(model, images, labels, spec, tape, teacher)["loss"])


def _first_batch(split: Split, spec: RunSpec) -> tuple[Tensor, Tensor]:
    """(B, C, S, S) images without augmentation and (B,) labels, where the run computes."""
    index = torch.arange(min(spec.train.batch, len(split)))
    images = split.batch(index, spec.data).to(spec.device)
    return images, split.labels[index].to(spec.device)


def resident_mib(model: nn.Module, spec: RunSpec) -> dict[str, float]:
    """Measures by how many MiB a few training steps raise the peak of the `resident` set of a fresh
    process.

    With spec.device="cuda" also `cuda`, the largest MiB that torch's allocator held on the device
    during these steps. model: as it is trained, pruned where it is pruned; the process gets a copy,
    and nothing that a score or a search for it held. The interpreter, the libraries and the images
    stand before it and do not count; the allocator's slack does. Raises RuntimeError with the
    process's own words if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.save(model, Path(folder) / "model.pt")
        (Path(folder) / "spec.json").write_text(spec.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-m", "lib.measure.memory", folder],
            cwd=paths.ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise RuntimeError(
            f"the process that measures the resident set of run {spec.id} failed: "
            f"{done.stderr.strip()[-600:]}"
        )
    return json.loads(done.stdout)


def _train_and_measure(folder: Path) -> dict[str, float]:
    """What `resident_mib` measures, in the process that it is measured in."""
    spec = RunSpec.model_validate_json((folder / "spec.json").read_text())
    torch.set_num_threads(spec.threads)
    split = load_splits(spec.data).train  # stays there, before and after
    images, labels = _first_batch(split, spec)
    peak_rss_mib(reset=True)
    before = peak_rss_mib()
    # the file is the parent process's own, so it may hold a whole module
    model = torch.load(folder / "model.pt", map_location="cpu", weights_only=False)
    model = model.to(spec.device).train()
    optim, tape = optimiser(model, spec), RoutingTape(model)
    without_teacher = spec.but(train={"distil": "none", "distil_logits": 0.0})
    with products(spec):
        for _ in range(STEPS):
            optim.zero_grad(set_to_none=True)
            losses(model, images, labels, without_teacher, tape)["loss"].backward()
            optim.step()
    measured = {"resident": peak_rss_mib() - before}
    if spec.device == "cuda":
        measured["cuda"] = torch.cuda.max_memory_allocated() / MIB
    return measured


if __name__ == "__main__":
    json.dump(_train_and_measure(Path(sys.argv[1])), sys.stdout)
