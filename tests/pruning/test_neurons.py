"""Importance scores by hand, against their formulas, against true removal and against
torch-pruning."""

import copy

import pytest
import torch
import torch_pruning
from scipy.stats import spearmanr
from timm.layers import Mlp
from torch import nn
from vits import A, C, H, N, as_dense, batch, build, moe, refused_unchanged

from lib.models.moe import RoutingTape
from lib.pruning.neurons.calibration import calibration
from lib.pruning.neurons.removal import remove
from lib.pruning.neurons.scores import (
    cross_entropy,
    expert_scores,
    forced,
    keep_indices,
    neuron_scores,
    removal_effects,
)
from lib.spec import class_groups


class Small(nn.Module):
    """One MLP with a residual and a head."""

    def __init__(self, mlp, classes=None):
        super().__init__()
        self.block = nn.ModuleDict({"mlp": mlp})
        self.head = nn.Linear(mlp.fc1.in_features, classes) if classes else None

    def forward(self, x):
        y = self.block["mlp"](x)
        return y if self.head is None else self.head(x + y)


# ---- scores


@pytest.mark.parametrize(
    "kind, one_batch, two_batches",
    [
        # Neuron 0 on x = 1 and 3: g w is 3*2*2 (fc1), 3*1 (bias), 3*5 (fc2); neuron 1: 2*2*-1, 2*3,
        # 2*1.
        ("taylor", [144 + 9 + 225, 16 + 36 + 4], [(126 + 774) / 2, (56 + 72) / 2]),
        ("molchanov", [30**2, 4**2], [(18**2 + 42**2) / 2, (8**2 + 0) / 2]),
        ("magnitude", [4 + 1 + 9, 1 + 9 + 4], [14, 14]),
    ],
)
def test_by_hand(kind, one_batch, two_batches):
    """y = 3 (2 x + 1) + 2 (-x + 3), loss = mean y; two neurons of one input."""
    mlp = Mlp(1, 2, act_layer=nn.Identity)
    with torch.no_grad():
        for held, values in zip(
            mlp.parameters(), ([[2.0], [-1.0]], [1.0, 3.0], [[3.0, 2.0]], [0.0]), strict=True
        ):
            held.copy_(torch.tensor(values))
    x, labels = torch.tensor([[1.0], [3.0]]), torch.zeros(2)

    def scores(batches):
        return neuron_scores(Small(mlp), batches, kind, loss=lambda model, x, _: model(x).mean())[
            "block.mlp"
        ].tolist()

    assert scores([(x, labels)]) == one_batch
    assert scores([(x[:1], labels[:1]), (x[1:], labels[1:])]) == two_batches


def test_attention_groups():
    """Each score against a loop over heads and dimensions of the plain gradients."""
    model, (images, labels) = build(), batch()
    scores = neuron_scores(model, [(images, labels)], parts=["attention"])
    assert list(scores) == [f"blocks.{i}.attn.{half}" for i in range(2) for half in ("qk", "vo")]
    cross_entropy(model, images, labels).backward()
    attn = model.blocks[1].attn
    w, b, p = (
        (held * held.grad).detach().square()
        for held in (attn.qkv.weight, attn.qkv.bias, attn.proj.weight)
    )
    for head in range(A):
        for dim in range(C):
            q, k, v = (part * A * C + head * C + dim for part in range(3))
            of_qk = w[q].sum() + w[k].sum() + b[q] + b[k]
            of_vo = w[v].sum() + b[v] + p[:, head * C + dim].sum()
            assert scores["blocks.1.attn.qk"][head, dim].item() == pytest.approx(
                of_qk.item(), rel=1e-4
            )
            assert scores["blocks.1.attn.vo"][head, dim].item() == pytest.approx(
                of_vo.item(), rel=1e-4
            )


