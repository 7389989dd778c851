"""Costs of any model: against torch's counter, and of modules that no one foresaw, by hand."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lib.measure.cost import count
from lib.models.experts import Experts
from lib.models.moe import MoELayer
from lib.models.upcycle import upcycle
from lib.spec import MoESpec

# as small as they can be built; one of each kind of attention, norm, head, gate and position
SMALL = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 1},
    "vit_small_patch14_reg4_dinov2": {"img_size": 28, "depth": 1},
    "vit_small_plus_patch16_dinov3": {"img_size": 32, "depth": 1},
    "eva02_tiny_patch14_224": {"img_size": 28, "depth": 1},
    "beit_base_patch16_224": {"img_size": 32, "depth": 1},
    "vit_base_patch16_siglip_224": {"img_size": 32, "depth": 1},
    "cait_xxs24_224": {"img_size": 32, "depth": 1},
    "mixer_s32_224": {"img_size": 64},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 2, "depths": (1, 1)},
    "hiera_tiny_224": {"img_size": (64, 64)},
    "convnextv2_atto": {"depths": (1, 1, 1, 1)},
    "caformer_s18": {},
    "xcit_nano_12_p8_224": {"img_size": 32, "depth": 1},
    "maxvit_nano_rw_256": {"img_size": 64},
    "resnet18": {},
    "resnetv2_50": {},  # weights of its convolutions are standardised as it runs
    "pit_ti_224": {"img_size": 64},
    "levit_128s": {"img_size": 64},
    "mobilevitv2_050": {},
    "sequencer2d_s": {"layers": (1, 1, 1, 1), "img_size": 64},  # LSTMs
}


@pytest.mark.parametrize("name", SMALL)
def test_every_product_that_torch_counts_is_booked(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10, **SMALL[name]).eval().requires_grad_(False)
    size = SMALL[name].get("img_size", 64)
    side = size if isinstance(size, int) else size[0]
    got = count(model, size)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as reference:
        model(torch.empty(1, 3, side, side, device="meta"))
    assert 2 * got.macs == reference.get_total_flops() > 0
    assert got.params_stored == got.params_active == sum(p.numel() for p in model.parameters())


def macs_of(cost):
    """{(module, kind): macs} of the rows that multiply."""
    return {(row.module, row.kind): row.macs for row in cost.rows if row.macs}


class Unforeseen(nn.Module):
    """Parameters and products of its own: B images of 4 x 6 pixels, 5 tokens of width 8."""

    def __init__(self):
        super().__init__()
        self.position = nn.Parameter(torch.zeros(5, 8))  # only added
        self.weight = nn.Parameter(torch.randn(24, 40))  # multiplied outside of any layer
        self.experts = nn.Parameter(torch.randn(5, 8, 3))  # a matrix a token
        self.vector = nn.Parameter(torch.randn(3))
        self.norm = nn.BatchNorm1d(5)
        self.mixing = nn.Conv1d(5, 5, 3, padding=1)

    def forward(self, x):
        tokens = (x.flatten(1) @ self.weight).unflatten(1, (5, 8)) + self.position
        tokens = self.mixing(self.norm(tokens))
        similar = torch.einsum("bnd,bmd->bnm", tokens, tokens)
        out = torch.einsum("bnd,ndk->bnk", similar @ tokens, self.experts)
        return out @ self.vector


def test_own_parameters_and_products_by_hand():
    model = Unforeseen()
    got = count(model, example=torch.randn(2, 1, 4, 6))
    assert got.images == 2
    assert macs_of(got) == {
        ("", "linear"): 2 * (24 * 40 + 5 * 8 * 3 + 5 * 3),
        ("", "attention"): 2 * 2 * 5 * 5 * 8,  # two products of tokens with tokens
        ("mixing", "conv"): 2 * 8 * 5 * 5 * 3,
    }
    other = [row for row in got.rows if row.kind == "other"]
    assert [(row.module, row.stored, row.active, row.macs) for row in other] == [
        ("norm", 10, 10, 0)
    ]
    assert got.params_stored == sum(p.numel() for p in model.parameters())


def test_a_weight_that_is_computed_belongs_to_the_module_that_runs_it():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)))
    got = count(model, example=torch.randn(3, 8))
    assert sum(row.macs for row in got.rows) == got.by_kind()["linear"] == 3 * 8 * 4


def test_shared_parameters_are_stored_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    got = count(model, example=torch.randn(1, 8))
    assert (got.params_stored, got.macs) == (64, 2 * 64)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), depth=1)
        self.head = nn.Linear(1000 + 2, 3)

    def forward(self, pixels, place):
        return self.head(torch.cat([self.trunk(pixels), place], dim=1))


def test_examples_of_every_form_count_alike():
    model = TwoInputs()
    pixels, place = torch.randn(2, 3, 32, 48), torch.randn(2, 2)
    by_name = count(model, example={"pixels": pixels, "place": place})
    assert by_name.macs == count(model, example=(pixels, place)).macs
    trunk = count(model.trunk, (32, 48), images=2)
    assert trunk.macs == count(model.trunk, example=pixels).macs
    assert by_name.macs == trunk.macs + 2 * 1002 * 3
    assert by_name.images == trunk.images == 2


class NeedsData(nn.Module):
    """Looks at its numbers, which the meta device has none of."""

    def __init__(self):
        super().__init__()
        self.often, self.rarely = nn.Linear(12, 5), nn.Linear(5, 5)

    def forward(self, x):
        y = self.often(x.flatten(1))
        return y if torch.isfinite(y).all().item() else self.rarely(y)


@pytest.mark.parametrize("given", [{"image_size": 2}, {"example": torch.ones(1, 3, 2, 2)}])
def test_a_model_that_needs_data_is_run_on_a_copy(given):
    model = NeedsData()
    before = copy.deepcopy(model.state_dict())
    got = count(model, **given)
    assert (got.macs, got.params_stored) == (60, 60 + 5 + 25 + 5)
    assert model.training and not model.often._forward_hooks
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_half_precision_and_inference_mode():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    whole = count(model, 32)
    with torch.inference_mode():
        assert count(model, 32) == whole
    assert count(model.bfloat16(), 32) == whole


@pytest.mark.parametrize(
    "given, message",
    [
        ({}, "image_size=None and example=None: give one"),
        ({"image_size": 32, "example": torch.ones(1, 3, 32, 32)}, "give one of them"),
        ({"example": {"size": 3}}, "example=dict with images=1: its first tensor"),
        ({"example": torch.ones(1, 3, 32, 32), "images": 4}, "leave images out"),
        ({"image_size": 48}, "VisionTransformer does not run on image_size=48: "),
        ({"example": torch.ones(1, 3, 48, 48)}, "does not run on this example: "),
    ],
)
def test_inputs_that_a_model_cannot_take_are_named(given, message):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(ValueError, match=message):
        count(model, **given)


def test_activations_with_parameters_are_other():
    """PReLU: one number in the experts, which share it, and one in the shared expert."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, act_layer=nn.PReLU)
    dense = count(model, 32)
    got = count(upcycle(model, MoESpec(experts=2, shared=True)), 32)
    assert got.params_stored == sum(p.numel() for p in model.parameters())
    stored = {row.module: row.stored for row in got.rows if row.kind == "other"}
    assert (stored["blocks.0.mlp"], stored["blocks.0.mlp.shared.act"]) == (1, 1)
    mlp = 2 * 192 * 768 + 768 + 192
    # the router, and an expert and its activation beside the shared one
    assert got.params_active == dense.params_active + 2 * 192 + mlp + 1
    assert got.macs == dense.macs + 2 * 192 + 5 * 2 * 192 * 768


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.value, self.out = nn.Linear(192, 64), nn.Linear(192, 64), nn.Linear(64, 192)
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        return self.out(self.norm(self.gate(x).sigmoid() * self.value(x)))


