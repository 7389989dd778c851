"""Clusters of tokens and of neurons: HDBSCAN, k-means, and controls (MoEE, 2505.15414).

`density_clusters` computes HDBSCAN's distances as matrix products, which is many times as fast as
the library's own path on wide activations, and gives the library's labels: everything after the
spanning tree is the library's.

Axis letters: **n** tokens, **D** width, **K** clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

BLOCK = 2048  # rows of the distance matrix that are made at a time
# Of a squared distance float32 products lose some 1e-7 of the largest squared norm: a distance
# below this share of that norm is off by percents, and float64 products take their place.
LEAST_DISTANCE = 2e-3


@dataclass(frozen=True)
class Clusters:
    """Says which cluster each token is in.

    labels: (n,) cluster of each token, -1 = noise, -2 = was not clustered. strength: of membership
    in 0..1, of the clustered tokens (HDBSCAN's `probabilities_`). tree: HDBSCAN's condensed tree as
    the library keeps it, None for other methods.
    """

    labels: np.ndarray
    strength: np.ndarray
    tree: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Returns K, which is 0 if all is noise."""
        return int(self.labels.max(initial=-1)) + 1

    @property
    def noise(self) -> float:
        """Returns the share of the clustered tokens that is in no cluster."""
        return float((self.labels[self.labels > -2] < 0).mean())

    def nearest(self, clustered: Tensor, others: Tensor) -> Tensor:
        """Returns (m,) the cluster whose mean is nearest to each of `others` (m, D).

        clustered: (n, D) the tokens that `labels` are of.
        """
        labels = torch.from_numpy(self.labels).to(clustered.device)
        members = [clustered[labels == k] for k in range(self.count)]
        means = torch.stack([x.mean(dim=0) for x in members])
        if _are_tight(torch.pdist(means), 1, means):
            means = torch.stack([x.double().mean(dim=0) for x in members])
            centre = means.mean(dim=0)
            means, others = means - centre, others.double() - centre
        # |x - m|^2 is smallest where x.m - |m|^2 / 2 is largest
        return (others @ means.t() - means.square().sum(dim=1) / 2).argmax(dim=1)


def density_clusters(x: Tensor, min_cluster_size: int, min_samples: int = 5) -> Clusters:
    """Clusters tokens x (n, D) by HDBSCAN: Euclidean distances, excess of mass.

    Labels equal the library's up to their order, where distances within and between clusters differ
    by a factor of up to 10^6. Distances are one float32 matrix, 4 n^2 bytes.
    Raises ValueError if n is not above both numbers, for a cluster size below 2, and if x is not
    finite.
    """
    from hdbscan._hdbscan_linkage import label
    from hdbscan.hdbscan_ import _tree_to_labels

    n = len(x)
    if min_cluster_size < 2 or min_samples < 1 or n <= max(min_cluster_size, min_samples):
        raise ValueError(
            f"{n} tokens, min_cluster_size={min_cluster_size}, min_samples={min_samples}: a "
            "cluster has at least 2, a neighbourhood at least 1, and there must be more tokens "
            "than either; record more"
        )
    if not torch.isfinite(x).all():
        raise ValueError("tokens to cluster must be finite")
    distance = distances(x)
    core = _core_distances(distance, min_samples)
    if _are_tight(core, min_cluster_size, x - x.mean(dim=0)):
        distance = distances(x, torch.float64)
        core = _core_distances(distance, min_samples)
    edges = spanning_tree(distance.cpu().numpy(), core.cpu().numpy())
    # the library's own sort: edges of equal weight come in its order, too
    tree = label(edges[np.argsort(edges.T[2])])
    labels, strength, _, condensed, _ = _tree_to_labels(x.cpu().numpy(), tree, min_cluster_size)
    return Clusters(labels, strength, condensed)


def _core_distances(distance: Tensor, min_samples: int) -> Tensor:
    """(n,) distance to the min_samples-th neighbour."""
    # a token is its own nearest one, hence one more
    parts = [part.kthvalue(min_samples + 1, dim=1).values for part in distance.split(BLOCK)]
    return torch.cat(parts)


def _are_tight(distance: Tensor, count: int, x: Tensor) -> bool:
    """Tells whether `count` of the distances are too small for float32 products of x (n, D).

    Squares that are infinite or 0 in float32 count as such.
    """
    if len(distance) < count:
        return False
    return not distance.kthvalue(count).values > LEAST_DISTANCE * x.norm(dim=1).max()


def stability(
    x: Tensor, image: Tensor, smallest_share: float, min_samples: int = 5
) -> float | None:
    """Measures whether other images give the same clusters: 1 for the same ones, 0 for chance.

    Tokens x (n, D) of images with even and with odd numbers, image (n,), are clustered apart by
    HDBSCAN; all tokens join the nearest mean of either, and the adjusted Rand index compares the
    two partitions. smallest_share: of the tokens that makes a cluster. None if a half has fewer
    than two clusters.
    """
    from sklearn.metrics import adjusted_rand_score

    partitions = []
    for odd in (0, 1):
        half = x[image % 2 == odd]
        size = max(2, round(smallest_share * len(half)))
        if len(half) <= max(size, min_samples):
            return None
        clusters = density_clusters(half, size, min_samples)
        if clusters.count < 2:
            return None
        partitions.append(clusters.nearest(half, x).cpu().numpy())
    return float(adjusted_rand_score(*partitions))


def distances(x: Tensor, products: torch.dtype = torch.float32) -> Tensor:
    """Computes (n, n) float32 Euclidean distances of (n, D), block by block; symmetric to the bit.

    products: the type that squared distances are computed in, as differences of products.

    A token's distance to its neighbour is also a core distance: were the two directions rounded
    differently, ties that the library sees would be broken by chance.
    """
    x = x if products == torch.float32 else x.to(products)
    x = (x - x.mean(dim=0)).to(products)  # smaller norms, so that less is lost in their difference
    squared_norm, n = x.square().sum(dim=1), len(x)
    out = torch.empty(n, n, device=x.device)
    for i in range(0, n, BLOCK):
        rows = slice(i, i + BLOCK)
        for j in range(i, n, BLOCK):
            columns = slice(j, j + BLOCK)
            block = squared_norm[rows].unsqueeze(1) + squared_norm[columns]
            block = block - 2 * (x[rows] @ x[columns].t())
            block.clamp_(min=0).sqrt_()
            if i == j:
                block = (block + block.t()) / 2
            out[rows, columns], out[columns, rows] = block, block.t()
    return out.fill_diagonal_(0.0)


def spanning_tree(distance: np.ndarray, core: np.ndarray) -> np.ndarray:
    """Computes the minimum spanning tree under mutual reachability, max(core_i, core_j, d_ij).

    distance: (n, n). core: (n,) distance to the `min_samples`-th neighbour. Returns (n - 1, 3)
    float64 edges: from, to, weight. Prim's algorithm.
    """
    n = len(core)
    best, source = np.full(n, np.inf, distance.dtype), np.zeros(n, np.int64)
    outside, edges, current = np.ones(n, bool), np.empty((n - 1, 3)), 0
    for i in range(n - 1):
        outside[current] = False
        reach = np.maximum(np.maximum(distance[current], core), core[current])
        closer = outside & (reach < best)
        best[closer], source[closer] = reach[closer], current
        best[current] = np.inf  # never chosen again
        following = int(best.argmin())
        edges[i] = source[following], following, best[following]
        current = following
    return edges


def kmeans_clusters(x: Tensor, count: int, seed: int) -> Clusters:
    """Clusters tokens x (n, D) by k-means.

    Raises ValueError if there are fewer tokens than clusters.
    """
    from sklearn.cluster import KMeans

    if len(x) < count:
        raise ValueError(
            f"{len(x)} tokens cannot make {count} clusters: record more, or ask for fewer"
        )
    labels = KMeans(count, n_init=2, max_iter=50, random_state=seed).fit(x.cpu().numpy()).labels_
    return Clusters(labels.astype(np.int64), np.ones(len(labels)))


def random_clusters(sizes: np.ndarray, generator: torch.Generator) -> Clusters:
    """Deals tokens at random to clusters of the given sizes (K,).

    The control: what is left of a method without its clusters.
    """
    order = torch.randperm(int(sizes.sum()), generator=generator).numpy()
    labels = np.repeat(np.arange(len(sizes)), sizes)[order]
    return Clusters(labels, np.ones(len(labels)))


def balanced_kmeans(x: Tensor, count: int, seed: int, rounds: int = 8) -> np.ndarray:
    """Returns (n,) clusters of equal size of the rows of x (n, D) (MoEfication, 2110.01786).

    K-means whose assignment of rows to clusters is solved exactly. Raises ValueError if `count`
    does not divide n.
    """
    from sklearn.cluster import kmeans_plusplus

    n = len(x)
    if n % count:
        raise ValueError(f"{n} rows do not divide into {count} equal clusters")
    rows = x.double().cpu().numpy()
    centres, _ = kmeans_plusplus(rows, count, random_state=seed)
    labels = np.zeros(n, np.int64)
    size = n // count
    for _ in range(rounds):
        squares = np.square(rows).sum(1)[:, None], np.square(centres).sum(1)[None]
        cost = squares[0] - 2 * rows @ centres.T + squares[1]  # (n, K) squared distances
        # every cluster has `size` seats: (n, n) costs of a row in a seat
        row, seat = linear_sum_assignment(np.repeat(cost, size, axis=1))
        new_labels = np.empty(n, np.int64)
        new_labels[row] = seat // size
        if np.array_equal(new_labels, labels):
            break
        labels = new_labels
        centres = np.stack([rows[labels == k].mean(0) for k in range(count)])
    return labels
