"""Every kind of MLP that timm's models have: upcycled it computes what the dense model does, pruned
what a masked one does, and extracted with all neurons what it did, or it is refused by name."""

import copy
import warnings

import pytest
import timm
import torch
from small_models import OWN, SMALL, VIT, assert_same, images_for, modules_of, small
from timm.layers import ConvMlp, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import nn

from lib.extraction.calibrate import AtOnce
from lib.extraction.layer import extract_layer
from lib.extraction.record import mlps_of
from lib.extraction.saved import layer_like
from lib.models.copies import WholeCopies
from lib.models.experts import Experts
from lib.models.mlps import layer_scale_of, maps_of, why_not_copied
from lib.models.moe import MoELayer, RoutingTape
from lib.models.upcycle import block_mlps, chosen_mlps, upcycle
from lib.pruning.experts.dropping import drop_experts
from lib.pruning.neurons.groups import prunable
from lib.pruning.neurons.masks import mask_weights
from lib.pruning.neurons.removal import fit_shapes, remove
from lib.pruning.neurons.scores import expert_scores, keep_indices, neuron_scores
from lib.routers.top_k import TopKRouter
from lib.spec import ExtractSpec, MoESpec

# {name: what its MLPs are refused with where neurons are taken apart}
REFUSED = {
    "eva02_base_patch14_224": "norm inside the MLP",
    "convnextv2_atto": r"\(GlobalResponseNormMlp\) is no MLP whose hidden neurons are known",
    "efficientformerv2_s0": r"\(ConvMlpWithNorm\) is no MLP whose hidden neurons are known",
}


def masked(model, keep):
    """A copy whose removed neurons have columns of zeros."""
    twin = copy.deepcopy(model)
    for name, neurons in keep.items():
        weight = maps_of(twin.get_submodule(name)).last_map.weight
        gone = torch.ones(weight.shape[1], dtype=torch.bool)
        gone[neurons] = False
        weight.data[:, gone] = 0.0
    return twin


def extracted(model, images, rules, modules=None):
    """Replaces the MLPs of a model, in place; returns the names of those that are mixtures."""
    sampling, mixtures = {"per_image": 50, "limit": 400, "seed": 0}, []
    source = AtOnce(model, [images], rules, sampling, modules=modules)
    for name, mlp in source.mlps.items():
        calibration, active = source.of_layer(name), source.active_neurons[name]
        layer, _ = extract_layer(mlp, calibration, rules, active, seed=0)
        loaded = layer_like(mlp, layer.state_dict(), rules)
        loaded.load_state_dict(layer.state_dict())
        model.set_submodule(name, loaded.eval())
        mixtures += [name] if isinstance(layer, MoELayer) else []
    return mixtures


ALL_NEURONS = ExtractSpec(
    neurons={"active": 1.0}, clusters={"method": "kmeans", "count": 2, "sample": 400}
)


@pytest.mark.parametrize("name", [*SMALL, OWN])
def test_upcycled_it_computes_what_the_dense_model_does(name):
    dense, x = small(name), images_for(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # whole copies: tested below
        moe = upcycle(
            copy.deepcopy(dense),
            modules=modules_of(name),
            experts=3,
            top_k=2,
            router="token",
            layers=len(chosen_mlps(dense, modules_of(name))),
        )
    assert not any(module.training for module in moe.modules())
    with torch.no_grad(), RoutingTape(moe) as tape:
        assert_same(moe(x), dense(x))
    assert len(tape.routings()) == len(chosen_mlps(dense, modules_of(name)))


@pytest.mark.parametrize("name", [*SMALL, OWN])
def test_pruned_it_computes_what_a_masked_one_does(name):
    model, x = small(name), images_for(name)
    batch = [(x, torch.arange(4))]
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            prunable(model, ("mlp",))
        return
    scores = neuron_scores(model, batch, parts=("mlp",), modules=modules_of(name))
    keep = {key: keep_indices(score, 0.5) for key, score in scores.items()}
    pruned = remove(copy.deepcopy(model), keep)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        assert_same(pruned(x), masked(model, keep)(x))
    again = fit_shapes(copy.deepcopy(model), pruned.state_dict())
    again.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x))


