"""What makes up for removed neurons: their mean, or ridge regression on those that stay.

The mean as a bias is VBP's (2507.12988), the regression CORP's (2602.05243); the updates of DVBP
have the same solution.

Axis letters: **n** tokens, **D** width, **H** hidden width, **S** neurons that stay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor

from ..spec import ExtractSpec
from .closed_form import ridge_regression
from .neurons import ExpertTokens, choose_neurons


class MlpWeights(NamedTuple):
    """Weights of one expert: w1 (S, D), b1 (S,), w2 (D, S), b2 (D,).

    A bias is None in the state of a layer that has none and stayed as it was.
    """

    w1: Tensor
    b1: Tensor | None
    w2: Tensor
    b2: Tensor | None


def weights_of(mlp: Mlp) -> MlpWeights:
    """Returns the weights of a whole MLP, S = H, without gradients, in float32.

    A bias that it lacks is zero: what is made of it may need one.
    """
    parts = []
    for linear in (mlp.fc1, mlp.fc2):
        weight = linear.weight.detach().float()
        bias = linear.bias
        parts += [weight, weight.new_zeros(len(weight)) if bias is None else bias.detach().float()]
    return MlpWeights(*parts)


def corrected_weights(
    mlp: Mlp,
    tokens: ExpertTokens,
    kept_neurons: Tensor,
    rules: ExtractSpec,
    bias_is_elsewhere: bool = False,
) -> MlpWeights:
    """Returns the weights of an expert that keeps some neurons (S,) of an MLP.

    bias_is_elsewhere: the layer's output bias is in a common part already, and without a correction
    the expert gets none.
    """
    w1, b1, w2, b2 = weights_of(mlp)
    if rules.correction.method == "ridge":
        moments = tokens.moments(kept_neurons)
        w2, b2 = ridge_regression(moments, rules.correction.penalty)
    elif rules.correction.method == "mean":
        w2 = w2[:, kept_neurons]
        b2 = tokens.target.mean(dim=0) - w2 @ tokens.hidden[:, kept_neurons].mean(dim=0)
    else:
        w2 = w2[:, kept_neurons]
        b2 = torch.zeros_like(b2) if bias_is_elsewhere else b2
    return MlpWeights(w1[kept_neurons], b1[kept_neurons], w2, b2)


class CommonPart(NamedTuple):
    """The neurons that every token of a layer passes, and what they leave to the experts.

    weights: None if there are none. rest: (n, D) what is left of the target. free_neurons: that the
    experts choose from.
    """

    weights: MlpWeights | None
    rest: Tensor
    free_neurons: Tensor


def common_part(mlp: Mlp, hidden: Tensor, target: Tensor, rules: ExtractSpec) -> CommonPart:
    """Chooses and corrects the share neurons.common of a layer's neurons, on all of its tokens.

    hidden: (n, H). target: (n, D).
    """
    all_neurons = torch.arange(mlp.fc1.out_features, device=target.device)
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
