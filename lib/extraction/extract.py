"""All MLPs of a trained model into experts, or into narrower MLPs, by one set of rules.

Axis letters: **B** images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import paths
from ..inputs.splits import Split
from ..inputs.weights import sha256_state
from ..models.mlps import maps_of
from ..models.plain import check_hooks
from ..models.tokens import begins_with_class_token
from ..models.upcycle import block_mlps, check_dropout
from ..pruning.neurons.calibration import calibration
from ..spec import ExtractSpec, RunSpec
from .calibrate import AtOnce, InSequence
from .head import features_and_logits, fit_head, head_of
from .layer import extract_layer
from .record import mlps_of
from .saved import layer_like


def extract(
    model: nn.Module, spec: RunSpec, split: Split, classes: int, checkpoint: Path | None = None
) -> list[dict[str, Any]]:
    """Replaces the MLPs of `model`, in place, as `spec.extract` says; returns a report a layer.

    Calibration images are class-balanced training images without augmentation, drawn by
    `spec.seed`; everything runs in float32. checkpoint: finished layers are filed beside it, and an
    extraction that broke off goes on after the last one. Raises ValueError for a split with fewer
    images than asked for, and as `extract_layers`.
    """
    rules = spec.extract
    check(model, rules)
    batches = calibration_batches(spec, rules.calibration.images, split, classes)
    title = f"extract {spec.id[:6]}"
    return extract_layers(model, batches, rules, spec.seed, title=title, checkpoint=checkpoint)


def extract_layers(
    model: nn.Module,
    batches: Iterable[Tensor],
    rules: ExtractSpec,
    seed: int,
    *,
    ignore: Collection[str] = (),
    modules: Sequence[str] | None = None,
    resize: Callable[[str, int, int], int] | None = None,
    title: str = "extract",
    checkpoint: Path | None = None,
) -> list[dict[str, Any]]:
    """Replaces the MLPs of `model`, in place, by rules; returns a report a layer.

    batches: calibration images (B, C, height, width), where the model is. seed: draws tokens and
    clusters. ignore: names of layers that stay. modules: patterns of MLPs to take instead of the
    blocks' own, not with correction.sequential. resize: changes how many neurons a token passes,
    (layer, neurons of it, as many as the rules give) -> number; not with neurons.variance_percent.
    title: of the progress bar. checkpoint: as in `extract`. A report is that of `extract_layer`,
    and the layer's name. Raises ValueError as `check`, `record_tokens` and the clusterings do.
    """
    mlps = check(model, rules, ignore, modules)
    if rules.correction.head is not None:
        batches = list(batches)  # read before and after the layers change
    sampling = {
        "per_image": rules.calibration.tokens_per_image,
        "limit": rules.calibration.tokens,
        "seed": seed,
    }
    if rules.correction.sequential:
        source = InSequence(model, batches, rules, sampling, ignore)
    else:
        source = AtOnce(model, batches, rules, sampling, ignore, modules)
    reports, head_penalty = [], rules.correction.head
    if head_penalty is not None:
        _, dense_logits = features_and_logits(model, batches)
    for name in tqdm(mlps, unit="layer", desc=title, leave=False, delay=5):
        filed = None if checkpoint is None else _FiledLayer(checkpoint, name)
        done = None if filed is None else filed.read(mlps[name], rules)
        if done is not None:
            layer, report = done
        else:
            active, calibration = source.active_neurons[name], source.of_layer(name)
            if resize is not None and active is not None:
                active = resize(name, calibration.tokens.hidden.shape[1], active)
            layer, report = extract_layer(mlps[name], calibration, rules, active, seed)
            if filed is not None:
                filed.write(layer, report)
        model.set_submodule(
            name, layer.to(next(mlps[name].parameters())).train(mlps[name].training)
        )
        reports.append({"layer": name} | report)
    if head_penalty is not None:
        fit_head(model, batches, dense_logits, head_penalty)
    return reports


def check(
    model: nn.Module,
    rules: ExtractSpec,
    ignore: Collection[str] = (),
    modules: Sequence[str] | None = None,
) -> dict[str, nn.Module]:
    """Returns {name: MLP} of the layers that `extract` would replace.

    ignore, modules: as of `mlps_of`. Raises ValueError as that, for correction.sequential on
    anything but a ViT, for correction.head on a model without a linear classifier, for
    clusters.class_token on a model without a class token, for experts of an MLP with dropout inside
    or with hooks, and for clusters of the neurons of a gated one.
    """
    class_token = rules.clusters.class_token
    begins = (begins_with_class_token(model, name) for name, _ in block_mlps(model))
    if class_token != "with" and not all(begins):
        raise ValueError(
            f"clusters.class_token={class_token!r} treats the class token apart from the patches, "
            f"and {type(model).__name__} has none at the head of its blocks' tokens: leave it at "
            "'with'"
        )
    if rules.correction.sequential and not isinstance(model, VisionTransformer):
        raise ValueError(
            "correction.sequential=True compares residual streams before norm2 of each block, as a "
            f"timm VisionTransformer has it: {type(model).__name__} is none"
        )
    if rules.correction.head is not None:
        head_of(model)
    mlps = mlps_of(model, ignore, modules=modules)
    if rules.clusters.of != "nothing":  # a narrower MLP carries its dropout
        for name, mlp in mlps.items():
            check_dropout(name, mlp)
            check_hooks(name, mlp)
    gated = [name for name, mlp in mlps.items() if maps_of(mlp).gated]
    if rules.clusters.of == "neurons" and gated:
        raise ValueError(
            f"{gated[0]} ({type(mlps[gated[0]]).__name__}) is a gated MLP, whose neurons have two "
            "input rows each, and clusters of neurons (MoEfication) compare one: take clusters of "
            "tokens, or leave the layer out with ignore="
        )
    return mlps


def calibration_batches(spec: RunSpec, images: int, split: Split, classes: int) -> Iterator[Tensor]:
    """Yields class-balanced training images (B, C, height, width) on the device of the run.

    They are drawn by `spec.seed`. Raises ValueError for a split with fewer than `images`.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    [index] = calibration(split.labels, [range(classes)], images, generator)
    if len(index) < images:
        raise ValueError(
            f"images={images} were asked for to calibrate on, the training split has {len(index)}: "
            "lower it"
        )
    return (split.batch(part, spec).to(spec.device) for part in index.split(64))


