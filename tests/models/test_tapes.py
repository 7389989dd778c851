"""A tape that did not hear a layer says so: a loss over no routing would be the number 0."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import vits
from timm.layers import DropPath, set_reentrant_ckpt
from torch import nn
from torch.utils.checkpoint import checkpoint

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


def test_a_tape_hears_its_own_thread_alone():
    model, other = mixture(), torch.randn(3, 3, 28, 28)
    with ThreadPoolExecutor(1) as pool:
        with RoutingTape(model) as tape:
            model(X)
            mine = tape.routings()
            pool.submit(model, other).result()
        assert [routing.shape[0] for routing in tape.routings()] == [2, 2]
        assert all(a is b for a, b in zip(tape.routings(), mine, strict=True))
        with tape:  # a pass elsewhere is none of this thread's
            pool.submit(model, other).result()
        with pytest.raises(RuntimeError, match="ran none of its MoE layers.*in the same thread"):
            tape.routings()

        def elsewhere():
            with tape:  # opened again, it is that thread's
                model(other)
            return [routing.shape[0] for routing in tape.routings()]

        assert pool.submit(elsewhere).result() == [3, 3]


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


OPTIONS = {
    "all": {"top_k": 3, "balance": "none"},
    "manual": {"groups": ((0, 1), (2, 3), (4,)), "balance": "none"},
    "soft": {"slots": 2},
}


@pytest.fixture(autouse=True)
def _timms_own_word_on_reentrant_checkpointing():
    yield
    set_reentrant_ckpt(False)


def of_timm(model, reentrant):
    set_reentrant_ckpt(reentrant)
    model.set_grad_checkpointing(True)


def of_one(name):
    """Checkpoints one module of the model, by torch itself."""

    def checkpointed(model, reentrant):
        module = model.get_submodule(name)
        plain = module.forward
        module.forward = lambda x, **more: checkpoint(plain, x, use_reentrant=reentrant, **more)

    return checkpointed


CHECKPOINTING = {"timm": of_timm, "block": of_one("blocks.1"), "MLP": of_one("blocks.2.mlp")}


def loss_and_gradients(model, inside=True, autocast=False):
    """Loss of outputs and routing, and the gradients of the routing's loss and of the whole."""
    model.zero_grad()
    torch.manual_seed(3)  # noise, dropped experts and dropped paths
    with labelled(model, torch.tensor([1, 4])):
        with RoutingTape(model) as tape:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = model(X)
            aux = sum(routing.probs.square().sum() for routing in tape.routings())
            loss = out.float().square().mean() + aux
            if inside:
                loss.backward(retain_graph=True)
        if not inside:
            loss.backward(retain_graph=True)
    whole = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    if aux.requires_grad:  # the router `manual` decides without one
        aux.backward()
    return loss.detach(), whole + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("inside", [True, False], ids=["backward in the tape", "backward after it"])
@pytest.mark.parametrize("by", CHECKPOINTING)
@pytest.mark.parametrize("router", [word for word in ROUTERS])
def test_gradient_checkpointing_under_a_tape(router, by, inside):
    """The second forward pass of a block saves what the first did, whatever routes in it."""
    model = mixture(router, **OPTIONS.get(router, {})).train()
    plain = loss_and_gradients(model, inside)
    CHECKPOINTING[by](model, False)
    torch.testing.assert_close(loss_and_gradients(model, inside), plain)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "router, options",
    [
        ("soft", {"slots": 1}),
        ("soft", {"slots": 2}),
        ("token", {"noise": 1.0, "expert_dropout": 0.5, "shared": True}),
        ("image", {"noise": 1.0}),
        ("expert_choice", {"noise": 1.0, "expert_dropout": 0.5}),
    ],
)
def test_gradient_checkpointing_with_chance_and_autocast(router, options, autocast, training):
    """Noise, dropped experts and paths are drawn again as they were, types are those of before."""
    model = mixture(router, **options)
    for block in model.blocks:
        block.drop_path1, block.drop_path2 = DropPath(0.5), DropPath(0.5)
    model.train(training)
    plain = loss_and_gradients(model, autocast=autocast)
    model.set_grad_checkpointing(True)
    torch.testing.assert_close(loss_and_gradients(model, autocast=autocast), plain)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("by", CHECKPOINTING)
@pytest.mark.parametrize("router", ["token", "soft"])
def test_reentrant_checkpointing_has_no_gradient_for_a_loss_of_routing(router, by, training):
    model = mixture(router, **OPTIONS.get(router, {})).train(training)
    CHECKPOINTING[by](model, True)
    with RoutingTape(model) as tape:
        out = model(X)
        with pytest.raises(RuntimeError, match="blocks.*without gradients.*use_reentrant=False"):
            tape.routings()
    out.square().mean().backward()  # without the loss of routing it trains
    with torch.no_grad():  # and can be looked at
        assert [name for name, _ in tape] == ["blocks.1.mlp", "blocks.2.mlp"]


def test_a_pass_without_gradients_is_told_from_one_for_them():
    model = mixture()
    layer = model.blocks[2].mlp
    with RoutingTape(model) as tape, torch.no_grad():
        model(X)
    with pytest.raises(RuntimeError, match="blocks.1.mlp, blocks.2.mlp of a VisionTransformer ran"):
        readme_loss(tape)
    with pytest.raises(RuntimeError, match="blocks.2.mlp of a VisionTransformer ran without"):
        tape[layer]
    with torch.inference_mode(), tape:
        model(X)
    assert readme_loss(tape) > 0 and tape[layer].probs.shape[1] == 3  # opened for a measurement
    with tape:
        model(X)
    readme_loss(tape).backward()
    assert layer.router.weight.grad.any()
