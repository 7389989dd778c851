"""Which hidden neurons an expert keeps, and how many a layer gets.

Axis letters: **n** tokens, **D** width, **H** hidden width, **S** neurons that stay, **K**
clusters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..models.mlps import maps_of
from ..spec import ExtractSpec
from .closed_form import (
    Moments,
    keep_by_update,
    moments_of,
    moments_of_union,
    share_out_neurons,
)

LEAST = 8  # neurons that a layer keeps at least, where layers share the neurons out


class ExpertTokens:
    """Holds the calibration tokens of one expert, as an index (n,) into those of the layer.

    Activations are gathered when they are asked for: no copy is held for each expert.
    """

    def __init__(self, hidden: Tensor, target: Tensor, index: Tensor, rules: ExtractSpec):
        self._layer_hidden, self._layer_target, self.index = hidden, target, index
        self._pooled_share = rules.correction.pooled
        self.moments_of_all_tokens: Moments | None = None  # see `pool_moments`
        # the choice of neurons needs the moments of all neurons; those that correct the weights are
        # a part of these
        self.moments_of_all_neurons: Moments | None = None
        if rules.neurons.score == "update":
            self.moments_of_all_neurons = moments_of(self.hidden, self.target)

    @property
    def hidden(self) -> Tensor:
        """Gathers (n, H) hidden activations."""
        return self._layer_hidden[self.index]

    @property
    def target(self) -> Tensor:
        """Gathers (n, D), what the layer ought to give."""
        return self._layer_target[self.index]

    def moments(self, neurons: Tensor) -> Moments:
        """Computes the moments of some neurons (S,); all tokens' are mixed in if pooled."""
        if self.moments_of_all_neurons is None:
            moments = moments_of(self.hidden[:, neurons], self.target)
        else:
            moments = self.moments_of_all_neurons.of_neurons(neurons)
        if self.moments_of_all_tokens is None:
            return moments
        return moments.mixed_with(
            self.moments_of_all_tokens.of_neurons(neurons), self._pooled_share
        )


def pool_moments(
    experts: Sequence[ExpertTokens], hidden: Tensor, target: Tensor, index: Tensor
) -> None:
    """Lets the experts mix the moments of all tokens into theirs.

    index: (n,) the tokens that are in a cluster, of hidden (n, H) and target (n, D).
    """
    sizes = torch.tensor([len(expert.index) for expert in experts])
    known = [expert.moments_of_all_neurons for expert in experts]
    if all(moments is not None for moments in known) and sizes.sum() == len(index):
        of_all = moments_of_union(known, sizes)  # cheaper than a pass over all tokens
    else:
        of_all = moments_of(hidden[index], target[index])
    for expert in experts:
        expert.moments_of_all_tokens = of_all


def variance_scores(
    mlp: nn.Module, hidden: Tensor, rules: ExtractSpec, layer_scale: Tensor | None = None
) -> Tensor:
    """Scores neurons by their variance over hidden (n, H): (H,).

    neurons.score="weighted": times the squared norm of a neuron's output weights. layer_scale: (D,)
    factor of the layer's output, which puts the norm in units of the residual stream.
    """
    variance = hidden.var(dim=0, unbiased=False)
    if rules.neurons.score == "variance":
        return variance
    output_weights = maps_of(mlp).weights().w2.float()
    if layer_scale is not None:
        output_weights = output_weights * layer_scale.unsqueeze(-1)
    return variance * output_weights.square().sum(dim=0)


def choose_neurons(
    mlp: nn.Module,
    experts: Sequence[ExpertTokens],
    rules: ExtractSpec,
    count: int | None,
    candidates: Tensor,
) -> list[Tensor]:
    """Chooses each expert's neurons, as rising indices, out of `candidates` (C,).

    count: neurons that stay, in each expert or, unless neurons.budget="layer", in the mean over
    tokens; None = the fewest that hold neurons.variance_percent of the sum of scores.
    """
    if count is not None:
        count = max(1, min(count, len(candidates)))
    if rules.neurons.budget == "layer":  # every expert for itself
        one = torch.ones(1, device=candidates.device)
        competing = [([expert], one) for expert in experts]
    else:
        loads = torch.tensor([float(len(e.index)) for e in experts], device=candidates.device)
        competing = [(experts, loads / loads.sum())]
    kept_candidates: list[Tensor] = []
    for some, shares in competing:
        if rules.neurons.score == "update":
            moments = [expert.moments(candidates) for expert in some]
            kept_candidates += keep_by_update(moments, shares, count, rules.correction.penalty)
            continue
        scores = [variance_scores(mlp, expert.hidden, rules)[candidates] for expert in some]
        if count is None:
            kept_candidates += [_fewest_neurons(scores[0], rules.neurons.variance_percent)]
        else:
            kept_candidates += share_out_neurons(scores, shares, count)
    return [candidates[index] for index in kept_candidates]


def _fewest_neurons(scores: Tensor, percent: float) -> Tensor:
    """(S,) rising: the fewest neurons that hold a percentage of the sum of scores."""
    order = scores.argsort(descending=True, stable=True)
    share = scores[order].double().cumsum(0) / scores.double().sum().clamp_min(1e-30)
    below = int((share < percent / 100 - 1e-12).sum())
    count = len(order) if percent == 100 else below + 1
    return order[:count].sort().values


# ---------------------------------------------------------------- over the layers of a model


def neurons_by_layer(
    mlps: Mapping[str, nn.Module], rules: ExtractSpec, scores: Mapping[str, Tensor]
) -> dict[str, int | None]:
    """Returns how many neurons a token passes in each layer: None with neurons.variance_percent.

    scores: (H,) of each layer, which share the neurons out with neurons.budget="model"; not looked
    at otherwise.
    """
    active = rules.neurons.active
    if active is None:
        return dict.fromkeys(mlps)
    if rules.neurons.budget != "model":
        return {name: max(1, round(active * maps_of(mlp).hidden)) for name, mlp in mlps.items()}
    # by rank, since many scores may be equal: of neurons that never fire all are 0
    ranked = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
    best = ranked[: max(1, round(active * len(ranked)))]
    ends = torch.tensor([len(score) for score in scores.values()]).cumsum(0).tolist()
    counts = {
        name: int(((best >= end - len(score)) & (best < end)).sum())
        for (name, score), end in zip(scores.items(), ends, strict=True)
    }
    return {name: max(LEAST, count) for name, count in counts.items()}


def neurons_by_added_error(
    moments: Mapping[str, Moments], active: float, penalty: float
) -> dict[str, int]:
    """Returns how many neurons a token passes in each layer, ranked by the error they save.

    moments: of each layer, with a target in units of the residual stream's variance after the
    block: the next block norms the stream, so it sees no other.
    """
    mean_hidden = next(iter(moments.values())).mean_hidden
    # layers stand in for clusters here, each with the same share of the tokens
    shares = mean_hidden.new_full((len(moments),), 1 / len(moments))
    count = round(active * len(mean_hidden))
    kept = keep_by_update(list(moments.values()), shares, count, penalty)
    return {name: max(LEAST, len(neurons)) for name, neurons in zip(moments, kept, strict=True)}
