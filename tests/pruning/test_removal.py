"""Removal that changes nothing where nothing was, sizes by formula, and saved shapes that come
back."""

import pytest
import timm
import torch
from safetensors.torch import load, save
from torch import nn
from vits import VIT, A, C, D, H, N, batch, build, moe, prune, refused_unchanged

from lib.measure import cost
from lib.pruning.neurons.groups import prunable
from lib.pruning.neurons.removal import fit_shapes, remove
from lib.pruning.neurons.scores import expert_scores, keep_indices, neuron_scores


def dead(parameters, places):
    with torch.no_grad():
        for held in parameters:
            held[places] = 0.0


def test_unused_neurons_of_an_mlp():
    model, data = build(), batch()
    lost = torch.randperm(H, generator=torch.Generator().manual_seed(1))[: H // 4]
    dead([model.blocks[1].mlp.fc2.weight.t()], lost)
    model.blocks[1].mlp.fc2.weight.requires_grad_(False)
    scores = neuron_scores(model, [data], parts=["mlp"])
    assert not scores["blocks.1.mlp"][lost].any() and scores["blocks.0.mlp"].min() > 0
    before, keep = model(data[0]), keep_indices(scores["blocks.1.mlp"], 0.25)
    assert set(keep.tolist()) == set(range(H)) - set(lost.tolist())
    assert remove(model, {"blocks.1.mlp": keep}) is model
    torch.testing.assert_close(model(data[0]), before, rtol=0, atol=1e-6)
    mlp = model.blocks[1].mlp
    assert (
        mlp.fc1.weight.shape == (72, D)
        and mlp.fc1.bias.shape == (72,)
        and mlp.fc2.weight.shape == (D, 72)
    )
    assert (mlp.fc1.out_features, mlp.fc2.in_features, mlp.fc2.out_features) == (72, 72, D)
    assert all(isinstance(p, nn.Parameter) for p in mlp.parameters())
    assert mlp.fc1.weight.requires_grad and not mlp.fc2.weight.requires_grad
    assert model.blocks[0].mlp.fc1.weight.shape == (H, D)


@pytest.mark.parametrize("counts", [(24, 24, 24), (10, 48, 0)], ids=["equal", "unequal"])
def test_unused_neurons_of_experts(counts):
    model, data = build(moe=moe(top_k=2, gate="renormalised")), batch()
    experts = model.blocks[1].mlp.experts
    for e, count in enumerate(counts):
        dead(
            [experts.fc2.weight[e].t()],
            torch.randperm(H, generator=torch.Generator().manual_seed(e))[:count],
        )
    experts.fc1.bias.requires_grad_(False)
    scores, before = expert_scores(model, [[data]] * 3), model(data[0])
    keep = {
        name: keep_indices(score, count / H)
        for (name, score), count in zip(scores.items(), counts, strict=True)
    }
    remove(model, {name: index for name, index in keep.items() if index.numel() < H})
    torch.testing.assert_close(model(data[0]), before, rtol=0, atol=1e-6)
    cut = model.blocks[1].mlp.experts
    assert cut.widths == tuple(H - count for count in counts) and not cut.training
    assert cut.fc1.weight.shape == ((3, 72, D) if len(set(counts)) == 1 else (86 + 48 + 96, D))
    assert not cut.fc1.bias.requires_grad and cut.fc1.weight.requires_grad
    # unequal ones may become equal
    again = {f"blocks.1.mlp.experts.{e}": torch.arange(40) for e in range(3)}
    assert remove(model, again).blocks[1].mlp.experts.fc2.weight.shape == (3, D, 40)
    model(data[0])


@pytest.mark.parametrize("fused, scale", [(True, C**-0.5), (False, C**-0.5), (False, 0.7)])
@pytest.mark.parametrize("bias", [True, False])
def test_unused_dimensions_of_attention(fused, scale, bias):
    model, data = build(qkv_bias=bias), batch()
    attn = model.blocks[0].attn
    order = torch.stack(
        [torch.randperm(C, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    )
    attn.fused_attn, attn.scale = fused, scale
    for part in range(3):
        lost = order[2 * (part == 2) :][:A, :3] + torch.arange(A).unsqueeze(1) * C + part * A * C
        dead([attn.qkv.weight] + [attn.qkv.bias] * bias, lost.flatten())
    scores = neuron_scores(model, [data], parts=["attention"])
    keep = {
        name: keep_indices(scores[name], 0.25) for name in ("blocks.0.attn.qk", "blocks.0.attn.vo")
    }
    for half, lost in (("qk", order[:2, :3]), ("vo", order[2:, :3])):
        assert not scores[f"blocks.0.attn.{half}"].gather(1, lost).any()
        assert not set(keep[f"blocks.0.attn.{half}"][0].tolist()) & set(lost[0].tolist())
    before = model(data[0])
    remove(model, keep)
    torch.testing.assert_close(model(data[0]), before, rtol=0, atol=2e-6)
    assert (attn.num_heads, attn.head_dim, attn.attn_dim) == (A, 9, 18)
    assert (attn.qkv.out_features, attn.proj.in_features, attn.proj.out_features) == (54, 18, D)
    assert (
        attn.qkv.weight.shape == (54, D)
        and attn.proj.weight.shape == (D, 18)
        and (attn.qkv.bias is not None) == bias
    )
    assert attn.scale == pytest.approx(scale * (C / 9) ** 0.5)
    if scale == C**-0.5:  # both forms agree on the cut layer, too
        attn.fused_attn = not fused
        torch.testing.assert_close(model(data[0]), before, rtol=0, atol=2e-6)


def test_keeping_all_changes_no_bit():
    model, data = build(moe=moe()), batch()
    before = {name: held.clone() for name, held in model.state_dict().items()}
    remove(
        model,
        {
            name: keep_indices(score, 0.0)
            for name, score in neuron_scores(model, [], "magnitude").items()
        },
    )
    after = model.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[name], before[name]) for name in before
    )
    assert model.blocks[0].attn.scale == C**-0.5 and model(data[0]).shape == (6, 5)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.95])
