"""Clusters of tokens, their centres, and routers to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_mlps import (
    OF_NEURONS,
    D,
    H,
    calibration_of,
    extracted_layer,
    rules,
    small_mlp,
)

from lib.extraction import token_clusters
from lib.extraction.clusters import Clusters
from lib.extraction.record import RecordedTokens
from lib.routers.centroid import CentroidRouter
from lib.routers.controls import OracleRouter, RandomRouter
from lib.routers.hard import HardRouter
from lib.spec import ClusterSpec


def belongings(mlp, calibration, changed_rules):
    """(labels of the sample, centres, cluster of each token)."""
    clustered, _ = token_clusters.cluster_tokens(calibration.tokens, changed_rules.clusters, seed=0)
    return clustered.labels, *token_clusters.centres_and_members(
        calibration.tokens, clustered, changed_rules.clusters, seed=0
    )


def test_tokens_that_were_not_clustered_join_the_nearest_centre_or_none():
    mlp = small_mlp()
    calibration, group = calibration_of(mlp), torch.arange(600) % 3
    labels, _, member = belongings(mlp, calibration, rules(clusters={"sample": 150}))
    assert (labels == -2).sum() == 450 and all(
        len(member[group == g].unique()) == 1 for g in range(3)
    )
    labels, _, member = belongings(
        mlp,
        calibration,
        rules(clusters={"method": "hdbscan", "smallest_share": 0.1, "sample": 150}),
    )
    # they might be noise
    assert (member >= 0).sum() == (labels >= 0).sum() <= 150 and (member == -1).sum() >= 450
    _, report = extracted_layer(
        mlp,
        calibration,
        rules(clusters={"method": "hdbscan", "smallest_share": 0.1, "sample": 150}),
    )
    assert report["tokens"] == 600 and not report["dense"]


# seven tokens on a line, clustered by what they activate: 0 and 1 about 0.5, 10 and 11 about 10.5,
# 2 and 8 noise, 9 not in the sample; the first of each image is its class token. Inputs are 100
# times as large.
LINE = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0], [8.0], [9.0]])
ON_A_LINE = RecordedTokens(
    100 * LINE, LINE, torch.tensor([0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2, 3])
)
LABELS = Clusters(np.array([0, 0, -1, 1, 1, -1, -2]), np.ones(6))


def test_noise_takes_no_part_or_joins_the_nearest_mean_and_moves_the_centre():
    def belonging(**fields):
        centres, member = token_clusters.centres_and_members(
            ON_A_LINE, LABELS, ClusterSpec(**fields), seed=0
        )
        return centres[:, 0].tolist(), member.tolist()

    assert belonging() == ([50.0, 1050.0], [0, 0, -1, 1, 1, -1, -1])
    centres, member = belonging(noise="nearest")
    assert member == [0, 0, 0, 1, 1, 1, 1]  # the one outside the sample moves no centre
    assert centres == pytest.approx([100.0, 100 * (10 + 11 + 8) / 3])


def test_class_tokens_calibrate_no_cluster_or_their_own():
    # of the patches alone: 1 and 2, 11 and 9 are clusters, 8 is noise
    of_patches = Clusters(np.array([-2, 0, 0, -2, 1, -1, 1]), np.ones(5))

    def belonging(**fields):
        centres, member = token_clusters.centres_and_members(
            ON_A_LINE, of_patches, ClusterSpec(**fields), seed=0
        )
        return centres[:, 0].tolist(), member.tolist()

    assert belonging(class_token="left_out") == ([150.0, 1000.0], [-1, 0, 0, -1, 1, -1, 1])
    centres, member = belonging(class_token="left_out", noise="nearest")
    assert member == [-1, 0, 0, -1, 1, 1, 1] and centres == pytest.approx([150.0, 2800 / 3])
    centres, member = belonging(class_token="apart")
    assert centres == [150.0, 1000.0, 500.0] and member == [2, 0, 0, 2, 1, -1, 1]
    none = RecordedTokens(*(part[1:3] for part in (100 * LINE, LINE, LINE, LINE)))
    with pytest.raises(ValueError, match="none of the 2 recorded tokens is a class token"):
        token_clusters.centres_and_members(
            none, Clusters(np.array([0, 1]), np.ones(2)), ClusterSpec(class_token="apart"), seed=0
        )


@pytest.mark.parametrize("method", ["hdbscan", "kmeans"])
def test_patches_are_clustered_among_themselves(method):
    calibration = calibration_of(small_mlp(), groups=4)
    group, is_class_token = torch.arange(600) % 4, calibration.tokens.is_class_token
    assert is_class_token.sum() == 30 and (group[is_class_token] == 0).all()
    for class_token, count in (("left_out", 4), ("apart", 5)):
        fields = {"method": method, "count": 4, "smallest_share": 0.1, "sample": 570}
        changed_rules = rules(clusters=fields | {"class_token": class_token})
        labels, centres, member = belongings(small_mlp(), calibration, changed_rules)
        assert (labels[is_class_token] == -2).all() and (labels[~is_class_token] > -2).all()
        assert len(centres) == count
        of_class_tokens = -1 if class_token == "left_out" else 4
        assert (member[is_class_token] == of_class_tokens).all()
        assert (member[~is_class_token] != 4).all()
    mean_input = calibration.tokens.inputs[is_class_token].mean(dim=0)
    torch.testing.assert_close(centres[-1], mean_input)
    _, report = extracted_layer(small_mlp(), calibration, changed_rules)
    assert report["clusters"] == 5 and len(report["widths"]) == 5


def test_random_clusters_are_dealt_to_all_tokens_whatever_share_was_clustered():
    mlp = small_mlp()
    calibration, group = calibration_of(mlp), torch.arange(600) % 3
    _, _, member = belongings(mlp, calibration, rules(clusters={"method": "random", "sample": 150}))
    assert member.bincount().tolist() == [200] * 3  # the sizes of the three groups
    shares = torch.stack(
        [
            torch.stack([(group[member == k] == g).float().mean() for g in range(3)])
            for k in range(3)
        ]
    )
    assert (shares - 1 / 3).abs().max() < 0.15


def test_random_directions_are_the_centres_that_route():
    mlp = small_mlp()
    calibration, changed_rules = (
        calibration_of(mlp),
        rules(
            clusters={"method": "directions", "space": "input", "sample": 150},
            router="nearest",
            neurons={"statistics": "routed"},
        ),
    )
    new_layer, report = extracted_layer(mlp, calibration, changed_rules)
    centres = token_clusters.random_directions(calibration.tokens, 3, 0)
    torch.testing.assert_close(new_layer.router.weight, centres)
    nearest = (
        torch.cdist(calibration.tokens.inputs, centres).argmin(1).bincount(minlength=len(centres))
        / 600
    )
    assert report["load"] == pytest.approx(nearest.tolist()) and (nearest > 0).all()


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
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    centres = torch.stack([calibration.tokens.hidden[k::3].mean(0) for k in range(3)])
    oracle = OracleRouter(centres, mlp.fc1.weight, mlp.fc1.bias, mlp.act)
    routing = oracle(calibration.tokens.inputs.unsqueeze(0))
    assert (
        routing.expert.tolist()
        == torch.cdist(calibration.tokens.hidden, centres).argmin(1).tolist()
    )
    assert routing.weight.tolist() == [1.0] * 600 and routing.probs.sum() == 600
    blind = RandomRouter(3)
    assert torch.equal(blind(torch.zeros(2, 50, D)).expert, blind(torch.ones(2, 50, D)).expert)
    assert set(blind(torch.zeros(2, 50, D)).expert.tolist()) == {0, 1, 2}
    with pytest.raises(TypeError, match="abstract"):
        HardRouter(2)


@pytest.mark.parametrize(
    "fields",
    [
        {"clusters": {"space": "input"}, "router": "nearest"},
        {"router": "oracle"},
        {"storage": "shared", "correction": {"method": "mean"}},
        {"storage": "inputs", "correction": {"method": "ridge"}},
        {"clusters": OF_NEURONS, "neurons": {"active": 0.5}, "router": "trained"},
    ],
)
def test_in_bfloat16_tokens_go_where_they_went(fields):
    mlp = small_mlp()
    calibration = calibration_of(mlp)
    new_layer, _ = extracted_layer(mlp, calibration, rules(**fields), H // 2)
    x = calibration.tokens.inputs.unsqueeze(0).to(torch.bfloat16)
    before, full = new_layer.router(x).expert, new_layer(x.float())
    half = new_layer.to(torch.bfloat16)
    assert (half.router(x).expert == before).float().mean() > 0.97 and half(
        x
    ).dtype == torch.bfloat16
    assert (half(x).float() - full).square().mean() < 0.02 * full.var()
