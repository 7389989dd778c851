"""`lib.upcycle`: a copy of the model with MoE layers, equal to it until it is trained."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small_classifier import Wrapped, images_and_labels, loader, vit
from small_models import images_for, modules_of, small

import lib
from lib.extraction.record import mlps_of
from lib.models.moe import MoELayer


def output(model):
    with torch.no_grad():
        return model(images_and_labels()[0])


@pytest.mark.parametrize("inplace", [False, True])
def test_the_model_is_changed_where_that_is_asked_for(inplace):
    model = vit()
    wanted = output(model)
    mixture = lib.upcycle(model, layers=1, experts=3, router="token", inplace=inplace)
    assert (mixture is model) == inplace
    assert isinstance(model.blocks[1].mlp, MoELayer) == inplace
    torch.testing.assert_close(output(mixture), wanted, atol=1e-5, rtol=0)


def test_what_was_done_is_told_by_layer():
    once = lib.upcycle(vit(), ignore=["blocks.0"], layers=1, experts=3, router="token")
    rows = [{"layer": "blocks.1.mlp", "experts": 3, "shared": False}]
    assert once.upcycling == rows
    twice = lib.upcycle(once, ignore=["blocks.1"], layers=1, experts=2, router="token", shared=True)
    assert twice.upcycling == rows + [{"layer": "blocks.0.mlp", "experts": 2, "shared": True}]
    assert once.upcycling == rows and not isinstance(once.blocks[0].mlp, MoELayer)


def test_what_fits_no_model_changes_none():
    model = vit()
    with pytest.raises(ValueError, match="beyond the depth"):
        lib.upcycle(model, layers=3, experts=2, router="token", inplace=True)
    assert not hasattr(model, "upcycling")


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"expert": 2}, r"^MoESpec: expert=2: there is no such field; near it: experts"),
        (
            {"experts": 2, "router": "best"},
            r"^MoESpec: router='best': it should be 'token', 'image'",
        ),
        ({"experts": 2, "top_k": 3}, r"^MoESpec: top_k=3 needs at least 3 experts, got experts=2$"),
        (
            {"experts": 2, "router": "token", "members": 2},
            r"^members=2 is for runs, which make an ensemble",
        ),
        ({"spec": lib.MoESpec(experts=2, router="token", members=2)}, r"^members=2 is for runs"),
    ],
)
def test_fields_that_do_not_fit_are_refused_in_a_sentence(fields, says):
    with pytest.raises(ValueError, match=says):
        lib.upcycle(vit(), **fields)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": 2},
        {"layers": 2, "blocks": (1, 2), "modules": ["blocks.*.mlp"]},
        {"layers": 1, "modules": ["blocks.1.mlp"]},
        {"layers": 1, "ignore": ["blocks.0"]},
    ],
    ids=str,
)
def test_an_mlp_of_two_blocks_is_named_as_one(options):
    model = vit()
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ValueError, match=r"blocks.\d.mlp shares parameters with blocks.\d.mlp"):
        lib.upcycle(model, experts=3, router="token", **options)
    with pytest.raises(ValueError, match="shares parameters"):
        lib.prune(model, None, 0.5, score="magnitude", repair="none")
    with pytest.raises(ValueError, match="shares parameters"):
        mlps_of(model)


@pytest.mark.parametrize("field", [{"balance": "none"}, {"z_weight": 1.0}])
def test_fields_that_only_a_run_reads_say_so(field):
    with pytest.warns(UserWarning, match="only the training of a RunSpec reads that"):
        lib.upcycle(vit(), layers=1, experts=2, router="token", **field)


@pytest.mark.parametrize(
    ("norm_inside", "fields"),
    [(False, {"balance": "none"}), (False, {"router": "soft"}), (True, {})],
    ids=["of a run", "another function", "whole copies"],
)
def test_warnings_name_the_line_that_upcycles(norm_inside, fields):
    model = vit()
    if norm_inside:
        model.blocks[1].mlp.norm = torch.nn.LayerNorm(model.blocks[1].mlp.fc1.out_features)
    with pytest.warns(UserWarning) as warned:
        lib.upcycle(model, layers=1, experts=2, **{"router": "token"} | fields)
    assert [warning.filename for warning in warned] == [__file__]


class Centred(torch.nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class Adapted(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("kind", [Centred, Adapted])
def test_maps_that_compute_something_of_their_own_do_not_lose_it(kind):
    model = vit()
    for block in model.blocks:
        own = kind(block.mlp.fc1.in_features, block.mlp.fc1.out_features)
        own.load_state_dict(block.mlp.fc1.state_dict())
        block.mlp.fc1 = own
    says = f"has a {kind.__name__} at fc1, whose class computes something of its own"
    for call in (lib.prune, lib.extract):
        with pytest.raises(ValueError, match=says):
            call(model, loader(), 0.5)
    with pytest.raises(ValueError, match=says):
        lib.upcycle(model, layers=1, experts=2, router="token")


def test_fields_that_change_the_function_say_so():
    model = vit()
    wanted = output(model)
    for fields, word in (
        ({"router": "token", "shared": True}, "shared=True"),
        ({"router": "soft"}, "router='soft'"),
        ({"router": "expert_choice"}, "router='expert_choice'"),
        ({"copy_noise": 0.5}, "copy_noise=0.5"),
        ({"router": "token", "gate": "printed"}, "gate='printed'"),
        ({"router": "token", "capacity_factor": 0.5}, "capacity_factor=0.5"),
    ):
        with pytest.warns(UserWarning, match=f"with {word} the model need not compute"):
            changed = lib.upcycle(model, experts=3, **fields)
        assert not torch.allclose(output(changed), wanted, atol=1e-3)
    with pytest.warns(UserWarning, match="with expert_dropout=0.5 the model need not compute"):
        lib.upcycle(model, experts=3, router="token", expert_dropout=0.5)  # in training mode
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fields in ({"router": "token", "top_k": 2}, {"router": "priority"}, {}):
            same = lib.upcycle(model, experts=3, **fields)
            torch.testing.assert_close(output(same), wanted, atol=1e-5, rtol=0)
        lib.upcycle(model, lib.MoESpec(experts=3, shared=True))  # it says itself what it does


@pytest.mark.parametrize(
    "name", ["a trunk of mine", "mixer_s32_224", "vit_base_patch16_siglip_224"]
)
def test_the_mean_token_of_models_built_for_small_images(name):
    if name == "a trunk of mine":
        model, images = Wrapped(vit()).eval(), images_and_labels()[0]
    else:
        model, images = small(name), images_for(name)
    modules = modules_of(name)
    with torch.no_grad():
        wanted = model(images)
        mixture = lib.upcycle(model, experts=3, pool="mean", layers=1, modules=modules)
        torch.testing.assert_close(mixture(images), wanted, atol=1e-4, rtol=1e-5)
    layers = [module for module in mixture.modules() if isinstance(module, MoELayer)]
    with lib.RoutingTape(mixture) as tape:
        mixture(images)
    assert len(layers) == 1 and tape[layers[0]].per_image
