"""Eighteen models that users have, through the calls of the README: each call works, and computes
what it should, or is refused in words that name the layer."""

from __future__ import annotations

import copy
import warnings

import pytest
import timm
import torch
from small_models import BY_CLASS, CLASSES, OWN, Owner, images_for, modules_of, small
from torch import nn

import lib
from lib.extraction import moefication
from lib.models.mlps import maps_of
from lib.models.upcycle import chosen_mlps

IMAGES, TOLERANCE = 8, 1e-5  # relative to the largest output

CALLS = {
    "upcycle": lambda m, data, mods: lib.upcycle(m, layers=2, experts=4, router="token", **mods),
    "of image": lambda m, data, mods: lib.upcycle(m, experts=3, **mods),
    "top 2": lambda m, data, mods: lib.upcycle(m, experts=3, router="token", top_k=2, **mods),
    "prune": lambda m, data, mods: lib.prune(m, data, keep=0.5, **mods),
    "taylor": lambda m, data, mods: lib.prune(m, data, score="taylor", **mods),
    "by layer": lambda m, data, mods: lib.prune(m, data, keep={"*.0.*": 0.8, "*": 0.4}, **mods),
    "attention": lambda m, data, mods: lib.prune(
        m, data, score="taylor", parts=("mlp", "attention"), **mods
    ),
    "extract": lambda m, data, mods: lib.extract(m, data, active=0.5, **mods),
    "whole": lambda m, data, mods: lib.extract(m, data, active=1.0, **mods),
    "neurons": lambda m, data, mods: lib.extract(m, data, clusters="moefication", **mods),
}
# calls on what `upcycle` gave
OF_A_MIXTURE = {
    "drop": lambda m, data, mods: lib.drop_experts(m, data, keep=0.5),
    "experts": lambda m, data, mods: lib.prune(m, data, score="taylor", parts=("experts",), **mods),
    "finetune": lambda m, data, mods: lib.finetune(m, data, data, epochs=0.5, teacher=m),
}
# + works; a letter is a refusal. Columns: the calls above, in their order.
#                                  up im t2 pr ta by at ex wh ne dr pe ft
OUTCOMES = {
    "vit_small_patch16_224":         "+  +  +  +  +  +  +  +  +  +  +  +  +",
    "deit3_small_patch16_224":       "+  +  +  +  +  +  +  +  +  +  +  +  +",
    "beit_base_patch16_224":         "+  +  +  +  +  +  a  +  +  +  +  +  +",
    "vit_small_patch14_reg4_dinov2": "+  +  +  +  +  +  +  +  +  +  +  +  +",
    "vit_small_patch16_dinov3":      "+  +  +  +  +  +  a  +  +  +  +  +  +",
    "vit_small_plus_patch16_dinov3": "+  +  +  +  +  +  a  +  +  g  +  +  +",
    "eva02_tiny_patch14_224":        "+  +  +  +  +  +  a  +  +  g  +  +  +",
    "swin_tiny_patch4_window7_224":  "+  c  +  +  +  +  a  +  +  +  +  +  +",
    "swinv2_tiny_window8_256":       "+  c  +  +  +  +  a  +  +  +  +  +  +",
    "convnext_tiny":                 "+  c  +  +  +  +  n  +  +  +  +  +  +",
    "convnextv2_atto":               "+  c  +  u  v  u  n  u  u  u  w  x  +",
    "vit_base_patch16_siglip_224":   "+  c  +  +  +  +  +  +  +  +  +  +  +",
    "hiera_tiny_224":                "+  c  +  +  +  +  a  +  +  +  +  +  +",
    "maxvit_nano_rw_256":            "+  c  +  +  +  +  a  +  +  +  +  +  +",
    "caformer_s18":                  "+  c  +  +  +  +  n  +  +  +  +  +  +",
    "mixer_s32_224":                 "+  c  +  +  +  +  n  +  +  +  +  +  +",
    "cait_xxs24_224":                "+  +  +  +  +  +  a  +  +  +  +  +  +",
    OWN:                             "+  c  +  +  +  +  +  +  +  +  +  +  +",
}  # fmt: skip
# calls whose layers are of another structure
STRUCTURES = {"dense", "upcycle", "prune", "attention", "extract", "neurons", "drop", "experts"}
# linear, gated, of windows with a mask, of convolutions, and copied whole
TRACED = ("beit_base_patch16_224", "eva02_tiny_patch14_224", "swin_tiny_patch4_window7_224")
TRACED += ("convnext_tiny", "convnextv2_atto")
KIND = r"\(GlobalResponseNormMlp\)"
REFUSALS = {
    "a": r"^(layers\.0\.|stages\.0\.)?blocks\.0\.(attn_block\.)?attn \(\w+\) cannot be pruned: "
    r"known is timm.layers.Attention.* Leave it out with parts= or ignore=$",
    "n": r"^(ConvNeXt|MetaFormer|MlpMixer) has no attention to prune: it has .*mlp",
    "c": r"^image-level routing reads the class token, and \w+ has none: .* pool='mean', or",
    "g": r"^blocks\.0\.mlp \((SwiGLU|GluMlp)\) is a gated MLP, .*: take clusters of tokens, or",
    "u": rf"^stages\.0\.blocks\.0\.mlp {KIND} is no MLP whose .* is taken is timm.layers.Mlp, .*: "
    r"no experts are extracted from it, and no neuron is pruned. Leave it out with ignore=$",
    "v": rf"^stages\.0\.blocks\.0\.mlp {KIND} cannot be pruned: .* what is taken is timm.*Mlp",
    "w": r"^stages\.2\.blocks\.0\.mlp has whole copies of an MLP as experts .*: leave the layer as",
    "x": r"^stages\.2\.blocks\.0\.mlp\.experts \(WholeCopies\) cannot be pruned: .* Leave it out",
}


