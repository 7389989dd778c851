"""Experts cut out of MLPs: by hand, against the dense layer, against formulas, and through runs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import load_file
from timm.layers import Mlp

from lib.extraction import closed_form, extract
from lib.extraction import layer as cutting
from lib.extraction import record as recording
from lib.extraction.closed_form import moments, pooled, regression, shared_out, survivors
from lib.extraction.layer import Cut, cut_layer
from lib.extraction.record import Recorded
from lib.inputs.splits import load_splits
from lib.measure import pictures
from lib.measure.cost import count
from lib.models.backbone import build
from lib.models.moe import MoELayer, RoutingTape
from lib.models.shared_experts import SharedExperts
from lib.routers.centroid import CentroidRouter
from lib.routers.controls import OracleRouter, RandomRouter
from lib.routers.hard import HardRouter
from lib.routers.predictor import PredictorRouter
from lib.runs import collect as runs
from lib.runs.restore import restored
from lib.spec import BackboneSpec, DataSpec, ExtractSpec, MoESpec, RunSpec, TrainSpec

D, H = 6, 16


def layer(seed=0):
    torch.manual_seed(seed)
    return Mlp(D, H).eval()


def tokens(mlp, n=600, seed=1, groups=3):
    """Tokens in separate groups, and what the layer gives."""
    generator = torch.Generator().manual_seed(seed)
    centre = 3 * torch.randn(groups, D, generator=generator)
    x = centre[torch.arange(n) % groups] + 0.4 * torch.randn(n, D, generator=generator)
    with torch.no_grad():
        return Cut(Recorded(x, mlp.act(mlp.fc1(x)), torch.arange(n)), mlp(x))


def rules(**fields):
    share = {} if "percent" in fields else {"active": 0.5}
    return ExtractSpec(**{"clusters": "kmeans", "count": 3, "clustered": 600} | share | fields)


def cut(mlp, found, given, width=None):
    width = width if width is not None or given.active is None else round(given.active * H)
    return cut_layer(copy.deepcopy(mlp), found, given, width, seed=0)


def run(made, x):
    return made(x.unsqueeze(0))[0]


# ---------------------------------------------------------------- one layer


@pytest.mark.parametrize(
    "kind",
    [
        {"clusters": "hdbscan", "smallest": 0.1},
        {"space": "input", "router": "nearest"},
        {"storage": "shared"},
        {"correct": "ridge", "ridge": 1e-9},
        {"router": "oracle"},
        {"router": "random"},
    ],
)
def test_at_100_percent_experts_run_and_nothing_changes(kind):
    mlp = layer()
    found = tokens(mlp)
    made, report = cut(mlp, found, rules(percent=100.0, **kind))
    assert (
        isinstance(made, MoELayer)
        and report["clusters"] >= 2
        and report["widths"] == [H] * report["clusters"]
    )
    x = found.tokens.inputs
    with RoutingTape(made) as tape:
        out = run(made, x)
    assert (tape[made].load() > 0).sum() >= 2
    # Least squares on nearly collinear activations is exact to the conditioning of float32 moments.
    torch.testing.assert_close(out, mlp(x), atol=1e-3 if "correct" in kind else 1e-5, rtol=0)
    assert report["error"] < 1e-6 and report["active"] == H


def test_a_neuron_that_never_varies_goes_for_nothing():
    mlp = layer()
    with torch.no_grad():
        mlp.fc1.weight[[2, 5, 11]] = 0.0  # constant activations, not zero
        mlp.fc1.bias[[2, 5, 11]] = torch.tensor([1.0, 2.0, -0.3])
    found = tokens(mlp)
    for given in (
        rules(clusters="one", active=13 / H, correct="mean"),
        rules(active=13 / H, correct="mean"),
        rules(active=13 / H, correct="mean", storage="shared"),
    ):
        made, report = cut(mlp, found, given)
        torch.testing.assert_close(
            run(made, found.tokens.inputs), mlp(found.tokens.inputs), atol=1e-5, rtol=0
        )
        assert report["widths"] == [13] * report["clusters"]
    plain, _ = cut(mlp, found, rules(clusters="one", active=13 / H))
    assert (
        run(plain, found.tokens.inputs) - mlp(found.tokens.inputs)
    ).abs().max() > 0.01  # the mean is what is missing


def test_variance_by_hand_and_the_shortest_set_of_a_percentage():
    mlp = layer()
    found = tokens(mlp)
    made, report = cut(mlp, found, rules(percent=80.0))
    member = (
        torch.arange(600) % 3
    )  # the groups are far apart, so clusters are the groups, in some order
    for e, (w1, b1, w2, b2) in enumerate(made.experts.each()):
        means = torch.stack(
            [F.normalize(found.tokens.inputs[member == g].mean(0), dim=0) for g in range(3)]
        )
        own = int((made.router.weight[e] - means).norm(dim=1).argmin())
        variance = found.tokens.hidden[member == own].var(dim=0, unbiased=False)
        order = variance.argsort(descending=True)
        total = variance.sum()
        least = next(k for k in range(1, H + 1) if variance[order[:k]].sum() >= 0.8 * total - 1e-6)
        kept = order[:least].sort().values
        assert (
            report["widths"][e] == least
            and torch.equal(w1, mlp.fc1.weight[kept])
            and torch.equal(b2, mlp.fc2.bias)
        )
        assert torch.equal(w2, mlp.fc2.weight[:, kept]) and torch.equal(b1, mlp.fc1.bias[kept])
    assert report["stored"] == sum(report["widths"]) and report["load"] == pytest.approx(
        [1 / 3] * 3
    )
    assert report["active"] == pytest.approx(sum(report["widths"]) / 3)
    weighted, _ = cut(mlp, found, rules(clusters="one", score="weighted"))
    score = found.tokens.hidden.var(dim=0) * mlp.fc2.weight.square().sum(dim=0)
    assert torch.equal(weighted.fc1.weight, mlp.fc1.weight[score.topk(8).indices.sort().values])


def test_ridge_is_the_best_linear_prediction():
    mlp = layer()
    found = tokens(mlp)
    made, report = cut(mlp, found, rules(clusters="one", correct="ridge", ridge=1e-9))
    kept = [(mlp.fc1.weight == row).all(dim=1).nonzero().item() for row in made.fc1.weight]
    h, y = found.tokens.hidden[:, kept].numpy(), found.target.numpy()
    design = np.hstack([h, np.ones((len(h), 1))])
    best, *_ = np.linalg.lstsq(design, y, rcond=None)
    np.testing.assert_allclose(made.fc2.weight.detach().numpy(), best[:-1].T, atol=2e-3)
    left = ((design @ best - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert report["error"] == pytest.approx(left, rel=1e-3)
    order = [
        cut(mlp, found, rules(clusters="one", correct=kind))[1]["error"]
        for kind in ("none", "mean", "ridge")
    ]
    assert order == sorted(order, reverse=True) and order[0] > 2 * order[2]
    by_cluster = cut(mlp, found, rules(correct="ridge", space="input", router="nearest"))[1][
        "error"
    ]
    assert by_cluster < order[2]
    nearly_static = cut(
        mlp, found, rules(correct="ridge", space="input", router="nearest", pooled=0.999)
    )[1]["error"]
    assert by_cluster < nearly_static


def test_moments_of_some_neurons_and_mixed_ones_by_hand():
    generator = torch.Generator().manual_seed(0)
    hidden, target = (
        torch.randn(60, 4, generator=generator),
        torch.randn(60, 2, generator=generator),
    )
    own, everyone = moments(hidden[:20], target[:20]), moments(hidden, target)
    some = torch.tensor([3, 1])
    for got, want in zip(own.of(some), moments(hidden[:20][:, some], target[:20]), strict=True):
        torch.testing.assert_close(got, want)
    mixed = own.mixed(everyone, 0.25)
    cov = [np.cov(np.hstack([hidden[:n], target[:n]]).T, bias=True) for n in (20, 60)]
    want = torch.tensor(0.75 * cov[0] + 0.25 * cov[1], dtype=torch.float32)
    torch.testing.assert_close(
        torch.cat([mixed.square, mixed.cross], dim=1), want[:4], atol=1e-5, rtol=0
    )
    assert torch.equal(mixed.mean, own.mean) and torch.equal(mixed.wanted, own.wanted)
    for got, want in zip(
        pooled([own, moments(hidden[20:], target[20:])], torch.tensor([20, 40])),
        everyone,
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    exact = own._replace(square=own.square.double())
    regression(exact, 0.5)
    assert torch.equal(
        exact.square.float(), own.square
    )  # a penalty is not left in what it was given


def test_the_neuron_that_goes_is_the_one_whose_loss_the_others_make_up_for():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(400, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    target = hidden @ torch.randn(5, 3, generator=generator) + 0.1 * torch.randn(
        400, 3, generator=generator
    )

    def left(kept):
        design = np.hstack([hidden[:, kept].numpy(), np.ones((400, 1))])
        best, *_ = np.linalg.lstsq(design, target.numpy(), rcond=None)
        return ((design @ best - target.numpy()) ** 2).sum()

    without = [left([i for i in range(5) if i != j]) for j in range(5)]
    one = torch.ones(1)
    kept = survivors([moments(hidden, target)], one, 4, 1e-9)[0].tolist()
    assert kept == [i for i in range(5) if i != int(np.argmin(without))]
    twins = torch.cat(
        [hidden, 3 * hidden[:, :1] + 1e-3 * torch.randn(400, 1, generator=generator)], dim=1
    )
    found = survivors([moments(twins, 5 * twins[:, 5:] + target)], one, 5, 1e-9)[0].tolist()
    assert found in (
        [0, 1, 2, 3, 4],
        [1, 2, 3, 4, 5],
    )  # of two that say the same one goes, however large it is


def test_choosing_with_the_update_in_mind_leaves_less_error():
    mlp = layer()
    found = tokens(mlp)
    for how in (
        {"clusters": "one"},
        {"space": "input", "router": "nearest", "members": "routed"},
        {"common": 0.25},
    ):
        errors = [
            cut(mlp, found, rules(correct="ridge", score=score, ridge=1e-6, **how))[1]
            for score in ("weighted", "update")
        ]
        assert (
            errors[1]["error"] < errors[0]["error"] and errors[1]["widths"] == errors[0]["widths"]
        )
    with pytest.raises(
        ValidationError, match="score='update' is the error that ridge regression leaves"
    ):
        rules(score="update", correct="mean")


def test_moments_made_in_pieces_are_those_of_the_whole():
    n, s = (
        2 * closed_form.ROWS + 7,
        closed_form.BLOCK + 5,
    )  # several pieces of tokens and of neurons, the last ones short
    generator = torch.Generator().manual_seed(0)
    hidden, target = (
        3 + torch.randn(n, s, generator=generator),
        torch.randn(n, 2, generator=generator),
    )
    found, want = (
        moments(hidden, target),
        np.cov(torch.cat([hidden, target], dim=1).double().numpy().T, bias=True),
    )
    np.testing.assert_allclose(found.square, want[:s, :s], atol=2e-6)
    np.testing.assert_allclose(found.cross, want[:s, s:], atol=2e-6)
    assert torch.equal(found.square, found.square.t())


def test_groups_lean_on_the_same_moments_whether_made_of_theirs_or_anew():
    found, halves = tokens(layer()), torch.arange(60).chunk(2)
    everyone = torch.arange(60)
    for score in ("update", "weighted"):
        given = rules(correct="ridge", score=score, pooled=0.3)
        groups = [cutting._Group(found.tokens.hidden, found.target, half, given) for half in halves]
        cutting._lean(groups, found.tokens.hidden, found.target, everyone)
        want = moments(found.tokens.hidden[:60], found.target[:60])
        for part in (part for group in groups for part in zip(group.every, want, strict=True)):
            torch.testing.assert_close(*part)


def test_a_layer_s_neurons_are_shared_out_over_its_clusters():
    scores = [torch.tensor([9.0, 4.0, 1.0, 0.5]), torch.tensor([3.0, 2.0, 0.1, 0.2])]
    found = shared_out(
        scores, torch.tensor([0.25, 0.75]), 2
    )  # 0.25 + 0.25 + 0.75 + 0.75 tokens' worth of neurons
    assert [part.tolist() for part in found] == [[0, 1], [0, 1]]
    assert [part.tolist() for part in shared_out(scores, torch.tensor([0.9, 0.1]), 1)] == [
        [0],
        [0],
    ]  # 0.9 + 0.1
    assert [part.tolist() for part in shared_out(scores, torch.tensor([0.5, 0.5]), 1)] == [
        [0, 1],
        [0],
    ]  # none goes empty
    mlp = layer()
    found, given = (
        tokens(mlp),
        {"space": "input", "router": "nearest", "members": "routed", "correct": "ridge"},
    )
    for score in ("weighted", "update"):
        alike, told = cut(mlp, found, rules(score=score, **given))
        apart, report = cut(mlp, found, rules(score=score, budget="cluster", **given))
        assert (
            report["active"] == pytest.approx(told["active"], abs=1)
            and report["active"] <= told["active"] + 1e-6
        )
        assert len(set(told["widths"])) == 1 and sum(report["widths"]) > 0
    with pytest.raises(ValidationError, match="budget='cluster' shares the neurons of a layer out"):
        rules(budget="cluster", clusters="one")


def test_what_chooses_and_corrects_stays_where_the_tokens_are():
    """Without a graphics card: a tensor that was made on the CPU does not meet one of another
    device."""
    mlp, hidden, target = (
        layer().to("meta"),
        torch.empty(50, H, device="meta"),
        torch.empty(50, D, device="meta"),
    )
    assert cutting.scores_of(mlp, hidden, rules(score="weighted")).is_meta
    assert cutting.scores_of(
        mlp, hidden, rules(score="weighted"), torch.ones(D, device="meta")
    ).is_meta
    assert cutting.layer_scale(
        timm.create_model("vit_tiny_patch16_224", depth=1).to("meta"), "blocks.0.mlp"
    ).is_meta
    found = moments(hidden, target)
    w2, b2 = regression(found.mixed(found, 0.3).of(torch.arange(H, device="meta")), 1e-3)
    assert w2.is_meta and b2.is_meta and w2.shape == (D, H)


def test_storage_is_a_choice_between_memory_and_speed():
    mlp = layer()
    found = tokens(mlp)
    copies, first = cut(mlp, found, rules(correct="mean"))
    shared, second = cut(mlp, found, rules(correct="mean", storage="shared"))
    x = found.tokens.inputs
    torch.testing.assert_close(run(shared, x), run(copies, x), atol=1e-6, rtol=0)
    assert (
        isinstance(shared.experts, SharedExperts)
        and first["stored"] == 24
        and second["stored"] == first["union"] <= H
    )
    held = sum(p.numel() for p in shared.experts.parameters())
    assert held == second["stored"] * (2 * D + 1) + 3 * D
    run(shared.train(), x).sum().backward()
    assert shared.experts.fc1.weight.grad.abs().sum() > 0


def test_one_store_of_input_weights_with_output_weights_of_each_expert():
    mlp = layer()
    found = tokens(mlp)
    given = {"correct": "ridge", "space": "input", "router": "nearest"}
    copies, first = cut(mlp, found, rules(**given))
    inputs, second = cut(mlp, found, rules(storage="inputs", **given))
    x = found.tokens.inputs
    torch.testing.assert_close(run(inputs, x), run(copies, x), atol=1e-6, rtol=0)
    assert (
        first["stored"] == first["columns"] == second["columns"] == 24
        and second["stored"] == first["union"] < 24
    )
    held = sum(p.numel() for p in inputs.experts.parameters())
    assert held == second["stored"] * (D + 1) + 24 * D + 3 * D
    slopes = []
    for made in (copies, inputs):
        run(made.train(), x).square().sum().backward()
        slopes.append(made.experts.fc2.weight.grad)
    torch.testing.assert_close(
        torch.cat([w.t() for w in slopes[0]]), slopes[1], rtol=1e-4, atol=1e-4
    )


def test_a_common_part_is_dense_and_the_rest_conditional():
    mlp = layer()
    found = tokens(mlp)
    made, report = cut(
        mlp, found, rules(common=0.25, correct="ridge", space="input", router="nearest")
    )
    assert (
        made.shared.fc1.out_features == 4
        and report["widths"] == [4] * 3
        and report["stored"] == 16
        and report["active"] == 8
    )
    own = {tuple(row.tolist()) for w1, *_ in made.experts.each() for row in w1}
    assert not own & {tuple(row.tolist()) for row in made.shared.fc1.weight}
    x = found.tokens.inputs
    left = (run(made, x) - found.target).square().sum() / (
        found.target - found.target.mean(0)
    ).square().sum()
    assert report["error"] == pytest.approx(left.item(), rel=1e-4)


def test_without_clusters_the_layer_stays_dense():
    mlp = layer()
    x = torch.rand(200, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = Cut(Recorded(x, mlp.act(mlp.fc1(x)), torch.arange(200)), mlp(x))
    made, report = cut(mlp, found, rules(clusters="hdbscan", smallest=0.3, clustered=200))
    assert (
        type(made) is Mlp
        and report["dense"]
        and report["clusters"] < 2
        and report["stored"] == H
        and report["noise"] > 0.5
    )


def belongings(mlp, found, given):
    """What is clustered of the tokens, and what becomes of all of them: (labels, centres, members)."""
    clustered, _ = cutting._clustered(found.tokens, given, seed=0)
    return clustered.labels, *cutting._members(found.tokens, clustered, given, seed=0)


def test_tokens_that_were_not_clustered_join_the_nearest_centre_or_none():
    mlp = layer()
    found, group = tokens(mlp), torch.arange(600) % 3
    labels, _, member = belongings(mlp, found, rules(clustered=150))
    assert (labels == -2).sum() == 450 and all(
        len(member[group == g].unique()) == 1 for g in range(3)
    )
    labels, _, member = belongings(
        mlp, found, rules(clusters="hdbscan", smallest=0.1, clustered=150)
    )
    assert (member >= 0).sum() == (labels >= 0).sum() <= 150 and (
        member == -1
    ).sum() >= 450  # they might be noise
    _, report = cut(mlp, found, rules(clusters="hdbscan", smallest=0.1, clustered=150))
    assert report["tokens"] == 600 and not report["dense"]


def test_random_clusters_are_dealt_to_all_tokens_whatever_share_was_clustered():
    mlp = layer()
    found, group = tokens(mlp), torch.arange(600) % 3
    _, _, member = belongings(mlp, found, rules(clusters="random", clustered=150))
    assert member.bincount().tolist() == [200] * 3  # the sizes of the three groups
    shares = torch.stack(
        [
            torch.stack([(group[member == k] == g).float().mean() for g in range(3)])
            for k in range(3)
        ]
    )
    assert (shares - 1 / 3).abs().max() < 0.15


def test_random_directions_are_the_centres_that_route():
    mlp = layer()
    found, given = (
        tokens(mlp),
        rules(
            clusters="directions", space="input", router="nearest", members="routed", clustered=150
        ),
    )
    made, report = cut(mlp, found, given)
    centres = cutting._directions(found.tokens, given, 0)
    torch.testing.assert_close(made.router.weight, centres)
    nearest = (
        torch.cdist(found.tokens.inputs, centres).argmin(1).bincount(minlength=len(centres)) / 600
    )
    assert report["load"] == pytest.approx(nearest.tolist()) and (nearest > 0).all()


def test_groups_of_neurons_compute_all_or_some():
    mlp = layer()
    found = tokens(mlp)
    whole, report = cut(mlp, found, rules(clusters="weights", count=4, active=1.0))
    torch.testing.assert_close(
        run(whole, found.tokens.inputs), mlp(found.tokens.inputs), atol=1e-5, rtol=0
    )
    assert report["widths"] == [4] * 4 and report["active"] == H
    half, _ = cut(mlp, found, rules(clusters="weights", count=4, active=0.5))
    learnt, _ = cut(mlp, found, rules(clusters="weights", count=4, active=0.5, router="trained"))
    assert half.router.top_k == 2 and isinstance(learnt.router, PredictorRouter)
    assert cutting._error(learnt, found) < 1 and cutting._error(whole, found) < 1e-6


# ---------------------------------------------------------------- routers


def test_centres_by_three_measures():
    means = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    x = torch.tensor([[[2.0, 0.5], [1.0, 0.9], [5.0, 4.0], [0.1, 0.0]]])

    def chosen(router):
        with torch.no_grad():
            return router(x).expert.tolist()

    rows = x[0]
    assert (
        chosen(CentroidRouter.of(means))
        == F.cosine_similarity(rows.unsqueeze(1), means, dim=2).argmax(1).tolist()
    )
    assert (
        chosen(CentroidRouter.of(means, "nearest")) == torch.cdist(rows, means).argmin(1).tolist()
    )
    centre = torch.tensor([1.5, 1.0])
    want = (
        F.cosine_similarity((rows - centre).unsqueeze(1), means - centre, dim=2).argmax(1).tolist()
    )
    assert chosen(CentroidRouter.of(means, "centred", centre)) == want
    assert not list(CentroidRouter.of(means).parameters())
    with pytest.raises(ValueError, match="valid are cosine, centred and nearest"):
        CentroidRouter.of(means, "angle")
    with pytest.raises(ValueError, match="top_k=3 of 2 experts"):
        CentroidRouter.of(means, top_k=3)


def test_an_oracle_sees_activations_and_chance_sees_nothing():
    mlp = layer()
    found = tokens(mlp)
    centres = torch.stack([found.tokens.hidden[k::3].mean(0) for k in range(3)])
    oracle = OracleRouter(centres, mlp.fc1.weight, mlp.fc1.bias, mlp.act)
    routing = oracle(found.tokens.inputs.unsqueeze(0))
    assert routing.expert.tolist() == torch.cdist(found.tokens.hidden, centres).argmin(1).tolist()
    assert routing.weight.tolist() == [1.0] * 600 and routing.probs.sum() == 600
    blind = RandomRouter(3)
    assert torch.equal(blind(torch.zeros(2, 50, D)).expert, blind(torch.ones(2, 50, D)).expert)
    assert set(blind(torch.zeros(2, 50, D)).expert.tolist()) == {0, 1, 2}
    with pytest.raises(TypeError, match="abstract"):
        HardRouter(2)


@pytest.mark.parametrize(
    "fields",
    [
        {"space": "input", "router": "nearest"},
        {"router": "oracle"},
        {"storage": "shared", "correct": "mean"},
        {"storage": "inputs", "correct": "ridge"},
        {"clusters": "weights", "count": 4, "active": 0.5, "router": "trained"},
    ],
)
def test_in_bfloat16_tokens_go_where_they_went(fields):
    mlp = layer()
    found = tokens(mlp)
    made, _ = cut(mlp, found, rules(**{"active": 0.5} | fields), H // 2)
    x = found.tokens.inputs.unsqueeze(0).to(torch.bfloat16)
    before, full = made.router(x).expert, made(x.float())
    half = made.to(torch.bfloat16)
    assert (half.router(x).expert == before).float().mean() > 0.97 and half(
        x
    ).dtype == torch.bfloat16
    assert (half(x).float() - full).square().mean() < 0.02 * full.var()


# ---------------------------------------------------------------- whole models and runs

BASE = RunSpec(
    data=DataSpec(train=400, val=20, test=60),
    threads=1,
    train=TrainSpec(epochs=1.0, batch=40, lr=3e-3),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2, hidden=24),
)


def record(where, spec):
    return runs.collect({"one": [spec.but(keep=True)]}, where=where)["one"][0]


def extracted(then=None, **fields):
    given = {"clusters": "kmeans", "count": 4, "images": 100, "tokens": 800, "clustered": 400}
    share = {} if "percent" in fields else {"active": 0.5}
    return BASE.but(init=BASE, train=then, extract=ExtractSpec(**given | share | fields))


@pytest.mark.parametrize(
    "fields, kind",
    [
        (
            {"correct": "ridge", "members": "routed", "space": "input", "router": "nearest"},
            MoELayer,
        ),
        ({"clusters": "one", "correct": "mean", "budget": "model"}, Mlp),
        ({"percent": 90.0}, MoELayer),
        ({"storage": "shared"}, MoELayer),
        ({"storage": "inputs", "correct": "ridge"}, MoELayer),
        ({"router": "oracle"}, MoELayer),
        ({"router": "random"}, MoELayer),
        ({"clusters": "weights", "router": "trained"}, MoELayer),
        ({"common": 0.25, "correct": "mean"}, MoELayer),
        ({"sequential": True, "correct": "ridge"}, MoELayer),
        ({"sequential": True, "correct": "ridge", "score": "update", "budget": "model"}, MoELayer),
    ],
)
def test_a_run_records_saves_and_goes_on(where, fields, kind):
    spec = extracted(**fields)
    made = record(where, spec)
    assert [row["layer"] for row in made.extract] == ["blocks.0.mlp", "blocks.1.mlp"] and made.val[
        "n"
    ] == 20
    model = runs.model_of(spec, where)
    assert type(model.blocks[0].mlp) is kind
    stored = sum(row["stored"] for row in made.extract)
    base = where.get(BASE)
    columns = sum(row["columns"] for row in made.extract)
    extra = made.cost["params_stored"] - (base.cost["params_stored"] - 2 * (24 * 33 + 16))
    experts = sum(row["clusters"] if kind is MoELayer else 1 for row in made.extract) + (
        2 if "common" in fields else 0
    )
    routers = sum(
        t.numel()
        for m in model.modules()
        if isinstance(m, HardRouter)
        for t in (*m.parameters(), *m.buffers())
    )
    assert extra == stored * 17 + columns * 16 + experts * 16 + routers
    child = spec.but(init=spec, extract=None, train=BASE.train.but(distil_logits=0.5))
    after = record(where, child)
    assert (
        after.cost["params_stored"] == made.cost["params_stored"]
        and "train_distil_loss" in after.history[-1]
    )
    splits = load_splits(spec.data)
    images = splits.test.batch(torch.arange(8), spec.data)
    again = restored(child, load_file(where.state(child.id)), 10, 1).eval()
    assert not torch.equal(again(images), model(images))


def test_multiply_adds_are_those_of_the_neurons_that_tokens_pass(where):
    made, base = record(where, extracted(percent=70.0)), record(where, BASE)
    loads, widths = (
        [row[key] for row in part] for part, key in ((made.moe, "load"), (made.extract, "widths"))
    )
    neurons = sum(
        sum(s * h for s, h in zip(*pair, strict=True)) for pair in zip(loads, widths, strict=True)
    )
    centres = sum(row["clusters"] for row in made.extract)
    gone = 17 * 16 * (2 * (2 * 24 - neurons) - centres)
    assert base.cost["macs"] - made.cost["macs"] == pytest.approx(gone, abs=4)
    static = record(where, extracted(clusters="one"))
    assert base.cost["macs"] - static.cost["macs"] == 17 * 16 * 2 * 24


def test_sequential_extraction_makes_up_for_the_layers_before(where):
    model = build(BASE.but(init=BASE, train=None), 10, 1, _state(where))
    splits = load_splits(BASE.data)
    images = splits.train.batch(torch.arange(100), BASE.data)
    with torch.no_grad():
        want = model.forward_features(images)
    far = []
    for how in ({}, {"sequential": True, "catch_up": 0.5}, {"sequential": True}):
        spec = extracted(clusters="one", correct="ridge", active=0.2, **how)
        cut_model = copy.deepcopy(model)
        extract.extract(cut_model, spec, splits.train, 10)
        with torch.no_grad():
            far.append((cut_model.forward_features(images) - want).square().mean().item())
    assert far == sorted(far, reverse=True)


def test_a_stream_records_what_a_pass_through_the_whole_model_would(where):
    model, splits = (
        build(BASE.but(init=BASE, train=None), 10, 1, _state(where)).train(),
        load_splits(BASE.data),
    )
    batches = [splits.train.batch(part, BASE.data) for part in torch.arange(40).split(16)]
    drawn = {"per_image": 5, "limit": 120, "seed": 1}
    dense, changed = extract._streams(model, batches)
    for name in extract.mlps_of(model):
        for stream, vit in ((dense, dense.vit), (changed, model)):
            names = {name: vit.get_submodule(name)}
            there = {name: vit.get_submodule(name.removesuffix("mlp") + "norm2")}
            want, got = (
                recording.record(vit, batches, names, norms=there, **drawn)[name],
                stream.record(name, **drawn),
            )
            for field in ("inputs", "hidden", "image", "before"):
                torch.testing.assert_close(getattr(got, field), getattr(want, field))
        model.get_submodule(
            name
        ).fc2.bias.data += 0.1  # a cut layer: what follows it is seen by one of the streams
    assert model.training and not torch.allclose(dense.parts[0], changed.parts[0])


def test_layers_are_ranked_by_what_they_add_to_the_stream(where):
    model, splits = (
        build(BASE.but(init=BASE, train=None), 10, 1, _state(where)),
        load_splits(BASE.data),
    )
    spec = extracted(
        clusters="one", correct="ridge", score="update", budget="model", sequential=True, active=0.5
    )
    even = extracted(clusters="one", correct="ridge", score="update", sequential=True, active=0.5)
    images = splits.train.batch(torch.arange(100), BASE.data)

    def left(whole, given):
        made = copy.deepcopy(whole)
        reports = extract.extract(made, given, splits.train, 10)
        with torch.no_grad():
            apart = (
                (made.forward_features(images) - whole.forward_features(images))
                .square()
                .mean()
                .item()
            )
        return [row["active"] for row in reports], apart

    for quiet in (0, 1):  # a layer that adds next to nothing to the stream has neurons to spare
        whole = copy.deepcopy(model).eval()
        whole.blocks[quiet].mlp.fc2.weight.data *= 1e-4
        widths, apart = left(whole, spec)
        assert (
            widths[quiet] == cutting.LEAST
            and widths[1 - quiet] == 24
            and left(whole, even)[0] == [12, 12]
        )
        assert apart < 0.1 * left(whole, even)[1]
    loud = copy.deepcopy(model).eval()
    loud.blocks[0].mlp.fc2.weight.data[:, 12:] = 0  # twelve neurons say all that this layer says
    widths, _ = left(loud, spec)
    assert widths[0] <= 12 <= widths[1] and sum(widths) == 24


def _state(where):
    record(where, BASE)
    return load_file(where.state(BASE.id))


def test_a_whole_model_at_100_percent_is_the_dense_one_through_experts(where):
    whole = build(BASE.but(init=BASE), 10, 1, _state(where)).eval()
    splits, cut_model = load_splits(BASE.data), copy.deepcopy(whole)
    reports = extract.extract(cut_model, extracted(percent=100.0), splits.train, 10)
    images = splits.test.batch(torch.arange(20), BASE.data)
    with torch.no_grad(), RoutingTape(cut_model) as tape:
        torch.testing.assert_close(cut_model(images), whole(images), atol=1e-5, rtol=0)
    assert len(reports) == 2 and all((routing.load() > 0).sum() >= 2 for routing in tape.routings())


@pytest.mark.parametrize("sequential", [False, True])
def test_a_broken_off_extraction_goes_on(where, tmp_path, monkeypatch, sequential):
    model, splits, spec = (
        build(BASE.but(init=BASE), 10, 1, _state(where)),
        load_splits(BASE.data),
        extracted(correct="ridge"),
    )
    spec = spec.but(extract={"sequential": sequential})
    whole = copy.deepcopy(model)
    want = extract.extract(whole, spec, splits.train, 10)
    file, done = tmp_path / "run.pt", []

    def once(*args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return cut_layer(*args, **kwargs)

    broken = copy.deepcopy(model)
    monkeypatch.setattr(extract, "cut_layer", once)
    with pytest.raises(KeyboardInterrupt):
        extract.extract(broken, spec, splits.train, 10, file)
    calls = []
    monkeypatch.setattr(
        extract, "cut_layer", lambda *args, **kwargs: calls.append(1) or cut_layer(*args, **kwargs)
    )
    again = copy.deepcopy(model)
    assert extract.extract(again, spec, splits.train, 10, file) == want and len(calls) == 1
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in again.state_dict().items())


@pytest.mark.parametrize(
    "name, size", [("swin_tiny_patch4_window7_224", 224), ("convnext_tiny", 64)]
)
def test_other_families_are_extracted_saved_and_run(name, size, tmp_path):
    torch.manual_seed(0)
    swin, convnext = (
        {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)},
        {"dims": (16, 24, 32, 32), "depths": (1,) * 4},
    )
    sizes = swin if "swin" in name else convnext
    model = timm.create_model(name, num_classes=10, in_chans=1, **sizes).eval()
    splits = load_splits(DataSpec(train=100, val=20, test=20, image_size=size))
    spec = RunSpec(
        data=DataSpec(train=100, val=20, test=20, image_size=size),
        init=RunSpec(),
        threads=1,
        extract=ExtractSpec(
            clusters="kmeans",
            count=3,
            active=0.5,
            correct="ridge",
            images=20,
            tokens=300,
            clustered=200,
        ),
    )
    want = copy.deepcopy(model)
    reports = extract.extract(model, spec, splits.train, 10)
    assert all(row["clusters"] == 3 and not row["dense"] for row in reports)
    images = splits.test.batch(torch.arange(2), spec.data)
    maps = pictures.token_maps(model, splits.test, spec, torch.arange(2))
    assert maps.shape[:2] == (len(reports), 2) and (maps[-1] == -1).any() and (maps[0] >= 0).all()
    fresh = extract.fit_extracted(want, model.state_dict(), spec.extract)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), model(images))
    assert (
        count(model, size, experts_per_image=3.0 * len(reports)).macs
        < count(timm.create_model(name, num_classes=10, in_chans=1, **sizes), size).macs
    )


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: ExtractSpec(), "give one of percent and active"),
        (lambda: ExtractSpec(percent=50.0, active=0.5), "give one of percent and active"),
        (lambda: ExtractSpec(percent=0.0), "percent"),
        (lambda: ExtractSpec(percent=101.0), "percent"),
        (lambda: ExtractSpec(active=0.5, common=0.5), "common=0.5 must be below active=0.5"),
        (
            lambda: ExtractSpec(active=0.5, correct="ridge", storage="shared"),
            "storage='shared' is for experts",
        ),
        (
            lambda: ExtractSpec(active=0.5, clusters="one", storage="inputs"),
            "storage='inputs' is for experts that share neurons",
        ),
        (
            lambda: ExtractSpec(active=0.5, router="trained"),
            "router='trained' with clusters='hdbscan'",
        ),
        (
            lambda: ExtractSpec(active=0.5, clusters="weights", correct="mean"),
            "cuts no neuron away",
        ),
        (lambda: ExtractSpec(percent=50.0, budget="model"), "need active, not percent"),
        (lambda: rules(budget="model", common=0.25), "common is a share of each layer's neurons"),
        (
            lambda: rules(budget="model", score="update", correct="ridge"),
            "residual stream, which is taken along in sequence only",
        ),
        (
            lambda: rules(catch_up=0.5),
            "a share of what cut layers have left behind: set sequential=True",
        ),
        (
            lambda: BASE.but(extract=ExtractSpec(active=0.5)),
            "extract cuts experts out of a trained model",
        ),
        (lambda: extracted().but(moe=MoESpec()), "extract cuts experts out of a trained model"),
        (lambda: extracted().but(init=extracted()), "extract cuts experts out of a trained model"),
        (lambda: BASE.but(train={"distil_logits": 0.5}), "distil_logits needs a parent"),
    ],
)
def test_bad_specs(make, says):
    with pytest.raises(ValidationError, match=says):
        make()


def test_too_few_images_to_calibrate_on(where):
    with pytest.raises(
        RuntimeError, match="images=900 were asked for to calibrate on, the training split has 400"
    ):
        record(where, extracted(images=900))


@pytest.mark.parametrize(
    "name, fields, says",
    [
        (
            "convnextv2_atto",
            {},
            "is a GlobalResponseNormMlp: experts are cut out of timm.layers.Mlp",
        ),
        (
            "convnext_atto",
            {"sequential": True},
            "compares residual streams before norm2 of each block",
        ),
    ],
)
def test_models_that_cannot_be_cut_are_refused_before_anything_trains(where, name, fields, says):
    whole = BASE.but(backbone=BackboneSpec(name=name), data={"image_size": 32})
    with pytest.raises(ValueError, match=says):
        runs.collect(
            {"cut": [whole.but(init=whole, train=None, extract=rules(**fields))]}, where=where
        )
    assert not list(where.states.glob("*"))
