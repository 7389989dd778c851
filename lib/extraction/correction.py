"""What makes up for removed neurons: their mean, or ridge regression on those that stay.

The mean as a bias is VBP's (2507.12988), the regression CORP's (2602.05243); the updates of DVBP
have the same solution.

Axis letters: **n** tokens, **D** width, **H** hidden width, **S** neurons that stay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.mlps import MlpWeights, maps_of, rows_of_neurons
from ..spec import ExtractSpec
from .closed_form import ridge_regression
from .neurons import ExpertTokens, choose_neurons


def weights_of(mlp: nn.Module) -> MlpWeights:
    """Returns the weights of a whole MLP, S = H, without gradients, in float32.

    A bias that it lacks is zero: what is made of it may need one.
    """
    w1, b1, w2, b2 = maps_of(mlp).weights()
    parts = []
    for weight, bias in ((w1, b1), (w2, b2)):
        weight = weight.float()
        parts += [weight, weight.new_zeros(len(weight)) if bias is None else bias.float()]
    return MlpWeights(*parts)


def kept_weights(mlp: nn.Module, neurons: Tensor) -> MlpWeights:
    """Returns the weights of some neurons (S,) of an MLP, as `weights_of`."""
    w1, b1, w2, b2 = weights_of(mlp)
    rows = rows_of_neurons(neurons, w2.shape[1], maps_of(mlp).gated)
    return MlpWeights(w1[rows], b1[rows], w2[:, neurons], b2)


def corrected_weights(
    mlp: nn.Module,
    tokens: ExpertTokens,
    kept_neurons: Tensor,
    rules: ExtractSpec,
    bias_is_elsewhere: bool = False,
) -> MlpWeights:
    """Returns the weights of an expert that keeps some neurons (S,) of an MLP.

    bias_is_elsewhere: the layer's output bias is in a common part already, and without a correction
    the expert gets none.
    """
    w1, b1, w2, b2 = kept_weights(mlp, kept_neurons)
    if rules.correction.method == "ridge":
        moments = tokens.moments(kept_neurons)
        w2, b2 = ridge_regression(moments, rules.correction.penalty)
    elif rules.correction.method == "mean":
        b2 = tokens.target.mean(dim=0) - w2 @ tokens.hidden[:, kept_neurons].mean(dim=0)
    else:
        b2 = torch.zeros_like(b2) if bias_is_elsewhere else b2
    return MlpWeights(w1, b1, w2, b2)


class CommonPart(NamedTuple):
    """The neurons that every token of a layer passes, and what they leave to the experts.

    weights: None if there are none. rest: (n, D) what is left of the target. free_neurons: that the
    experts choose from.
    """

    weights: MlpWeights | None
    rest: Tensor
    free_neurons: Tensor


def common_part(mlp: nn.Module, hidden: Tensor, target: Tensor, rules: ExtractSpec) -> CommonPart:
    """Chooses and corrects the share neurons.common of a layer's neurons, on all of its tokens.

    hidden: (n, H). target: (n, D).
    """
    all_neurons = torch.arange(hidden.shape[1], device=target.device)
    if not rules.neurons.common:
        return CommonPart(None, target, all_neurons)
    all_tokens = torch.arange(len(hidden), device=hidden.device)
    tokens = ExpertTokens(hidden, target, all_tokens, rules)
    count = round(rules.neurons.common * len(all_neurons))
    alone = rules.but(neurons={"budget": "layer"})
    [neurons] = choose_neurons(mlp, [tokens], alone, count, all_neurons)
    weights = corrected_weights(mlp, tokens, neurons, rules)
    rest = target - F.linear(hidden[:, neurons], weights.w2, weights.b2)
    return CommonPart(weights, rest, all_neurons[~torch.isin(all_neurons, neurons)])
