"""One RunSpec carried out: data, model, what is cut, training, evaluation and probes; a record as a
dict with its arrays.

Nothing here knows the store or its locks: `runs` calls `execute`, in this process or in a worker.
"""

from __future__ import annotations

import contextlib
import datetime
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import paths
from ..spec import RunSpec
from .environment import code_hash, environment

PROBE_IMAGES = 12  # fixed test images whose token-to-expert maps every record keeps


def execute(
    spec: RunSpec, state_folder: str, checkpoint: str | None = None
) -> tuple[dict, dict[str, np.ndarray]]:
    """Run one spec and return its record as a dict with its arrays; writes nothing but checkpoint
    and final weights.

    The parent's weights are read from `state_folder`, the own ones written there if `spec.keep`. A
    failure is returned as a failed record, never raised, except KeyboardInterrupt.
    """
    head = {
        "id": spec.id,
        "spec": spec.model_dump(mode="json"),
        "semantics": spec.canonical(),
        "environment": environment(spec),
        "code": code_hash(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    try:
        from ..training.bfloat16 import products

        with products(spec):
            body, arrays = _run(spec, Path(state_folder), Path(checkpoint) if checkpoint else None)
        return head | {"status": "ok"} | body, arrays
    except Exception as error:
        from ..training.loop import Diverged

        where = {"step": error.step, "last": error.last} if isinstance(error, Diverged) else {}
        return head | {
            "status": "failed",
            "error": where
            | {
                "kind": type(error).__name__,
                "message": str(error),
                "traceback": traceback.format_exc(limit=-6),
            },
        }, {}


def _run(
    spec: RunSpec, states: Path, checkpoint: Path | None
) -> tuple[dict, dict[str, np.ndarray]]:
    import torch
    from safetensors.torch import save_file

    from ..extraction import extract
    from ..inputs.splits import load_splits
    from ..inputs.weights import sha256_state
    from ..measure import cost, memory, pictures
    from ..measure import timing as clock
    from ..measure.routing import RoutingProbe
    from ..models.backbone import build
    from ..models.moe import RoutingTape, without_experts
    from ..pruning import surgery
    from ..training import evaluate, loop

    torch.set_num_threads(spec.threads)
    # float32 is float32 on a graphics card, too: by default convolutions round more
    torch.backends.cudnn.allow_tf32 = False
    clock.peak_rss_mib(reset=True)
    splits = load_splits(spec.data)
    parent = None if spec.init is None else state_of(spec.init, states)
    model = build(
        spec, len(splits.class_names), splits.channels, parent, partial(surgery.fit, spec=spec.init)
    )
    model = model.to(spec.device)
    body: dict[str, Any] = {"classes": splits.class_names, "history": [], "curve": {}, "val": {}}
    masks = {}
    if spec.prune is not None:
        before = surgery.weights_in(model, spec.prune)
        masks = surgery.prune(model, spec, splits.train, len(splits.class_names))
        body["prune"] = (
            {"before": before, "after": surgery.weights_in(model, spec.prune)}
            if not masks
            else {
                "before": sum(mask.numel() for mask in masks.values()),
                "after": sum(int(mask.sum()) for mask in masks.values()),
            }
        )
    if spec.drop is not None:
        before = state_of(spec.init.init, states) if spec.drop.compares else None
        body["drop"] = {
            "scores": surgery.drop(model, spec, splits.train, len(splits.class_names), before)
        }
    if spec.extract is not None:
        body["extract"] = extract.extract(
            model, spec, splits.train, len(splits.class_names), checkpoint
        )
    blocks = evaluate.moe_blocks(model)
    weights = {
        "start": sha256_state(model.state_dict()),
        "parent": sha256_state(parent) if parent else None,
    }
    timing: dict[str, float] = {}
    if spec.train is not None:
        with _tensorboard(states.parent / "tensorboard" / spec.id) as report:
            teacher, trained = _teacher(spec, splits, parent), model
            model, progress = loop.fit(
                model, splits.train, splits.val, spec, checkpoint, report, teacher, masks
            )
        body["memory"] = _memory(trained, splits, spec, teacher)
        if spec.resident:
            body["memory"] |= memory.resident_mib(
                trained, spec, len(splits.class_names), splits.channels
            )
        body |= {"history": progress.history, "curve": progress.curve}
        timing |= {
            "train_seconds": progress.seconds,
            "train_images_per_s": progress.images / max(progress.seconds, 1e-9),
        }
        last = progress.history[-1]
        body["val"] = {"n": len(splits.val)} | {
            name: last[f"val_{name}"] for name in ("top1", "loss") if f"val_{name}" in last
        }
    elif (
        spec.extract is not None
    ):  # what is cut without training is still chosen on validation images
        found = evaluate.evaluate(model, splits.val, spec)
        body["val"] = {"n": found.n, "top1": found.top1, "loss": found.loss}
    probe = RoutingProbe(len(splits.class_names))
    result = evaluate.evaluate(model, splits.test, spec, probe)
    body["test"] = (
        {"n": result.n}
        | ({} if result.top1 is None else {"top1": result.top1})
        | {"loss": result.loss}
    )
    if spec.experts_off:
        with without_experts(model):
            body["experts_off"] = {
                "n": result.n,
                "top1": evaluate.evaluate(model, splits.test, spec).top1,
            }
    if spec.depth_probe:
        from ..measure import features

        body["depth"] = features.by_depth(model, splits, spec)
    body["moe"] = probe.summary() if blocks else []
    arrays = {"test_label": splits.test.labels.numpy().astype(np.int16)}
    index = torch.linspace(0, len(splits.test) - 1, min(PROBE_IMAGES, len(splits.test))).long()
    if result.predictions is None:
        arrays |= pictures.reconstructions(model, splits.test, spec, index)
    else:
        arrays["test_pred"] = result.predictions.numpy()
    if blocks:
        arrays |= probe.arrays() | {
            "token_expert": pictures.token_maps(model, splits.test, spec, index).numpy()
        }
        if spec.colour_probe and result.predictions is not None:
            arrays["checker_expert"] = pictures.checkerboard(model, spec, splits.channels).numpy()
    if spec.cam_probe:
        arrays["cam"] = pictures.gradcam(model, splits.test, spec, index)
    if blocks or result.predictions is None or spec.cam_probe:
        arrays["probe_index"] = splits.test.rows[index.numpy()].astype(np.int32)
    state = model.state_dict()
    weights["final"] = sha256_state(state)
    if spec.keep:
        with paths.written_whole(states / f"{spec.id}.safetensors") as part:
            save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, part)
    timing |= {"eval_images_per_s": result.images_per_s, "peak_rss_mib": clock.peak_rss_mib()}
    by_token = cost.needs_measured_experts(model)
    shared = sum(getattr(layer, "shared", None) is not None for layer in RoutingTape(model).layers)
    touched = sum(row["experts_per_image"] for row in body["moe"]) + shared if by_token else None
    loads = [row["load"] for row in body["moe"]] if spec.extracted else None
    counted = cost.count(
        getattr(model, "encoder", model),
        spec.data.image_size,
        experts_per_image=touched,
        loads=loads,
        unserved=[row["dropped"] for row in body["moe"]] if spec.reduced else None,
    )
    body["cost"] = {
        "params_stored": counted.params_stored,
        "params_active": counted.params_active,
        "macs": counted.macs,
    }
    return body | {"weights": weights, "timing": timing}, arrays


def state_of(spec: RunSpec, states: Path) -> dict:
    """The final weights that a run left."""
    from safetensors.torch import load_file

    if not (states / f"{spec.id}.safetensors").is_file():
        raise FileNotFoundError(
            f"the run it starts from, {spec.id}, left no weights: see its own record"
        )
    return load_file(states / f"{spec.id}.safetensors")


def _teacher(spec: RunSpec, splits: Any, parent: dict | None):
    """The parent as it was, where its gates or logits are distilled; else None."""
    if spec.train.distil == "none" and not spec.train.distil_logits:
        return None
    from ..pruning import surgery

    return (
        surgery.restored(spec.init, parent, len(splits.class_names), splits.channels)
        .to(spec.device)
        .eval()
    )


def _memory(model: Any, splits: Any, spec: RunSpec, teacher: Any) -> dict[str, float]:
    """What a training step on the first images of the run holds, in MiB by kind."""
    import torch

    from ..measure.memory import step_mib
    from ..models.moe import RoutingTape
    from ..training.losses import losses

    index = torch.arange(min(spec.train.batch, len(splits.train)))
    images, labels = (
        splits.train.batch(index, spec.data).to(spec.device),
        splits.train.labels[index].to(spec.device),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # router noise decides how many rows an expert saves
        model.train()
        return step_mib(
            model, lambda: losses(model, images, labels, spec, RoutingTape(model), teacher)["loss"]
        )


@contextlib.contextmanager
def _tensorboard(folder: Path):
    """A hook for `train.fit` that writes history rows as TensorBoard scalars; None if that is not
    installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        yield None
        return
    with SummaryWriter(str(folder)) as writer:

        def report(row: dict) -> None:
            for name in row.keys() - {"epoch"}:
                writer.add_scalar(
                    name, row[name], round(1000 * row["epoch"])
                )  # a whole number is asked for: 1/1000 epoch
            writer.flush()

        yield report
