"""Models frozen for inference: equal outputs, weights that are never stale, and all else as it
was."""

import copy
import io
import warnings

import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

import lib
from lib.measure.cost import count
from lib.models import packed
from lib.models.experts import Experts
from lib.models.moe import MoELayer
from lib.models.packed import can_pack, is_packed
from lib.models.shared_experts import SharedExperts
from lib.models.upcycle import upcycle
from lib.routers.top_k import TopKRouter
from lib.spec import MoESpec

D, H, E = 16, 24, 4

# Of the largest value. In bfloat16 ten steps of 0.4 %, through a dozen maps one after the other.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.04}
# bfloat16 needs AVX-512; everywhere else there is nothing to freeze, which other tests say
TYPES = [dtype for dtype in TOLERANCE if can_pack(dtype)] or [torch.float32]


@pytest.fixture(autouse=True)
def wide_vectors(monkeypatch):
    """All kinds of modules are packed, whatever this processor gains from it."""
    monkeypatch.setattr(packed, "dense_maps_gain", lambda: True)


def images(dtype=torch.float32, count=2):
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(0)).to(dtype)


def vit(**options):
    torch.manual_seed(0)
    sizes = {"img_size": 28, "patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", **sizes | {"num_classes": 5} | options)
    return model.eval()


def upcycled(**fields):
    model = upcycle(vit(), MoESpec(**{"layers": 2, "experts": 3, "router": "token"} | fields))
    for module in model.modules():
        if isinstance(module, Experts):
            module.perturb(0.5, torch.Generator().manual_seed(1))
    return model.eval()


def with_layer(layer):
    """A model whose second MLP is this MoE layer of width 32."""
    model = vit()
    model.blocks[1].mlp = layer
    return model.eval()


def unequal():
    torch.manual_seed(1)
    return with_layer(MoELayer(TopKRouter(32, 3, 2, std=1.0), Experts(3, 32, (9, 1, 20))))


def shared():
    torch.manual_seed(1)
    fc1, fc2 = nn.Linear(32, 40), nn.Linear(40, 32)
    sets = [torch.arange(0, 20), torch.arange(10, 40, 2), torch.arange(5, 12)]
    store = (fc1.weight, fc1.bias, fc2.weight)
    experts = SharedExperts(store, sets, torch.randn(3, 32), nn.ReLU())
    return with_layer(MoELayer(TopKRouter(32, 3, 1, std=1.0), experts, Mlp(32, 8)))