class _FiledLayer:
    """A finished layer beside the checkpoint of its run: weights, and its report once they are
    whole."""

    def __init__(self, checkpoint: Path, name: str):
        self.weights = checkpoint.with_name(f"{checkpoint.name}.{name}.safetensors")
        self.report = self.weights.with_suffix(".json")

    def read(self, mlp: nn.Module, rules: ExtractSpec) -> tuple[nn.Module, dict[str, Any]] | None:
        """Returns the layer and its report; None if they are not there, or set aside with a
        warning."""
        if not (self.weights.exists() and self.report.exists()):
            return None
        try:
            state, content = load_file(self.weights), json.loads(self.report.read_text())
            report = content.get("report", content)  # files of an older version have no checksum
            if content.get("sha256", _sha256(state, report)) != _sha256(state, report):
                raise ValueError("they do not match their SHA-256")
            layer = layer_like(mlp, state, rules)
            layer.load_state_dict(state)
        except Exception as error:  # the readers raise many kinds on damaged files
            paths.set_aside(
                [self.weights, self.report],
                self.weights.parent.parent / "damaged",
                f"the extracted layer {self.weights.name} cannot be used ({error})",
                "the layer is extracted again",
            )
            return None
        return layer, report

    def write(self, layer: nn.Module, report: dict[str, Any]) -> None:
        state = {
            name: tensor.detach().contiguous().cpu() for name, tensor in layer.state_dict().items()
        }
        with paths.written_whole(self.weights) as part:
            save_file(state, part)
        with paths.written_whole(self.report) as part:
            part.write_text(json.dumps({"report": report, "sha256": _sha256(state, report)}))


def _sha256(state: dict[str, Tensor], report: dict[str, Any]) -> str:
    """Computes the SHA-256 over the weights and the report of a layer."""
    text = sha256_state(state) + json.dumps(report)
    return hashlib.sha256(text.encode()).hexdigest()