@pytest.mark.parametrize("name", [*SMALL, OWN])
def test_extracted_with_all_neurons_it_computes_what_it_did(name):
    model, x = small(name), images_for(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            mlps_of(model)
        return
    with torch.no_grad():
        expected = model(x)
        assert extracted(model, x, ALL_NEURONS, modules_of(name))
        assert_same(model(x), expected)


def test_mlps_of_other_names_are_asked_for_by_name():
    mixer = small("mixer_s32_224")
    with pytest.raises(ValueError, match="no block MLP called .mlp; name .* with modules="):
        mlps_of(mixer)
    with pytest.raises(ValueError, match="MlpMixer has no mlp to prune: .* given by modules="):
        prunable(mixer, ("mlp",))


# ---- one MLP

D, H = 6, 8
KINDS = {
    "mlp": lambda: Mlp(D, H),
    "mlp of convolutions": lambda: Mlp(D, H, use_conv=True),
    "convmlp": lambda: ConvMlp(D, H),
    "glu, gate last": lambda: GluMlp(D, 2 * H),
    "swiglu, packed": lambda: SwiGLUPacked(D, 2 * H),
    "swiglu without biases": lambda: SwiGLU(D, H, bias=False),
    "swiglu": lambda: SwiGLU(D, H),
    "glu of convolutions": lambda: GluMlp(D, 2 * H, use_conv=True),
}


def one(kind, seed=0):
    torch.manual_seed(seed)
    mlp = KINDS[kind]().eval()
    x = torch.randn(3, D, 4, 4) if maps_of(mlp).channels_first else torch.randn(3, 16, D)
    return mlp, x


@pytest.mark.parametrize("kind", KINDS)
def test_maps_read_what_the_mlp_computes(kind):
    mlp, x = one(kind)
    maps = maps_of(mlp)
    assert (maps.width, maps.hidden, maps.outputs) == (D, H, D)
    w1, b1, w2, b2 = maps.weights()
    rows = maps.tokens_last(x).reshape(-1, D) @ w1.t()
    out = maps.act(rows if b1 is None else rows + b1) @ w2.t()
    out = out if b2 is None else out + b2
    torch.testing.assert_close(out, maps.tokens_last(mlp(x)).reshape(-1, D))
    # weights handed back, of the same neurons in another order
    order = torch.randperm(H)
    tensors = maps.tensors_of_neurons()
    assert all(tensor.shape[0] == H for tensor in tensors)
    same = maps.with_weights(maps.weights())
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), mlp.parameters(), strict=True))
    kept = copy.deepcopy(mlp)
    maps_of(kept).keep(order.sort().values)
    assert torch.equal(kept(x), mlp(x))


@pytest.mark.parametrize("kind", KINDS)
def test_masked_weights_are_zero_in_the_model(kind):
    mlp, _ = one(kind)
    for _, matrix in maps_of(mlp).matrices():
        matrix.zero_()
    assert not any(p.any() for name, p in mlp.named_parameters() if name.endswith("weight"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["swiglu, packed", "swiglu", "glu, gate last"])
def test_gated_experts_of_unequal_width_run_as_masked_ones(kind, dtype):
    mlp, _ = one(kind)
    experts = Experts.copies(mlp, 2).to(dtype)
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].mlp = MoELayer(one_router(), experts)
    whole = copy.deepcopy(experts)
    for expert, gone in zip(whole.each(), (3, 5), strict=True):
        expert[2].data[:, gone:] = 0.0
    remove(
        model,
        {f"blocks.0.mlp.experts.{e}": torch.arange(gone) for e, gone in enumerate((3, 5))},
    )
    narrow = model.blocks[0].mlp.experts
    assert narrow.widths == (3, 5) and narrow.fc1.weight.shape == (16, D)
    x = torch.randn(20, D).to(dtype)
    routing = MoELayer(one_router(), whole).decide(x.unsqueeze(0).float())
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    with torch.no_grad():
        torch.testing.assert_close(narrow(x, routing), whole(x, routing), **tolerance)
    torch.testing.assert_close(narrow(x, routing), whole(x, routing), **tolerance)


def one_router():
    return TopKRouter(D, 2, 1, generator=torch.Generator().manual_seed(0))