MODELS = {
    "plain": vit,
    "tanh": lambda: vit(act_layer="gelu_tanh"),
    "gated": lambda: upcycle(vit(mlp_layer=timm.layers.SwiGLU), MoESpec(layers=1, experts=3)),
    "upcycled": upcycled,
    "K = 2": lambda: upcycled(top_k=2, shared=True),
    "per image": lambda: upcycled(router="image"),
    "unequal": unequal,
    "shared store": shared,
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
def test_equal_outputs(make, dtype):
    model = make().to(dtype).eval()
    frozen = lib.freeze_for_inference(model)
    x = images(dtype)
    with torch.inference_mode():
        plain, fast = model(x), frozen(x)
    assert fast.dtype == dtype and torch.isfinite(fast).all()
    assert (fast - plain).abs().max() <= TOLERANCE[dtype] * plain.abs().max()
    assert any(map(is_packed, frozen.modules())) and not any(map(is_packed, model.modules()))


@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("tokens", [0, 1, 5, 700])
def test_experts_with_few_and_many_rows(top_k, tokens):
    torch.manual_seed(0)
    layer = MoELayer(TopKRouter(D, E, top_k, std=1.0), Experts(E, D, H)).eval()
    frozen = lib.freeze_for_inference(layer)
    x = torch.randn(1, tokens, D)
    with torch.no_grad():
        torch.testing.assert_close(frozen(x), layer(x), rtol=1e-5, atol=1e-6)
        layer.router.choice_bias[2] = 10.0  # all first choices on one expert
        frozen.router.choice_bias[2] = 10.0
        torch.testing.assert_close(frozen(x), layer(x), rtol=1e-5, atol=1e-6)


def test_packed_products_run(monkeypatch):
    """Under inference mode, and there alone: gradients, training and tracers get the plain ones."""
    calls = []
    linear = packed._linear
    monkeypatch.setattr(packed, "_linear", lambda *args: calls.append(1) or linear(*args))
    frozen = lib.freeze_for_inference(upcycled())

    def products(run):
        calls.clear()
        run()
        return len(calls)

    with torch.inference_mode():
        ran = products(lambda: frozen(images()))
    # qkv and proj of two blocks, the head, and two products of each expert that has rows
    assert 5 < ran <= 5 + 2 * 2 * 3
    assert not products(lambda: frozen(images()).sum().backward())
    frozen.train()
    with torch.no_grad():
        assert not products(lambda: frozen(images()))
        frozen.eval()
        assert products(lambda: frozen(images())) == ran
        torch._dynamo.reset()
        compiled = torch.compile(frozen, backend="eager")
        assert not products(lambda: compiled(images()))
        torch.testing.assert_close(compiled(images()), frozen(images()), rtol=1e-4, atol=1e-5)
        torch._dynamo.reset()


@pytest.mark.parametrize("layers", [0, 1])
@pytest.mark.parametrize("options", [{"scale_mlp_norm": True}, {}])
def test_a_norm_between_the_maps_of_an_mlp_is_not_left_out(layers, options):
    model = vit(**options)
    for block in model.blocks:
        if options:
            assert isinstance(block.mlp.norm, nn.LayerNorm)
            nn.init.normal_(block.mlp.norm.weight)
    if layers:
        model = upcycle(model, MoESpec(layers=1, experts=2, router="token")).eval()
    frozen = lib.freeze_for_inference(model)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(images()), model(images()), rtol=1e-5, atol=1e-5)
    # one that is put in later is seen, too
    frozen.blocks[0].mlp.norm = model.blocks[0].mlp.norm = nn.LayerNorm(128)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(images()), model(images()), rtol=1e-5, atol=1e-5)


def test_hooks_on_parts_of_an_mlp_are_heard():
    frozen = lib.freeze_for_inference(vit())
    heard = []
    frozen.blocks[0].mlp.act.register_forward_hook(lambda *args: heard.append(args[2].shape))
    with torch.inference_mode():
        frozen(images())
    assert len(heard) == 1


def test_hooks_on_the_activation_of_experts_are_heard():
    frozen = lib.freeze_for_inference(upcycled())
    heard, act = [], frozen.blocks[0].mlp.experts.act
    handle = act.register_forward_pre_hook(lambda *args: heard.append(1))
    with torch.inference_mode():
        frozen(images())
        assert heard
        handle.remove()
        heard.clear()
        every = nn.modules.module.register_module_forward_hook(
            lambda module, *rest: heard.append(1) if module is act else None
        )
        try:
            frozen(images())
        finally:
            every.remove()
    assert heard


def test_dropout_that_is_switched_on_is_not_left_out():
    """As in Monte Carlo dropout: the model in evaluation mode, its dropout in training mode."""
    frozen = lib.freeze_for_inference(vit(proj_drop_rate=0.5))
    mlp, x = frozen.blocks[0].mlp, torch.randn(4, 17, 32)
    with torch.inference_mode():
        expected = mlp(x)
        for name in ("drop1", "drop2"):
            part = getattr(mlp, name).train()
            assert not torch.allclose(mlp(x), expected, atol=1e-3)
            part.p = 0.0
            torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)
            part.eval()
        mlp.drop1 = nn.AlphaDropout(0.5)  # another kind
        assert not torch.allclose(mlp(x), expected, atol=1e-3)


def test_a_map_of_an_mlp_put_in_another_is_run():
    frozen = lib.freeze_for_inference(vit())
    mlp, x = frozen.blocks[0].mlp, torch.randn(4, 17, 32)
    with torch.inference_mode():
        expected = mlp(x)
        mlp.fc1 = nn.Sequential(mlp.fc1)  # as an adapter around it, without a weight of its own
        torch.testing.assert_close(mlp(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 7), (7,), ()], ids=str)
