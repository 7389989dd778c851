"""Pruning of a model by a loader: against masks, by hand, and refused by name."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from small_classifier import (
    CLASSES,
    NAMES,
    D,
    H,
    Wrapped,
    images_and_labels,
    loader,
    same_state,
    state_of,
    vit,
)
from small_models import SMALL, built, images_for
from timm.layers import Mlp
from timm.models.mlp_mixer import MlpMixer

import lib
from lib.models.experts import Experts

IMAGES, _ = images_and_labels()


def widths(model):
    return [block.mlp.fc1.out_features for block in model.blocks]


def kept_rows(before, after):
    """The neurons of an MLP that another has, by their rows."""
    same = (after.fc1.weight.unsqueeze(1) == before.fc1.weight).all(dim=-1)
    assert (same.sum(dim=1) == 1).all()
    return same.int().argmax(dim=1)


def masked(model, pruned):
    """A copy of `model` whose removed neurons give nothing."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for block, narrow in zip(model.blocks, pruned.blocks, strict=True):
            gone = torch.ones(H, dtype=torch.bool)
            gone[kept_rows(block.mlp, narrow.mlp)] = False
            block.mlp.fc2.weight[:, gone] = 0
    return model


def hidden_of(model, block):
    """(tokens, H) what the second map of an MLP sees."""
    seen = []
    fc2 = model.blocks[block].mlp.fc2
    handle = fc2.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(IMAGES)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize(
    "score", ["weighted", "variance", "taylor", "molchanov", "magnitude", "random"]
)
@pytest.mark.parametrize("across", ["layer", "model"])
def test_pruned_without_repair_equals_masked(score, across):
    model = vit()
    state = state_of(model)
    small = lib.prune(model, loader(), 0.5, score=score, repair="none", across=across)
    with torch.no_grad():
        torch.testing.assert_close(small(IMAGES), masked(model, small)(IMAGES), atol=1e-5, rtol=0)
        assert not torch.allclose(small(IMAGES), model(IMAGES), atol=1e-2)
    assert same_state(model, state) and small is not model
    assert sum(widths(small)) == H if across == "model" else widths(small) == [H // 2] * 2
    rows = [(row["layer"], row["before"], row["after"]) for row in small.pruning]
    assert rows == [(name, H, width) for name, width in zip(NAMES, widths(small), strict=True)]
    assert {(row["score"], row["repair"], row["part"]) for row in small.pruning} == {
        (score, "none", "mlp")
    }


def test_neurons_are_chosen_and_repaired_as_by_hand():
    model = vit()
    small = lib.prune(model, loader(), 0.25, ignore=["blocks.1"])
    hidden, mlp = hidden_of(model, 0), model.blocks[0].mlp
    score = hidden.var(dim=0, unbiased=False) * mlp.fc2.weight.square().sum(dim=0)
    kept = kept_rows(mlp, small.blocks[0].mlp)
    assert kept.tolist() == score.topk(H // 4).indices.sort().values.tolist()
    # ridge regression of the layer's output on the neurons that stay
    x = hidden[:, kept]
    target = (hidden @ mlp.fc2.weight.t()).detach()
    centred = x - x.mean(dim=0)
    covariance = (centred.t() @ centred / len(x)).double()
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(kept))
    cross = (centred.t() @ (target - target.mean(dim=0)) / len(x)).double()
    want = torch.linalg.solve(covariance, cross).t().float()
    torch.testing.assert_close(small.blocks[0].mlp.fc2.weight, want, atol=1e-3, rtol=1e-3)
    assert torch.equal(small.blocks[1].mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)
    assert [row["layer"] for row in small.pruning] == NAMES[:1]
    assert 0 < small.pruning[0]["error"] < 1


def test_repair_brings_the_model_nearer_to_the_dense_one():
    model, far = vit(), []
    for repair in ("ridge", "mean", "none"):
        small = lib.prune(model, loader(), 0.3, repair=repair)
        with torch.no_grad():
            far.append((small(IMAGES) - model(IMAGES)).square().mean().item())
    assert far == sorted(far) and far[0] < 0.5 * far[2]


def test_the_random_score_is_drawn_by_the_seed_and_needs_no_loader():
    first, again, other = (lib.prune(vit(), None, score="random", seed=seed) for seed in (0, 0, 1))
    assert same_state(first, state_of(again)) and not same_state(first, state_of(other))


@pytest.mark.parametrize("score", ["weighted", "taylor"])
def test_shares_by_layer_and_multiples(score):
    keep = {"blocks.0.mlp": 0.25, "blocks.0": 0.75, "blocks.1.*": 0.5}
    assert widths(lib.prune(vit(), loader(), keep, score=score)) == [24, 48]
    assert widths(lib.prune(vit(), loader(), {"blocks.1": 0.5}, score=score)) == [96, 48]
    assert widths(lib.prune(vit(), loader(), 0.4, score=score)) == [38, 38]
    assert widths(lib.prune(vit(), loader(), 0.4, score=score, round_to=16)) == [48, 48]
    uneven = lib.prune(vit(), loader(), 0.4, score=score, round_to=16, across="model")
    assert all(width % 16 == 0 for width in widths(uneven)) and sum(widths(uneven)) >= 0.4 * 2 * H


@pytest.mark.parametrize("score", ["variance", "weighted", "taylor"])
def test_neurons_of_equal_scores_count_in_the_share_of_a_model(score):
    """40 of the 96 neurons of each MLP never fire, and 58 of all 192 go."""
    model = vit()
    for block in model.blocks:
        block.mlp.act = torch.nn.ReLU()
        with torch.no_grad():
            block.mlp.fc1.weight[:40] = 0.0
            block.mlp.fc1.bias[:40] = -1.0
    for across in ("layer", "model"):
        cut = widths(lib.prune(model, loader(), 0.7, score=score, across=across))
        assert sum(cut) == 134 and min(cut) >= 56


@pytest.mark.parametrize("score", ["weighted", "taylor"])
def test_a_whole_share_leaves_the_function_alone(score):
    model = vit()
    for across in ("layer", "model"):
        whole = lib.prune(model, loader(), 1.0, score=score, across=across)
        assert same_state(whole, state_of(model))


def test_attention_and_experts():
    dims = [lib.prune(vit(), loader(), score="taylor", parts=("mlp", "attention"))]
    dims.append(lib.prune(vit(), loader(), {"*.attn": 0.5}, score="taylor", parts=("attention",)))
    for small, width in zip(dims, (48, 96), strict=True):
        assert widths(small) == [width] * 2
        assert [block.attn.head_dim for block in small.blocks] == [6, 6]
    assert {row["part"] for row in dims[0].pruning} == {"mlp", "attention"}
    mixture = lib.upcycle(vit(), lib.MoESpec(layers=1, experts=3, router="token", shared=True))
    small = lib.prune(
        mixture, loader(), score="taylor", parts=("mlp", "experts"), ignore=["*.shared"]
    )
    assert small.blocks[1].mlp.experts.widths == (48,) * 3 and widths_of_dense(small) == 48
    assert small.blocks[1].mlp.shared.fc1.out_features == 96
    parts = {row["layer"]: row["part"] for row in small.pruning}
    assert parts == {"blocks.0.mlp": "mlp"} | {
        f"blocks.1.mlp.experts.{e}": "experts" for e in range(3)
    }
    # by activations only the dense block is pruned
    assert [row["layer"] for row in lib.prune(mixture, loader()).pruning] == NAMES[:1]


def widths_of_dense(model):
    return model.blocks[0].mlp.fc1.out_features


def test_in_place_and_what_a_model_tells_survives_a_copy():
    model = vit()
    assert lib.prune(model, loader(), inplace=True) is model and widths(model) == [48, 48]
    lib.prune(model, loader(), score="taylor", inplace=True)
    assert widths(model) == [24, 24] and len(model.pruning) == 4
    other = copy.deepcopy(model)
    assert other.pruning == model.pruning and other.pruning is not model.pruning
    assert not any("pruning" in name for name in model.state_dict())


@pytest.mark.parametrize("score", ["weighted", "taylor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modes_and_types_stay(score, dtype):
    model = vit().to(dtype)
    model.blocks[0].train()
    model.blocks[1].mlp.fc1.weight.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    small = lib.prune(model, loader(dtype), score=score)
    assert {name: module.training for name, module in small.named_modules()} == modes
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.dtype == dtype for parameter in small.parameters())


def test_a_module_of_ones_own_around_a_trunk():
    model = Wrapped(vit()).eval()
    for score in ("weighted", "taylor"):
        small = lib.prune(model, loader(), {"trunk.blocks.1": 0.5}, score=score)
        assert widths(small.trunk) == [96, 48]
        assert [row["layer"] for row in small.pruning] == ["trunk.blocks.1.mlp"]
        assert small(IMAGES).shape == (len(IMAGES), CLASSES)


@pytest.mark.parametrize(
    "options, says",
    [
        (
            {"score": "best"},
            "score='best' is unknown: valid are weighted, variance, update, taylor",
        ),
        ({"repair": "glue"}, "repair='glue' is unknown: valid are ridge, mean, none"),
        ({"score": "taylor", "repair": "ridge"}, "goes with scores of activations"),
        ({"score": "update", "repair": "mean"}, "leave repair='mean' out"),
        ({"parts": ("mlp", "attention")}, "set score='taylor', or parts="),
        ({"parts": "mlp"}, "parts='mlp': give a tuple of mlp, attention, experts"),
        ({"parts": ("experts",), "score": "taylor"}, "has no experts to prune"),
        ({"keep": 0.0}, "keep=0.0: the share that stays is above 0 and at most 1"),
        ({"keep": 50}, "keep=50: the share"),
        ({"keep": {}}, "names no layer"),
        (
            {"keep": {"block.0": 0.5}},
            r"keep: 'block.0' fits none of the layers blocks.0.mlp, blocks.1",
        ),
        ({"keep": {"*": 0.5}, "across": "model"}, "give one number, or across='layer'"),
        ({"across": "world"}, "across='world' is unknown"),
        ({"round_to": 0}, "round_to=0"),
        ({"ignore": ["head"]}, "ignore: 'head' fits none of the layers"),
        ({"ignore": "blocks.0"}, r"one text: give a list, \['blocks.0'\]"),
        ({"images": 0}, "images=0: at least 1"),
    ],
)
def test_what_is_refused(options, says):
    model = vit()
    state = state_of(model)
    with pytest.raises(ValueError, match=says):
        lib.prune(model, loader(), **options)
    assert same_state(model, state)


@pytest.mark.parametrize("score", ["weighted", "taylor"])
def test_mlps_of_other_names(score):
    torch.manual_seed(0)
    sizes = {"img_size": 14, "patch_size": 7, "embed_dim": D, "num_classes": CLASSES}
    mixer = MlpMixer(num_blocks=2, **sizes).eval()
    with pytest.raises(ValueError, match="MlpMixer has no "):
        lib.prune(mixer, loader(), score=score)
    named = {"modules": ["blocks.*.mlp_channels"], "ignore": ["blocks.0"]}
    small = lib.prune(mixer, loader(), score=score, **named)
    assert small.blocks[1].mlp_channels.fc1.out_features == H // 2
    assert [row["layer"] for row in small.pruning] == ["blocks.1.mlp_channels"]
    same = lib.extract(mixer, loader(), 1.0, count=2, modules=["blocks.*.mlp_channels"])
    torch.testing.assert_close(same(IMAGES), mixer(IMAGES), atol=1e-5, rtol=0)
    assert len(same.extraction) == 2


@pytest.mark.parametrize("score", ["weighted", "taylor"])
def test_mlps_without_neurons_of_their_own_are_refused_unless_ignored(score):
    model = vit()
    model.blocks[0].mlp = Mlp(D, H, norm_layer=torch.nn.LayerNorm).eval()
    with pytest.raises(ValueError, match="blocks.0.mlp.* norm inside the MLP"):
        lib.prune(model, loader(), score=score)
    small = lib.prune(model, loader(), score=score, ignore=["blocks.0"])
    assert small.blocks[1].mlp.fc1.out_features == H // 2


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"]
)
@pytest.mark.parametrize("score", ["weighted", "taylor"])
def test_dropout_inside_is_carried_by_narrower_mlps(name, score):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=CLASSES, proj_drop_rate=0.5, **SMALL[name])
    without = timm.create_model(name, num_classes=CLASSES, **SMALL[name]).eval()
    without.load_state_dict(model.state_dict())
    images = images_for(name, 10)
    data = [(images, torch.arange(10) % CLASSES)]
    narrow = lib.prune(model.eval(), data, score=score)
    assert same_state(narrow, state_of(lib.prune(without, data, score=score)))
    layer = narrow.get_submodule(narrow.pruning[0]["layer"])
    assert layer.drop1.p == 0.5 and layer.fc1.out_features == narrow.pruning[0]["after"]
    again = lib.prune(model.train(), data, score="weighted")  # looked at without dropout
    assert again.training
    if score == "weighted":
        assert same_state(again, state_of(narrow))
    with pytest.raises(
        ValueError, match=r"blocks\.0\.mlp has dropout inside .*experts do not carry"
    ):
        lib.extract(model, data, count=2)


