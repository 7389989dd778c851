"""Measures extraction: clustering against the library's own path, the whole extraction, and the
speed of what comes out.

The limit of an extracted model is a static one with as many active neurons in each layer: the same
products, and no router, no sorting, one weight matrix instead of several. The ratio of MACs is the
limit of both. Weights and images are random and experts are those of k-means clusters, so loads are
nearly even: uneven ones are slower.
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import timm
import torch
from sklearn.metrics import adjusted_rand_score
from timm.layers import Mlp
from torch import Tensor, nn

from lib.extraction.clusters import density_clusters
from lib.extraction.layer import extract_layer
from lib.extraction.record import LayerCalibration, RecordedTokens, mlps_of, record_tokens
from lib.measure import cost
from lib.measure.timing import compare, peak_rss_mib
from lib.spec import ClusterSpec, ExtractSpec

from .moe import D, N, chunks
from .row import DTYPES, Row, forward, seconds

NAME, SIDE, CLASSES = "vit_small_patch14_dinov2", 224, 100
TOKENS, MANY_TOKENS, HIDDEN = 4000, 20_000, 1536
CLUSTER_SHARE = 0.01  # of the tokens: the smallest cluster
ACTIVE_SHARE, EXPERTS, BATCHES = 0.5, 8, (1, 16, 64)
# targets: times faster than the library, seconds for the clusters of all layers, peak memory
LIBRARY_RATIO, LAYERS_S, PEAK_MIB = 8.0, 60.0, 4096
# targets by batch and dtype: least share of the ratio of MACs to the whole model, and of the speed
# of the static model
MODEL_TARGETS = {(16, "fp32"): 0.9, (64, "fp32"): 0.9}
STATIC_TARGETS = {(batch, dtype): 0.95 for batch in (16, 64) for dtype in ("fp32", "bf16")}


def rows(repeats: int = 20) -> Iterator[Row | str]:
    """Measures all; a line comes as soon as it is measured."""
    yield from clustering()
    model = timm.create_model(NAME, img_size=SIDE, num_classes=CLASSES).eval()
    yield from whole(model)
    yield from latency(model, repeats)
    yield from parts(16, repeats)


def clustering(turns: int = 3) -> Iterator[Row | str]:
    """Times HDBSCAN of tokens as wide as a ViT-S's hidden layer, by our path and by the library's.

    It also measures the memory that our path takes for many tokens.
    """
    import hdbscan

    tokens, smallest = _clustered_tokens(TOKENS), round(CLUSTER_SHARE * TOKENS)
    library = hdbscan.HDBSCAN(min_cluster_size=smallest, min_samples=5)
    labels: dict[str, object] = {}
    s = seconds(
        {
            "ours": lambda: labels.update(ours=density_clusters(tokens, smallest, 5).labels),
            "library": lambda: labels.update(library=library.fit(tokens.double().numpy()).labels_),
        },
        turns,
    )
    yield Row(
        what=f"HDBSCAN, {TOKENS} x {HIDDEN}",
        dtype="fp32",
        against="library",
        against_ms=1e3 * s["library"],
        ours_ms=1e3 * s["ours"],
        target=LIBRARY_RATIO,
    )
    agreement = adjusted_rand_score(labels["ours"], labels["library"])
    yield (
        f"  labels of the two: adjusted Rand index {agreement:.3f} (at least 1.000), "
        f"{labels['ours'].max() + 1} clusters  {_mark(agreement >= 1 - 1e-9)}"
    )
    # The peak of a process counts all that it ever did: this one does nothing else.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        peak = process.submit(_peak_of_clustering, MANY_TOKENS).result()
    yield (
        f"HDBSCAN, {MANY_TOKENS} x {HIDDEN}: "
        f"peak {peak:.0f} MiB of a whole process (at most {PEAK_MIB})  {_mark(peak <= PEAK_MIB)}"
    )


def whole(model: nn.Module) -> Iterator[str]:
    """Measures one recording pass, and clustering and extraction of all layers as in MoEE."""
    images = _images(TOKENS // 10)
    tokens_of_layers: dict[str, RecordedTokens] = {}
    rules = ExtractSpec(neurons={"variance_percent": 90.0}, calibration={"tokens": TOKENS})
    mlps = mlps_of(model)

    def record() -> None:
        recorded = record_tokens(model, images.split(50), per_image=10, limit=TOKENS, seed=0)
        tokens_of_layers.update(recorded)

    def clusters() -> None:
        for tokens in tokens_of_layers.values():
            density_clusters(tokens.hidden, round(CLUSTER_SHARE * TOKENS), 5)

    def extraction() -> None:
        for name, mlp in mlps.items():
            extract_layer(mlp, _calibration(mlp, tokens_of_layers[name]), rules, None, 0)

    s = seconds({"record": record, "clusters": clusters, "extraction": extraction}, turns=1)
    yield (
        f"{len(mlps)} layers, {TOKENS} tokens: record {s['record']:.1f} s; clusters "
        f"{s['clusters']:.1f} s (at most {LAYERS_S:.0f} s)  {_mark(s['clusters'] <= LAYERS_S)}; "
        f"whole extraction {s['extraction']:.1f} s"
    )


def latency(model: nn.Module, repeats: int = 20) -> Iterator[Row]:
    """Times forward passes of an extracted model.

    They stand against those of the whole model, and of a static one of the same active width.
    """
    tokens = record_tokens(model, _images(100).split(50), per_image=40, limit=TOKENS, seed=0)
    rules = ExtractSpec(neurons={"active": ACTIVE_SHARE}, calibration={"tokens": TOKENS})
    inputs = ClusterSpec(method="kmeans", space="input", count=EXPERTS)
    routed = rules.but(clusters=inputs, router="nearest", neurons={"statistics": "routed"})
    models = {
        "whole": model,
        "static": _extracted(model, tokens, rules.but(clusters=ClusterSpec(of="nothing"))),
        "ours": _extracted(model, tokens, routed),
    }
    ideal = cost.count(model, SIDE).macs / cost.count(models["ours"], SIDE).macs
    for batch in BATCHES:
        for dtype, torch_dtype in DTYPES.items():
            images = _images(batch).to(torch_dtype)
            calls = {name: forward(m.to(torch_dtype), images) for name, m in models.items()}
            timed = compare(calls, repeats, settle=1)
            ms = {name: time.median for name, time in timed.items()}
            what = f"{EXPERTS} experts, {ACTIVE_SHARE:.0%} active, batch {batch}"
            for against, limit, targets in (
                ("whole", ideal, MODEL_TARGETS),
                ("static", 1.0, STATIC_TARGETS),
            ):
                yield Row(
                    what=what,
                    dtype=dtype,
                    against=f"{against} model",
                    against_ms=ms[against],
                    ours_ms=ms["ours"],
                    ideal=limit,
                    target=targets.get((batch, dtype)),
                )


def parts(batch: int, repeats: int = 20) -> Iterator[Row]:
    """Times what several weight matrices cost without any routing.

    One narrow MLP stands against `EXPERTS` of them, each on an equal chunk of its rows.
    """
    rows = torch.randn(batch, N, D, generator=torch.Generator().manual_seed(0))
    mlps = nn.ModuleList(Mlp(D, round(ACTIVE_SHARE * HIDDEN)) for _ in range(EXPERTS))
    for dtype, torch_dtype in DTYPES.items():
        x, mlps = rows.to(torch_dtype), mlps.to(torch_dtype)
        calls = {"one": forward(mlps[0], x), "parts": forward(partial(chunks, mlps), x)}
        timed = compare(calls, repeats, settle=1)
        yield Row(
            what=f"one layer in {EXPERTS} parts, batch {batch}",
            dtype=dtype,
            against="one MLP",
            against_ms=timed["one"].median,
            ours_ms=timed["parts"].median,
            ideal=1.0,
        )


def _mark(fine: bool) -> str:
    return "pass" if fine else "SHORT"


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


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _calibration(mlp: nn.Module, tokens: RecordedTokens) -> LayerCalibration:
    """Adds to the recorded tokens of a layer the outputs that its MLP has for them."""
    return LayerCalibration(tokens, mlp.fc2(tokens.hidden))


def _extracted(
    model: nn.Module, tokens: dict[str, RecordedTokens], rules: ExtractSpec
) -> nn.Module:
    """Copies a model and replaces each MLP by a layer of experts extracted from it."""
    extracted = copy.deepcopy(model)
    for name, mlp in mlps_of(model).items():
        active_neurons = round(rules.neurons.active * mlp.fc1.out_features)
        calibration = _calibration(mlp, tokens[name])
        layer, _ = extract_layer(mlp, calibration, rules, active_neurons, 0)
        extracted.set_submodule(name, layer)
    return extracted.eval()
