"""One MLP into experts: which tokens are whose, which neurons stay, and what makes up for the
others.

Axis letters: **n** tokens, **D** width, **H** hidden width, **S** neurons that stay, **K**
clusters.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn

from ..models.experts import Experts
from ..models.moe import MoELayer
from ..models.shared_experts import SharedExperts
from ..routers.centroid import CentroidRouter
from ..routers.controls import OracleRouter, RandomRouter
from ..routers.predictor import PredictorRouter
from ..spec import ExtractSpec
from .closed_form import Moments, moments, pooled, regression, shared_out, survivors
from .clusters import (
    Clusters,
    balanced_means,
    density_clusters,
    means_clusters,
    random_clusters,
    stability,
)
from .record import Recorded

LEAST = 8  # neurons that a layer keeps at least, when widths are ranked over the model


@dataclass(frozen=True)
class Cut:
    """A layer's calibration tokens and target: (n, D), what it ought to give on them."""

    tokens: Recorded
    target: Tensor


class _Group:
    """The tokens of one expert, by index (n,). every: moments of all tokens, all neurons, that lean
    into the group's own."""

    every: Moments | None = None

    def __init__(self, hidden: Tensor, target: Tensor, index: Tensor, rules: ExtractSpec):
        self._hidden, self._target, self.index, self.rules = hidden, target, index, rules
        # which neurons stay is seen in the moments of all: those that correct the weights are a
        # part of these
        self.whole = (
            moments(hidden[index], target[index]) if rules.neurons.score == "update" else None
        )

    @property
    def hidden(self) -> Tensor:
        """(n, H)."""
        return self._hidden[self.index]

    @property
    def target(self) -> Tensor:
        """(n, D)."""
        return self._target[self.index]

    def moments(self, neurons: Tensor) -> Moments:
        """Of some neurons, (S,)."""
        own = (
            moments(self.hidden[:, neurons], self.target)
            if self.whole is None
            else self.whole.of(neurons)
        )
        return (
            own
            if self.every is None
            else own.mixed(self.every.of(neurons), self.rules.correction.pooled)
        )


def _lean(groups: list[_Group], hidden: Tensor, target: Tensor, everyone: Tensor) -> None:
    """Let the moments of all tokens, by index, into those of each group; where groups know their
    own, all tokens' are made of these."""
    sizes = torch.tensor([len(group.index) for group in groups])
    if all(group.whole is not None for group in groups) and sizes.sum() == len(everyone):
        every = pooled([group.whole for group in groups], sizes)
    else:
        every = moments(hidden[everyone], target[everyone])
    for group in groups:
        group.every = every


