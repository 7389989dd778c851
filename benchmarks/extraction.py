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
from .row import Row, forward, seconds

NAME, SIDE, CLASSES = "vit_small_patch14_dinov2", 224, 100
TOKENS, MANY, HIDDEN, SHARE = 4000, 20_000, 1536, 0.01  # SHARE of the tokens makes a cluster
ACTIVE, COUNT, BATCHES = 0.5, 8, (1, 16, 64)
LIBRARY_TIMES, LAYERS_S, PEAK_MIB = 8.0, 60.0, 4096  # what is asked for
MODEL_SHARE = {(16, "fp32"): 0.9, (64, "fp32"): 0.9}  # of the ratio of MACs
STATIC_SHARE = {
    (batch, dtype): 0.95 for batch in (16, 64) for dtype in ("fp32", "bf16")
}  # of the static model's speed-up


def rows(repeats: int = 20) -> Iterator[Row | str]:
    """Measure all; a line comes as soon as it is measured."""
    yield from clustering()
    model = timm.create_model(NAME, img_size=SIDE, num_classes=CLASSES).eval()
    yield from whole(model)
    yield from latency(model, repeats)
    yield from parts(16, repeats)


def clustering(turns: int = 3) -> Iterator[Row | str]:
    """HDBSCAN of tokens as wide as a ViT-S's hidden layer, by our path and by the library's, and
    the memory of many tokens."""
    import hdbscan

    x, smallest = _blobs(TOKENS), round(SHARE * TOKENS)
    library = hdbscan.HDBSCAN(min_cluster_size=smallest, min_samples=5)
    found: dict[str, object] = {}
    s = seconds(
        {
            "ours": lambda: found.update(ours=density_clusters(x, smallest, 5).labels),
            "library": lambda: found.update(library=library.fit(x.double().numpy()).labels_),
        },
        turns,
    )
    same = adjusted_rand_score(found["ours"], found["library"])
    yield Row(
        f"HDBSCAN, {TOKENS} x {HIDDEN}",
        "fp32",
        "library",
        1e3 * s["library"],
        1e3 * s["ours"],
        None,
        LIBRARY_TIMES,
    )
    yield (
        f"  labels of the two: adjusted Rand index {same:.3f} (at least 1.000), "
        f"{found['ours'].max() + 1} clusters  {_mark(same >= 1 - 1e-9)}"
    )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as apart:
        peak = apart.submit(_peak, MANY).result()
    yield (
        f"HDBSCAN, {MANY} x {HIDDEN}: peak {peak:.0f} MiB of a whole process (at most {PEAK_MIB})  "
        f"{_mark(peak <= PEAK_MIB)}"
    )


def whole(model: nn.Module) -> Iterator[str]:
    """Measures one recording pass, and clustering and extraction of all layers as in MoEE."""
    images = _images(TOKENS // 10)
    kept: dict[str, RecordedTokens] = {}
    rules = ExtractSpec(neurons={"variance_percent": 90.0}, calibration={"tokens": TOKENS})
    mlps = mlps_of(model)

    def extraction() -> None:
        for name, mlp in mlps.items():
            extract_layer(mlp, _calibration(mlp, kept[name]), rules, None, 0)

    def clusters() -> None:
        for found in kept.values():
            density_clusters(found.hidden, round(SHARE * TOKENS), 5)

    s = seconds(
        {
            "record": lambda: kept.update(
                record_tokens(model, images.split(50), per_image=10, limit=TOKENS, seed=0)
            ),
            "clusters": clusters,
            "extraction": extraction,
        },
        1,
    )
    yield (
        f"{len(mlps)} layers, {TOKENS} tokens: record {s['record']:.1f} s; clusters "
        f"{s['clusters']:.1f} s (at most {LAYERS_S:.0f} s)  {_mark(s['clusters'] <= LAYERS_S)}; "
        f"whole extraction {s['extraction']:.1f} s"
    )


def latency(model: nn.Module, repeats: int = 20) -> Iterator[Row]:
    """Forward passes of an extracted model against the whole one, and against a static one of the
    same active width."""
    tokens = record_tokens(model, _images(100).split(50), per_image=40, limit=TOKENS, seed=0)
    rules = ExtractSpec(neurons={"active": ACTIVE}, calibration={"tokens": TOKENS})
    inputs = ClusterSpec(method="kmeans", space="input", count=COUNT)
    routed = rules.but(clusters=inputs, router="nearest", neurons={"statistics": "routed"})
    made = {
        "static": _extracted(model, tokens, rules.but(clusters=ClusterSpec(of="nothing"))),
        "ours": _extracted(model, tokens, routed),
    }
    ideal = cost.count(model, SIDE).macs / cost.count(made["ours"], SIDE).macs
    for batch in BATCHES:
        for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            images = _images(batch).to(kind)
            timed = compare(
                {
                    name: forward(net.to(kind), images)
                    for name, net in ({"model": model} | made).items()
                },
                repeats,
                settle=1,
            )
            ms = {name: time.median for name, time in timed.items()}
            what = f"{COUNT} experts, {ACTIVE:.0%} active, batch {batch}"
            yield Row(
                what,
                dtype,
                "whole model",
                ms["model"],
                ms["ours"],
                ideal,
                MODEL_SHARE.get((batch, dtype)),
            )
            yield Row(
                what,
                dtype,
                "static model",
                ms["static"],
                ms["ours"],
                1.0,
                STATIC_SHARE.get((batch, dtype)),
            )


def parts(batch: int, repeats: int = 20) -> Iterator[Row]:
    """What several weight matrices cost without any routing: one narrow MLP against `COUNT` of them
    on equal runs of its rows."""
    rows = torch.randn(batch, N, D, generator=torch.Generator().manual_seed(0))
    mlps = nn.ModuleList(Mlp(D, round(ACTIVE * HIDDEN)) for _ in range(COUNT))
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        x, many = rows.to(kind), mlps.to(kind)
        timed = compare(
            {"one": forward(many[0], x), "parts": forward(partial(chunks, many), x)},
            repeats,
            settle=1,
        )
        ms = {name: time.median for name, time in timed.items()}
        yield Row(
            f"one layer in {COUNT} parts, batch {batch}",
            dtype,
            "one MLP",
            ms["one"],
            ms["parts"],
            1.0,
        )


def _mark(fine: bool) -> str:
    return "pass" if fine else "SHORT"


def _blobs(n: int) -> Tensor:
    """(n, H) tokens: ten clusters of unequal density, and a tenth that is in none."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(10, HIDDEN, generator=generator)
    which = torch.randint(10, (n,), generator=generator)
    x = centre[which] + (0.5 + 0.1 * which.unsqueeze(1)) * torch.randn(
        n, HIDDEN, generator=generator
    )
    x[: n // 10] = 2 * torch.randn(n // 10, HIDDEN, generator=generator)
    return x


def _peak(n: int) -> float:
    density_clusters(_blobs(n), round(SHARE * n), 5)
    return peak_rss_mib()


def _images(count: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _calibration(mlp: nn.Module, tokens: RecordedTokens) -> LayerCalibration:
    return LayerCalibration(tokens, mlp.fc2(tokens.hidden))


def _extracted(
    model: nn.Module, tokens: dict[str, RecordedTokens], rules: ExtractSpec
) -> nn.Module:
    out = copy.deepcopy(model)
    for name, mlp in mlps_of(model).items():
        layer, _ = extract_layer(
            mlp,
            _calibration(mlp, tokens[name]),
            rules,
            round(rules.neurons.active * mlp.fc1.out_features),
            0,
        )
        out.set_submodule(name, layer)
    return out.eval()