def test_model_is_left_alone():
    model, data = build(moe=moe(shared=True)), [batch(), batch(3, seed=2)]
    free = neuron_scores(model, data, "molchanov")
    assert set(free) == {
        "blocks.0.mlp",
        "blocks.1.mlp.shared",
        *(f"blocks.1.mlp.experts.{e}" for e in range(3)),
        *(f"blocks.{i}.attn.{half}" for i in range(2) for half in ("qk", "vo")),
    }
    model.train()
    model.blocks[0].eval()
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
        p.grad = torch.ones_like(p) if i % 2 else None
    before = {
        n: (p, p.detach().clone(), p.requires_grad, p.grad) for n, p in model.named_parameters()
    }
    with torch.no_grad():  # a caller's mode must not matter either
        scores = neuron_scores(model, data, "molchanov")
        expert_scores(model, [data] * 3)
        with pytest.raises(ZeroDivisionError):
            neuron_scores(model, data, loss=lambda *_: 1 / 0)
    assert all(torch.equal(scores[name], free[name]) for name in free)
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    for name, p in model.named_parameters():
        same, weight, wanted, grad = before[name]
        assert p is same and torch.equal(p, weight) and p.requires_grad == wanted and p.grad is grad
        assert grad is None or torch.equal(grad, torch.ones_like(p))


