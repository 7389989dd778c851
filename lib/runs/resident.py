"""The resident set of training steps, measured in a process of its own.

That process does nothing but train, so that neither earlier runs nor scoring count.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from .. import paths
from ..inputs.splits import load_splits
from ..measure.memory import MIB, first_batch
from ..measure.timing import peak_rss_mib
from ..models.moe import RoutingTape
from ..spec import RunSpec
from ..training.bfloat16 import products
from ..training.losses import losses
from ..training.optimiser import freeze, optimiser
from .processes import end_with
from .restore import restored

# after the second one nothing new is allocated: weights, gradients, moments and activations are all
# there
STEPS = 4


def resident_mib(model: nn.Module, spec: RunSpec, classes: int, channels: int) -> dict[str, float]:
    """Measures by how many MiB a few training steps raise the peak of the `resident` set of a fresh
    process.

    With spec.device="cuda" also `cuda`, the largest MiB that torch's allocator held on the device
    during these steps. model: as it is trained, pruned where it is pruned; the process gets its
    weights, and nothing that a score or a search for them held. The interpreter, the libraries and
    the images stand before it and do not count; the allocator's slack does. classes, channels: of
    the run's data. Raises RuntimeError with the process's own words if it fails.
    """
    state = {
        name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()
    }
    with tempfile.TemporaryDirectory() as folder:
        save_file(state, Path(folder) / "state.safetensors")
        (Path(folder) / "spec.json").write_text(spec.model_dump_json())
        done = subprocess.run(
            [sys.executable, "-m", f"{__package__}.resident", folder, str(classes), str(channels)],
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


def _train_and_measure(folder: Path, classes: int, channels: int) -> dict[str, float]:
    """What `resident_mib` measures, in the process that it is measured in."""
    spec = RunSpec.model_validate_json((folder / "spec.json").read_text())
    torch.set_num_threads(spec.threads)
    split = load_splits(spec.data).train  # stays there, before and after
    images, labels = first_batch(split, spec)
    peak_rss_mib(reset=True)
    before = peak_rss_mib()
    model = restored(spec, load_file(folder / "state.safetensors"), classes, channels)
    model = model.to(spec.device).train()
    if spec.train.trainable != "all":
        freeze(model, spec.train.trainable)
    optim, tape = optimiser(model, spec.train), RoutingTape(model)
    without_teacher = spec.but(train={"distil": "none", "distil_logits": 0.0, "distil_stream": 0.0})
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
    end_with(os.getppid())
    json.dump(_train_and_measure(Path(sys.argv[1]), *map(int, sys.argv[2:])), sys.stdout)