def test_a_wrong_width_is_refused_in_torchs_own_words(shape):
    plain, x = nn.Linear(8, 4), torch.randn(shape)
    mlp = Mlp(8, 4).eval()
    for module in (plain, mlp):
        frozen = lib.freeze_for_inference(module)
        with torch.no_grad():
            with pytest.raises(RuntimeError) as of_plain:
                module(x)
            with pytest.raises(RuntimeError) as of_frozen:
                frozen(x)
        assert str(of_frozen.value) == str(of_plain.value)
    experts = lib.freeze_for_inference(MoELayer(TopKRouter(8, 2, 1), Experts(2, 8, 4)).eval())
    routing = experts.router(torch.randn(1, 3, 8))
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        experts.experts(torch.randn(3, 7), routing)


@pytest.mark.filterwarnings("ignore:freeze_for_inference left", "ignore:Initializing zero-element")
@pytest.mark.parametrize("sizes", [(8, 0), (0, 8)], ids=str)
def test_a_linear_map_without_numbers_stays_plain(sizes):
    frozen = lib.freeze_for_inference(nn.Linear(*sizes))
    with torch.no_grad():
        assert frozen(torch.randn(3, sizes[0])).shape == (3, sizes[1])
    assert not is_packed(frozen)


def _wide():
    """64 numbers lie 128 apart in the first weight, which is twice the length of its rows."""
    torch.manual_seed(0)
    return Mlp(64, 128).eval()


def _column(weight):
    weight.data[:, 5] += 1.0


def _row(weight):
    weight.data[5] += 1.0


def _masked(weight):
    """All but every second row."""
    weight.data.mul_((torch.arange(len(weight)) % 2).unsqueeze(1))


def _masked_elsewhere(weight):
    weight.data.mul_((torch.arange(len(weight)) % 2 == 0).unsqueeze(1))


def _all_but_a_column(weight):
    weight.data[:, 1:] += 1.0


WRITES = (_masked, _masked_elsewhere, _all_but_a_column)


@pytest.mark.parametrize(
    "is_transposed, write",
    # what runs across the matrix as it lies in memory: transposed, that is a row
    [(False, write) for write in (_column, *WRITES)] + [(True, write) for write in (_row, *WRITES)],
)
def test_writes_through_data_to_columns_and_rows(is_transposed, write):
    model, x = _wide(), torch.randn(4, 64)
    if is_transposed:
        model.fc1.weight = nn.Parameter(model.fc1.weight.detach().t().contiguous().t())
    frozen = lib.freeze_for_inference(model, inplace=True)
    with torch.inference_mode():
        frozen(x)
        write(frozen.fc1.weight)
        torch.testing.assert_close(frozen(x), Mlp.forward(packed.unpack(frozen), x))


def test_frozen_again_it_is_packed_anew():
    """So after a write through `.data` to a number that is not compared."""
    frozen, x = lib.freeze_for_inference(_wide()), torch.randn(4, 64)
    forward = frozen.fc1.forward
    lib.freeze_for_inference(frozen, inplace=True)
    assert frozen.fc1.forward is not forward
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), packed.unpack(frozen)(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [vit, upcycled], ids=["plain", "upcycled"])
def test_weights_made_under_inference_mode(make):
    """Torch counts no changes of them: a copy has its own, in place nothing is packed."""
    with torch.inference_mode():
        model = make()
        frozen = lib.freeze_for_inference(model)
        assert any(map(is_packed, frozen.modules()))
        for each in (model, frozen):
            each.blocks[1].attn.proj.weight[3, 5] += 10.0  # no number that is compared
        torch.testing.assert_close(frozen(images()), model(images()), rtol=1e-4, atol=1e-4)
    with pytest.warns(UserWarning, match=r"made under torch.inference_mode.*inplace=False"):
        assert lib.freeze_for_inference(model, inplace=True) is model
    assert not any(map(is_packed, model.modules()))