def test_parameters_and_macs_by_formula(share):
    model = build()
    before, cut = cost.count(model, 28), round(share * H)
    prune(model, share, "mlp")
    after = cost.count(model, 28)
    assert before.params_stored - after.params_stored == 2 * cut * (2 * D + 1)
    assert before.macs - after.macs == 2 * N * cut * 2 * D
    dims = A * round(share * C)
    prune(model, share, "attention")
    last = cost.count(model, 28)
    assert after.params_stored - last.params_stored == 2 * dims * (4 * D + 3)
    assert after.macs - last.macs == 2 * dims * (N * 4 * D + 2 * N * N)
    assert last.params_stored == sum(p.numel() for p in model.parameters())


def test_pruned_experts_by_formula():
    model = build(moe=moe(router="all", top_k=3, gate="renormalised", balance="none"))
    before = cost.count(model, 28)
    remove(
        model,
        {
            "blocks.1.mlp.experts.0": torch.arange(H - 20),
            "blocks.1.mlp.experts.2": torch.arange(H - 51),
        },
    )
    after = cost.count(model, 28)
    assert (
        before.params_stored - after.params_stored
        == before.params_active - after.params_active
        == 71 * (2 * D + 1)
    )
    assert before.macs - after.macs == N * 71 * 2 * D


# ---- saving and reloading


@pytest.mark.parametrize("spec", [None, moe(shared=True, top_k=2)], ids=["dense", "moe"])
def test_saved_shapes_come_back(spec):
    model, data = build(moe=spec), batch()
    scores = neuron_scores(model, [data])
    shares = dict(zip(scores, [0.5, 0.1, 0.3, 0.7, 0.2, 0.6, 0.4, 0.8, 0.5], strict=False))
    shares |= {f"blocks.{i}.attn.{half}": (0.25, 0.5)[i] for i in range(2) for half in ("qk", "vo")}
    remove(model, {name: keep_indices(score, shares[name]) for name, score in scores.items()})
    state = load(save({name: held.contiguous() for name, held in model.state_dict().items()}))
    fresh = fit_shapes(build(moe=spec), state)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {
        n: p.shape for n, p in model.named_parameters()
    }
    fresh.load_state_dict(state)
    assert torch.equal(fresh(data[0]), model(data[0]))
    assert (
        cost.count(fresh, 28, experts_per_image=spec and 3).macs
        == cost.count(model, 28, experts_per_image=spec and 3).macs
    )
    whole = build(moe=spec)  # an unpruned state leaves the model as it is
    parameters = list(whole.parameters())
    assert all(
        a is b
        for a, b in zip(
            fit_shapes(whole, build(moe=spec).state_dict()).parameters(), parameters, strict=True
        )
    )