def test_full_precision_whatever_the_caller_does():
    model, data = build(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        inside = neuron_scores(model, [data])
    outside = neuron_scores(model, [data])
    assert all(torch.equal(inside[name], outside[name]) for name in outside)


def test_random_scores_follow_their_generator():
    model = build()
    first, again, other = (
        neuron_scores(model, [], "random", generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    )
    assert all(
        torch.equal(first[name], again[name]) and not torch.equal(first[name], other[name])
        for name in first
    )
    assert first["blocks.0.mlp"].shape == (H,) and first["blocks.1.attn.vo"].shape == (A, C)


@pytest.mark.parametrize("seed", range(3))
def test_rank_of_true_removal(seed):
    """Against the change of the loss when a neuron alone is removed, on a trained layer with
    neurons of unequal size, some of them silent behind large weights: magnitude cannot know that.
    Early in training, where slopes are steep, the sum of squares does worse (0.6 to 0.95): it does
    not see that terms cancel."""
    torch.manual_seed(seed)
    kind = torch.randint(12, (600,))
    x, labels = 1.5 * torch.randn(12, 8)[kind] + 0.6 * torch.randn(600, 8), kind % 4
    model, size = Small(Mlp(8, 24), classes=4), torch.logspace(-1, 0, 24)
    with torch.no_grad():
        for held in (
            model.block["mlp"].fc1.weight.t(),
            model.block["mlp"].fc1.bias,
            model.block["mlp"].fc2.weight,
        ):
            held.mul_(size)
        model.block["mlp"].fc1.bias[15::4] = -30.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(100):
        index = torch.randint(600, (100,))
        optimizer.zero_grad()
        cross_entropy(model, x[index], labels[index]).backward()
        optimizer.step()
    change = []
    with torch.no_grad():
        whole = cross_entropy(model, x, labels)
        assert whole < 0.3  # ln 4 = 1.39 at the start
        for neuron in range(24):
            cut = remove(
                copy.deepcopy(model),
                {"block.mlp": torch.tensor([i for i in range(24) if i != neuron])},
            )
            change.append(abs(cross_entropy(cut, x, labels) - whole).item())

    def rank(kind):
        scores = neuron_scores(
            model, [(x, labels)], kind, generator=torch.Generator().manual_seed(seed)
        )
        return spearmanr(scores["block.mlp"], change).statistic

    assert (
        rank("taylor") >= 0.9
        and rank("molchanov") >= 0.9
        and rank("magnitude") < 0.5
        and abs(rank("random")) < 0.5
    )
    before = copy.deepcopy(model.state_dict())
    effects = removal_effects(
        model, "block.mlp", [(x[:300], labels[:300]), (x[300:], labels[300:])], range(24)
    )
    torch.testing.assert_close(
        effects.abs(), torch.tensor(change, dtype=torch.float64), rtol=0, atol=2e-6
    )
    assert all(torch.equal(held, before[name]) for name, held in model.state_dict().items())
    with pytest.raises(ValueError, match="is no dense MLP.*valid are block.mlp"):
        removal_effects(model, "block.attn", [(x, labels)], [0])
    with pytest.raises(ValueError, match="neurons=.24. of block.mlp are out of range"):
        removal_effects(model, "block.mlp", [(x, labels)], [3, 24])


def test_groups_agree_with_torch_pruning():
    """It finds the groups by tracing. With g w in the place of the weights its magnitude is the
    Taylor score."""
    model, (images, labels) = build(), batch()
    ours = {
        kind: neuron_scores(model, [(images, labels)], kind, parts=["mlp"])
        for kind in ("magnitude", "taylor")
    }
    cross_entropy(model, images, labels).backward()
    importance = torch_pruning.importance.GroupMagnitudeImportance(
        p=2, group_reduction="sum", normalizer=None, bias=True
    )
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, images, unwrapped_parameters=[(model.cls_token, 2), (model.pos_embed, 2)]
    )
    for kind in ("magnitude", "taylor"):
        if kind == "taylor":
            for block in model.blocks:
                for p in block.mlp.parameters():
                    p.data *= p.grad
        for i, block in enumerate(model.blocks):
            group = graph.get_pruning_group(
                block.mlp.fc1, torch_pruning.prune_linear_out_channels, list(range(H))
            )
            torch.testing.assert_close(
                ours[kind][f"blocks.{i}.mlp"], importance(group), rtol=1e-4, atol=1e-12
            )


# ---- experts


def test_forced_routing():
    model, (images, _) = build(moe=moe(top_k=2, capacity_factor=1.0)), batch()
    layer, names, free = model.blocks[1].mlp, list(model.state_dict()), model(images)
    router = layer.router
    with forced(model, 2), RoutingTape(model) as tape:
        out = model(images)
    [routing] = tape.routings()
    assert routing.load().tolist() == [0, 0, 6 * N] and (routing.weight == 1).all()
    assert layer.router is router and list(model.state_dict()) == names
    dense = as_dense(model, 2)
    torch.testing.assert_close(out, dense(images), rtol=1e-4, atol=1e-5)
    assert (out - free).abs().max() > 1e-2
    with pytest.raises(ZeroDivisionError), forced(model, 0):
        _ = 1 / 0
    assert layer.router is router


def test_expert_scores_are_those_of_a_dense_model_on_its_group():
    model, groups = (
        build(moe=moe(layers=2)),
        [[batch(4, seed=s), batch(2, seed=s + 9)] for s in range(3)],
    )
    for kind in ("taylor", "molchanov"):
        scores = expert_scores(model, groups, kind)
        assert len(scores) == 6
        for e in range(3):
            for name, dense in neuron_scores(
                as_dense(model, e), groups[e], kind, parts=["mlp"]
            ).items():
                torch.testing.assert_close(
                    scores[f"{name}.experts.{e}"], dense, rtol=1e-3, atol=1e-12
                )
    weights = expert_scores(model, [], "magnitude")
    w1, b1, w2, _ = list(model.blocks[1].mlp.experts.each())[1]
    expected = w1.square().sum(1) + b1.square() + w2.square().sum(0)
    torch.testing.assert_close(weights["blocks.1.mlp.experts.1"], expected.detach())


def test_class_groups():
    assert [len(group) for group in class_groups(67, 4)] == [17, 17, 17, 16]
    assert class_groups(12, 4) == ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))
    assert sum(class_groups(67, 4), ()) == tuple(range(67))
    assert class_groups(2, 4) == ((0,), (1,), (0,), (1,)) and class_groups(5, 1) == (
        (0, 1, 2, 3, 4),
    )


def test_calibration_is_balanced_and_disjoint():
    labels = torch.arange(5).repeat_interleave(torch.tensor([40, 40, 3, 40, 40]))
    drawn = calibration(labels, class_groups(5, 2), 12, torch.Generator().manual_seed(0))
    assert [torch.bincount(labels[index], minlength=5).tolist() for index in drawn] == [
        [5, 4, 3, 0, 0],
        [0, 0, 0, 6, 6],
    ]
    again = calibration(labels, class_groups(5, 2), 12, torch.Generator().manual_seed(0))
    other = calibration(labels, class_groups(5, 2), 12, torch.Generator().manual_seed(1))
    assert torch.equal(drawn[0], again[0]) and not torch.equal(drawn[0], other[0])
    with pytest.warns(UserWarning, match="group 1 has no image of class 4"):
        calibration(labels[labels < 4], class_groups(5, 2), 12, torch.Generator().manual_seed(0))
    # Fewer than asked for: all there are.
    shared = calibration(labels[:80], class_groups(2, 4), 80, torch.Generator())
    assert [len(index) for index in shared] == [20] * 4 and torch.cat(shared).unique().numel() == 80