@torch.no_grad()
def cut_layer(
    mlp: Mlp, cut: Cut, rules: ExtractSpec, width: int | None, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The layer that takes the place of `mlp`, and a report on it. width: neurons a token passes;
    None with `percent`.

    Report: tokens (n), width (D), clusters, noise (share of clustered tokens in none), stability
    (of HDBSCAN's clusters, else None), dense (true where fewer than two clusters were found, and
    the MLP stays as it is), widths (of the experts), stored (neurons in all, by their input
    weights), columns (the same by output weights, of which a neuron may have several), active
    (neurons a token passes, mean), load (share of tokens by expert), error (squared error of the
    output over its variance), union (neurons in any expert), cosine (K, K) of mean inputs, overlap
    (K, K) of neuron sets (intersection over union); the last two not for groups of neurons.
    """
    if rules.clusters.of == "neurons":
        return _moefied(mlp, cut, rules, seed)
    found, stable = _clustered(cut.tokens, rules, seed)
    told = {"noise": found.noise, "stability": stable, "tokens": len(cut.tokens.inputs)}
    if found.count < 2 and not rules.static:
        whole = mlp.fc1.out_features
        kept = {
            "width": mlp.fc1.in_features,
            "clusters": found.count,
            "dense": True,
            "widths": [whole],
            "stored": whole,
            "columns": whole,
            "active": float(whole),
            "load": [1.0],
            "error": 0.0,
        }
        return mlp, told | kept
    centres, member = _members(cut.tokens, found, rules, seed)
    router = None if rules.static else _router(mlp, cut.tokens, centres, member, rules)
    routed = (
        router.scores(cut.tokens.inputs).argmax(dim=1)
        if router is not None
        else torch.zeros_like(member)
    )
    if rules.neurons.statistics == "routed" and router is not None:
        member = routed
    shared, target, free = _common(mlp, cut, rules)
    groups = [(member == k).nonzero()[:, 0] for k in range(1 if rules.static else len(centres))]
    everyone = (member >= 0).nonzero()[:, 0]
    groups = [group if len(group) > 1 else everyone for group in groups]
    own = None if width is None else width - (mlp.fc1.out_features - len(free))
    apart = [_Group(cut.tokens.hidden, target, group, rules) for group in groups]
    if rules.correction.pooled:
        _lean(apart, cut.tokens.hidden, target, everyone)
    sets = _sets(mlp, apart, rules, own, free)
    parts = [
        _corrected(mlp, group, kept, rules, shared is not None)
        for group, kept in zip(apart, sets, strict=True)
    ]
    layer = _assembled(mlp, parts, sets, router, shared, rules)
    return layer, told | _report(
        layer, cut, routed, sets, centres, mlp.fc1.out_features - len(free)
    )


# ---------------------------------------------------------------- whose tokens


def _clustered(tokens: Recorded, rules: ExtractSpec, seed: int) -> tuple[Clusters, float | None]:
    """Clusters of some of the tokens, the others being -2, random ones of all; and how stable
    density's clusters are."""
    n, stable = len(tokens.inputs), None
    if rules.static:
        return Clusters(np.zeros(n, np.int64), np.ones(n)), None
    drawn = torch.Generator().manual_seed(seed)
    some = torch.randperm(n, generator=drawn)[: rules.clusters.sample].sort().values
    x = _space(tokens, rules)[some]
    if rules.clusters.components is not None:
        from sklearn.decomposition import PCA

        x = torch.from_numpy(
            PCA(min(rules.clusters.components, *x.shape), random_state=seed).fit_transform(
                x.cpu().numpy()
            )
        ).float()
    if rules.clusters.method == "hdbscan":
        found = density_clusters(
            x, max(2, round(rules.clusters.smallest_share * len(x))), rules.clusters.neighbours
        )
        stable = stability(
            x, tokens.image[some], rules.clusters.smallest_share, rules.clusters.neighbours
        )
    elif rules.clusters.method == "directions":
        nearest = (
            CentroidRouter.of(_directions(tokens, rules, seed), "nearest")
            .scores(tokens.inputs)
            .argmax(dim=1)
        )
        return Clusters(nearest.cpu().numpy(), np.ones(n)), None
    else:
        found = means_clusters(x, rules.clusters.count, seed)
    labels = np.full(n, -2)
    labels[some.numpy()] = found.labels
    found = Clusters(labels, found.strength, found.tree)
    if (
        rules.clusters.method == "random"
    ):  # of the sizes that the means' clusters have among all tokens
        space = _space(tokens, rules)
        found = random_clusters(
            found.nearest(space, space).bincount(minlength=found.count).cpu().numpy(), drawn
        )
    return found, stable


def _space(tokens: Recorded, rules: ExtractSpec) -> Tensor:
    """(n, H) or (n, D) what is clustered of the tokens."""
    return tokens.hidden if rules.clusters.space == "hidden" else tokens.inputs


def _directions(tokens: Recorded, rules: ExtractSpec, seed: int) -> Tensor:
    """(K, D) drawn from a normal distribution as wide as the inputs, those that a token is nearest
    to; at most `count`."""
    drawn = torch.randn(
        rules.clusters.count,
        tokens.inputs.shape[1],
        generator=torch.Generator().manual_seed(seed + 1),
    )
    drawn = drawn.to(tokens.inputs.device) * tokens.inputs.std()
    return drawn[CentroidRouter.of(drawn, "nearest").scores(tokens.inputs).argmax(dim=1).unique()]


def _members(
    tokens: Recorded, found: Clusters, rules: ExtractSpec, seed: int
) -> tuple[Tensor, Tensor]:
    """(K, D) mean inputs of the clustered tokens, and (n,) the cluster of each token, -1 for one in
    none.

    Tokens that were not clustered join the nearest centre; not so with HDBSCAN, where they might be
    noise. Random directions are centres themselves.
    """
    member = torch.from_numpy(found.labels).to(tokens.inputs.device)
    if rules.clusters.method == "directions":
        return _directions(tokens, rules, seed), member
    space = _space(tokens, rules)
    means = torch.stack(
        [tokens.inputs[member == k].mean(dim=0) for k in range(max(found.count, 1))]
    )
    if rules.clusters.method == "hdbscan":
        return means, member.clamp_min(-1)
    return means, torch.where(member == -2, found.nearest(space, space), member) if (
        member == -2
    ).any() else member


def _router(
    mlp: Mlp, tokens: Recorded, means: Tensor, member: Tensor, rules: ExtractSpec
) -> nn.Module:
    if rules.router == "random":
        return RandomRouter(len(means))
    if rules.router == "oracle":
        centres = torch.stack([tokens.hidden[member == k].mean(dim=0) for k in range(len(means))])
        return OracleRouter(centres, mlp.fc1.weight, mlp.fc1.bias, mlp.act)
    return CentroidRouter.of(means, rules.router, tokens.inputs.mean(dim=0))


# ---------------------------------------------------------------- which neurons


def scores_of(mlp: Mlp, hidden: Tensor, rules: ExtractSpec, scale: Tensor | None = None) -> Tensor:
    """(H,) variance over tokens (n, H), weighted by what a neuron does to the output if asked for.
    scale: (D,) of the output."""
    variance = hidden.var(dim=0, unbiased=False)
    if rules.neurons.score == "variance":
        return variance
    out = mlp.fc2.weight.detach()
    return variance * (out if scale is None else out * scale.unsqueeze(-1)).square().sum(dim=0)


def _sets(
    mlp: Mlp, groups: list[_Group], rules: ExtractSpec, own: int | None, free: Tensor
) -> list[Tensor]:
    """Of each group of tokens the rising neurons that stay, out of `free`: `own` of them, in the
    mean over tokens unless budget="layer", or the shortest set that holds the percentage of the sum
    of scores."""
    own = None if own is None else max(1, min(own, len(free)))
    if rules.neurons.budget != "layer":
        load = torch.tensor([float(len(group.index)) for group in groups], device=free.device)
        batches = [(groups, load / load.sum())]
    else:
        batches = [([group], torch.ones(1, device=free.device)) for group in groups]
    kept: list[Tensor] = []
    for some, load in batches:
        if rules.neurons.score == "update":
            kept += survivors(
                [group.moments(free) for group in some], load, own, rules.correction.penalty
            )
        else:
            scores = [scores_of(mlp, group.hidden, rules)[free] for group in some]
            kept += (
                [_shortest(scores[0], rules.neurons.variance_percent)]
                if own is None
                else shared_out(scores, load, own)
            )
    return [free[part] for part in kept]


def _shortest(score: Tensor, percent: float) -> Tensor:
    """(S,) rising: the fewest neurons that hold a percentage of the sum of scores."""
    order = score.argsort(descending=True, stable=True)
    share = score[order].double().cumsum(0) / score.double().sum().clamp_min(1e-30)
    count = len(order) if percent == 100 else int((share < percent / 100 - 1e-12).sum()) + 1
    return order[:count].sort().values


def layer_scale(model: nn.Module, name: str) -> Tensor:
    """(D,) or (1,) what a block multiplies the output of its MLP `name` with before it adds it to
    the residual stream."""
    block = model.get_submodule(name.rpartition(".")[0])
    plain = model.get_submodule(name).fc2.weight.new_ones(1)
    return getattr(getattr(block, "ls2", None), "gamma", plain).detach()


def widths_over_model(
    mlps: Mapping[str, Mlp], scores: Mapping[str, Tensor], rules: ExtractSpec
) -> dict[str, int | None]:
    """Neurons that a token passes in each layer: the same share of all, or the best of all layers
    by pooled score.

    scores: (H,) of each layer; over the model a weighted score is taken in units of the residual
    stream, that is with the layer's scale. Only budget="model" looks at them.
    """
    if rules.neurons.active is None:
        return dict.fromkeys(mlps)
    if rules.neurons.budget != "model":
        return {
            name: max(1, round(rules.neurons.active * mlp.fc1.out_features))
            for name, mlp in mlps.items()
        }
    whole = torch.cat(list(scores.values()))
    least = whole.sort(descending=True).values[max(1, round(rules.neurons.active * len(whole))) - 1]
    return {name: max(LEAST, int((score >= least).sum())) for name, score in scores.items()}


# ---------------------------------------------------------------- what makes up for the others


def _common(
    mlp: Mlp, cut: Cut, rules: ExtractSpec
) -> tuple[tuple[Tensor, ...] | None, Tensor, Tensor]:
    """The part that every token passes (w1, b1, w2, b2) or None, what is left for the experts to
    give (n, D), and the neurons that they may choose from."""
    whole = torch.arange(mlp.fc1.out_features, device=cut.target.device)
    if not rules.neurons.common:
        return None, cut.target, whole
    hidden = cut.tokens.hidden
    everyone = _Group(hidden, cut.target, torch.arange(len(hidden), device=hidden.device), rules)
    [kept] = _sets(
        mlp,
        [everyone],
        rules.but(neurons={"variance_percent": None, "active": 1.0, "budget": "layer"}),
        round(rules.neurons.common * len(whole)),
        whole,
    )
    w1, b1, w2, b2 = _corrected(mlp, everyone, kept, rules, False)
    left = cut.target - F.linear(hidden[:, kept], w2, b2)
    return (w1, b1, w2, b2), left, whole[~torch.isin(whole, kept)]


def _corrected(
    mlp: Mlp, group: _Group, kept: Tensor, rules: ExtractSpec, beside: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w1 (S, D), b1 (S,), w2 (D, S), b2 (D,) of an expert. beside: a common part has the layer's
    bias already."""
    w1, b1, w2, b2 = (
        held.detach() for held in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    )
    if rules.correction.method == "ridge":
        own = regression(group.moments(kept), rules.correction.penalty)
    elif rules.correction.method == "mean":
        out = w2[:, kept]
        own = out, group.target.mean(dim=0) - out @ group.hidden[:, kept].mean(dim=0)
    else:
        own = w2[:, kept], torch.zeros_like(b2) if beside else b2
    return w1[kept], b1[kept], *own


# ---------------------------------------------------------------- the layer


def _assembled(
    mlp: Mlp,
    parts: list,
    sets: list[Tensor],
    router: nn.Module | None,
    shared: tuple | None,
    rules: ExtractSpec,
) -> nn.Module:
    if router is None:
        [(w1, b1, w2, b2)] = parts
        return narrow_mlp(mlp, w1, b1, w2, b2)
    if rules.storage != "copies":
        union = torch.cat(sets).unique()
        second = mlp.fc2.weight[:, union] if rules.storage == "shared" else [p[2] for p in parts]
        held = (mlp.fc1.weight[union], mlp.fc1.bias[union], second)
        experts = SharedExperts(
            held,
            [torch.searchsorted(union, s) for s in sets],
            torch.stack([p[3] for p in parts]),
            mlp.act,
        )
    else:
        experts = Experts.of(parts, mlp.act)
    return MoELayer(router, experts, None if shared is None else narrow_mlp(mlp, *shared))


def narrow_mlp(mlp: Mlp, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Mlp:
    """A copy of `mlp` with these weights, (S, D), (S,), (D, S), (D,)."""
    out = copy.deepcopy(mlp)
    for linear, weight, bias in ((out.fc1, w1, b1), (out.fc2, w2, b2)):
        linear.weight, linear.bias = (
            nn.Parameter(held.detach().clone().contiguous()) for held in (weight, bias)
        )
        linear.out_features, linear.in_features = weight.shape
    return out


def _report(
    layer: nn.Module, cut: Cut, routed: Tensor, sets: list[Tensor], means: Tensor, common: int
) -> dict[str, Any]:
    widths = [len(s) for s in sets]
    load = torch.bincount(routed, minlength=len(sets)).double().cpu() / len(routed)
    flags = means.new_zeros(len(sets), int(torch.cat(sets).max()) + 1)
    for row, s in zip(flags, sets, strict=True):
        row[s] = 1.0
    both = flags @ flags.t()
    union = flags.sum(1, keepdim=True) + flags.sum(1) - both
    unit = F.normalize(means, dim=1)
    once, experts = int(flags.any(dim=0).sum()), getattr(layer, "experts", None)
    rows = once if isinstance(experts, SharedExperts) else sum(widths)
    columns = sum(widths) if getattr(experts, "own", False) else rows
    return {
        "clusters": len(sets),
        "dense": False,
        "width": means.shape[1],
        "widths": widths,
        "stored": rows + common,
        "columns": columns + common,
        "active": float((load * torch.tensor(widths)).sum()) + common,
        "load": load.tolist(),
        "error": _error(layer, cut),
        "union": once + common,
        "cosine": _short(unit @ unit.t()),
        "overlap": _short(both / union),
    }


def _short(matrix: Tensor) -> list[list[float]]:
    """Four decimals: a record holds two of these matrices a layer."""
    return matrix.double().round(decimals=4).tolist()


@torch.no_grad()
def _error(layer: nn.Module, cut: Cut) -> float:
    """Squared error of the layer's output on its tokens, over the variance of the target."""
    out = torch.cat([layer(part.unsqueeze(0))[0] for part in cut.tokens.inputs.split(4096)])
    wanted = cut.target - cut.target.mean(dim=0)
    return float((out - cut.target).square().sum() / wanted.square().sum().clamp_min(1e-30))


# ---------------------------------------------------------------- groups of neurons


def top_k(rules: ExtractSpec) -> int:
    """K: of groups of neurons as many as the active share makes, else one."""
    return (
        max(1, round(rules.neurons.active * rules.clusters.count))
        if rules.clusters.of == "neurons"
        else 1
    )


def _moefied(mlp: Mlp, cut: Cut, rules: ExtractSpec, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """MoEfication (2110.01786): groups of neurons with similar rows, of which a token passes
    several; nothing is thrown away."""
    w1, b1, w2, b2 = (
        held.detach() for held in (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    )
    group = torch.from_numpy(balanced_means(F.normalize(w1, dim=1), rules.clusters.count, seed)).to(
        w1.device
    )
    sets = [(group == k).nonzero()[:, 0] for k in range(rules.clusters.count)]
    k, means = top_k(rules), torch.stack([w1[s].mean(dim=0) for s in sets])
    router = (
        CentroidRouter.of(means, top_k=k)
        if rules.router == "cosine"
        else _predictor(means, sets, cut.tokens, k, seed)
    )
    layer = MoELayer(router, Experts.of([(w1[s], b1[s], w2[:, s], b2 / k) for s in sets], mlp.act))
    chosen = router.scores(cut.tokens.inputs).topk(k, dim=1).indices.flatten()
    report = _report(layer, cut, chosen, sets, means, 0)
    del (
        report["cosine"],
        report["overlap"],
    )  # of mean inputs and of sets that overlap: groups of neurons have neither
    return layer, report | {"noise": 0.0, "active": k * mlp.fc1.out_features / rules.clusters.count}


@torch.enable_grad()
def _predictor(
    means: Tensor, sets: list[Tensor], tokens: Recorded, k: int, seed: int, steps: int = 400
) -> PredictorRouter:
    """Trained to give each group its sum of positive activations, over the token's largest one;
    started from the mean rows."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = PredictorRouter(means.shape[1], len(sets), k).to(means.device)
        router.fc1.weight.data.copy_(F.normalize(means, dim=1))
        wanted = torch.stack([tokens.hidden[:, s].relu().sum(dim=1) for s in sets], dim=1)
        wanted = wanted / wanted.amax(dim=1, keepdim=True).clamp_min(1e-12)
        optim = torch.optim.AdamW(router.parameters(), lr=3e-3)
        for _ in range(steps):
            index = torch.randint(len(wanted), (min(1024, len(wanted)),))
            optim.zero_grad(set_to_none=True)
            F.binary_cross_entropy_with_logits(
                router.scores(tokens.inputs[index]), wanted[index]
            ).backward()
            optim.step()
    return router.requires_grad_(True)
