"""Recorded tokens and their clusters: against the library's own HDBSCAN, against brute force, and
by hand."""

from __future__ import annotations

import hdbscan
import numpy as np
import pytest
import timm
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from scipy.spatial.distance import cdist
from sklearn.metrics import adjusted_rand_score
from timm.layers import Mlp
from vits import D, H, N, batch, build, moe

from lib.extraction import clusters
from lib.extraction import record as recording


def blobs(n, d, count, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, d, generator=generator)
    which = torch.randint(count, (n,), generator=generator)
    return (0.7 + torch.rand(n, 1, generator=generator)) * centre[which] + spread * torch.randn(
        n, d, generator=generator
    ), which


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n, d, spread", [(700, 96, 0.8), (700, 96, 1.3), (500, 8, 0.3)])
def test_labels_are_the_librarys(n, d, spread, seed):
    x, _ = blobs(n, d, 5, spread, seed)
    ours = clusters.density_clusters(x, 20, 5)
    theirs = hdbscan.HDBSCAN(min_cluster_size=20, min_samples=5).fit(x.double().numpy())
    assert (
        adjusted_rand_score(ours.labels, theirs.labels_) == 1.0
        and ours.count == theirs.labels_.max() + 1 > 1
    )
    assert (
        np.array_equal(ours.labels < 0, theirs.labels_ < 0)
        and ours.noise == (theirs.labels_ < 0).mean()
    )
    assert len(ours.tree) == len(theirs.condensed_tree_.to_numpy())


def test_distances_in_blocks_and_the_tree_by_brute_force(monkeypatch):
    monkeypatch.setattr(clusters, "BLOCK", 7)
    x, _ = blobs(60, 12, 3, 0.5)
    x += 100.0  # far from the origin, where squares are large and differences small
    found = clusters.distances(x)
    np.testing.assert_allclose(found.numpy(), cdist(x, x), atol=2e-4)
    core = np.sort(cdist(x, x), axis=1)[:, 4]
    reach = np.maximum(np.maximum.outer(core, core), cdist(x, x))
    np.fill_diagonal(reach, 0)
    edges = clusters.spanning_tree(cdist(x, x), core)
    assert edges[:, 2].sum() == pytest.approx(minimum_spanning_tree(reach).sum())
    assert len(set(edges[:, 1].astype(int))) == 59 and all(
        edges[:, 2] == reach[edges[:, 0].astype(int), edges[:, 1].astype(int)]
    )


def test_nothing_but_noise_and_what_is_refused():
    x = torch.rand(80, 30, generator=torch.Generator().manual_seed(1))
    alone = clusters.density_clusters(x, 30, 5)
    assert alone.count == 0 and alone.noise == 1.0
    for size, neighbours in ((1, 5), (80, 5), (20, 0), (20, 80)):
        with pytest.raises(ValueError, match="80 tokens, min_cluster_size="):
            clusters.density_clusters(x, size, neighbours)
    with pytest.raises(ValueError, match="must be finite"):
        clusters.density_clusters((x - 0.5).log(), 20)
    with pytest.raises(ValueError, match="3 tokens cannot make 8 clusters"):
        clusters.kmeans_clusters(x[:3], 8, 0)
    with pytest.raises(ValueError, match="80 rows do not divide into 7 equal clusters"):
        clusters.balanced_kmeans(x, 7, 0)


def test_other_kinds():
    x, which = blobs(300, 20, 3, 0.1)
    assert adjusted_rand_score(clusters.kmeans_clusters(x, 3, 0).labels, which) == 1.0
    dealt = clusters.random_clusters(np.array([5, 3, 2]), torch.Generator().manual_seed(0))
    assert np.bincount(dealt.labels).tolist() == [5, 3, 2] and not np.array_equal(
        dealt.labels, np.repeat([0, 1, 2], [5, 3, 2])
    )
    even = torch.cat([x[which == k][:40] for k in range(3)])
    groups = clusters.balanced_kmeans(even, 3, 0)
    assert adjusted_rand_score(groups, np.repeat([0, 1, 2], 40)) == 1.0 and set(
        np.bincount(groups)
    ) == {40}
    lopsided = torch.cat([x[which == 0][:60], x[which == 1][:20], x[which == 2][:10]])
    assert set(np.bincount(clusters.balanced_kmeans(lopsided, 3, 0))) == {30}