class Walk:
    """What each call on a model gave: a model, or a message."""

    def __init__(self, name):
        self.name, self.dense, self.images = name, small(name), images_for(name, IMAGES)
        labels = torch.arange(IMAGES) % CLASSES
        self.data = list(zip(self.images.split(4), labels.split(4), strict=True))
        self.mods = {"modules": modules_of(name)}
        self.state = copy.deepcopy(self.dense.state_dict())
        self.models, self.refused = {"dense": self.dense}, {}
        for calls, of in ((CALLS, "dense"), (OF_A_MIXTURE, "upcycle")):
            for call, function in calls.items():
                try:
                    self.models[call] = function(self.models[of], self.data, self.mods)
                except ValueError as error:  # anything else is a fault
                    self.refused[call] = str(error)

    @torch.no_grad()
    def output(self, model):
        return model(self.images)

    def difference(self, model, expected):
        """The largest difference of outputs, relative to the largest one."""
        wanted = self.output(expected)
        return ((self.output(model) - wanted).abs().max() / wanted.abs().max()).item()


@pytest.fixture(scope="module", params=OUTCOMES)
def walk(request):
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.filterwarnings("ignore", ".*whole copies, which is slow")
        patch.setattr(moefication, "STEPS", 20)  # how well its router learns is not looked at
        return Walk(request.param)


def test_each_call_works_or_is_refused_by_name(walk, subtests):
    words = OUTCOMES[walk.name].split()
    for call, word in zip([*CALLS, *OF_A_MIXTURE], words, strict=True):
        with subtests.test(call=call):
            if word == "+":
                assert call in walk.models, walk.refused[call]
                assert walk.output(walk.models[call]).isfinite().all()
            else:
                with pytest.raises(ValueError, match=REFUSALS[word]):
                    raise ValueError(walk.refused[call])
    # the given model is as it was
    assert not any(module.training for module in walk.dense.modules())
    now = walk.dense.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in walk.state.items())


def test_upcycled_and_extracted_with_all_neurons_it_is_the_dense_model(walk):
    for call in {"upcycle", "of image", "top 2", "whole"} & walk.models.keys():
        assert walk.difference(walk.models[call], walk.dense) <= TOLERANCE, call
    for call in {"prune", "taylor", "extract", "finetune"} & walk.models.keys():
        assert walk.difference(walk.models[call], walk.dense) > TOLERANCE, call