def test_gated_experts_are_pruned_masked_and_dropped():
    model, x = small("eva02_tiny_patch14_224"), images_for("eva02_tiny_patch14_224")
    upcycle(model, MoESpec(layers=1, experts=3, router="token", shared=True))
    batch = [(x, torch.arange(4))]
    scores = expert_scores(model, [batch] * 3)
    pruned = remove(
        copy.deepcopy(model), {key: keep_indices(score, 0.5) for key, score in scores.items()}
    )
    assert pruned.blocks[1].mlp.experts.widths == (pruned.blocks[0].mlp.fc2.in_features // 2,) * 3
    again = fit_shapes(copy.deepcopy(model), pruned.state_dict())
    again.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), pruned(x)) and not torch.equal(pruned(x), model(x))
    masks = mask_weights(copy.deepcopy(model), batch, 0.5, parts=("mlp", "experts"))
    assert masks["blocks.1.mlp.experts.0.fc1"].shape[0] == 2 * model.blocks[0].mlp.fc2.in_features
    dropped = drop_experts(copy.deepcopy(model), {"blocks.1.mlp": [0, 2]}, "reroute")
    assert dropped.blocks[1].mlp.experts.experts == 2 and dropped(x).isfinite().all()


@pytest.mark.parametrize("rules", ["copies", "inputs", "shared", "static"])
@pytest.mark.parametrize(
    "name", ["vit_small_plus_patch16_dinov3", "eva02_tiny_patch14_224", "convnext_atto"]
)
def test_every_storage_of_gated_and_convolutional_mlps(name, rules):
    """The same neurons give the same outputs, whichever way their weights are stored."""
    model, x = small(name), images_for(name)
    fields = {"neurons": {"active": 0.5}, "correction": {"method": "ridge"}}
    if rules == "static":
        fields["clusters"] = {"of": "nothing"}
    else:
        fields["clusters"] = {"method": "kmeans", "count": 2, "sample": 400}
        fields["storage"] = rules
        fields["neurons"] = {"active": 0.5, "common": 0.2}
    if rules == "shared":
        fields["correction"] = {"method": "mean"}
    with torch.no_grad():
        plain, stored = copy.deepcopy(model), copy.deepcopy(model)
        names = extracted(stored, x, ExtractSpec(**fields))
        extracted(plain, x, ExtractSpec(**fields | {"storage": "copies"}))
        assert_same(stored(x), plain(x))
    assert bool(names) is (rules != "static")


# ---- whole copies


