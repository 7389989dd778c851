"""A tape that did not hear a layer says so: a loss over no routing would be the number 0."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
import vits
from torch import nn

from lib.models.balance import switch_loss
from lib.models.moe import MoELayer, RoutingTape
from lib.models.upcycle import upcycle
from lib.routers.manual import labelled
from lib.spec import ROUTERS, MoESpec

VIT = {**vits.VIT, "depth": 3}
X = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def mixture(router="token", **options):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", **VIT)
    return upcycle(model, MoESpec(layers=2, experts=3, router=router, **options))


def readme_loss(tape):
    return sum(switch_loss(routing) for routing in tape.routings())


def in_the_middle(model):
    return copy.deepcopy(model)(X)


def unpickled(model):
    return pickle.loads(pickle.dumps(model))(X)


@pytest.mark.parametrize("run", [in_the_middle, unpickled], ids=["deep copy", "pickle"])
def test_a_copy_that_runs_in_the_place_of_the_model(run):
    model = mixture()
    with RoutingTape(model) as tape:
        run(model)
    with pytest.raises(
        RuntimeError,
        match="RoutingTape of a VisionTransformer has nothing of blocks.1.mlp, blocks.2.mlp; while "
        "it was open there ran none of its MoE layers.*not a copy",
    ):
        readme_loss(tape)


def test_a_copy_made_before_and_an_average_of_weights():
    model = mixture()
    for other in (copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)):
        with RoutingTape(model) as tape:
            other(X)
        with pytest.raises(RuntimeError, match="has nothing of blocks.1.mlp"):
            readme_loss(tape)


def test_a_copy_made_under_an_open_tape_is_free():
    model = mixture()
    with RoutingTape(model) as tape:
        twin = copy.deepcopy(model)
        model(X)
        with RoutingTape(twin) as tape_of_twin:
            twin(X)
    assert all(m.tape is None for m in twin.modules() if isinstance(m, MoELayer))
    assert readme_loss(tape) == readme_loss(tape_of_twin) > 0


def test_replicas_of_data_parallel_are_named():
    """A replica shares what its layer has, the open tape too, and is another module."""
    model = mixture()
    with RoutingTape(model):
        replica = model.blocks[2].mlp._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="replicas of nn.DataParallel are such copies"):
            replica(torch.randn(2, 17, 24))


def test_a_layer_that_was_left_out_or_replaced():
    model = mixture()
    with RoutingTape(model) as tape:
        model.blocks[1].mlp(torch.randn(2, 17, 24))
    with pytest.raises(
        RuntimeError, match="nothing of blocks.2.mlp; while it was open there ran blocks.1.mlp"
    ):
        list(tape)
    with RoutingTape(model) as tape:
        model.blocks[2].mlp = copy.deepcopy(model.blocks[2].mlp)
        model(X)
    with pytest.raises(RuntimeError, match="nothing of blocks.2.mlp"):
        tape.routings()


def test_a_model_without_mixture_has_no_routing_and_no_error():
    dense = timm.create_model("vit_tiny_patch16_224", **VIT)
    with RoutingTape(dense) as tape:
        dense(X)
    assert tape.routings() == []
    with RoutingTape(nn.Identity()) as tape:
        pass
    assert list(tape) == []


@pytest.mark.parametrize("inside", [True, False], ids=["backward in the tape", "backward after it"])
@pytest.mark.parametrize("router", [word for word in ROUTERS])
def test_gradient_checkpointing_under_a_tape(router, inside):
    """The second forward pass of a block saves what the first did, whatever routes in it."""
    options = {
        "all": {"top_k": 3, "balance": "none"},
        "manual": {"groups": ((0, 1), (2, 3), (4,)), "balance": "none"},
        "soft": {"slots": 2},
    }
    model = mixture(router, **options.get(router, {})).train()

    def gradients():
        model.zero_grad()
        with labelled(model, torch.tensor([1, 4])):
            with RoutingTape(model) as tape:
                loss = model(X).square().mean()
                loss = loss + sum(routing.probs.square().sum() for routing in tape.routings())
                if inside:
                    loss.backward()
            if not inside:
                loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    model.set_grad_checkpointing(True)
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)