def as_masked(pruned, dense, modules):
    """The dense model with zeros for the output weights of neurons that the pruned one lacks.

    Neurons are found by their input weights; what repair gave the others is taken over.
    """
    twin = copy.deepcopy(dense)
    for name, mlp in chosen_mlps(twin, modules):
        whole, narrow = maps_of(mlp), maps_of(pruned.get_submodule(name))
        rows, remaining = whole.tensors_of_neurons()[0], narrow.tensors_of_neurons()[0]
        place = {row.numpy().tobytes(): neuron for neuron, row in enumerate(rows)}
        neurons = [place[row.numpy().tobytes()] for row in remaining]
        assert len(set(neurons)) == len(neurons) < len(place) == len(rows)
        columns = torch.zeros_like(whole.weights().w2)
        columns[:, neurons] = narrow.weights().w2
        whole.last_map.weight.data.copy_(columns.view_as(whole.last_map.weight))
        # repair gives a bias to an MLP that had none
        whole.last_map.bias = copy.deepcopy(narrow.last_map.bias)
    return twin


def test_pruned_it_is_a_masked_model(walk):
    for call in {"prune", "taylor", "by layer"} & walk.models.keys():
        pruned = walk.models[call]
        twin = as_masked(pruned, walk.dense, modules_of(walk.name))
        assert walk.difference(pruned, twin) <= TOLERANCE, call


def test_saved_it_comes_back_to_the_bit(walk, tmp_path):
    path, is_own = tmp_path / "model.safetensors", walk.name == OWN or walk.name in BY_CLASS
    for call in STRUCTURES & walk.models.keys():
        model = walk.models[call]
        lib.save(model, path, class_names=list("abcde"))
        again = lib.restore(path, small(walk.name) if is_own else None)
        assert torch.equal(walk.output(again), walk.output(model)), call


def test_the_form_for_export_is_equal(walk):
    for call, model in walk.models.items():
        exported = lib.for_export(model)
        assert walk.difference(exported, model) <= TOLERANCE, call
    if walk.name in TRACED:
        model = lib.for_export(walk.models.get("extract", walk.models["upcycle"]))
        program = torch.export.export(model, (walk.images,), strict=False).module()
        assert walk.difference(program, model) <= TOLERANCE


def test_compared_they_give_a_table_and_a_sentence(walk):
    pruned = walk.models.get("prune")
    models = {"dense": walk.dense, "other": pruned or walk.models["upcycle"]}
    table = lib.compare(models, lib.on_device(walk.data, "cpu"), batches=(1,))
    assert list(table.index) == list(models) and (table[["ms_1", "ms_1_q10"]] > 0).all(axis=None)
    sizes = table[["macs", "params", "mb"]]
    if pruned:
        assert (sizes.loc["other"] < sizes.loc["dense"]).all()
    else:
        assert (sizes.loc["other"] > sizes.loc["dense"]).all() and table.difference["other"] == 0
    assert "dense" in lib.advice(table)


class Inside(nn.Module):
    """A module of one's own that holds a model which timm does not build so."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def test_cut_by_hand_it_is_saved_inside_a_module_of_ones_own(tmp_path):
    def cut():
        model = timm.create_model("mixer_s32_224", img_size=64, num_classes=CLASSES)
        model.blocks = model.blocks[:1]
        return model.eval()

    model, path, images = cut(), tmp_path / "model.safetensors", images_for("mixer_s32_224")
    says = (
        r"blocks.1 \(MixerBlock\) is in the built model alone; .*: put it into an nn.Module of your"
    )
    with pytest.raises(ValueError, match=says):
        lib.save(model, path)
    assert not path.exists()
    small_one = lib.prune(Inside(model), None, score="magnitude", modules=["*.mlp_channels"])
    lib.save(small_one, path)
    again = lib.restore(path, Inside(cut()))
    with torch.no_grad():
        assert torch.equal(again(images), small_one(images))


class Described(Owner):
    """Gives its logits in a dict."""

    def forward(self, x):
        return {"logits": super().forward(x)}


def test_a_model_that_gives_no_logits_is_refused_by_its_class():
    model, images = Described().eval(), images_for(OWN)
    data = [(images, torch.arange(4))]
    for call in (
        lambda: lib.prune(model, data, score="taylor"),
        lambda: lib.finetune(model, data),
        lambda: lib.finetune(Owner(), data, teacher=model),
    ):
        with pytest.raises(ValueError, match="Described returns dict .* must return logits"):
            call()
    with pytest.raises(ValueError, match="'mine' gives dict .* wrap the model in a module that"):
        lib.compare({"mine": model}, data)
    # what reads no logits takes it
    for changed in (lib.prune(model, data), lib.extract(model, data, count=2)):
        assert changed(images)["logits"].isfinite().all()
