"""Measures extraction itself: clustering against the library's own path, and the whole extraction.

The speed of what comes out is in `models`.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor

import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor, nn

from lib.extraction.clusters import density_clusters
from lib.extraction.layer import extract_layer
from lib.extraction.record import LayerCalibration, RecordedTokens, mlps_of, record_tokens
from lib.measure.timing import peak_rss_mib
from lib.spec import ExtractSpec
from lib.verdicts.speed import Ratio, Timing

from .clock import summary
from .models import dense_model, images

TOKENS, MANY_TOKENS, HIDDEN = 4000, 20_000, 1536
CLUSTER_SHARE = 0.01  # of the tokens: the smallest cluster
# goals: times faster than the library, ms for the clusters of all layers, peak memory
LIBRARY_GOAL, LAYERS_MS, PEAK_MIB = 8.0, 60_000.0, 4096


def rows(turns: int = 3) -> Iterator[Ratio]:
    """Measures all; a row comes as soon as it is measured."""
    yield clustering(turns)
    yield from whole(dense_model())


def clustering(turns: int) -> Ratio:
    """Times HDBSCAN of tokens as wide as a ViT-S's hidden layer, by our path and by the library's.

    The note says whether the labels agree, and the memory that our path takes for many tokens.
    """
    import hdbscan

    tokens, smallest = _clustered_tokens(TOKENS), round(CLUSTER_SHARE * TOKENS)
    library = hdbscan.HDBSCAN(min_cluster_size=smallest, min_samples=5)
    labels: dict[str, object] = {}
    ours, others = [], []
    for _ in range(turns):
        ours.append(_ms(lambda: labels.update(ours=density_clusters(tokens, smallest, 5).labels)))
        others.append(
            _ms(lambda: labels.update(library=library.fit(tokens.double().numpy()).labels_))
        )
    agreement = adjusted_rand_score(labels["ours"], labels["library"])
    # The peak of a process counts all that it ever did: this one does nothing else.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak = process.submit(_peak_of_clustering, MANY_TOKENS).result()
    return Ratio(
        part="other",
        what="HDBSCAN",
        shape=f"{TOKENS} x {HIDDEN}",
        dtype="fp32",
        ours_is="density_clusters",
        against="hdbscan",
        ours=summary(ours),
        other=summary(others),
        goal=LIBRARY_GOAL,
        note=f"adjusted Rand index of the labels {agreement:.3f} (to be 1.000); peak memory at "
        f"{MANY_TOKENS} tokens {peak:.0f} MiB (at most {PEAK_MIB})",
    )


def whole(model: nn.Module) -> Iterator[Ratio]:
    """Measures one recording pass, and clustering and extraction of all layers as in MoEE.

    Clusters stand against the time that they may take at most.
    """
    tokens_of_layers: dict[str, RecordedTokens] = {}
    rules = ExtractSpec(neurons={"variance_percent": 90.0}, calibration={"tokens": TOKENS})
    mlps, batches = mlps_of(model), images(TOKENS // 10).split(50)

    def record() -> None:
        tokens_of_layers.update(record_tokens(model, batches, per_image=10, limit=TOKENS, seed=0))

    def clusters() -> None:
        for tokens in tokens_of_layers.values():
            density_clusters(tokens.hidden, round(CLUSTER_SHARE * TOKENS), 5)

    def extraction() -> None:
        for name, mlp in mlps.items():
            extract_layer(mlp, _calibration(mlp, tokens_of_layers[name]), rules, None, 0)

    recorded, clustered, extracted = map(_ms, (record, clusters, extraction))
    yield Ratio(
        part="other",
        what="clusters of all layers",
        shape=f"{len(mlps)} layers, {TOKENS} tokens",
        dtype="fp32",
        ours_is="density_clusters",
        against="time allowed",
        ours=Timing(clustered, clustered),
        other=Timing(LAYERS_MS, LAYERS_MS),
        goal=1.0,
        note=f"recording took {recorded / 1e3:.1f} s, all of extraction {extracted / 1e3:.1f} s",
    )


def _ms(work: Callable[[], object]) -> float:
    """Times one call in ms; it is for work of many seconds, which no warm-up changes."""
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def _clustered_tokens(count: int) -> Tensor:
    """Draws (count, H) tokens: ten clusters of unequal density, and a tenth that is in none."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, HIDDEN, generator=generator)
    cluster_of_token = torch.randint(10, (count,), generator=generator)
    spread = 0.5 + 0.1 * cluster_of_token.unsqueeze(1)
    noise = torch.randn(count, HIDDEN, generator=generator)
    tokens = centres[cluster_of_token] + spread * noise
    tokens[: count // 10] = 2 * torch.randn(count // 10, HIDDEN, generator=generator)
    return tokens


def _peak_of_clustering(count: int) -> float:
    """Clusters `count` tokens and returns the peak memory of the process in MiB."""
    density_clusters(_clustered_tokens(count), round(CLUSTER_SHARE * count), 5)
    return peak_rss_mib()


@torch.no_grad()
def _calibration(mlp: nn.Module, tokens: RecordedTokens) -> LayerCalibration:
    """Adds to the recorded tokens of a layer the outputs that its MLP has for them."""
    return LayerCalibration(tokens, mlp.fc2(tokens.hidden))
