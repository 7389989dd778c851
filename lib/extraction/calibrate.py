"""What the layers of a model are calibrated on: all at once, or one after the other.

Axis letters: **B** images, **N** tokens of an image, **n** recorded tokens, **D** width.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..models.mlps import layer_scale_of
from ..models.upcycle import before_blocks
from ..spec import ExtractSpec
from .closed_form import Moments, moments_of
from .correction import weights_of
from .neurons import neurons_by_added_error, neurons_by_layer, variance_scores
from .record import LayerCalibration, RecordedTokens, mlps_of, record_tokens


class AtOnce:
    """Calibrates every layer on the tokens of the dense model, recorded in one pass.

    active_neurons: {layer: neurons that a token passes, or None}. sampling: keyword arguments of
    `record_tokens`. modules: patterns of MLPs, as `mlps_of` takes them.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Tensor],
        rules: ExtractSpec,
        sampling: Mapping[str, int],
        modules: Sequence[str] | None = None,
    ):
        self.mlps = mlps_of(model, modules=modules)
        self.tokens = record_tokens(model, batches, self.mlps, **sampling)
        scores = {}
        if rules.neurons.budget == "model":
            for name, mlp in self.mlps.items():
                scale = layer_scale_of(model, name)
                scores[name] = variance_scores(mlp, self.tokens[name].hidden, rules, scale)
        self.active_neurons = neurons_by_layer(self.mlps, rules, scores)

    def of_layer(self, name: str) -> LayerCalibration:
        """Hands over the tokens of a layer, once; its target is what it gives on them."""
        tokens = self.tokens.pop(name)
        return LayerCalibration(tokens, _output(self.mlps[name], tokens))


class InSequence:
    """Calibrates every layer of a ViT on what the changed layers before it give.

    A layer ought to give what the dense layer gives on the same tokens, and a share
    (correction.catch_up) of what the residual stream lacks by then against the dense model's.
    """

    def __init__(
        self,
        model: VisionTransformer,
        batches: Iterable[Tensor],
        rules: ExtractSpec,
        sampling: Mapping[str, int],
    ):
        self.model, self.rules, self.sampling = model, rules, sampling
        dense, self.changed = streams_of(model, batches)
        self.stream_after = {}  # {layer: (n, D) residual stream of the dense model after its block}
        self.active_neurons = self._follow(dense)

    def of_layer(self, name: str) -> LayerCalibration:
        """Records the tokens of a layer; all layers before it are changed by now."""
        tokens = self.changed.record(name, **self.sampling)
        target = _output(self.model.get_submodule(name), tokens)
        lacking = self.stream_after[name] - tokens.residual
        lacking = lacking / layer_scale_of(self.model, name) - target
        target += self.rules.correction.catch_up * lacking
        return LayerCalibration(tokens, target)

    @torch.no_grad()
    def _follow(self, dense: Stream) -> dict[str, int | None]:
        """Follows the dense model's stream to its end; returns the neurons of each layer."""
        neurons, mlps = self.rules.neurons, mlps_of(dense.vit)
        moments: dict[str, Moments] = {}
        scores: dict[str, Tensor] = {}
        for name, mlp in mlps.items():
            tokens, scale = dense.record(name, **self.sampling), layer_scale_of(dense.vit, name)
            added = _output(mlp, tokens) * scale
            after = self.stream_after[name] = tokens.residual + added
            if neurons.budget == "model" and neurons.score == "update":
                variance = after.var(dim=0, unbiased=False).sum().clamp_min(1e-12)
                moments[name] = moments_of(tokens.hidden, added / variance.sqrt())
            elif neurons.budget == "model":
                scores[name] = variance_scores(mlp, tokens.hidden, self.rules, scale)
        if moments:
            return neurons_by_added_error(moments, neurons.active, self.rules.correction.penalty)
        return neurons_by_layer(mlps, self.rules, scores)


class Stream:
    """Takes the residual stream of a ViT from block to block while these are changed.

    All layers together cost one pass, and the tokens of one layer are held at a time. batches: the
    stream (B, N, D) of each batch, before the block with the number `block`.
    """

    def __init__(self, vit: VisionTransformer, batches: list[Tensor]):
        self.vit, self.batches, self.block = vit, batches, 0

    def record(self, name: str, **sampling: Any) -> RecordedTokens:
        """Records tokens of the MLP of a block that the stream has not passed.

        The stream then stands before that block.
        """
        block = self.vit.get_submodule(name.removesuffix(".mlp"))
        number = list(self.vit.blocks).index(block)
        before_block: list[Tensor] = []
        handle = block.register_forward_pre_hook(lambda _, args: before_block.append(args[0]))
        blocks = self.vit.blocks[self.block : number + 1]
        norms = {name: block.norm2}
        try:
            tokens = record_tokens(blocks, self.batches, {name: block.mlp}, norms=norms, **sampling)
        finally:
            handle.remove()
        self.batches, self.block = before_block, number
        return tokens[name]


@torch.no_grad()
def streams_of(vit: VisionTransformer, batches: Iterable[Tensor]) -> tuple[Stream, Stream]:
    """Starts the stream of a copy, which stays dense, and that of `vit` itself."""
    dense = copy.deepcopy(vit).eval()
    start = [before_blocks(dense, images) for images in batches]
    return Stream(dense, start), Stream(vit, start)


def _output(mlp: nn.Module, tokens: RecordedTokens) -> Tensor:
    """(n, D) what an MLP gives on its tokens."""
    weights = weights_of(mlp)
    return F.linear(tokens.hidden, weights.w2, weights.b2)
