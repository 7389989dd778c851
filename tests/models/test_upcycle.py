"""Upcycling of timm models, parameter groups, and the tape under checkpointing, compilation and
DDP."""

import copy

import pytest
import timm
import torch
import torch._dynamo.testing
import torch.distributed as dist
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from torch import nn

from lib.models.experts import Experts
from lib.models.moe import MoELayer, RoutingTape
from lib.models.upcycle import block_mlps, moe_layer, upcycle
from lib.spec import MoESpec, TrainSpec
from lib.training.optimiser import optimiser

VIT = {
    "img_size": 28,
    "patch_size": 7,
    "embed_dim": 24,
    "depth": 3,
    "num_heads": 2,
    "num_classes": 5,
}
MODELS = {
    "vit_tiny_patch16_224": VIT,
    "deit_tiny_distilled_patch16_224": VIT,
    "beit_base_patch16_224": VIT,
    "swin_tiny_patch4_window7_224": {
        "img_size": 56,
        "embed_dim": 24,
        "depths": (1, 2),
        "num_heads": (2, 4),
        "num_classes": 5,
    },
    "convnext_atto": {
        "depths": (1, 1, 1, 1),
        "dims": (8, 8, 16, 16),
        "conv_mlp": False,
        "num_classes": 5,
    },
}


def build(name="vit_tiny_patch16_224", **changes):
    torch.manual_seed(0)
    model = timm.create_model(name, **{**MODELS[name], **changes})
    # timm starts gates and biases at zero, which would hide differences.
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def images(model, count=2):
    size = 56 if "Vision" not in type(model).__name__ and type(model).__name__ != "Beit" else 28
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("top_k, shared", [(1, False), (2, False)])
@pytest.mark.parametrize("name", MODELS)
def test_starts_as_the_dense_model(name, top_k, shared):
    """Copies of one MLP with weights that sum to one are that MLP."""
    dense = build(name).eval()
    moe = upcycle(
        copy.deepcopy(dense),
        MoESpec(layers=2, experts=3, top_k=top_k, router="token", gate="renormalised"),
    )
    assert sum(isinstance(m, MoELayer) for m in moe.modules()) == 2
    assert isinstance(block_mlps(moe)[-1][1], MoELayer)
    assert not isinstance(block_mlps(moe)[0][1], MoELayer)
    x = images(dense)
    torch.testing.assert_close(moe(x), dense(x), rtol=1e-4, atol=1e-5)


def test_image_level_and_shared():
    dense = build().eval()
    x = images(dense)
    image = upcycle(copy.deepcopy(dense), MoESpec(layers=3, experts=4, gate="renormalised"))
    torch.testing.assert_close(image(x), dense(x), rtol=1e-4, atol=1e-5)
    shared = upcycle(
        copy.deepcopy(dense), MoESpec(layers=1, experts=4, gate="renormalised", shared=True)
    )
    mlp, moe = dense.blocks[2].mlp, shared.blocks[2].mlp
    tokens = torch.randn(2, 17, 24)
    torch.testing.assert_close(moe(tokens), 2 * mlp(tokens), rtol=1e-4, atol=1e-5)
    assert moe.shared.fc1.weight is not mlp.fc1.weight


def test_mean_pool_for_models_without_class_token():
    swin = build("swin_tiny_patch4_window7_224")
    with pytest.raises(ValueError, match="has none: ask for the mean token with pool='mean'"):
        upcycle(swin, MoESpec(layers=1, experts=2))
    assert not any(isinstance(m, MoELayer) for m in swin.modules())
    upcycle(swin, MoESpec(layers=1, experts=2, pool="mean"))
    with RoutingTape(swin) as tape:
        swin(images(swin))
    assert tape.routings()[0].per_image and tape.routings()[0].probs.shape == (2, 2)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("resnet18", {}, r"ResNet has no block MLP: a timm ViT"),
        ("mixer_s32_224", {}, r"no block MLP called .mlp; name .* modules=, .*blocks.0.mlp_tokens"),
        ("pvt_v2_b0", {}, r"MlpWithDepthwiseConv\) takes x, feat_size, and an expert gets tokens"),
    ],
)
def test_refused_by_name(name, options, message):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    with pytest.raises(ValueError, match=message):
        upcycle(model, MoESpec(layers=1, experts=2, router="token"))
    assert not any(isinstance(m, MoELayer) for m in model.modules())