@pytest.mark.parametrize(
    "modules", ["blocks.*.mlp_channels", "blocks.*.mlp_tokens", "blocks.1.mlp_*"]
)
def test_experts_of_other_names(modules):
    mixer = built("mixer_s32_224")
    images = images_for("mixer_s32_224", 10)
    data = [(images, torch.arange(10) % CLASSES)]
    mixture = lib.upcycle(mixer, modules=[modules], experts=3, router="token")
    narrow = lib.prune(mixture, data, parts=("experts",), score="taylor", modules=[modules])
    before, after = ([m for m in x.modules() if isinstance(m, Experts)] for x in (mixture, narrow))
    assert len(before) == len(after) == 2
    for wide, thin in zip(before, after, strict=True):
        assert thin.widths == tuple(width // 2 for width in wide.widths)
    assert narrow(images).isfinite().all()


def test_models_and_labels_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="labels from 0 to 4, .* has 3 classes, valid is 0 to 2"):
        lib.prune(vit(num_classes=3), loader(), score="taylor")
    with pytest.raises(ValueError, match=r"returns \(40, 5, 24\) for 40 images"):
        lib.prune(vit(num_classes=0, global_pool=""), loader(), score="taylor")
    with pytest.raises(ValueError, match=r"parts=\('experts',\) and score='taylor'"):
        lib.prune(lib.upcycle(vit(), lib.MoESpec(layers=2, experts=2, router="token")), loader())
    with pytest.raises(ValueError, match="Linear has no block MLP"):
        lib.prune(torch.nn.Linear(2, 2), loader())
    with pytest.raises(ValueError, match="Wrapped is none: set across='layer'"):
        lib.prune(Wrapped(vit()), loader(), score="update", across="model")
