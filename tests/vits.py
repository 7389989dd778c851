"""Small ViTs with weights large enough to tell apart, for the tests of pruning.

Axis letters: **D** width, **H** hidden width, **A** heads, **C** dimensions of a head, **N**
tokens.
"""

import copy

import pytest
import timm
import torch
from timm.layers import Mlp

from lib.models.moe import MoELayer
from lib.models.upcycle import upcycle
from lib.pruning.neurons.removal import remove
from lib.pruning.neurons.scores import keep_indices, neuron_scores
from lib.spec import MoESpec

D, H, A, C, N = 24, 96, 2, 12, 17
VIT = {
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": D,
    "depth": 2,
    "num_heads": A,
    "num_classes": 5,
}


def build(name="vit_tiny_patch16_224", moe=None, **changes):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**VIT, **changes})
    if moe is not None:
        upcycle(model, moe, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        # timm starts biases at zero and weights small, which would hide differences
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def moe(experts=3, **changes):
    return MoESpec(
        **{"layers": 1, "experts": experts, "router": "token", "fresh_experts": True, **changes}
    )


def batch(count=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 28, 28, generator=generator), torch.randint(
        5, (count,), generator=generator
    )


def as_dense(model, expert):
    """A copy with one expert in the place of each MoE layer."""
    dense = copy.deepcopy(model)
    for block in dense.blocks:
        if isinstance(block.mlp, MoELayer):
            weights, act = list(block.mlp.experts.each())[expert], block.mlp.experts.act
            block.mlp = Mlp(D, weights[1].shape[0], act_layer=lambda act=act: act)
            for parameter, weight in zip(block.mlp.parameters(), weights, strict=True):
                parameter.data = weight.detach().clone()
    return dense.eval()


def prune(model, share, *parts):
    scores = neuron_scores(model, [batch()], parts=parts or None)
    return remove(model, {name: keep_indices(score, share) for name, score in scores.items()})


def refused_unchanged(call, message):
    """`call` raises ValueError with this message on a model with an MoE layer, and leaves weights,
    router and modes alone."""
    model = build(moe=moe())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    router = model.blocks[1].mlp.router
    with pytest.raises(ValueError, match=message):
        call(model)
    after = model.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[name], before[name]) for name in before
    )
    assert model.blocks[1].mlp.router is router and not any(m.training for m in model.modules())
