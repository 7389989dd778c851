"""Experts cut out of the MLPs of a trained model, or a static pruner's neurons, by one set of rules
(`ExtractSpec`).

Each layer by itself: tokens are clustered (MoEE, 2505.15414), each cluster keeps the neurons that
vary most on it, a router sends a token to the cluster whose mean input it is nearest to. With one
cluster for all this is static pruning by variance (VBP, 2507.12988). What the removed neurons gave
may be made up for by their mean, or by ridge regression on those that stay (CORP, 2602.05243; the
OBC updates of DVBP have the same solution), for each cluster.

Axis letters: **n** recorded tokens, **D** width, **H** hidden width, **S** neurons that stay, **K**
clusters.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm.auto import tqdm

from .. import paths
from ..inputs.splits import Split
from ..models.experts import Experts
from ..models.moe import MoELayer
from ..models.shared_experts import SharedExperts
from ..models.upcycle import before_blocks
from ..pruning.neurons.calibration import calibration
from ..routers.centroid import CentroidRouter
from ..routers.controls import OracleRouter, RandomRouter
from ..routers.hard import HardRouter
from ..routers.predictor import PredictorRouter
from ..spec import ExtractSpec, RunSpec
from .closed_form import Moments, moments, survivors
from .layer import (
    LEAST,
    Cut,
    cut_layer,
    layer_scale,
    narrow_mlp,
    scores_of,
    top_k,
    widths_over_model,
)
from .record import Recorded, mlps_of, record


def extract(
    model: nn.Module, spec: RunSpec, split: Split, classes: int, checkpoint: Path | None = None
) -> list[dict[str, Any]]:
    """Replace the MLPs of `model`, in place, as `spec.extract` says; returns a report a layer, as
    `cut_layer` makes it.

    Calibration images are class-balanced training images without augmentation, drawn by
    `spec.seed`; everything runs in float32. checkpoint: finished layers are filed beside it, and a
    broken-off extraction goes on after the last one. Raises ValueError for a calibration set that
    is smaller than asked for, and as `check`, `record` and the clusterings do.
    """
    rules = spec.extract
    mlps = check(model, rules)
    index = calibration(
        split.labels,
        [range(classes)],
        rules.calibration.images,
        torch.Generator().manual_seed(spec.seed),
    )[0]
    if len(index) < rules.calibration.images:
        raise ValueError(
            f"images={rules.calibration.images} were asked for to calibrate on, the training split has {len(index)}: lower it"
        )

    def batches() -> Iterator[Tensor]:
        return (split.batch(part, spec.data).to(spec.device) for part in index.split(64))

    drawn = {
        "per_image": rules.calibration.tokens_per_image,
        "limit": rules.calibration.tokens,
        "seed": spec.seed,
    }
    if rules.correction.sequential:
        dense, stream = _streams(model, batches())
        wanted, widths = _looked_through(dense, rules, drawn)
    else:
        tokens = record(model, batches(), mlps, **drawn)
        ranked = {
            name: scores_of(mlp, tokens[name].hidden, rules, layer_scale(model, name))
            for name, mlp in mlps.items()
            if rules.neurons.budget == "model"
        }
        widths = widths_over_model(mlps, ranked, rules)
    reports = []
    for name in tqdm(mlps, unit="layer", desc=f"extract {spec.id[:6]}", leave=False, delay=5):
        file = checkpoint.with_name(f"{checkpoint.name}.{name}.safetensors") if checkpoint else None
        if file is not None and file.is_file() and file.with_suffix(".json").is_file():
            state = load_file(file)
            layer = shaped(mlps[name], state, rules)
            layer.load_state_dict(state)
            report = json.loads(file.with_suffix(".json").read_text())
        else:
            here = stream.record(name, **drawn) if rules.correction.sequential else tokens.pop(name)
            target = _output(mlps[name], here)
            if rules.correction.sequential:
                target += rules.correction.catch_up * (
                    (wanted[name] - here.before) / layer_scale(model, name) - target
                )
            layer, report = cut_layer(mlps[name], Cut(here, target), rules, widths[name], spec.seed)
            del here, target  # before the next layer's are recorded
            if file is not None:
                _file(layer, report, file)
        model.set_submodule(name, layer.to(spec.device).train(model.training))
        reports.append({"layer": name} | report)
    return reports


def check(model: nn.Module, rules: ExtractSpec) -> dict[str, Mlp]:
    """{name: MLP} that experts can be cut out of. ValueError as `mlps_of`, and for `sequential` on
    anything but a ViT."""
    if rules.correction.sequential and not isinstance(model, VisionTransformer):
        raise ValueError(
            f"sequential=True compares residual streams before norm2 of each block, as a timm VisionTransformer has "
            f"it: {type(model).__name__} is none"
        )
    return mlps_of(model)


class _Stream:
    """The residual stream of a ViT on its calibration images, (B, N, D) a batch, taken from block
    to block while these are cut: for all layers it is one pass, and one layer's tokens are held."""

    def __init__(self, vit: VisionTransformer, parts: list[Tensor]):
        self.vit, self.parts, self.block = vit, parts, 0

    def record(self, name: str, **drawn) -> Recorded:
        """Tokens of the MLP of a block that the stream has not passed; it then stands before that
        block."""
        block = self.vit.get_submodule(name.removesuffix(".mlp"))
        at = list(self.vit.blocks).index(block)
        reached: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda _, args: reached.append(args[0]))
        onward = self.vit.blocks[self.block : at + 1]
        try:
            found = record(
                onward, self.parts, {name: block.mlp}, norms={name: block.norm2}, **drawn
            )
        finally:
            handle.remove()
        self.parts, self.block = reached, at
        return found[name]