@pytest.mark.parametrize(
    "saved, here, message",
    [
        ({}, {"depth": 3}, "blocks.2.mlp: the state has no Mlp there"),
        ({"depth": 3}, {}, "blocks.2.attn: the state has it and the model does not"),
        ({"moe": moe()}, {}, "blocks.1.mlp.experts: the state has it and the model does not"),
        ({}, {"moe": moe()}, "blocks.1.mlp.experts: the state has no Experts there"),
        ({"moe": moe(shared=True)}, {"moe": moe()}, "blocks.1.mlp.shared: the state has it"),
        (
            {"moe": moe(4)},
            {"moe": moe(3)},
            "blocks.1.mlp.experts: the state has 4 experts, the model 3",
        ),
        ({}, {"num_heads": 3}, "blocks.0.attn: the state's 30 rows of qkv .* 3 heads"),
        ({"embed_dim": 32}, {}, "blocks.0.mlp: no removal gives .*fc1.weight"),
        ({"mlp_ratio": 16}, {}, "blocks.0.mlp: the state has 154 groups, the model 96"),
        (
            {"qkv_bias": False},
            {},
            "blocks.0.attn: no removal gives the state's blocks.0.attn.qkv.bias: none",
        ),
    ],
)
def test_states_that_do_not_fit(saved, here, message):
    model = build(**here)
    before = {name: held.shape for name, held in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit_shapes(model, prune(build(**saved), 0.6).state_dict())
    assert {name: held.shape for name, held in model.state_dict().items()} == before


# ---- errors


class ResidualMlp(timm.layers.Mlp):
    """Computes something else than timm's MLP."""

    def forward(self, x):
        return super().forward(x) + x


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "vit_tiny_patch16_224",
            {"qk_norm": True},
            r"blocks.0.attn \(Attention\) cannot be pruned: .*qk_norm",
        ),
        ("vit_tiny_patch16_224", {"scale_attn_norm": True}, r"blocks.0.attn .*scale_norm"),
        ("vit_tiny_patch16_224", {"scale_mlp_norm": True}, r"blocks.0.mlp .*a norm inside"),
        ("beit_base_patch16_224", {}, r"blocks.0.attn .*known is timm.layers.Attention"),
        (
            "vit_tiny_patch16_224",
            {"mlp_layer": ResidualMlp},
            r"blocks.0.mlp \(ResidualMlp\) .*no MLP whose hidden neurons are known",
        ),
    ],
)
def test_refused_by_name(name, options, message):
    with torch.device("meta"):
        model = timm.create_model(name, **VIT, **options)
    with pytest.raises(ValueError, match=message):
        prunable(model)


def test_gated_attention_is_refused_and_parts_leave_it_out():
    model = build()
    model.blocks[0].attn.gate = nn.Linear(D, D)
    with pytest.raises(ValueError, match="blocks.0.attn .*gated.*Leave it out with parts="):
        neuron_scores(model, [batch()])
    assert set(neuron_scores(model, [batch()], parts=["mlp"])) == {"blocks.0.mlp", "blocks.1.mlp"}


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda m: remove(m, {"blocks.9.mlp": torch.arange(3)}),
            "no groups 'blocks.9.mlp' .*it has blocks.0.mlp",
        ),
        (
            lambda m: remove(m, {"blocks.0.mlp": torch.arange(0)}),
            "blocks.0.mlp: .*at least 1 is kept",
        ),
        (
            lambda m: remove(m, {"blocks.0.mlp": torch.tensor([3, 3])}),
            "blocks.0.mlp: indices must rise",
        ),
        (lambda m: remove(m, {"blocks.0.mlp": torch.tensor([3, 96])}), r"within 0..95"),
        (
            lambda m: remove(m, {"blocks.1.mlp.experts.0": torch.zeros(2, 1).long()}),
            "blocks.1.mlp.experts.0: .*must agree",
        ),
        (
            lambda m: remove(m, {"blocks.0.attn.qk": torch.arange(4).expand(A, 4)}),
            "qk keeps 4 dimensions .* all: .*name both",
        ),
        (
            lambda m: remove(
                m,
                {
                    "blocks.0.mlp": torch.arange(4),
                    "blocks.0.attn.qk": torch.arange(4).expand(A, 4),
                    "blocks.0.attn.vo": torch.arange(5).expand(A, 5),
                },
            ),
            "blocks.0.attn: qk keeps 4 .* and vo 5",
        ),
    ],
)
def test_errors_teach_and_change_nothing(call, message):
    refused_unchanged(call, message)
