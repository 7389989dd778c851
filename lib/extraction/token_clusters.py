"""Whose tokens are whose: the clusters of a layer's tokens, their centres, and the router to them.

Axis letters: **n** recorded tokens, **D** width, **H** hidden width, **K** clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..models.mlps import maps_of
from ..routers.centroid import CentroidRouter
from ..routers.controls import OracleRouter, RandomRouter
from ..routers.hard import HardRouter
from ..spec import ClusterSpec, ExtractSpec
from .clusters import Clusters, density_clusters, kmeans_clusters, random_clusters, stability
from .correction import weights_of
from .record import RecordedTokens


def cluster_tokens(
    tokens: RecordedTokens, rules: ClusterSpec, seed: int
) -> tuple[Clusters, float | None]:
    """Clusters a random sample of a layer's tokens; returns how stable the clusters are, too.

    Tokens outside the sample get the label -2, class tokens too unless they are clustered with the
    others. Controls label all tokens. Stability is HDBSCAN's alone, None for other methods.
    """
    n = len(tokens.inputs)
    if rules.method == "directions":
        centres = random_directions(tokens, rules.count, seed)
        nearest = CentroidRouter.of(centres, "nearest").scores(tokens.inputs).argmax(dim=1)
        return Clusters(nearest.cpu().numpy(), np.ones(n)), None
    generator = torch.Generator().manual_seed(seed)
    may_cluster = _may_cluster(tokens, rules).nonzero()[:, 0].cpu()
    order = torch.randperm(len(may_cluster), generator=generator)
    sample = may_cluster[order[: rules.sample]].sort().values
    x = _principal_components(_space(tokens, rules)[sample], rules.components, seed)
    stable = None
    if rules.method == "hdbscan":
        size = max(2, round(rules.smallest_share * len(x)))
        of_sample = density_clusters(x, size, rules.neighbours)
        stable = stability(x, tokens.image[sample], rules.smallest_share, rules.neighbours)
    else:
        of_sample = kmeans_clusters(x, rules.count, seed)
    labels = np.full(n, -2)
    labels[sample.numpy()] = of_sample.labels
    clusters = Clusters(labels, of_sample.strength, of_sample.tree)
    if rules.method == "random":  # of the sizes that k-means' clusters have among all tokens
        nearest = clusters.nearest(_space(tokens, rules), _space(tokens, rules))
        sizes = nearest.bincount(minlength=clusters.count).cpu().numpy()
        clusters = random_clusters(sizes, generator)
    return clusters, stable


def centres_and_members(
    tokens: RecordedTokens, clusters: Clusters, rules: ClusterSpec, seed: int
) -> tuple[Tensor, Tensor]:
    """Returns (K, D) centres and (n,) the cluster of each token, -1 for a token in none.

    A centre is the mean input of the sampled tokens of its cluster, noise that joined it included;
    random directions are centres themselves. Tokens outside the sample join the nearest cluster;
    with HDBSCAN they might be noise, and do as noise does. The class token's cluster, where it is
    apart, is the last one. Raises ValueError where it is and no class token was recorded.
    """
    cluster_of_token = torch.from_numpy(clusters.labels).to(tokens.inputs.device)
    if rules.method == "directions":
        return random_directions(tokens, rules.count, seed), cluster_of_token
    in_sample = cluster_of_token > -2
    joins = cluster_of_token == -2
    if rules.method == "hdbscan":
        joins = cluster_of_token < 0 if rules.noise == "nearest" else torch.zeros_like(joins)
    joins = joins & _may_cluster(tokens, rules)
    if joins.any():
        nearest = clusters.nearest(_space(tokens, rules), _space(tokens, rules))
        cluster_of_token = torch.where(joins, nearest, cluster_of_token)
    cluster_of_token = cluster_of_token.clamp_min(-1)
    members = [in_sample & (cluster_of_token == k) for k in range(clusters.count)]
    if rules.class_token == "apart":
        is_class_token = tokens.is_class_token
        if not is_class_token.any():
            raise ValueError(
                f"clusters.class_token='apart' and none of the {len(in_sample)} recorded tokens is "
                "a class token: raise calibration.tokens_per_image or calibration.tokens"
            )
        cluster_of_token = torch.where(is_class_token, clusters.count, cluster_of_token)
        members.append(is_class_token)
    return torch.stack([tokens.inputs[of].mean(dim=0) for of in members]), cluster_of_token


def random_directions(tokens: RecordedTokens, count: int, seed: int) -> Tensor:
    """Draws centres from a normal distribution as wide as the inputs: (K, D), K at most `count`.

    Directions that no token is nearest to are left out.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    drawn = torch.randn(count, tokens.inputs.shape[1], generator=generator)
    drawn = drawn.to(tokens.inputs.device) * tokens.inputs.std()
    nearest = CentroidRouter.of(drawn, "nearest").scores(tokens.inputs).argmax(dim=1)
    return drawn[nearest.unique()]


def router_to(
    centres: Tensor,
    cluster_of_token: Tensor,
    mlp: nn.Module,
    tokens: RecordedTokens,
    rules: ExtractSpec,
) -> HardRouter:
    """Builds the router that sends a token to the cluster of one of the centres (K, D)."""
    if rules.router == "random":
        return RandomRouter(len(centres))
    if rules.router == "oracle":
        mean_hidden = torch.stack(
            [tokens.hidden[cluster_of_token == k].mean(dim=0) for k in range(len(centres))]
        )
        whole = weights_of(mlp)
        return OracleRouter(mean_hidden, whole.w1, whole.b1, maps_of(mlp).act)
    return CentroidRouter.of(centres, rules.router, tokens.inputs.mean(dim=0))


def _may_cluster(tokens: RecordedTokens, rules: ClusterSpec) -> Tensor:
    """(n,) which tokens may be clustered: all, or those of patches alone."""
    if rules.class_token == "with":
        return torch.ones_like(tokens.place, dtype=torch.bool)
    return ~tokens.is_class_token


def _space(tokens: RecordedTokens, rules: ClusterSpec) -> Tensor:
    """(n, H) or (n, D): what is clustered of the tokens."""
    return tokens.hidden if rules.space == "hidden" else tokens.inputs


def _principal_components(x: Tensor, count: int | None, seed: int) -> Tensor:
    """(n, D) -> (n, count) at most; None = x itself."""
    if count is None:
        return x
    from sklearn.decomposition import PCA

    components = PCA(min(count, *x.shape), random_state=seed).fit_transform(x.cpu().numpy())
    return torch.from_numpy(components).float()
