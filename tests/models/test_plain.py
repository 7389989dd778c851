"""MLPs that are more than class and weights are refused by name; what is frozen stays so."""

import copy
import types
import warnings

import pytest
import torch.nn.utils.prune as masks
from small_classifier import loader, same_state, state_of, vit
from torch import nn

import lib

IMAGES = loader()[0][0]
BY_NAME = {
    "upcycle": lambda model: lib.upcycle(model, layers=2, experts=2, router="token"),
    "extract": lambda model: lib.extract(model, loader(), count=2),
    "extract, all neurons": lambda model: lib.extract(model, loader(), active=1, count=2),
    "prune": lambda model: lib.prune(model, loader()),
    "prune by magnitude": lambda model: lib.prune(model, None, score="magnitude"),
    "prune by gradients": lambda model: lib.prune(model, loader(), score="taylor"),
}
REPLACES = ("upcycle", "extract", "extract, all neurons")  # with another module


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize("call", BY_NAME.values(), ids=BY_NAME)
@pytest.mark.parametrize(
    "compute, kind",
    [
        (nn.utils.parametrizations.spectral_norm, "weight"),
        (old_weight_norm, "weight"),
        (lambda layer: masks.l1_unstructured(layer, "bias", 0.5), "bias"),
    ],
    ids=["spectral norm", "weight norm", "masked bias"],
)
def test_computed_weights_are_refused(call, compute, kind):
    model = vit()
    compute(model.blocks[1].mlp.fc2)
    with pytest.raises(ValueError, match=rf"blocks.1.mlp.* has a (fc2.)?{kind} that is computed"):
        call(model)


def test_computed_weights_of_attention_are_refused_and_plain_again_are_taken():
    model = vit()
    nn.utils.parametrizations.spectral_norm(model.blocks[0].attn.proj)
    attention = {"score": "magnitude", "parts": ("attention",)}
    with pytest.raises(ValueError, match="blocks.0.attn .* proj.weight that is computed"):
        lib.prune(model, None, **attention)
    lib.prune(model, None, score="magnitude")(IMAGES)
    nn.utils.parametrize.remove_parametrizations(model.blocks[0].attn.proj, "weight")
    lib.prune(model, None, **attention)(IMAGES)


@pytest.mark.parametrize("call", BY_NAME.values(), ids=BY_NAME)
@pytest.mark.parametrize("part", ["", "act"])
def test_a_forward_of_the_instance_is_refused(call, part):
    model = vit()
    module = model.blocks[0].mlp.get_submodule(part)
    module.forward = types.MethodType(lambda self, x: 2 * type(self).forward(self, x), module)
    at = " at act" if part else ""
    with pytest.raises(ValueError, match=f"blocks.0.mlp.* has a forward of its own{at}, set on"):
        call(model)


def test_packed_weights_are_no_forward_of_ones_own(recwarn):
    model = lib.freeze_for_inference(vit())
    for call in BY_NAME.values():
        call(model)(IMAGES)


@pytest.mark.parametrize("call", [BY_NAME[name] for name in REPLACES], ids=REPLACES)
@pytest.mark.parametrize("part", ["", "fc1"])
def test_hooks_that_would_be_lost_are_refused(call, part):
    model = vit()
    module = model.blocks[1].mlp.get_submodule(part)
    handle = module.register_forward_hook(lambda module, args, out: 2 * out)
    at = " at fc1" if part else ""
    with pytest.raises(ValueError, match=f"blocks.1.mlp has hooks{at}, which experts made of it"):
        call(model)
    handle.remove()
    call(model)(IMAGES)