@pytest.mark.parametrize("name", ["eva02_base_patch14_224", "convnextv2_atto"])
def test_whole_copies_run_by_assignment_and_say_so(name):
    dense, x = small(name), images_for(name)
    with pytest.warns(UserWarning, match="whole copies, which is slow"):
        model = upcycle(copy.deepcopy(dense), experts=2, router="token")
    layer_name, layer = [(n, m) for n, m in model.named_modules() if isinstance(m, MoELayer)][0]
    assert isinstance(layer.experts, WholeCopies)
    # each copy gives another multiple of what the MLP gives, so that the choice shows
    for e, mlp in enumerate(layer.experts.copies):
        for parameter in list(mlp.fc2.parameters()):
            parameter.data *= e + 1
    seen = {}
    dense.get_submodule(layer_name).register_forward_hook(
        lambda _, args, out: seen.update(input=args[0], output=out)
    )
    with torch.no_grad(), RoutingTape(model) as tape:
        dense(x)
        out = layer(seen["input"])
    first = 1 if layer.channels_first else -1
    factor = (tape[layer].token_choice()[..., 0] + 1).view(
        seen["output"].movedim(first, -1).shape[:-1]
    )
    expected = seen["output"].movedim(first, -1) * factor.unsqueeze(-1)
    torch.testing.assert_close(out.movedim(first, -1), expected, rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    assert all(p.grad is not None for p in layer.experts.parameters())
    for fields in ({"copy_noise": 0.1}, {"fresh_experts": True}):
        with pytest.raises(ValueError, match=f"whole copies, which {next(iter(fields))}"):
            upcycle(small(name), experts=2, router="token", **fields)
    with pytest.raises(ValueError, match="whole copies of an MLP as experts"):
        drop_experts(model, {layer_name: [0]}, "reroute")


def test_dropout_inside_is_carried_by_whole_copies():
    model = timm.create_model("vit_small_patch16_224", proj_drop_rate=0.5, **VIT)
    with pytest.warns(UserWarning, match=r"has dropout inside \(p=0.5, 0.5\)"):
        upcycle(model, experts=2, router="token")
    copies = model.blocks[1].mlp.experts.copies
    assert [mlp.drop1.p for mlp in copies] == [0.5, 0.5] and copies[0].training
    x = torch.randn(2, 3, 28, 28)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


# ---- which MLPs, and what is kept


def test_names_choose_mlps():
    mixer = small("mixer_s32_224")
    names = [name for name, _ in chosen_mlps(mixer, ["blocks.*.mlp_*"], ["blocks.0.*"])]
    assert names == ["blocks.1.mlp_tokens", "blocks.1.mlp_channels"]
    upcycle(mixer, modules=["blocks.*.mlp_tokens"], experts=2, router="token")
    assert [isinstance(block.mlp_tokens, MoELayer) for block in mixer.blocks] == [True, True]
    vit = small("vit_small_patch16_224")
    assert [name for name, _ in chosen_mlps(vit, ignore=["blocks.1"])] == ["blocks.0.mlp"]
    assert list(prunable(vit, ("mlp",), ignore=["blocks.1.mlp"])) == ["blocks.0.mlp"]
    for call, says in (
        (
            lambda: chosen_mlps(vit, ["blocks.*.ffn"]),
            "modules: 'blocks.*.ffn' fits none of",
        ),
        (
            lambda: chosen_mlps(vit, ignore=["x"]),
            "ignore: 'x' fits none of the layers blocks.0.mlp,",
        ),
        (lambda: chosen_mlps(vit, ignore=["*"]), r"ignore=\* leaves nothing of blocks.0.mlp"),
        (lambda: upcycle(vit), "takes a MoESpec, or its fields by name"),
        (lambda: upcycle(vit, MoESpec(experts=2), experts=2), "a MoESpec and experts beside it"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_fields_leave_the_function_as_it_was_and_a_spec_says_what_it_does():
    fields, spec = small("vit_small_patch16_224"), small("vit_small_patch16_224")
    upcycle(fields, experts=4)
    upcycle(spec, MoESpec(experts=4))
    x, dense = images_for("vit_small_patch16_224"), small("vit_small_patch16_224")
    with torch.no_grad():
        assert_same(fields(x), dense(x))
        assert (spec(x) - dense(x)).abs().max() > 1e-3


def test_type_and_mode_are_kept():
    for training in (True, False):
        model = small("convnext_atto").to(torch.bfloat16).train(training)
        upcycle(model, experts=2, router="token")
        assert {module.training for module in model.modules()} == {training}
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "name, attribute",
    [
        ("vit_small_patch14_reg4_dinov2", "ls2.gamma"),
        ("beit_base_patch16_224", "gamma_2"),
        ("vit_small_patch16_dinov3", "gamma_2"),
        ("convnext_tiny", "gamma"),
        ("cait_xxs24_224", "gamma_2"),
        ("xcit_nano_12_p16_224", "gamma2"),
        ("swin_tiny_patch4_window7_224", None),
    ],
)
def test_layer_scale_wherever_it_is_called(name, attribute):
    """What the stream gains by an MLP that gives ones is the layer scale."""
    model = small(name)
    mlp_name = block_mlps(model)[0][0]
    block = model.get_submodule(mlp_name.rpartition(".")[0])
    scale = layer_scale_of(model, mlp_name)
    if attribute is None:
        assert torch.equal(scale, torch.ones(1))
        return
    owner, _, parameter = attribute.rpartition(".")
    expected = getattr(block.get_submodule(owner), parameter)
    assert torch.equal(scale, expected.detach()) and len(scale) > 1


def test_an_mlp_that_changes_the_width_has_no_experts():
    assert "maps 6 channels to 4" in why_not_copied(Mlp(6, 8, 4))
    assert "has no linear map" in why_not_copied(nn.GELU())
