"""What a file tells beside weights: class names, names of the model's own, plain attributes."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from small_classifier import Wrapped, loader, vit
from torch import nn

import lib
from lib.api.save import description_of

IMAGES = loader()[0][0]
NAMES = ["bath", "bed", "hall", "loft", "shed"]


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


# ---- class names


@pytest.mark.parametrize(
    "names, says",
    [
        ({name: i for i, name in enumerate(NAMES)}, "is a dict: give a list of words"),
        (set(NAMES), "is a set: give a list of words"),
        (5, "is a int: give a list of words"),
        (["bath", "bed", "bath", "loft", "bed"], "has 'bath', 'bed' more than once"),
        ([*NAMES[:4], 4], "must be a list of words"),
    ],
)
def test_class_names_without_an_order_or_with_doubles_are_refused(names, says, file):
    with pytest.raises(ValueError, match=f"class_names.*{says}"):
        lib.save(vit(), file, class_names=names)
    assert not file.exists()


@pytest.mark.parametrize("names", [tuple(NAMES), (name for name in NAMES), dict.fromkeys(NAMES)])
def test_class_names_of_any_sequence(names, file):
    lib.save(vit(), file, class_names=names.keys() if isinstance(names, dict) else names)
    assert lib.restore(file).class_names == NAMES


# ---- names of the model's own


class Norm(nn.Module):
    def forward(self, x):
        return 2 * x


class Preprocessed(nn.Module):
    """A model that keeps a module where a file's information on images would stand."""

    def __init__(self, preprocessing):
        super().__init__()
        self.preprocessing, self.trunk = preprocessing, vit()

    def forward(self, x):
        return self.trunk(self.preprocessing(x))


def twice(x):
    return 2 * x


@pytest.mark.parametrize("own", [Norm(), twice], ids=["module", "function"])
def test_preprocessing_of_ones_own_stays(own, file):
    model = Preprocessed(own)
    lib.save(model, file, preprocessing={"size": [14, 14]})
    restored = lib.restore(file, Preprocessed(own))
    assert restored.preprocessing is own
    assert torch.equal(restored(IMAGES), model.eval()(IMAGES))
    assert description_of(file)["preprocessing"] == {"size": [14, 14]}
    with pytest.raises(ValueError, match="preprocessing=.* is a Norm: give a dict"):
        lib.save(model, file, preprocessing=Norm())
    if own is twice:
        with pytest.raises(ValueError, match="preprocessing is 'function twice' in the saved"):
            lib.restore(file, Preprocessed(torch.neg))


class Owned(nn.Module):
    def __init__(self, name, value):
        super().__init__()
        self.trunk = vit()
        setattr(self, name, value)

    def forward(self, x):
        return self.trunk(x)


@pytest.mark.parametrize(
    "name, call",
    [
        ("pruning", lambda model: lib.prune(model, loader())),
        ("extraction", lambda model: lib.extract(model, loader())),
        ("upcycling", lambda model: lib.upcycle(model, layers=1, experts=2)),
        ("finetuning", lambda model: lib.finetune(model, loader())),
        ("dropping", lambda model: lib.drop_experts(model, loader())),
    ],
)
@pytest.mark.parametrize("value", [nn.Linear(2, 2), 0.5, ["words"]], ids=str)
def test_names_of_notes_are_refused_before_any_work(name, call, value, monkeypatch):
    model = Owned(name, value)
    monkeypatch.setattr(Owned, "forward", None)  # nothing may run
    with pytest.raises(ValueError, match=rf"model.{name} is a \w+ of the model's own"):
        call(model)


@pytest.mark.parametrize("value", [nn.Linear(2, 2), 0.5], ids=str)
def test_what_is_no_note_is_saved_as_what_it_is(value, file):
    lib.save(Owned("pruning", value), file)
    new = Owned("pruning", value)
    assert lib.restore(file, new).pruning is value
    assert description_of(file)["steps"] == {}


# ---- plain attributes


class Scaled(Wrapped):
    def __init__(self, factor):
        super().__init__(vit())
        self.factor = factor

    def forward(self, x):
        factor = self.factor["by"] if isinstance(self.factor, dict) else self.factor
        return factor * super().forward(x)


@pytest.mark.parametrize(
    "factor, other",
    [
        (torch.tensor(2.0), torch.tensor(3.0)),
        (torch.full((5,), 2.0), torch.full((1,), 2.0)),
        ({"by": 2.0}, {"by": 3.0}),
    ],
    ids=["number", "shape", "dict"],
)
def test_tensors_and_dicts_are_compared(factor, other, file):
    model = Scaled(factor).eval()
    lib.save(model, file)
    assert torch.equal(lib.restore(file, Scaled(factor))(IMAGES), model(IMAGES))
    with pytest.raises(ValueError, match="the model itself: factor is .* in the saved model"):
        lib.restore(file, Scaled(other))


def test_what_a_pass_leaves_behind_is_not_compared(file):
    model = Scaled(1.0)
    model.seen = model(IMAGES).detach()
    lib.save(model, file)
    lib.restore(file, Scaled(1.0))


def doubled(self, x):
    return 2 * type(self).forward(self, x)


@pytest.mark.parametrize("part", ["", "trunk.blocks.0.mlp"])
@pytest.mark.parametrize("how", [types.MethodType, functools.partial], ids=["method", "partial"])
def test_a_forward_that_was_set_on_a_module_is_refused(part, how, file):
    model = Wrapped(vit())
    module = model.get_submodule(part)
    module.forward = how(doubled, module)
    name = part or "the model"
    with pytest.raises(ValueError, match=f"{name} .* has a forward that was set on the module"):
        lib.save(model, file)
    assert not file.exists()


class Chosen(Wrapped):
    def __init__(self):
        super().__init__(vit())
        self.forward = self.other

    def other(self, x):
        return -super().forward(x)


def test_a_method_of_the_class_and_packed_weights_are_saved(file, recwarn):
    model = Chosen().eval()
    lib.save(model, file)
    assert torch.equal(lib.restore(file, Chosen())(IMAGES), model(IMAGES))
    lib.save(lib.freeze_for_inference(vit()), file)
    assert torch.equal(lib.restore(file)(IMAGES), vit()(IMAGES))


# ---- what is given


def test_what_is_no_module_is_refused_and_home_is_home(tmp_path, monkeypatch, file):
    with pytest.raises(ValueError, match="model is a (Ordered)?[dD]ict: give a torch.nn.Module"):
        lib.save(vit().state_dict(), file)
    lib.save(Wrapped(vit()), file)
    with pytest.raises(ValueError, match=r"model is a class.*restore\(path, Wrapped\(\.\.\.\)\)"):
        lib.restore(file, Wrapped)
    with pytest.raises(ValueError, match="model is a dict: give a new module"):
        lib.restore(file, {})
    monkeypatch.setenv("HOME", str(tmp_path))
    lib.save(vit(), "~/at_home.safetensors")
    assert (tmp_path / "at_home.safetensors").exists()
    lib.restore("~/at_home.safetensors")
