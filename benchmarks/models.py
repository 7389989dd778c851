"""Times whole models against the ratio of their multiply-adds: upcycled, extracted, and static ones
of as many active neurons.

The limit of an extracted model is a static one with as many active neurons in each layer: the same
products, and no router, no sorting, one weight matrix instead of several. The ratio of
multiply-adds is the limit of both. All models of a row are treated alike: all plain, or all frozen,
which packs the weights of MLPs and attention as well. Weights and images are random and experts are
those of k-means clusters, so loads are nearly even: uneven ones are slower.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import timm
import torch
from torch import Tensor, nn

import lib
from lib.extraction.layer import extract_layer
from lib.extraction.record import LayerCalibration, RecordedTokens, mlps_of, record_tokens
from lib.measure import cost
from lib.spec import ClusterSpec, ExtractSpec
from lib.verdicts.speed import Ratio, Timing

from . import machine
from .clock import DTYPES, forward, timed

NAME, SIDE, CLASSES, DEPTH = "vit_small_patch14_dinov2", 224, 100, 12
TOKENS = 1000  # of each layer, for clusters and the choice of neurons
ACTIVE_SHARE, EXPERTS = 0.5, 8
BATCHES, SHORT_BATCHES = (1, 16, 64), (1, 16)
DEPTHS, SHORT_DEPTHS = (2, 6, 12), (2, 12)
AT_THE_LIMIT = "whole model at the ratio of multiply-adds"
# goals of the extracted model by dtype: share of the ratio of multiply-adds to the whole model, and
# of the speed of the static one; the latter at batch 1 in either dtype
WHOLE_GOALS, STATIC_GOALS = {"fp32": 0.90, "bf16": 0.85}, {"fp32": 0.95, "bf16": 0.90}
STATIC_GOAL_OF_ONE = 0.80


def dense_model() -> nn.Module:
    """Makes a ViT-S/14 of random weights."""
    torch.manual_seed(0)
    return timm.create_model(NAME, img_size=SIDE, num_classes=CLASSES).eval()


def rows(repeats: int, full: bool) -> Iterator[Ratio]:
    """Measures all batches, dtypes and treatments; rows come as soon as they are measured."""
    whole = dense_model()
    models = {"whole model": whole, "upcycled": upcycled(whole, DEPTH)} | cut_models(whole)
    yield from _compared(models, BATCHES if full else SHORT_BATCHES, repeats)
    whole.float()
    depths = DEPTHS if full else SHORT_DEPTHS
    deep = {f"{layers} MoE layers": upcycled(whole, layers) for layers in depths}
    yield from _with_depth({"whole model": whole} | deep, repeats)


def upcycled(whole: nn.Module, layers: int) -> nn.Module:
    """Makes a model whose last `layers` MLPs are each EXPERTS experts, one a token."""
    options = {"experts": EXPERTS, "router": "token", "gate": "renormalised"}
    return lib.upcycle(whole, layers=layers, **options).eval()


def cut_models(whole: nn.Module) -> dict[str, nn.Module]:
    """Makes the static and the extracted model, by recorded tokens of random images."""
    tokens = record_tokens(
        whole, images(TOKENS // 40).split(25), per_image=40, limit=TOKENS, seed=0
    )
    rules = ExtractSpec(neurons={"active": ACTIVE_SHARE}, calibration={"tokens": TOKENS})
    by_input = ClusterSpec(method="kmeans", space="input", count=EXPERTS)
    routed = rules.but(clusters=by_input, router="nearest", neurons={"statistics": "routed"})
    return {
        "static model": extracted(whole, tokens, rules.but(clusters=ClusterSpec(of="nothing"))),
        "extracted": extracted(whole, tokens, routed),
    }


@torch.no_grad()
def extracted(whole: nn.Module, tokens: dict[str, RecordedTokens], rules: ExtractSpec) -> nn.Module:
    """Copies a model and replaces each MLP by a layer of experts extracted from it."""
    out = copy.deepcopy(whole)
    for name, mlp in mlps_of(whole).items():
        active_neurons = round(rules.neurons.active * mlp.fc1.out_features)
        calibration = LayerCalibration(tokens[name], mlp.fc2(tokens[name].hidden))
        layer, _ = extract_layer(mlp, calibration, rules, active_neurons, 0)
        out.set_submodule(name, layer)
    return out.eval()


def images(count: int) -> Tensor:
    """Draws (count, 3, SIDE, SIDE) images, always the same."""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def macs_ratio(whole: nn.Module, other: nn.Module) -> float:
    """Computes how many times fewer multiply-adds an image takes in `other`."""
    return cost.count(whole, SIDE).macs / cost.count(other, SIDE).macs


def _compared(
    models: dict[str, nn.Module], batches: tuple[int, ...], repeats: int
) -> Iterator[Ratio]:
    """Times all models in turn at each batch and dtype, plain and then frozen."""
    ideals = {name: macs_ratio(models["whole model"], model) for name, model in models.items()}
    for dtype in ("fp32", "bf16"):
        if machine.why_not(dtype, packed=False):
            continue  # the rows of the layer say why
        for model in models.values():
            model.to(DTYPES[dtype])
        treated = {"plain": models}
        if not machine.why_not(dtype, packed=True):
            treated["frozen"] = {n: lib.freeze_for_inference(m) for n, m in models.items()}
        for how, alike in treated.items():
            for batch in batches:
                x = images(batch).to(DTYPES[dtype])
                calls = {name: forward(model, x) for name, model in alike.items()}
                # in service a model follows itself; large batches leave nothing in the cache
                times = timed(calls, repeats, warmup=1, settle=int(batch == 1))
                yield from _of_batch(times, ideals, f"batch {batch}, {how}", dtype, batch == 1)


def _of_batch(
    times: dict[str, Timing], ideals: dict[str, float], shape: str, dtype: str, single: bool
) -> Iterator[Ratio]:
    """Makes the rows of one batch: each model against the whole one, extracted against static."""
    limit = ideals["extracted"]
    whole = times["whole model"]
    at_the_limit = Timing(whole.median / limit, whole.low / limit)
    beside = {AT_THE_LIMIT: at_the_limit, "static model": times["static model"]}
    goals = {
        # alone it must at least not be slower than the whole one
        ("extracted", "whole model"): 1 / limit if single else WHOLE_GOALS[dtype],
        ("extracted", "static model"): STATIC_GOAL_OF_ONE if single else STATIC_GOALS[dtype],
    }
    for name, against in (
        ("upcycled", "whole model"),
        ("static model", "whole model"),
        ("extracted", "whole model"),
        ("extracted", "static model"),
    ):
        is_extracted = name == "extracted"
        yield Ratio(
            part="models",
            what=f"{EXPERTS} experts, {ACTIVE_SHARE:.0%} active" if is_extracted else name,
            shape=shape,
            dtype=dtype,
            ours_is=name,
            against=against,
            ours=times[name],
            other=times[against],
            ideal=ideals[name] / ideals[against],
            goal=goals.get((name, against)),
            beside=beside if is_extracted else {},
        )


def _with_depth(models: dict[str, nn.Module], repeats: int) -> Iterator[Ratio]:
    """Times models of more and more MoE layers in turn, against the dense one; batch 4, fp32."""
    x = images(4)
    times = timed({name: forward(model, x) for name, model in models.items()}, repeats, warmup=1)
    for name in list(models)[1:]:
        yield Ratio(
            part="growth",
            what="growth with depth",
            shape=f"batch 4, {name} of {EXPERTS} experts",
            dtype="fp32",
            ours_is="upcycled",
            against="whole model",
            ours=times[name],
            other=times["whole model"],
            ideal=macs_ratio(models["whole model"], models[name]),
        )
