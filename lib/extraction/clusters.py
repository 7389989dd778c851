"""What the MLPs of a trained network do with tokens, recorded and clustered (MoEE, 2505.15414).

`record` takes tokens of all MLPs in one pass. `density_clusters` are HDBSCAN's, by distances from
matrix products: the library's own labels, many times as fast on wide activations; everything after
the spanning tree is the library's.

Axis letters: **B** images, **N** tokens of an image, **n** recorded tokens, **D** width, **H**
hidden width, **K** clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

BLOCK = 2048  # rows of the distance matrix that are made at a time


@dataclass(frozen=True)
class Clusters:
    """labels: (n,) cluster of each token, -1 = noise, -2 = was not clustered.

    strength: (n,) membership in 0..1 (HDBSCAN's `probabilities_`). tree: HDBSCAN's condensed tree
    as the library keeps it, None for other kinds.
    """

    labels: np.ndarray
    strength: np.ndarray
    tree: np.ndarray | None = None

    @property
    def count(self) -> int:
        """K; 0 if all is noise."""
        return int(self.labels.max(initial=-1)) + 1

    @property
    def noise(self) -> float:
        """Share of the clustered tokens that is in no cluster."""
        return float((self.labels[self.labels > -2] < 0).mean())

    def nearest(self, x: Tensor, others: Tensor) -> Tensor:
        """(m,) the cluster whose mean is nearest to each of `others` (m, D). x: (n, D) the tokens
        that `labels` are of."""
        own = torch.from_numpy(self.labels).to(x.device)
        means = torch.stack([x[own == k].mean(dim=0) for k in range(self.count)])
        return (others @ means.t() - means.square().sum(dim=1) / 2).argmax(dim=1)


def density_clusters(x: Tensor, min_cluster_size: int, min_samples: int = 5) -> Clusters:
    """HDBSCAN of x (n, D), Euclidean, excess of mass; labels equal to the library's up to renaming.

    Distances come from matrix products and are kept as one float32 matrix, 4 n^2 bytes; the
    spanning tree is Prim's on rows of it, and everything after that tree is the library's. Raises
    ValueError if n is not above both numbers, for a cluster size below 2, and if x is not finite.
    """
    from hdbscan._hdbscan_linkage import label
    from hdbscan.hdbscan_ import _tree_to_labels

    n = len(x)
    if min_cluster_size < 2 or min_samples < 1 or n <= max(min_cluster_size, min_samples):
        raise ValueError(
            f"{n} tokens, min_cluster_size={min_cluster_size}, min_samples={min_samples}: a cluster has at least 2, "
            "a neighbourhood at least 1, and there must be more tokens than either; record more"
        )
    if not torch.isfinite(x).all():
        raise ValueError("tokens to cluster must be finite")
    distance = distances(x)
    core = torch.cat(
        [part.kthvalue(min_samples + 1, dim=1).values for part in distance.split(BLOCK)]
    )
    edges = spanning_tree(distance.cpu().numpy(), core.cpu().numpy())
    tree = label(
        edges[np.argsort(edges.T[2])]
    )  # the library's own sort: edges of equal weight come in its order, too
    labels, strength, _, condensed, _ = _tree_to_labels(x.cpu().numpy(), tree, min_cluster_size)
    return Clusters(labels, strength, condensed)


def stability(x: Tensor, image: Tensor, smallest: float, min_samples: int = 5) -> float | None:
    """Whether other images make the same clusters: adjusted Rand index, 1 for equal ones, 0 for
    chance.

    Tokens x (n, D) of images with even and with odd numbers, `image` (n,), are clustered apart, all
    tokens join the nearest mean of either, and the two partitions are compared. smallest: share of
    the tokens that makes a cluster. None if a half has fewer than two clusters.
    """
    from sklearn.metrics import adjusted_rand_score

    partitions = []
    for odd in (0, 1):
        part = x[image % 2 == odd]
        size = max(2, round(smallest * len(part)))
        found = (
            density_clusters(part, size, min_samples)
            if len(part) > max(size, min_samples)
            else None
        )
        if found is None or found.count < 2:
            return None
        partitions.append(found.nearest(part, x).cpu().numpy())
    return float(adjusted_rand_score(*partitions))


def distances(x: Tensor) -> Tensor:
    """(n, D) -> (n, n) float32 Euclidean distances, block by block; symmetric to the bit.

    A token's distance to its neighbour is also a core distance: were the two directions rounded
    apart, ties that the library sees would be broken by chance.
    """
    x = (x - x.mean(dim=0)).float()  # smaller norms, so that less is lost in their difference
    square, n = x.square().sum(dim=1), len(x)
    out = torch.empty(n, n, device=x.device)
    for i in range(0, n, BLOCK):
        rows = slice(i, i + BLOCK)
        for j in range(i, n, BLOCK):
            columns = slice(j, j + BLOCK)
            part = square[rows].unsqueeze(1) + square[columns] - 2 * (x[rows] @ x[columns].t())
            part.clamp_(min=0).sqrt_()
            part = (part + part.t()) / 2 if i == j else part
            out[rows, columns], out[columns, rows] = part, part.t()
    return out.fill_diagonal_(0.0)


def spanning_tree(distance: np.ndarray, core: np.ndarray) -> np.ndarray:
    """(n - 1, 3) float64 edges (from, to, weight) of the minimum spanning tree under mutual
    reachability, max(core_i, core_j, d_ij); distance: (n, n), core: (n,) distance to the
    `min_samples`-th neighbour. Prim's algorithm."""
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


def means_clusters(x: Tensor, count: int, seed: int) -> Clusters:
    """K-means of x (n, D). ValueError if there are fewer tokens than clusters."""
    from sklearn.cluster import KMeans

    if len(x) < count:
        raise ValueError(
            f"{len(x)} tokens cannot make {count} clusters: record more, or ask for fewer"
        )
    labels = KMeans(count, n_init=2, max_iter=50, random_state=seed).fit(x.cpu().numpy()).labels_
    return Clusters(labels.astype(np.int64), np.ones(len(labels)))


def random_clusters(sizes: np.ndarray, generator: torch.Generator) -> Clusters:
    """Tokens dealt at random to clusters of the given sizes, the control: what is left of a method
    without its clusters."""
    labels = np.repeat(np.arange(len(sizes)), sizes)[
        torch.randperm(int(sizes.sum()), generator=generator).numpy()
    ]
    return Clusters(labels, np.ones(len(labels)))


def balanced_means(x: Tensor, count: int, seed: int, rounds: int = 8) -> np.ndarray:
    """(n,) groups of rows of x (n, D) of equal size, by k-means whose assignment is solved exactly
    (MoEfication, 2110.01786).

    ValueError if `count` does not divide n.
    """
    from sklearn.cluster import kmeans_plusplus

    n = len(x)
    if n % count:
        raise ValueError(f"{n} rows do not divide into {count} equal groups")
    rows = x.double().cpu().numpy()
    centres, _ = kmeans_plusplus(rows, count, random_state=seed)
    labels = np.zeros(n, np.int64)
    for _ in range(rounds):
        cost = (
            np.square(rows).sum(1)[:, None] - 2 * rows @ centres.T + np.square(centres).sum(1)[None]
        )
        seat, slot = linear_sum_assignment(np.repeat(cost, n // count, axis=1))
        new = np.empty(n, np.int64)
        new[seat] = slot // (n // count)
        if np.array_equal(new, labels):
            break
        labels = new
        centres = np.stack([rows[labels == k].mean(0) for k in range(count)])
    return labels
