"""Times the MoE layer against its dense bounds and against other libraries, all in the same turns.

Axis letters: **B** images, **N** tokens of an image, **T** = B*N, **D** width, **H** expert hidden
width, **E** experts, **K** experts per token.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import lib
from lib.models.experts import Experts
from lib.models.moe import MoELayer
from lib.models.packed import dense_maps_gain
from lib.routers.top_k import TopKRouter
from lib.verdicts.speed import (
    FASTEST_PEER,
    MEDIAN_PEER,
    MEDIAN_PEER_EXPERTS,
    MEDIAN_PEER_GOAL,
    Ratio,
    Timing,
)

from . import machine
from .clock import DTYPES, Call, forward, forward_backward, timed
from .dense import EqualChunks, OneMlp, packed
from .peers import PEERS, Peer

D, H = 384, 1536  # of ViT-S
NARROW = 384  # H of 32 experts that together store what eight whole ones do
PASSES = ("forward", "forward+backward")
SKEW = 1.5  # the e-th expert's logit is lower by SKEW ln e: the first one gets half of the tokens
PLAIN, FROZEN = "layer", "layer, frozen"
BOUND, CHUNKS = ("one MLP", "equal chunks"), "equal chunks"


@dataclass(frozen=True)
class Setting:
    """Is a layer and the tokens that it gets; H is NARROW at E=32."""

    batch: int
    tokens: int
    experts: int
    top_k: int
    skewed: bool = False

    @property
    def hidden(self) -> int:
        return NARROW if self.experts == 32 else H

    @property
    def trained_shape(self) -> bool:
        """Says whether it is the shape of the runs of this book, where T is small."""
        return self.tokens == 17

    def __str__(self) -> str:
        kind = "skewed" if self.skewed else "balanced"
        sizes = f"B={self.batch} N={self.tokens} H={self.hidden} E={self.experts} K={self.top_k}"
        return f"{sizes} {kind}"


def settings() -> list[Setting]:
    """Lists all settings of the full benchmark."""
    return [
        Setting(batch, tokens, experts, top_k, skewed)
        for batch, tokens in ((16, 257), (64, 17))
        for experts in (4, 8, 32)
        for top_k in (1, 2)
        for skewed in (False, True)
    ]


# What `make bench` measures: the settings that goals are about, and a skewed one; of each the
# dtypes and passes.
SHORT = (
    (Setting(16, 257, 8, 1), ("fp32", "bf16"), PASSES),
    (Setting(16, 257, 8, 2), ("fp32", "bf16"), ("forward",)),
    (Setting(16, 257, 8, 1, skewed=True), ("fp32", "bf16"), ("forward",)),
    (Setting(16, 257, 32, 2), ("bf16",), ("forward",)),
    (Setting(64, 17, 8, 1), ("fp32", "bf16"), PASSES),
)


def rows(repeats: int, full: bool) -> Iterator[Ratio]:
    """Measures each setting, dtype and pass; rows come as soon as they are measured."""
    everything = [(setting, ("fp32", "bf16", "autocast"), PASSES) for setting in settings()]
    for setting, dtypes, passes in everything if full else SHORT:
        for dtype in dtypes:
            for what in passes:
                yield from compared(setting, dtype, what, repeats)


def compared(setting: Setting, dtype: str, what: str, repeats: int) -> Iterator[Ratio]:
    """Measures one setting: first the rows against the bounds, then those against peers."""
    if reason := machine.why_not(dtype, packed=False):
        sides = {"part": "layer", "ours_is": PLAIN, "against": "bound"}
        yield Ratio(what=what, shape=str(setting), dtype=dtype, note=reason, **sides)
        return
    layer, x = moe_layer(setting), inputs(setting)
    freezes = what == "forward" and dtype != "autocast" and not machine.why_not(dtype, packed=True)
    peers = [peer for peer in PEERS if not peer.why_not(setting.top_k, dtype)]
    calls = ours_and_bounds(setting, layer, x, dtype, what, freezes)
    for peer in peers:
        calls[peer.name] = _call(peer.make(layer), x, dtype, what)
    times = timed(calls, repeats)
    about = {"shape": str(setting), "dtype": dtype, "what": what}
    load = f"the busiest expert has {busiest_share(layer, x):.0%} of the assignments"
    yield from _against_bounds(times, setting, about, load if setting.skewed else "")
    yield from _against_peers(times, setting, about, peers, FROZEN if freezes else PLAIN)


def moe_layer(setting: Setting) -> MoELayer:
    """Makes a layer of distinct experts, biases zero, and a router of which `inputs` are told."""
    generator = torch.Generator().manual_seed(1)
    experts, top_k = setting.experts, setting.top_k
    # logits of about normal distribution, so that gates are neither flat nor hard
    router = TopKRouter(D, experts, top_k, gate="renormalised", std=D**-0.5, generator=generator)
    layer = MoELayer(router, Experts(experts, D, setting.hidden))
    offsets = SKEW * torch.arange(1, experts + 1).log() if setting.skewed else torch.zeros(experts)
    with torch.no_grad():
        router.weight[:, 0] = -offsets
        layer.experts.fc1.bias.zero_()
        layer.experts.fc2.bias.zero_()
    return layer


def inputs(setting: Setting) -> Tensor:
    """Draws (B, N, D) tokens whose first channel is one: the router's weight there is a bias."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(setting.batch, setting.tokens, D, generator=generator)
    x[..., 0] = 1.0
    return x