@torch.no_grad()
def _streams(vit: VisionTransformer, batches: Iterable[Tensor]) -> list[_Stream]:
    """That of a copy, which stays dense, and that of `vit`."""
    dense = copy.deepcopy(vit).eval()
    start = [before_blocks(dense, images) for images in batches]
    return [_Stream(dense, start), _Stream(vit, start)]


@torch.no_grad()
def _looked_through(
    dense: _Stream, rules: ExtractSpec, drawn: dict[str, int]
) -> tuple[dict[str, Tensor], dict[str, int | None]]:
    """The residual stream (n, D) that each block's cut layer ought to lead to, and the neurons that
    a token passes in each."""
    wanted, parts, ranked = {}, {}, {}
    by_error = rules.neurons.score == "update" and rules.neurons.budget == "model"
    for name, mlp in mlps_of(dense.vit).items():
        tokens, scale = dense.record(name, **drawn), layer_scale(dense.vit, name)
        given = _output(mlp, tokens) * scale
        wanted[name] = tokens.before + given
        if by_error:
            spread = wanted[name].var(dim=0, unbiased=False).sum().clamp_min(1e-12)
            parts[name] = moments(tokens.hidden, given / spread.sqrt())
        elif rules.neurons.budget == "model":
            ranked[name] = scores_of(mlp, tokens.hidden, rules, scale)
    return wanted, _widths(parts, rules) if by_error else widths_over_model(
        mlps_of(dense.vit), ranked, rules
    )


def _widths(parts: Mapping[str, Moments], rules: ExtractSpec) -> dict[str, int]:
    """Neurons that each layer of a static cut keeps if all layers' neurons are ranked by what going
    without one adds to the error, in units of the residual stream's variance after the block: the
    next block norms the stream, so it sees no other."""
    mean = next(iter(parts.values())).mean
    load = mean.new_full((len(parts),), 1 / len(parts))
    kept = survivors(
        list(parts.values()),
        load,
        round(rules.neurons.active * len(mean)),
        rules.correction.penalty,
    )
    return {name: max(LEAST, len(own)) for name, own in zip(parts, kept, strict=True)}


def _output(mlp: Mlp, tokens: Recorded) -> Tensor:
    """(n, D) what an MLP gives on its tokens."""
    return F.linear(tokens.hidden, mlp.fc2.weight.detach(), mlp.fc2.bias.detach())


def _file(layer: nn.Module, report: dict, file: Path) -> None:
    with paths.written_whole(file) as part:
        save_file(
            {key: held.detach().contiguous().cpu() for key, held in layer.state_dict().items()},
            part,
        )
    with paths.written_whole(file.with_suffix(".json")) as part:
        part.write_text(json.dumps(report))


# ---------------------------------------------------------------- structure of a saved model


def fit_extracted(model: nn.Module, state: Mapping[str, Tensor], rules: ExtractSpec) -> nn.Module:
    """Give the MLPs of an uncut model, in place, the structure that the state of its extracted form
    has; returns the model.

    Structure only: load the state afterwards. Raises ValueError as `mlps_of`, and for a state
    without one of the layers.
    """
    for name, mlp in mlps_of(model).items():
        inner = {
            key.removeprefix(f"{name}."): held
            for key, held in state.items()
            if key.startswith(f"{name}.")
        }
        if not inner:
            raise ValueError(
                f"{name}: the state has nothing there: build the model as the saved one was before extraction"
            )
        model.set_submodule(name, shaped(mlp, inner, rules))
    return model


def shaped(mlp: Mlp, state: Mapping[str, Tensor], rules: ExtractSpec) -> nn.Module:
    """A layer with the shapes of `state`, whose names count from the layer: an MLP of that hidden
    width, or a MoE layer."""
    if "fc1.weight" in state:
        return narrow_mlp(
            mlp,
            *(
                torch.empty_like(state[key])
                for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
            ),
        )
    experts = len(state["experts.fc2.bias"])
    if "experts.index" in state:
        widths, second = state["experts.rows"].tolist(), state["experts.fc2.weight"]
        second = (
            [part.t() for part in second.split(widths)] if rules.storage == "inputs" else second.t()
        )
        store = (state["experts.fc1.weight"], state["experts.fc1.bias"], second)
        sets = state["experts.index"].split(widths)
        held = SharedExperts(store, sets, state["experts.fc2.bias"], mlp.act)
    else:
        held = Experts(experts, mlp.fc1.in_features, Experts.widths_in(state, "experts."), mlp.act)
    common = [
        state.get(f"shared.{key}") for key in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    ]
    shared = None if common[0] is None else narrow_mlp(mlp, *common)
    return MoELayer(_router(state, experts, top_k(rules), mlp.act), held, shared)


def _router(state: Mapping[str, Tensor], experts: int, k: int, act: nn.Module) -> HardRouter:
    if "router.centres" in state:
        return OracleRouter(
            state["router.centres"], state["router.weight"], state["router.bias"], act
        )
    if "router.fc1.weight" in state:
        return PredictorRouter(state["router.fc1.weight"].shape[1], experts, k)
    if "router.weight" in state:
        return CentroidRouter(state["router.weight"], state["router.bias"], k)
    return RandomRouter(experts, k)
