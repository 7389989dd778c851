"""One MLP into experts: by hand, against the dense layer and against formulas."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from small_mlps import (
    OF_NEURONS,
    STATIC,
    D,
    H,
    calibration_of,
    extracted_layer,
    output_of,
    rules,
    small_mlp,
)
from timm.layers import Mlp

from lib.extraction import neurons as choosing
from lib.extraction.closed_form import (
    moments_of,
    ridge_regression,
    share_out_neurons,
)
from lib.extraction.record import LayerCalibration, RecordedTokens
from lib.extraction.report import relative_error
from lib.models.mlps import layer_scale_of
from lib.models.moe import MoELayer, RoutingTape
from lib.models.shared_experts import SharedExperts
from lib.routers.predictor import PredictorRouter


@pytest.mark.parametrize(
    "kind",
    [
        {"clusters": {"method": "hdbscan", "smallest_share": 0.1}},
        {"clusters": {"space": "input"}, "router": "nearest"},
        {"storage": "shared"},
        {"correction": {"method": "ridge", "penalty": 1e-9}},
        {"router": "oracle"},
        {"router": "random"},
    ],
)
def test_at_100_percent_experts_run_and_nothing_changes(kind):
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    new_layer, report = extracted_layer(
        mlp, calibration, rules(neurons={"variance_percent": 100.0}, **kind)
    )
    assert (
        isinstance(new_layer, MoELayer)
        and report["clusters"] >= 2
        and report["widths"] == [H] * report["clusters"]
    )
    x = calibration.tokens.inputs
    with RoutingTape(new_layer) as tape:
        out = output_of(new_layer, x)
    assert (tape[new_layer].load() > 0).sum() >= 2
    # Least squares on nearly collinear activations is exact to the conditioning of float32 moments.
    torch.testing.assert_close(out, mlp(x), atol=1e-3 if "correction" in kind else 1e-5, rtol=0)
    assert report["error"] < 1e-6 and report["active"] == H


def test_a_neuron_that_never_varies_goes_for_nothing():
    mlp = small_mlp()
    with torch.no_grad():
        mlp.fc1.weight[[2, 5, 11]] = 0.0  # constant activations, not zero
        mlp.fc1.bias[[2, 5, 11]] = torch.tensor([1.0, 2.0, -0.3])
    calibration = calibration_of(mlp)
    for changed_rules in (
        rules(clusters=STATIC, neurons={"active": 13 / H}, correction={"method": "mean"}),
        rules(neurons={"active": 13 / H}, correction={"method": "mean"}),
        rules(neurons={"active": 13 / H}, correction={"method": "mean"}, storage="shared"),
    ):
        new_layer, report = extracted_layer(mlp, calibration, changed_rules)
        torch.testing.assert_close(
            output_of(new_layer, calibration.tokens.inputs),
            mlp(calibration.tokens.inputs),
            atol=1e-5,
            rtol=0,
        )
        assert report["widths"] == [13] * report["clusters"]
    plain, _ = extracted_layer(mlp, calibration, rules(clusters=STATIC, neurons={"active": 13 / H}))
    # the mean is what is missing
    assert (
        output_of(plain, calibration.tokens.inputs) - mlp(calibration.tokens.inputs)
    ).abs().max() > 0.01


def test_variance_by_hand_and_the_shortest_set_of_a_percentage():
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    new_layer, report = extracted_layer(mlp, calibration, rules(neurons={"variance_percent": 80.0}))
    # The groups are far apart, so clusters are the groups, in some order.
    member = torch.arange(600) % 3
    for e, (w1, b1, w2, b2) in enumerate(new_layer.experts.each()):
        means = torch.stack(
            [F.normalize(calibration.tokens.inputs[member == g].mean(0), dim=0) for g in range(3)]
        )
        own = int((new_layer.router.weight[e] - means).norm(dim=1).argmin())
        variance = calibration.tokens.hidden[member == own].var(dim=0, unbiased=False)
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
    weighted, _ = extracted_layer(
        mlp, calibration, rules(clusters=STATIC, neurons={"score": "weighted"})
    )
    score = calibration.tokens.hidden.var(dim=0) * mlp.fc2.weight.square().sum(dim=0)
    assert torch.equal(weighted.fc1.weight, mlp.fc1.weight[score.topk(8).indices.sort().values])


def test_ridge_is_the_best_linear_prediction():
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    new_layer, report = extracted_layer(
        mlp, calibration, rules(clusters=STATIC, correction={"method": "ridge", "penalty": 1e-9})
    )
    kept = [(mlp.fc1.weight == row).all(dim=1).nonzero().item() for row in new_layer.fc1.weight]
    h, y = calibration.tokens.hidden[:, kept].numpy(), calibration.target.numpy()
    design = np.hstack([h, np.ones((len(h), 1))])
    best, *_ = np.linalg.lstsq(design, y, rcond=None)
    np.testing.assert_allclose(new_layer.fc2.weight.detach().numpy(), best[:-1].T, atol=2e-3)
    left = ((design @ best - y) ** 2).sum() / ((y - y.mean(0)) ** 2).sum()
    assert report["error"] == pytest.approx(left, rel=1e-3)
    order = [
        extracted_layer(mlp, calibration, rules(clusters=STATIC, correction={"method": kind}))[1][
            "error"
        ]
        for kind in ("none", "mean", "ridge")
    ]
    assert order == sorted(order, reverse=True) and order[0] > 2 * order[2]
    by_cluster = extracted_layer(
        mlp,
        calibration,
        rules(correction={"method": "ridge"}, clusters={"space": "input"}, router="nearest"),
    )[1]["error"]
    assert by_cluster < order[2]
    nearly_static = extracted_layer(
        mlp,
        calibration,
        rules(
            correction={"method": "ridge", "pooled": 0.999},
            clusters={"space": "input"},
            router="nearest",
        ),
    )[1]["error"]
    assert by_cluster < nearly_static


def test_choosing_with_the_update_in_mind_leaves_less_error():
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    for how in (
        {"clusters": STATIC},
        {"clusters": {"space": "input"}, "router": "nearest", "neurons": {"statistics": "routed"}},
        {"neurons": {"common": 0.25}},
    ):
        errors = [
            extracted_layer(
                mlp,
                calibration,
                rules(**how | {"correction": {"method": "ridge", "penalty": 1e-6}}).but(
                    neurons={"score": score}
                ),
            )[1]
            for score in ("weighted", "update")
        ]
        assert (
            errors[1]["error"] < errors[0]["error"] and errors[1]["widths"] == errors[0]["widths"]
        )
    with pytest.raises(ValidationError, match="neurons.score='update' is the error that ridge"):
        rules(neurons={"score": "update"}, correction={"method": "mean"})


def test_a_layer_s_neurons_are_shared_out_over_its_clusters():
    scores = [torch.tensor([9.0, 4.0, 1.0, 0.5]), torch.tensor([3.0, 2.0, 0.1, 0.2])]
    # 0.25 + 0.25 + 0.75 + 0.75 tokens' worth of neurons.
    calibration = share_out_neurons(scores, torch.tensor([0.25, 0.75]), 2)
    assert [part.tolist() for part in calibration] == [[0, 1], [0, 1]]
    # 0.9 + 0.1
    assert [part.tolist() for part in share_out_neurons(scores, torch.tensor([0.9, 0.1]), 1)] == [
        [0],
        [0],
    ]
    # none goes empty
    assert [part.tolist() for part in share_out_neurons(scores, torch.tensor([0.5, 0.5]), 1)] == [
        [0, 1],
        [0],
    ]
    mlp = small_mlp()
    calibration, changed_rules = (
        calibration_of(mlp),
        {
            "clusters": {"space": "input"},
            "router": "nearest",
            "neurons": {"statistics": "routed"},
            "correction": {"method": "ridge"},
        },
    )
    for score in ("weighted", "update"):
        alike, even_report = extracted_layer(
            mlp, calibration, rules(**changed_rules).but(neurons={"score": score})
        )
        apart, report = extracted_layer(
            mlp,
            calibration,
            rules(**changed_rules).but(neurons={"score": score, "budget": "cluster"}),
        )
        assert (
            report["active"] == pytest.approx(even_report["active"], abs=1)
            and report["active"] <= even_report["active"] + 1e-6
        )
        assert len(set(even_report["widths"])) == 1 and sum(report["widths"]) > 0
    with pytest.raises(
        ValidationError, match="neurons.budget='cluster' shares the neurons of a layer out"
    ):
        rules(neurons={"budget": "cluster"}, clusters=STATIC)


def test_what_chooses_and_corrects_stays_where_the_tokens_are():
    """Without a graphics card: a tensor that was made on the CPU does not meet one of another
    device."""
    mlp, hidden, target = (
        small_mlp().to("meta"),
        torch.empty(50, H, device="meta"),
        torch.empty(50, D, device="meta"),
    )
    assert choosing.variance_scores(mlp, hidden, rules(neurons={"score": "weighted"})).is_meta
    assert choosing.variance_scores(
        mlp, hidden, rules(neurons={"score": "weighted"}), torch.ones(D, device="meta")
    ).is_meta
    assert layer_scale_of(
        timm.create_model("vit_tiny_patch16_224", depth=1).to("meta"), "blocks.0.mlp"
    ).is_meta
    found = moments_of(hidden, target)
    w2, b2 = ridge_regression(
        found.mixed_with(found, 0.3).of_neurons(torch.arange(H, device="meta")), 1e-3
    )
    assert w2.is_meta and b2.is_meta and w2.shape == (D, H)


def test_storage_is_a_choice_between_memory_and_speed():
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    copies, first = extracted_layer(mlp, calibration, rules(correction={"method": "mean"}))
    shared, second = extracted_layer(
        mlp, calibration, rules(correction={"method": "mean"}, storage="shared")
    )
    x = calibration.tokens.inputs
    torch.testing.assert_close(output_of(shared, x), output_of(copies, x), atol=1e-6, rtol=0)
    assert (
        isinstance(shared.experts, SharedExperts)
        and first["stored"] == 24
        and second["stored"] == first["union"] <= H
    )
    held = sum(p.numel() for p in shared.experts.parameters())
    assert held == second["stored"] * (2 * D + 1) + 3 * D
    output_of(shared.train(), x).sum().backward()
    assert shared.experts.fc1.weight.grad.abs().sum() > 0


def test_one_store_of_input_weights_with_output_weights_of_each_expert():
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    changed_rules = {
        "correction": {"method": "ridge"},
        "clusters": {"space": "input"},
        "router": "nearest",
    }
    copies, first = extracted_layer(mlp, calibration, rules(**changed_rules))
    inputs, second = extracted_layer(mlp, calibration, rules(storage="inputs", **changed_rules))
    x = calibration.tokens.inputs
    torch.testing.assert_close(output_of(inputs, x), output_of(copies, x), atol=1e-6, rtol=0)
    assert (
        first["stored"] == first["columns"] == second["columns"] == 24
        and second["stored"] == first["union"] < 24
    )
    held = sum(p.numel() for p in inputs.experts.parameters())
    assert held == second["stored"] * (D + 1) + 24 * D + 3 * D
    slopes = []
    for new_layer in (copies, inputs):
        output_of(new_layer.train(), x).square().sum().backward()
        slopes.append(new_layer.experts.fc2.weight.grad)
    torch.testing.assert_close(
        torch.cat([w.t() for w in slopes[0]]), slopes[1], rtol=1e-4, atol=1e-4
    )


def test_a_common_part_is_dense_and_the_rest_conditional():
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    new_layer, report = extracted_layer(
        mlp,
        calibration,
        rules(
            neurons={"common": 0.25},
            correction={"method": "ridge"},
            clusters={"space": "input"},
            router="nearest",
        ),
    )
    assert (
        new_layer.shared.fc1.out_features == 4
        and report["widths"] == [4] * 3
        and report["stored"] == 16
        and report["active"] == 8
    )
    own = {tuple(row.tolist()) for w1, *_ in new_layer.experts.each() for row in w1}
    assert not own & {tuple(row.tolist()) for row in new_layer.shared.fc1.weight}
    x = calibration.tokens.inputs
    left = (output_of(new_layer, x) - calibration.target).square().sum() / (
        calibration.target - calibration.target.mean(0)
    ).square().sum()
    assert report["error"] == pytest.approx(left.item(), rel=1e-4)


def test_without_clusters_the_layer_stays_dense():
    mlp = small_mlp()
    x = torch.rand(200, D, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        calibration = LayerCalibration(
            RecordedTokens(x, mlp.act(mlp.fc1(x)), torch.arange(200), torch.ones(200)), mlp(x)
        )
    new_layer, report = extracted_layer(
        mlp,
        calibration,
        rules(clusters={"method": "hdbscan", "smallest_share": 0.3, "sample": 200}),
    )
    assert (
        type(new_layer) is Mlp
        and report["dense"]
        and report["clusters"] < 2
        and report["stored"] == H
        and report["noise"] > 0.5
    )


def test_clusters_of_neurons_compute_all_or_some():
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    whole, report = extracted_layer(
        mlp, calibration, rules(clusters=OF_NEURONS, neurons={"active": 1.0})
    )
    torch.testing.assert_close(
        output_of(whole, calibration.tokens.inputs),
        mlp(calibration.tokens.inputs),
        atol=1e-5,
        rtol=0,
    )
    assert report["widths"] == [4] * 4 and report["active"] == H
    half, _ = extracted_layer(mlp, calibration, rules(clusters=OF_NEURONS, neurons={"active": 0.5}))
    learnt, _ = extracted_layer(
        mlp, calibration, rules(clusters=OF_NEURONS, neurons={"active": 0.5}, router="trained")
    )
    assert half.router.top_k == 2 and isinstance(learnt.router, PredictorRouter)
    assert relative_error(learnt, calibration) < 1 and relative_error(whole, calibration) < 1e-6