def test_a_narrower_mlp_keeps_its_hooks():
    seen, model = [], vit()
    model.blocks[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    for call in ("prune", "prune by magnitude"):
        small = BY_NAME[call](model)
        seen.clear()
        small(IMAGES)
        assert seen == [1]


@pytest.mark.parametrize("call", BY_NAME.values(), ids=BY_NAME)
@pytest.mark.parametrize("shared", ["mlp", "mlp.fc1", "mlp.fc1.weight"])
def test_shared_parameters_are_refused(call, shared):
    model = vit(depth=3)
    owner, _, last = f"blocks.1.{shared}".rpartition(".")
    target = model.blocks[0]
    for part in shared.split("."):
        target = getattr(target, part)
    setattr(model.get_submodule(owner), last, target)
    state = state_of(model)
    with pytest.raises(ValueError, match="blocks.0.mlp shares parameters with blocks.1.mlp.fc1"):
        call(model)
    assert same_state(model, state)
    model.set_submodule("blocks.1.mlp", copy.deepcopy(model.blocks[1].mlp))
    call(model)(IMAGES)


def test_shared_moe_layers_are_not_dropped_from_at_one_name_alone():
    model = lib.upcycle(vit(), layers=2, experts=4, router="token")
    model.blocks[1].mlp = model.blocks[0].mlp
    with pytest.raises(ValueError, match="blocks.0.mlp shares parameters with blocks.1.mlp"):
        lib.drop_experts(model, loader())


# ---- frozen parameters


@pytest.mark.parametrize("call", BY_NAME.values(), ids=BY_NAME)
def test_what_is_made_of_frozen_parameters_stays_frozen(call):
    model = vit()
    model.blocks[0].mlp.requires_grad_(False)
    model.blocks[1].mlp.fc2.bias.requires_grad_(False)
    changed = call(model)
    first, second = (block.mlp for block in changed.blocks)
    kinds = [first.fc1, first.fc2] if hasattr(first, "fc1") else [first.experts]
    assert not any(p.requires_grad for part in kinds for p in part.parameters())
    of_maps = second if hasattr(second, "fc1") else second.experts
    assert not of_maps.fc2.bias.requires_grad
    assert of_maps.fc2.weight.requires_grad and of_maps.fc1.bias.requires_grad
    if hasattr(first, "router"):
        assert all(parameter.requires_grad for parameter in first.router.parameters())


@pytest.mark.parametrize(
    "options", [{"clusters": "moefication", "count": 4}, {"storage": "copies"}, {"repair": "mean"}]
)
def test_other_storages_and_new_biases_stay_frozen(options):
    model = vit()
    model.blocks[0].mlp.requires_grad_(False).fc2.bias = None
    changed = lib.extract(model, loader(), **options)
    assert not any(p.requires_grad for p in changed.blocks[0].mlp.experts.parameters())
    assert all(p.requires_grad for p in changed.blocks[1].mlp.experts.parameters())


def test_fresh_experts_are_made_of_nothing_frozen():
    with pytest.warns(UserWarning, match="fresh_experts"):
        mixed = lib.upcycle(
            vit().requires_grad_(False), layers=1, experts=2, router="token", fresh_experts=True
        )
    assert all(parameter.requires_grad for parameter in mixed.blocks[1].mlp.parameters())


# ---- what does not run


class Aided(nn.Module):
    """A classifier beside a trunk that its forward does not call."""

    def __init__(self):
        super().__init__()
        self.main, self.aux = vit(), vit()

    def forward(self, x):
        return self.main(x)


@pytest.mark.parametrize("call", ["prune", "extract", "prune by gradients"])
def test_layers_that_do_not_run_are_named(call):
    with pytest.raises(ValueError, match=r"aux.blocks.0.mlp.*with ignore="):
        BY_NAME[call](Aided())


def test_layers_that_do_not_run_are_left_out_as_advised():
    with pytest.raises(ValueError, match=r"did not run on the images.*ignore=\['aux'\]"):
        lib.prune(Aided(), loader())
    small = lib.prune(Aided(), loader(), ignore=["aux"])
    assert [row["layer"] for row in small.pruning] == ["main.blocks.0.mlp", "main.blocks.1.mlp"]
    lib.extract(Aided(), loader(), count=2, ignore=["aux"])(IMAGES)
