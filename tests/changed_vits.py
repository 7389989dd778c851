"""Small ViTs after everything that can be done to them, by name: `CHANGED[name]()` builds one.

Axis letters: **B** images, **N** tokens of an image, **D** width, **H** hidden width, **E**
experts.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from vits import D, N, batch, build, moe, prune

from lib.extraction.layer import extract_layer
from lib.extraction.record import LayerCalibration, RecordedTokens
from lib.models.ensemble import ensemble
from lib.pruning.experts.dropping import drop_experts
from lib.pruning.experts.progressive import ProgressiveDrop
from lib.pruning.neurons.removal import remove
from lib.routers.forced import ForcedRouter
from lib.routers.predictor import PredictorRouter
from lib.spec import ClusterSpec, ExtractSpec

LAYER = "blocks.1.mlp"
OF_NEURONS = ClusterSpec(of="neurons", count=4)
KMEANS = ClusterSpec(method="kmeans", count=3, sample=400)


def images(count=4, seed=5):
    return batch(count, seed)[0]


def extracted(storage="copies", clusters=KMEANS, **rules):
    """A ViT with both MLPs extracted, on tokens in clusters; a half of the neurons act."""
    rules = {"neurons": {"active": 0.5}} | rules
    spec = ExtractSpec(storage=storage, clusters=clusters, **rules)
    model = build()
    generator = torch.Generator().manual_seed(4)
    centres = 3 * torch.randn(3, D, generator=generator)
    x = centres[torch.arange(400) % 3] + 0.4 * torch.randn(400, D, generator=generator)
    for block in model.blocks:
        mlp, number = block.mlp, torch.arange(400)
        with torch.no_grad():
            tokens = RecordedTokens(x, mlp.act(mlp.fc1(x)), number // N, number % N)
            calibration = LayerCalibration(tokens, mlp(x))
        active = None if spec.neurons.active is None else 48
        block.mlp = extract_layer(mlp, calibration, spec, active, seed=0)[0].train(False)
    return model


def uneven(model):
    """Experts of unequal width: expert e keeps 4 + 2 e neurons."""
    for name, module in list(model.named_modules()):
        if name.endswith(".experts"):
            remove(model, {f"{name}.{e}": torch.arange(4 + 2 * e) for e in range(module.experts)})
    return model


def dropped(missing, model=None):
    """One expert fewer in the last layer."""
    return drop_experts(model or build(moe=moe()), {LAYER: [0, 2]}, missing)


def narrowed_then_upcycled(**changes):
    from lib.models.upcycle import upcycle

    model = prune(build(), 0.5, "mlp", "attention")
    return upcycle(model, moe(**changes), generator=torch.Generator().manual_seed(7))


def halfway():
    """In the middle of progressive dropping."""
    model = build(moe=moe(top_k=1))
    drop = ProgressiveDrop(model, 10)
    drop.routers[LAYER].alive[1] = False
    return model


def forced():
    model = build(moe=moe())
    model.get_submodule(LAYER).router = ForcedRouter(3, 1)
    return model


def predicted():
    """Clusters of neurons behind a router that predicts them, here without training."""
    model = extracted(clusters=OF_NEURONS)
    for block in model.blocks:
        block.mlp.router = PredictorRouter(D, 4, block.mlp.router.top_k).eval()
    return model


def without_biases():
    model = build(moe=None)
    for linear in (model.blocks[0].mlp.fc1, model.blocks[1].mlp.fc2):
        linear.bias = None
    return model


# one for each word of a router, and for each option that changes what it does
ROUTED = {
    "token": {"top_k": 2, "shared": True},
    "token, capacity": {"top_k": 2, "capacity_factor": 0.6},
    "token, priority": {"capacity_factor": 0.5, "batch_priority": True, "gate": "renormalised"},
    "token, noise and dropout": {"noise": 1.0, "expert_dropout": 0.2, "balance": "loss_free"},
    "token, compete": {"compete_rate": 0.5, "top_k": 2},
    "image": {"router": "image", "gate": "renormalised"},
    "image, mean": {"router": "image", "pool": "mean", "top_k": 2},
    "all": {"router": "all", "top_k": 3, "balance": "none"},
    "all, mean": {"router": "all", "top_k": 3, "balance": "none", "gate": "renormalised"},
    "expert_choice": {"router": "expert_choice", "choices": 1.5},
    "expert_choice, batch": {"router": "expert_choice", "group": "batch", "gate": "renormalised"},
    "priority": {"router": "priority"},
    "priority, batch": {"router": "priority", "group": "batch", "gate": "renormalised"},
    "soft": {"router": "soft", "slots": 2},
}
CHANGED = {
    "dense": build,
    "without some biases": without_biases,
    **{
        f"upcycled: {name}": lambda fields=fields: build(moe=moe(**fields))
        for name, fields in ROUTED.items()
    },
    "pruned": lambda: prune(build(), 0.5, "mlp", "attention"),
    "pruned, then upcycled": lambda: narrowed_then_upcycled(shared=True, top_k=2),
    "upcycled, then pruned": lambda: prune(build(moe=moe(shared=True)), 0.25),
    "upcycled, then pruned unevenly": lambda: uneven(build(moe=moe(top_k=2))),
    "extracted: copies": lambda: extracted(),
    "extracted: shared": lambda: extracted("shared", correction={"method": "mean"}),
    "extracted: inputs": lambda: extracted("inputs", correction={"method": "ridge"}),
    "extracted: unequal": lambda: extracted("inputs", neurons={"variance_percent": 70}),
    "extracted: with a common part": lambda: extracted(neurons={"active": 0.5, "common": 0.25}),
    "extracted: static": lambda: extracted(clusters=ClusterSpec(of="nothing")),
    "extracted: oracle": lambda: extracted(router="oracle"),
    "extracted: neurons": lambda: extracted(clusters=OF_NEURONS),
    "extracted: neurons, predicted": predicted,
    "dropped: zero update": lambda: dropped("zero_update"),
    "dropped: reroute": lambda: dropped("reroute"),
    "dropped, then pruned unevenly": lambda: uneven(dropped("zero_update")),
    "pruned, upcycled and dropped": lambda: dropped("reroute", narrowed_then_upcycled()),
    "halfway through progressive dropping": halfway,
    "forced": forced,
}


class Net(nn.Module):
    """A model of one's own around a ViT of timm."""

    def __init__(self, heads=2, classes=5):
        super().__init__()
        self.trunk = build(num_heads=heads, num_classes=0)
        self.head = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, classes))

    def forward(self, x):
        return self.head(self.trunk(x))


def ensemble_of(members=2):
    return ensemble(build(moe=moe(experts=4)), members).eval()


def copy_of(model):
    return copy.deepcopy(model)