def test_weights_put_in_under_inference_mode_run_plain():
    frozen = lib.freeze_for_inference(vit())
    with torch.inference_mode():
        frozen.head.weight = nn.Parameter(torch.ones(5, 32))
        frozen.blocks[0].mlp.fc2 = copy.deepcopy(frozen.blocks[0].mlp.fc2)
        frozen(images())
        frozen.head.weight[:, 7] = 3.0
        frozen.blocks[0].mlp.fc2.weight[2, 3] = 9.0
        torch.testing.assert_close(
            frozen(images()), packed.unpack(copy.deepcopy(frozen))(images()), rtol=1e-4, atol=1e-4
        )


def _step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(images()).square().sum().backward()
    optimizer.step()


@torch.no_grad()
def _in_place(model):
    for parameter in model.parameters():
        parameter.copy_(parameter * 0.5 + 0.1)


def _through_data(model):
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def _exchanged(model):
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach() * 1.5))


def _smaller(model):
    """A state of the same buffers and other parameters."""
    parameters = dict(model.named_parameters())
    return {k: v * (0.7 if k in parameters else 1) for k, v in model.state_dict().items()}


def _loaded(model):
    model.load_state_dict(_smaller(model))


def _assigned(model):
    model.load_state_dict(_smaller(model), assign=True)


def _trained(model):
    model.train()
    _step(model)
    model.eval()


CHANGES = (_step, _in_place, _through_data, _exchanged, _loaded, _assigned, _trained)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [vit, upcycled, unequal], ids=["plain", "upcycled", "unequal"])
def test_a_changed_weight_is_packed_again(make, change):
    model = make()
    frozen = lib.freeze_for_inference(model)
    with torch.inference_mode():
        before = frozen(images())
    change(model)
    change(frozen)
    with torch.inference_mode():
        plain, fast = model(images()), frozen(images())
    assert not torch.allclose(before, fast, atol=1e-3)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_cast_after_freezing(dtype):
    """float64 has no packed products; the model runs all the same."""
    model = upcycled()
    frozen = lib.freeze_for_inference(model).to(dtype)
    model.to(dtype)
    with torch.inference_mode():
        plain, fast = model(images(dtype)), frozen(images(dtype))
    assert fast.dtype == dtype
    assert (fast - plain).abs().max() <= TOLERANCE.get(dtype, 1e-12) * plain.abs().max()


def test_autocast():
    model = upcycled(top_k=2)
    frozen = lib.freeze_for_inference(model)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        plain, fast = model(images()), frozen(images())
    assert fast.dtype == plain.dtype
    assert (fast - plain).abs().max() <= 0.04 * plain.abs().max()