def test_refuses_depth_and_a_second_time():
    model = build()
    with pytest.raises(
        ValueError,
        match="layers=4 is beyond the depth: VisionTransformer has 3 blocks, valid is 1 to 3",
    ):
        upcycle(model, MoESpec(layers=4))
    upcycle(model, MoESpec(layers=1, experts=2))
    with pytest.raises(ValueError, match="blocks.2.mlp is an MoE layer already"):
        upcycle(model, MoESpec(layers=2, experts=2))
    assert not isinstance(model.blocks[1].mlp, MoELayer)


def test_pooling_head_is_no_block():
    model = timm.create_model(
        "vit_base_patch16_siglip_224", img_size=32, embed_dim=24, depth=2, num_heads=2
    )
    assert [name for name, _ in block_mlps(model)] == ["blocks.0.mlp", "blocks.1.mlp"]
    head = model.attn_pool.mlp
    upcycle(model, MoESpec(layers=2, experts=2, router="token"))
    assert model.attn_pool.mlp is head


def test_generator_decides_and_the_global_one_is_left_alone():
    spec = MoESpec(layers=2, experts=4)
    state = torch.get_rng_state()
    first, again, other = (
        upcycle(build(), spec, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    torch.set_rng_state(state)
    model = build()
    state = torch.get_rng_state()
    upcycle(model, spec, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.blocks[2].mlp.router.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_bias_free_mlp_and_dtype():
    mlp = timm.layers.Mlp(6, 8, bias=False).bfloat16()
    experts = Experts.copies(mlp, 3)
    assert experts.fc1.weight.dtype == torch.bfloat16 and experts.fc1.bias.dtype == torch.bfloat16
    assert not experts.fc2.bias.any() and torch.equal(experts.fc2.weight[2], mlp.fc2.weight)


# ---- parameter groups


def test_stacked_biases_have_no_weight_decay():
    model = upcycle(build(), MoESpec(layers=1, experts=4, shared=True))
    name = {id(p): n for n, p in model.named_parameters()}
    trainer = optimiser(model, TrainSpec(weight_decay=0.3, layer_decay=0.5))
    # Without layer decay timm goes by the name .bias; with it, by the number of axes, unless names
    # are given.
    for groups in (
        param_groups_weight_decay(model, 0.3),
        create_optimizer_v2(model, "adamw", 1e-3, 0.3).param_groups,
        trainer.param_groups,
    ):
        decay = {name[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
        assert decay["blocks.2.mlp.experts.fc1.bias"] == decay["blocks.2.mlp.experts.fc2.bias"] == 0
        assert (
            decay["blocks.2.mlp.experts.fc1.weight"] == decay["blocks.2.mlp.router.weight"] == 0.3
        )
        assert decay.keys() == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("kind", ["vit_tiny_patch16_224", "beit_base_patch16_224", "convnext_atto"])
def test_moe_parameters_get_the_scale_of_their_block(kind):
    model = upcycle(build(kind), MoESpec(layers=2, experts=2, router="token", shared=True))
    name = {id(p): n for n, p in model.named_parameters()}
    scale = {
        name[id(p)]: g["lr_scale"]
        for g in param_groups_layer_decay(model, layer_decay=0.5)
        for p in g["params"]
    }
    for mlp, _ in block_mlps(model)[-2:]:
        block = mlp.rpartition(".")[0]
        inside = {v for n, v in scale.items() if n.startswith(f"{block}.")}
        assert len(inside) == 1 and any(n.startswith(f"{mlp}.router") for n in scale)
    if kind == "vit_tiny_patch16_224":
        assert scale["blocks.2.mlp.experts.fc1.weight"] == 0.5
        assert scale["blocks.1.mlp.router.weight"] == 0.25


# ---- the tape


def test_no_tape_keeps_nothing():
    model = upcycle(build(), MoESpec(layers=2, experts=2))
    before = [dict(vars(m)) for m in model.modules() if isinstance(m, MoELayer)]
    model(images(model))
    assert [dict(vars(m)) for m in model.modules() if isinstance(m, MoELayer)] == before
    assert all(m.tape is None for m in model.modules() if isinstance(m, MoELayer))


def test_order_is_shallow_to_deep():
    model = upcycle(build(), MoESpec(layers=3, experts=2))
    with RoutingTape(model) as tape:
        model(images(model))
    assert [name for name, _ in tape] == [f"blocks.{i}.mlp" for i in range(3)]
    assert tape.routings()[0] is next(iter(tape))[1]


def test_nested_tapes_are_refused_and_leave_nothing():
    model = upcycle(build(), MoESpec(layers=3, experts=2))
    with RoutingTape(model.blocks[2]) as outer:
        with pytest.raises(
            RuntimeError, match="blocks.2.mlp already writes to an open RoutingTape"
        ):
            with RoutingTape(model):
                pass
        assert model.blocks[0].mlp.tape is None and model.blocks[2].mlp.tape is outer
    with RoutingTape(model):
        pass
    with pytest.raises(ZeroDivisionError), RoutingTape(model):
        _ = 1 / 0
    assert all(b.mlp.tape is None for b in model.blocks)


def balance_gradients(model, inside, wrap=lambda m: m):
    """Gradients of a loss that uses logits and routing."""
    model.zero_grad()
    run = wrap(model)
    with RoutingTape(model) as tape:
        loss = run(images(model)).square().mean()
        loss = loss + sum((r.probs.square().sum() for r in tape.routings()), start=torch.zeros(()))
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("inside", [True, False], ids=["backward in the tape", "backward after it"])
def test_gradient_checkpointing(inside):
    model = upcycle(build(), MoESpec(layers=2, experts=3, shared=True)).train()
    plain = balance_gradients(model, inside)
    model.set_grad_checkpointing(True)
    for a, b in zip(balance_gradients(model, inside), plain, strict=True):
        torch.testing.assert_close(a, b)


def test_compiled():
    """Dynamo breaks the graph at the data-dependent split, runs on, and a new tape each step does
    not recompile."""
    model = upcycle(build(depth=2), MoESpec(layers=1, experts=3, shared=True)).train()
    plain = balance_gradients(model, True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=frames)
    for a, b in zip(balance_gradients(model, True, lambda _: compiled), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    balance_gradients(model, True, lambda _: compiled)
    after_two = frames.frame_count
    for _ in range(3):
        balance_gradients(model, True, lambda _: compiled)
    assert 0 < frames.frame_count == after_two
    reasons = torch._dynamo.utils.counters["graph_break"]
    assert not any("tape" in reason.lower() for reason in reasons)
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(images(model)), model(images(model)), rtol=1e-4, atol=1e-5
        )
    torch._dynamo.reset()


def test_ddp(tmp_path):
    """Every expert has a gradient on every process: DDP needs no search for unused parameters."""
    model = upcycle(build(), MoESpec(layers=2, experts=4, shared=True)).train()
    plain = balance_gradients(model, True)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        for _ in range(2):  # a second step fails if a parameter got no gradient in the first
            for a, b in zip(balance_gradients(model, True, lambda _: wrapped), plain, strict=True):
                torch.testing.assert_close(a, b)
        with RoutingTape(wrapped) as tape:
            wrapped(images(model))
        assert [name for name, _ in tape] == ["module.blocks.1.mlp", "module.blocks.2.mlp"]
    finally:
        dist.destroy_process_group()


# ---- which blocks, and copies that differ


def test_named_blocks():
    model = upcycle(
        timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32),
        MoESpec(layers=2, blocks=(1, 3), experts=2),
    )
    assert [isinstance(block.mlp, MoELayer) for block in model.blocks] == [True, False, True, False]
    with pytest.raises(ValueError, match=r"blocks=\(1, 5\) goes beyond the depth.*1 to 4"):
        upcycle(
            timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32),
            MoESpec(layers=2, blocks=(1, 5), experts=2),
        )


def test_copy_noise_is_relative_to_each_weight_and_leaves_biases():
    mlp = timm.layers.Mlp(64, 256)
    with torch.no_grad():
        mlp.fc2.weight.mul_(10.0)
    spec = MoESpec(experts=3, copy_noise=0.5)
    experts, again = (
        moe_layer(mlp, spec, torch.Generator().manual_seed(1)).experts for _ in range(2)
    )
    for stack, linear in ((experts.fc1, mlp.fc1), (experts.fc2, mlp.fc2)):
        moved = stack.weight - linear.weight
        for expert in moved:
            assert (expert.std() / linear.weight.std()).item() == pytest.approx(0.5, rel=0.05)
        assert not torch.allclose(moved[0], moved[1])
        assert torch.equal(stack.bias, linear.bias.expand_as(stack.bias))
    for a, b in zip(experts.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
