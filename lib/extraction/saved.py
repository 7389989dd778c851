"""The structure of a saved model whose MLPs were changed.

Axis letters: **D** width, **E** experts, **K** experts a token.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..models.experts import Experts
from ..models.mlps import maps_of
from ..models.moe import MoELayer
from ..models.shared_experts import SharedExperts
from ..routers.centroid import CentroidRouter
from ..routers.controls import OracleRouter, RandomRouter
from ..routers.hard import HardRouter
from ..routers.predictor import PredictorRouter
from ..spec import ExtractSpec
from .moefication import experts_per_token
from .record import mlps_of


def fit_extracted(model: nn.Module, state: Mapping[str, Tensor], rules: ExtractSpec) -> nn.Module:
    """Gives the MLPs of an unchanged model, in place, the structure of its extracted state.

    Structure only: the state is loaded afterwards. Returns the model. Raises ValueError as
    `mlps_of`, and for a state without one of the layers.
    """
    for name, mlp in mlps_of(model).items():
        prefix = f"{name}."
        of_layer = {
            key.removeprefix(prefix): tensor
            for key, tensor in state.items()
            if key.startswith(prefix)
        }
        if not of_layer:
            raise ValueError(
                f"{name}: the state has nothing there: build the model as the saved one was before "
                "extraction"
            )
        layer = layer_like(mlp, of_layer, rules)
        model.set_submodule(name, layer.to(next(mlp.parameters())).train(mlp.training))
    return model


def layer_like(mlp: nn.Module, state: Mapping[str, Tensor], rules: ExtractSpec) -> nn.Module:
    """Builds a layer with the shapes of `state`: a narrow MLP, or an MoE layer.

    state: of the layer alone, so its names start at the layer.
    """
    maps = maps_of(mlp)
    if maps.hidden_in(state) is not None:
        return maps.with_shapes_of(state)
    count = len(state["experts.fc2.bias"])
    if "experts.index" in state:
        experts = _shared_experts(maps.act, state, rules)
    else:
        widths = Experts.widths_in(state, "experts.")
        experts = Experts(count, maps.width, widths, maps.act)
    common = None
    if maps.hidden_in(state, "shared.") is not None:
        common = maps.with_shapes_of(state, "shared.")
    router = _router(state, count, experts_per_token(rules), maps.act)
    return MoELayer(router, experts, common, channels_first=maps.channels_first)


def _shared_experts(
    act: nn.Module, state: Mapping[str, Tensor], rules: ExtractSpec
) -> SharedExperts:
    widths = state["experts.rows"].tolist()
    output_weights = state["experts.fc2.weight"].t()  # saved transposed
    if rules.storage == "inputs":
        output_weights = output_weights.split(widths, dim=1)
    store = (state["experts.fc1.weight"], state["experts.fc1.bias"], output_weights)
    neurons = state["experts.index"].split(widths)
    return SharedExperts(store, neurons, state["experts.fc2.bias"], act)


def _router(state: Mapping[str, Tensor], experts: int, k: int, act: nn.Module) -> HardRouter:
    """Which kind of router a state is of can be seen from its names."""
    if "router.centres" in state:
        return OracleRouter(
            state["router.centres"], state["router.weight"], state["router.bias"], act
        )
    if "router.fc1.weight" in state:
        return PredictorRouter(state["router.fc1.weight"].shape[1], experts, k)
    if "router.weight" in state:
        return CentroidRouter(state["router.weight"], state["router.bias"], k)
    return RandomRouter(experts, k)
