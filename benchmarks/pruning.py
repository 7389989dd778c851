"""Times static pruning against its limits: what it saves, and what scores and removal take.

The first part times a model without half of each MLP, the second the way to it. Removed MACs are
the limit of the first: at a share of 1 the pruned model is faster by as much as it multiplies less.
Norms, activations and attention products stay, and narrower products are less efficient, so it is
below 1 in practice. Scoring cannot be faster than the gradients that it reads, which is the limit
of the second. torch-pruning stands beside it, with its own first-order score on the same batch, its
dependency graph included. Each starts from a copy of the same model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import timm
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from lib.measure import cost
from lib.pruning.neurons.removal import remove
from lib.pruning.neurons.scores import keep_indices, neuron_scores
from lib.verdicts.speed import Ratio

from .clock import DTYPES, forward, timed

NAME, SIDE, BATCH, CLASSES, SHARE = "vit_small_patch14_dinov2", 224, 16, 100, 0.5
GOALS = {"fp32": 0.95}  # least share of the ratio of MACs
SHAPE = f"ViT-S/14, {SIDE} px, batch {BATCH}"


def rows(repeats: int) -> Iterator[Ratio]:
    """Measures all; a row comes as soon as it is measured."""
    yield from speed(repeats)
    yield from pruning(repeats)


def speed(repeats: int) -> Iterator[Ratio]:
    """Times inference with half of the neurons of each MLP, against the whole model.

    The bound is the ratio of MACs.
    """
    whole, (images, _) = _model(), _batch()
    pruned = copy.deepcopy(whole)
    scores = neuron_scores(pruned, [], "magnitude", parts=["mlp"])
    remove(pruned, {name: keep_indices(score, SHARE) for name, score in scores.items()})
    ideal = cost.count(whole, SIDE).macs / cost.count(pruned, SIDE).macs
    for dtype in ("fp32", "bf16"):
        inputs = images.to(DTYPES[dtype])
        models = {"whole": whole.to(DTYPES[dtype]), "pruned": pruned.to(DTYPES[dtype])}
        times = timed({name: forward(model, inputs) for name, model in models.items()}, repeats)
        yield Ratio(
            part="other",
            what=f"MLPs pruned by {SHARE:.0%}, forward",
            shape=SHAPE,
            dtype=dtype,
            ours_is="pruned model",
            against="whole model",
            ours=times["pruned"],
            other=times["whole"],
            ideal=ideal,
            goal=GOALS.get(dtype),
        )


def pruning(repeats: int) -> Iterator[Ratio]:
    """Times Taylor scores on one batch and removal of the lowest half of the hidden neurons.

    They stand against the gradients alone and against a rival.
    """
    model, batch = _model(), _batch()
    times = timed(
        {
            "lib": lambda: _ours(copy.deepcopy(model), batch),
            "torch-pruning": lambda: _rival(copy.deepcopy(model), batch),
            "gradients alone": lambda: _gradients(copy.deepcopy(model), batch),
        },
        repeats,
    )
    for against, goal in (("gradients alone", None), ("torch-pruning", 1.0)):
        yield Ratio(
            part="other",
            what=f"Taylor scores, MLPs pruned by {SHARE:.0%}",
            shape=SHAPE,
            dtype="fp32",
            ours_is="lib",
            against=against,
            ours=times["lib"],
            other=times[against],
            goal=goal,
        )


def _model() -> nn.Module:
    return timm.create_model(NAME, img_size=SIDE, num_classes=CLASSES).eval()


def _batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    return images, torch.randint(CLASSES, (BATCH,), generator=generator)


def _gradients(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Computes the gradients of the weights that are scored, and of no other."""
    weights = [p for block in model.blocks for p in block.mlp.parameters()]
    torch.autograd.grad(F.cross_entropy(model(batch[0]), batch[1]), weights)


def _ours(model: nn.Module, batch: tuple[Tensor, Tensor]) -> nn.Module:
    scores = neuron_scores(model, [batch], "taylor", parts=["mlp"])
    return remove(model, {name: keep_indices(score, SHARE) for name, score in scores.items()})


def _rival(model: nn.Module, batch: tuple[Tensor, Tensor]) -> nn.Module:
    importance = torch_pruning.importance.GroupTaylorImportance(
        group_reduction="sum", normalizer=None, bias=True
    )
    # Position table, class token and layer scales: torch-pruning has no rule for them, and would
    # warn about each.
    unwrapped = [
        (p, p.ndim - 1)
        for module in model.modules()
        if not isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d)
        for p in module.parameters(recurse=False)
    ]
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, batch[0][:1], unwrapped_parameters=unwrapped
    )
    scored = {p for block in model.blocks for p in block.mlp.parameters()}
    # Only now, since the dependency graph is read off the graph of the gradients.
    for p in model.parameters():
        p.requires_grad_(p in scored)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    for block in model.blocks:
        fc1, prune = block.mlp.fc1, torch_pruning.prune_linear_out_channels
        scores = importance(graph.get_pruning_group(fc1, prune, list(range(fc1.out_features))))
        lowest = scores.argsort()[: round(SHARE * fc1.out_features)].tolist()
        graph.get_pruning_group(fc1, prune, lowest).prune()
    return model