def test_gradients_are_those_of_the_model():
    model = upcycled()
    frozen = lib.freeze_for_inference(model)
    for each in (model, frozen):
        each(images()).square().sum().backward()
    for a, b in zip(frozen.parameters(), model.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_state_copies_and_files_stay_as_they_are(tmp_path):
    model = upcycled()
    frozen = lib.freeze_for_inference(model)
    state = frozen.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [type(m) for m in frozen.modules()] == [type(m) for m in model.modules()]
    twin = copy.deepcopy(frozen)
    _in_place(twin)  # a copy has weights of its own, packed ones too
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    lib.save(frozen, tmp_path / "frozen.safetensors")
    with torch.inference_mode():
        expected = frozen(images())
        assert not torch.allclose(twin(images()), expected, atol=1e-3)
        pickled = torch.load(file, weights_only=False)
        restored = lib.restore(tmp_path / "frozen.safetensors")
        for again in (pickled, restored, copy.deepcopy(frozen)):
            torch.testing.assert_close(again(images()), expected, rtol=1e-4, atol=1e-5)
    assert any(map(is_packed, pickled.modules())) and not any(map(is_packed, restored.modules()))
    assert count(frozen, 28).macs == count(model, 28).macs


def test_in_place_and_back():
    model = upcycled().train()
    assert lib.freeze_for_inference(model, inplace=True) is model and not model.training
    assert lib.freeze_for_inference(model, inplace=True) is model  # once more is no error
    modules = sum(map(is_packed, model.modules()))
    with torch.inference_mode():
        fast = model(images())
        packed.unpack(model)
        assert modules and not any(map(is_packed, model.modules()))
        torch.testing.assert_close(model(images()), fast, rtol=1e-4, atol=1e-5)


def test_extraction_and_pruning_take_a_frozen_model():
    frozen = lib.freeze_for_inference(vit())
    pruned = lib.prune(frozen, None, 0.5, score="magnitude", repair="none")
    plain = lib.prune(vit(), None, 0.5, score="magnitude", repair="none")
    with torch.inference_mode():
        torch.testing.assert_close(pruned(images()), plain(images()), rtol=1e-4, atol=1e-5)


def test_without_packed_products_the_model_runs_as_it_did(monkeypatch):
    monkeypatch.setattr(packed, "can_pack", lambda dtype: False)
    model = upcycled()
    with pytest.warns(UserWarning, match="no packed weights of float32 for this processor"):
        frozen = lib.freeze_for_inference(model)
    with torch.inference_mode():
        assert torch.equal(frozen(images()), model(images()))
    assert not any(map(is_packed, frozen.modules()))


def test_a_private_interface_that_is_gone_is_no_error(monkeypatch):
    def gone(*args):
        raise AttributeError("no such operation")

    monkeypatch.setattr(packed, "_pack", gone)
    can_pack.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            warnings.simplefilter("ignore", ResourceWarning)  # what another test left open
            lib.freeze_for_inference(vit())
        assert "left the VisionTransformer as it was" in str(said[-1].message)
    finally:
        can_pack.cache_clear()


@pytest.mark.parametrize("make", [upcycled, unequal, shared])
def test_without_avx_512_experts_alone_are_packed(monkeypatch, make):
    assert can_pack(torch.float32)  # whose trial applies a GELU, once
    acts = []
    linear = packed._linear
    monkeypatch.setattr(packed, "dense_maps_gain", lambda: False)
    monkeypatch.setattr(packed, "_linear", lambda *args: acts.append(args[3]) or linear(*args))
    model = make()
    frozen = lib.freeze_for_inference(model)
    packed_ones = [module for module in frozen.modules() if is_packed(module)]
    assert packed_ones and all(isinstance(module, Experts) for module in packed_ones)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(images()), model(images()), rtol=1e-4, atol=1e-5)
    # a product's own GELU is the slower one there
    assert ("none", "") in acts and not any(name == "gelu" for name, _ in acts)


@pytest.mark.parametrize("tokens, is_used", [(3 * packed.FEW_ROWS, True), (200, False)])
def test_without_avx_512_many_rows_of_an_expert_run_plain(monkeypatch, tokens, is_used):
    monkeypatch.setattr(packed, "dense_maps_gain", lambda: False)
    calls = []
    run = packed._linear
    monkeypatch.setattr(packed, "_linear", lambda *args: calls.append(1) or run(*args))
    torch.manual_seed(0)
    layer = MoELayer(TopKRouter(D, 3, 1, std=1.0), Experts(3, D, H)).eval()
    frozen, x = lib.freeze_for_inference(layer), torch.randn(1, tokens, D)
    with torch.inference_mode():
        torch.testing.assert_close(frozen(x), layer(x), rtol=1e-5, atol=1e-6)
        assert bool(calls) == is_used
        calls.clear()
        monkeypatch.setattr(packed, "dense_maps_gain", lambda: True)
        frozen(x)  # with wide vectors, any number of rows
    assert calls


def test_without_avx_512_a_model_without_experts_stays_and_says_so(monkeypatch):
    monkeypatch.setattr(packed, "dense_maps_gain", lambda: False)
    with pytest.warns(UserWarning, match="without AVX-512 only experts are faster"):
        frozen = lib.freeze_for_inference(vit())
    assert not any(map(is_packed, frozen.modules()))


def test_nothing_to_pack():
    with pytest.warns(UserWarning, match="no linear map, MLP or experts"):
        lib.freeze_for_inference(nn.Sequential(nn.Conv2d(3, 4, 1)))