def test_clusters_that_other_images_make_again():
    x, which = blobs(600, 20, 3, 0.1)
    image = torch.arange(600) // 10
    assert clusters.stability(x, image, 0.1) == 1.0
    lost = torch.rand(80, 30, generator=torch.Generator().manual_seed(1))
    assert clusters.stability(lost, torch.arange(80), 0.3) is None
    assert clusters.stability(x, 2 * image, 0.1) is None  # no image of the other half
    loose = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
    # chance in a uniform cloud
    assert abs(clusters.stability(loose, torch.arange(400), 0.05)) < 0.2


# ---------------------------------------------------------------- recording


def record(model, batches, mlps=None, **changes):
    return recording.record_tokens(
        model, batches, mlps, **{"per_image": N, "limit": 1000, "seed": 0, **changes}
    )


def test_what_is_recorded_is_what_the_layer_saw():
    model, images = build(), batch(4)[0]
    found = record(model, images.split(2))
    assert list(found) == ["blocks.0.mlp", "blocks.1.mlp"] and found[
        "blocks.0.mlp"
    ].hidden.shape == (4 * N, H)
    mlp, tokens = model.blocks[1].mlp, found["blocks.1.mlp"]
    torch.testing.assert_close(mlp.act(mlp.fc1(tokens.inputs)), tokens.hidden)
    assert (
        tokens.image.tolist() == [i for i in range(4) for _ in range(N)] and tokens.residual is None
    )
    assert tokens.place.tolist() == 4 * list(range(N))
    assert tokens.is_class_token.nonzero()[:, 0].tolist() == [0, N, 2 * N, 3 * N]
    with torch.no_grad():
        x = model.blocks[0](model._pos_embed(model.patch_embed(images)))
        x = x + model.blocks[1].attn(model.blocks[1].norm1(x))
    torch.testing.assert_close(tokens.inputs.view(4, N, D), model.blocks[1].norm2(x))
    again = record(
        model, images.split(2), {"blocks.1.mlp": mlp}, norms={"blocks.1.mlp": model.blocks[1].norm2}
    )
    torch.testing.assert_close(again["blocks.1.mlp"].residual.view(4, N, D), x.detach())
    assert torch.equal(again["blocks.1.mlp"].inputs, tokens.inputs) and not model.training


def test_a_reservoir_of_few_tokens_an_image():
    model, images = build(), torch.cat([batch(6, seed)[0] for seed in range(10)])
    some = record(model, images.split(6), per_image=3)["blocks.0.mlp"]
    assert np.bincount(some.image).tolist() == [3] * 60
    # a token is where it says it is
    whole = record(model, images.split(6), limit=60 * N)["blocks.0.mlp"]
    assert torch.equal(some.inputs, whole.inputs[some.image * N + some.place])
    few = {
        seed: record(model, images.split(6), per_image=3, limit=50, seed=seed)["blocks.0.mlp"]
        for seed in range(8)
    }
    assert all(len(each.image) == 50 for each in few.values())
    # Early and late images alike: half of the 400 kept tokens come from the first half, give or
    # take.
    early = sum(int((each.image < 30).sum()) for each in few.values())
    assert 160 < early < 240
    assert torch.equal(
        few[3].inputs,
        record(model, images.split(6), per_image=3, limit=50, seed=3)["blocks.0.mlp"].inputs,
    )


def test_recording_refuses():
    model, images = build(), batch(2)[0]
    with pytest.raises(ValueError, match="recording needs images"):
        record(model, [])
    with pytest.raises(ValueError, match="MoELayer.*timm.layers.Mlp"):
        record(build(moe=moe()), [images])
    with pytest.raises(ValueError, match="Linear has no block MLP"):
        recording.mlps_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"mlp \(GlobalResponseNormMlp\) is no MLP whose"):
        recording.mlps_of(timm.create_model("convnextv2_atto", num_classes=2))
    model.train()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[3] = torch.nan
    with pytest.raises(ValueError, match="blocks.1.mlp has activations that are not finite"):
        record(model, [images])
    assert (
        model.training
        and not model.blocks[1].mlp.fc2._forward_pre_hooks
        and type(model.blocks[1].mlp) is Mlp
    )
