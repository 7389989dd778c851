"""A batch without images goes through an MoE layer of every router, as it does through an MLP."""

from __future__ import annotations

import pytest
import torch
from timm.layers import Mlp

from lib.models.moe import MoELayer
from lib.models.upcycle import moe_layer
from lib.routers.expert_choice import ExpertChoiceRouter
from lib.routers.manual import labelled
from lib.routers.priority import PriorityRouter
from lib.spec import ROUTERS, MoESpec

OPTIONS = {
    "expert_choice": [{"group": "image"}, {"group": "batch"}],
    "priority": [{"group": "image"}, {"group": "batch"}],
    "soft": [{"slots": 2}],
    "manual": [{"groups": ((0,), (1,)), "balance": "none"}],
    "all": [{"top_k": 2, "balance": "none"}],
}
CASES = [(word, fields) for word in ROUTERS for fields in OPTIONS.get(word, [{}])]


def made(word, fields) -> MoELayer:
    torch.manual_seed(0)
    return moe_layer(Mlp(8, 16), MoESpec(layers=1, experts=2, router=word, **fields))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("word, fields", CASES, ids=str)
def test_a_batch_without_images(word, fields, training):
    layer = made(word, fields).train(training)
    x = torch.randn(0, 5, 8, requires_grad=True)
    with torch.set_grad_enabled(training), labelled(layer, torch.zeros(0, dtype=torch.long)):
        out, routing = layer(x), layer.router(x)
    assert out.shape == (0, 5, 8) and not routing.load().any()
    if training:
        out.sum().backward()
        assert x.grad.shape == x.shape


@pytest.mark.parametrize("kind", [ExpertChoiceRouter, PriorityRouter])
@pytest.mark.parametrize("group", ["image", "batch"])
def test_costs_of_no_image(kind, group):
    assert kind(8, 2, group=group).expert_rows(0, 0) == 0
