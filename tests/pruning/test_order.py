"""One order over all layers: by hand, against a plain loop over units, and sizes that come back."""

import pytest
import torch
from vits import A, C, D, H, batch, build, moe

from lib.pruning.neurons.groups import prunable, weights_of_groups
from lib.pruning.neurons.order import keep_in_one_order
from lib.pruning.neurons.removal import fit_shapes, remove
from lib.pruning.neurons.scores import expert_scores, neuron_scores

# Units of the attention: the lowest dimension of each head in both sets, (1+2 + 3+4) / 10 weights,
# then the highest, (5+6 + 7+8) / 10. Those of the MLP: 3/5, 6/5 and 60/5.
SCORES = {
    "mlp": torch.tensor([6.0, 60.0, 3.0]),
    "attn.qk": torch.tensor([[5.0, 1.0], [2.0, 6.0]]),
    "attn.vo": torch.tensor([[3.0, 7.0], [8.0, 4.0]]),
}
WEIGHTS = {"mlp": 5, "attn.qk": 3, "attn.vo": 2}  # 35 in all: 3 * 5 and 2 * 10


@pytest.mark.parametrize(
    "share, mlp, qk, vo",
    [
        (0.0, [0, 1, 2], [[0, 1], [0, 1]], [[0, 1], [0, 1]]),
        (0.14, [0, 1], [[0, 1], [0, 1]], [[0, 1], [0, 1]]),  # 5 of 35, asked for 4.9
        (0.21, [0, 1], [[0, 1], [0, 1]], [[0, 1], [0, 1]]),  # 7.35: 5 is nearer than 15
        (0.43, [0, 1], [[0], [1]], [[1], [0]]),  # 15 of 35, asked for 15.05
        (0.57, [1], [[0], [1]], [[1], [0]]),  # 20 of 35: all that can go
    ],
)
def test_by_hand(share, mlp, qk, vo):
    keep = keep_in_one_order(SCORES, WEIGHTS, share)
    expected = {"mlp": mlp, "attn.qk": qk, "attn.vo": vo}
    assert {name: index.tolist() for name, index in keep.items()} == expected


def one_by_one(scores, weights, share):
    """Takes the lowest unit of all layers away until no further one brings the share nearer."""
    units = []
    for name, score in scores.items():
        if score.ndim == 1:
            heads, of_unit = [(name, 0)], weights[name]
        elif name.endswith(".qk"):
            other = name.replace(".qk", ".vo")
            heads = [(half, a) for half in (name, other) for a in range(A)]
            of_unit = A * (weights[name] + weights[other])
        else:
            continue
        rising = [(h, a, scores[h].view(-1, scores[h].shape[-1])[a].argsort()) for h, a in heads]
        count = score.shape[-1]
        for j in range(count):
            members = [(h, a, int(order[j])) for h, a, order in rising]
            total = sum(float(scores[h].view(-1, count)[a, i]) for h, a, i in members)
            units.append((total / of_unit, j == count - 1, of_unit, members))
    target, gone, lost = share * sum(unit[2] for unit in units), 0, set()
    for _, is_best, size, members in sorted(units, key=lambda unit: unit[0]):
        if is_best:
            continue
        if abs(gone + size - target) >= abs(gone - target):
            break
        gone, lost = gone + size, lost | set(members)
    return lost, gone


def gone_by(keep, scores):
    return {
        (name, a, i)
        for name, index in keep.items()
        for a, row in enumerate(index.view(-1, index.shape[-1]))
        for i in set(range(scores[name].shape[-1])) - set(row.tolist())
    }


@pytest.mark.parametrize("kind", ["taylor", "molchanov", "magnitude", "random"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_units_go_as_in_a_plain_loop(kind, share):
    model = build(num_heads=A, depth=3)
    scores = neuron_scores(model, [batch()], kind, generator=torch.Generator().manual_seed(2))
    weights = weights_of_groups(prunable(model))
    assert weights["blocks.0.mlp"] == 2 * D + 1
    assert weights["blocks.0.attn.qk"] == 2 * (D + 1) and weights["blocks.0.attn.vo"] == 2 * D + 1
    keep = keep_in_one_order(scores, weights, share)
    lost, gone = one_by_one(scores, weights, share)
    assert gone_by(keep, scores) == lost and lost
    total = 3 * (H * weights["blocks.0.mlp"] + A * C * (4 * D + 3))
    assert abs(gone - share * total) <= A * (4 * D + 3) / 2, "half of the largest unit"
    before = sum(p.numel() for p in model.parameters())
    remove(model, keep)
    assert before - sum(p.numel() for p in model.parameters()) == gone
    whole = build(depth=3)
    fit_shapes(whole, model.state_dict()).load_state_dict(model.state_dict())
    images = batch()[0]
    torch.testing.assert_close(whole(images), model(images), rtol=0, atol=0)
    if (kind, share) == ("taylor", 0.5):
        assert len({block.attn.head_dim for block in model.blocks}) > 1


def test_experts_of_all_layers_compete():
    """The layer whose experts matter a hundredth loses all that it can."""
    model = build(moe=moe(experts=2, layers=2, top_k=2))
    scores = expert_scores(model, [[batch()]] * 2)
    for e in range(2):
        scores[f"blocks.0.mlp.experts.{e}"] *= 1e-6
    keep = keep_in_one_order(scores, weights_of_groups(prunable(model)), 0.5)
    sizes = {name: len(index) for name, index in keep.items()}
    assert sizes["blocks.0.mlp.experts.0"] == sizes["blocks.0.mlp.experts.1"] == 1
    assert sum(sizes.values()) == 2 * H
    remove(model, keep)(batch()[0])


def test_a_share_that_no_order_reaches_is_refused():
    with pytest.raises(ValueError, match="share=0.9 is out of reach: each of 2 layers .* 0.5714"):
        keep_in_one_order(SCORES, WEIGHTS, 0.9)
    with pytest.raises(ValueError, match="not finite"):
        keep_in_one_order(SCORES | {"mlp": torch.tensor([1.0, torch.nan, 2.0])}, WEIGHTS, 0.2)
