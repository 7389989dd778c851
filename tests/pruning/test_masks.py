"""Masks of single weights: what they zero, that zeros hold, and what is refused."""

import copy

import pytest
import torch
from vits import D, as_dense, batch, build, moe, refused_unchanged

from lib.pruning.neurons.masks import apply_masks, mask_weights
from lib.pruning.neurons.removal import remove
from lib.pruning.neurons.scores import cross_entropy


def test_masks_zero_the_lowest_and_hold():
    model, data = build(moe=moe()), batch()
    products = copy.deepcopy(model)
    cross_entropy(products, *data).backward()
    masks = mask_weights(model, [data], 0.3)
    assert set(masks) == {f"blocks.0.mlp.{part}" for part in ("fc1", "fc2")} | {
        f"blocks.{i}.attn.{part}" for i in range(2) for part in ("qkv", "proj")
    } | {f"blocks.1.mlp.experts.{e}.{part}" for e in range(3) for part in ("fc1", "fc2")}
    for mask in masks.values():
        assert (~mask).sum() == round(0.3 * mask.numel())
    stack = products.blocks[1].mlp.experts.fc2.weight
    e = stack.grad.square().sum(dim=(1, 2)).argmax().item()  # the router may leave an expert idle
    mask, fc1 = masks[f"blocks.1.mlp.experts.{e}.fc2"], products.blocks[0].mlp.fc1.weight
    for held, grad, stays, now in (
        (fc1, fc1.grad, masks["blocks.0.mlp.fc1"], model.blocks[0].mlp.fc1.weight),
        (stack[e], stack.grad[e], mask, model.blocks[1].mlp.experts.fc2.weight[e]),
    ):
        score = (held * grad).detach().square()
        assert (
            score[~stays].max() <= score[stays].min()
            and not now[~stays].any()
            and torch.equal(now[stays], held[stays])
        )

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    cross_entropy(model, *data).backward()
    optimizer.step()
    moved = model.blocks[1].mlp.experts.fc2.weight[e].detach()
    still = moved.clone()
    assert moved[~mask].any()
    apply_masks(model, masks)
    assert not moved[~mask].any() and torch.equal(moved[mask], still[mask])
    assert not model.blocks[0].mlp.fc1.weight[~masks["blocks.0.mlp.fc1"]].any()


def test_masks_of_unequal_experts_by_their_groups():
    model, groups = build(moe=moe()), [[batch(3, seed=s)] for s in range(3)]
    remove(model, {"blocks.1.mlp.experts.1": torch.arange(30)})
    dense = mask_weights(as_dense(model, 1), groups[1], 0.5, parts=["mlp"])
    masks = mask_weights(model, [], 0.5, batches_of_expert=groups, parts=["experts"])
    assert set(masks) == {
        f"blocks.1.mlp.experts.{e}.{part}" for e in range(3) for part in ("fc1", "fc2")
    }
    mask = masks["blocks.1.mlp.experts.1.fc2"]
    # but for rounding
    assert mask.shape == (D, 30) and (mask != dense["blocks.1.mlp.fc2"]).float().mean() < 0.01
    w2 = list(model.blocks[1].mlp.experts.each())[1][2]
    assert not w2[~mask].any() and w2[mask].all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: mask_weights(m, [batch()], 1.5), "share=1.5"),
        (lambda m: apply_masks(m, {"blocks.7.mlp.fc1": torch.ones(1)}), "has no blocks.7.mlp.fc1"),
    ],
)
def test_errors_teach_and_change_nothing(call, message):
    refused_unchanged(call, message)