# ---- what goes


@pytest.mark.parametrize(
    "count, share, kept",
    [(10, 0.0, 10), (10, 0.5, 5), (10, 0.94, 1), (7, 0.5, 3), (5, 0.5, 3), (96, 0.95, 5)],
)
def test_kept_number(count, share, kept):
    """round(share * n) go, halves to even: 3.5 is 4, 2.5 is 2."""
    scores = torch.arange(2 * count, 0, -1).view(2, count)[:, torch.randperm(count)].float()
    index = keep_indices(scores, share)
    assert index.shape == (2, kept) and (index.diff(dim=-1) > 0).all()
    torch.testing.assert_close(
        scores.gather(1, index).sort(descending=True).values, scores.topk(kept).values
    )
    # ties go from the end
    assert keep_indices(torch.zeros(count), share).tolist() == list(range(kept))


# ---- errors


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m: neuron_scores(m, [batch()], "hessian"),
            "'hessian' is unknown: valid are taylor, molchanov, magnitude, random",
        ),
        (
            lambda m: neuron_scores(m, [batch()], parts=["heads"]),
            "parts=heads is unknown: valid are mlp, attention, experts",
        ),
        (lambda m: neuron_scores(m, [], "taylor"), "0 calibration batches"),
        (lambda m: neuron_scores(m, [batch(), batch(0)]), r"\[6, 0\] images.*none may be empty"),
        (lambda m: neuron_scores(m, [], "random"), "pass generator="),
        (
            lambda m: neuron_scores(m, [batch()], loss=lambda m, x, y: m(x).sum() * torch.nan),
            "loss on a calibration batch is nan",
        ),
        (
            lambda m: neuron_scores(
                m, [batch()], loss=lambda m, x, y: m.blocks[0](m.patch_embed(x)).sum()
            ),
            "does not depend on blocks.1.mlp.experts.fc1.weight, .*zeros without meaning",
        ),
        (
            lambda m: expert_scores(m, [[batch()]] * 2),
            "2 calibration groups for the 3 experts of blocks.1.mlp.experts",
        ),
        (lambda m: expert_scores(m, [[batch()], [], [batch()]]), "group of expert 1 is empty"),
        (
            lambda m: expert_scores(m, [[batch()], [batch()], [batch(0)]]),
            "group of expert 2 is empty",
        ),
        (lambda m: forced(m, 3).__enter__(), "blocks.1.mlp has experts 0..2, not 3"),
        (lambda m: forced(build(), 0).__enter__(), "no MoE layer"),
        (
            lambda m: neuron_scores(build(), [], "magnitude", parts=["experts"]),
            "has no experts to prune",
        ),
        (
            lambda m: forced(build(moe=moe(router="soft")), 0).__enter__(),
            "blocks.1.mlp has a SoftRouter, which sends no token to an expert",
        ),
        (lambda m: class_groups(0, 4), "classes=0 over experts=4"),
        (
            lambda m: calibration(torch.tensor([0, 0]), [(0,), (1, 2)], 8, torch.Generator()),
            r"group 1 is empty.*classes \(1, 2\)",
        ),
        (
            lambda m: calibration(torch.tensor([0]), [(0,), (0,)], 8, torch.Generator()),
            r"group 1 is empty",
        ),
        (lambda m: keep_indices(torch.rand(8), 1.0), "share=1.0 .*valid is 0"),
        (lambda m: keep_indices(torch.rand(8), -0.1), "share=-0.1"),
        (
            lambda m: keep_indices(torch.rand(2, 8), 0.95),
            "share=0.95 of 8 leaves nothing .*head without dimensions.* below 0.9375",
        ),
        (lambda m: keep_indices(torch.tensor([1.0, torch.nan]), 0.5), "not finite"),
    ],
)
def test_errors_teach_and_change_nothing(call, message):
    refused_unchanged(call, message)