class Copies(nn.Module):
    """Experts that are no stacks: E modules of any kind. token_wise: see each token alone."""

    def __init__(self, experts, token_wise):
        super().__init__()
        self.copies = nn.ModuleList(Gated() for _ in range(experts))
        self.experts, self.width, self.token_wise = experts, 192, token_wise


@pytest.mark.parametrize(
    "token_wise, touched, experts_of_a_token",
    [(True, 3.5, 2), (True, None, 2), (False, 3.5, 3.5), (False, None, 4)],
)
def test_experts_and_shared_experts_of_any_kind(token_wise, touched, experts_of_a_token):
    """Those that see whole images compute all tokens of each image that has one for them; without
    a measurement every image may."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    dense = count(model, 32)
    upcycle(model, MoESpec(experts=4, router="token", top_k=2))
    layer = model.blocks[0].mlp
    model.blocks[0].mlp = MoELayer(layer.router, Copies(4, token_wise), Gated())
    got = count(model, 32, experts_per_image=touched and touched + 1)
    assert got.params_stored == sum(p.numel() for p in model.parameters())
    matrices, vectors = 3 * 192 * 64, 64 + 64 + 192 + 2 * 64
    mlp, router = 2 * 192 * 768, 4 * 192
    assert got.macs == dense.macs + 5 * (router + (experts_of_a_token + 1) * matrices - mlp)
    if touched:
        expected = dense.params_active - (mlp + 768 + 192) + router + 4.5 * (matrices + vectors)
        assert got.params_active == expected


class GatedExperts(Experts):
    rows_of_neuron = 2


def test_gated_experts_have_two_rows_a_neuron():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    upcycle(model, MoESpec(experts=2, router="token"))
    plain = count(model, 32, experts_per_image=1.5)
    experts = model.blocks[0].mlp.experts = GatedExperts(2, 192, 768)
    experts.fc1.weight = nn.Parameter(torch.zeros(2, 2 * 768, 192))
    experts.fc1.bias = nn.Parameter(torch.zeros(2, 2 * 768))
    got = count(model, 32, experts_per_image=1.5)
    assert got.macs == plain.macs + 5 * 192 * 768
    assert got.params_stored == plain.params_stored + 2 * (192 * 768 + 768)
    assert got.params_active == plain.params_active + 1.5 * (192 * 768 + 768)