def busiest_share(layer: MoELayer, x: Tensor) -> float:
    """Computes the share of the assignments that the busiest expert has."""
    with torch.no_grad():
        load = layer.float().router(x).load()
    return float(load.max() / load.sum())


def ours_and_bounds(
    setting: Setting, layer: MoELayer, x: Tensor, dtype: str, what: str, freezes: bool
) -> dict[str, Call]:
    """Makes the calls of the layer and its bounds, plain and, if it freezes, packed."""
    tokens = setting.batch * setting.tokens
    bounds = {
        "one MLP": OneMlp(D, setting.hidden, setting.top_k),
        "equal chunks": EqualChunks(D, setting.hidden, setting.experts, setting.top_k),
    }
    rows = x.view(-1, D)
    calls = {name: _call(bound, rows, dtype, what) for name, bound in bounds.items()}
    calls[PLAIN] = _call(layer, x, dtype, what)
    if freezes:
        # where packed weights are no faster for dense MLPs, the plain bound is the bound
        for name, bound in bounds.items() if dense_maps_gain() else ():
            calls[f"{name}, packed"] = _call(packed(bound, tokens), rows, dtype, what)
        frozen = lib.freeze_for_inference(nn.Sequential(layer).eval())
        calls[FROZEN] = _call(frozen, x, dtype, what)
    return calls


def _call(module: nn.Module, x: Tensor, dtype: str, what: str) -> Call:
    """Casts a module and its input, and makes the call of a pass."""
    module = module.to(DTYPES[dtype]).train(what != "forward")
    make = forward if what == "forward" else forward_backward
    return make(module, x.to(DTYPES[dtype]), dtype)


def _against_bounds(
    times: dict[str, Timing], setting: Setting, about: dict[str, str], note: str
) -> Iterator[Ratio]:
    """Makes the rows of the layer, plain and frozen, against plain and packed dense MLPs."""
    for ours in (PLAIN, FROZEN):
        for kind in ("", ", packed"):
            names = [f"{name}{kind}" for name in BOUND]
            # plain weights are measured against plain ones alone
            if ours not in times or names[0] not in times or (ours == PLAIN and kind):
                continue
            # where T is small, E weights must be read whatever is done
            chunks = setting.trained_shape
            bound = f"{CHUNKS}{kind}" if chunks else min(names, key=lambda n: times[n].median)
            yield Ratio(
                part="layer",
                ours_is=ours,
                against=bound,
                ours=times[ours],
                other=times[bound],
                goal=goal(setting, about["dtype"], about["what"], ours, bool(kind)),
                note=note,
                beside={name: times[name] for name in names},
                **about,
            )


def goal(setting: Setting, dtype: str, what: str, ours: str, is_packed: bool) -> float | None:
    """Looks up the least share of a bound that the layer is to reach; None: not promised."""
    if setting.skewed or dtype == "autocast":
        return None
    alike = is_packed == (ours == FROZEN)
    if setting.trained_shape:
        promised = (setting.experts, setting.top_k) == (8, 1) and alike
        return 0.88 if promised and (ours == FROZEN or what != "forward") else None
    if setting.experts == 32:
        return 0.45 if (what, dtype, is_packed) == ("forward", "bf16", True) else None
    if setting.experts != 8:
        return None
    if what != "forward":
        return {"fp32": 0.92, "bf16": 0.85}[dtype]
    if dtype == "fp32":
        return 0.97 if ours == PLAIN else None
    if ours == PLAIN:
        return None
    if is_packed:
        return 0.80
    return 0.90 if setting.top_k == 1 else 0.95


def _against_peers(
    times: dict[str, Timing],
    setting: Setting,
    about: dict[str, str],
    peers: list[Peer],
    ours: str,
) -> Iterator[Ratio]:
    """Makes a row a peer, measured or not, and those of the fastest and the median one."""
    sides = {"part": "peers", "ours_is": ours, "ours": times[ours]} | about
    for peer in PEERS:
        if peer.top_k not in (None, setting.top_k):
            continue
        reason = peer.why_not(setting.top_k, about["dtype"])
        drops = "drops tokens beyond its capacity" if peer.drops else ""
        other = times.get(peer.name)
        yield Ratio(against=peer.name, other=other, note=reason or drops, **sides)
    same = {peer.name: times[peer.name] for peer in peers if not peer.drops}
    fastest = min(same, key=lambda name: same[name].median)
    among = f"of the {len(same)} that compute the same"
    of_fastest = {"other": same[fastest], "goal": 1.0, "note": f"{fastest}, {among}"}
    yield Ratio(against=FASTEST_PEER, **of_fastest, **sides)
    median = Timing(
        statistics.median(timing.median for timing in same.values()),
        statistics.median(timing.low for timing in same.values()),
    )
    # a median of one peer is the fastest peer once more
    is_promised = setting.experts in MEDIAN_PEER_EXPERTS and len(same) > 1
    promised = MEDIAN_PEER_GOAL if is_promised else None
    yield Ratio(against=MEDIAN_PEER, other=median, goal=promised, note=among, **sides)
