"""What torch has on around a call: autocast, inference_mode and no_grad change no outcome."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_classifier import images_and_labels, loader, same_state, state_of, vit

import lib

IMAGES, LABELS = images_and_labels()
MODES = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
}


def mixture(model, **options):
    generator = torch.Generator().manual_seed(3)
    return lib.upcycle(model, layers=1, experts=4, router="token", generator=generator, **options)


CALLS = {
    "prune": lambda model: lib.prune(model, loader()),
    "prune, in place": lambda model: lib.prune(model, loader(), repair="mean", inplace=True),
    "taylor": lambda model: lib.prune(model, loader(), score="taylor", parts=("attention",)),
    "extract": lambda model: lib.extract(model, loader(), count=3),
    "moefication": lambda model: lib.extract(
        model, loader(), clusters="moefication", count=2, ignore=["blocks.0.*"]
    ),
    "upcycle": mixture,
    "upcycle, in place": lambda model: mixture(model, inplace=True),
    "drop": lambda model: lib.drop_experts(mixture(model), loader(), score="reap"),
    "merge": lambda model: lib.drop_experts(mixture(model), loader(), score="merge"),
    "export": lib.for_export,
}


@pytest.fixture(scope="module")
def plain():
    """The states that the calls leave without any mode around them."""
    return {name: state_of(call(vit())) for name, call in CALLS.items()}


def trains(model):
    """Says whether a model can be trained on: each gradient is there, and is no inference one."""
    model = copy.deepcopy(model).train()
    F.cross_entropy(model(IMAGES), LABELS).backward()
    return not any(tensor.is_inference() for tensor in model.state_dict(keep_vars=True).values())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("call", CALLS)
def test_the_outcome_is_that_of_the_call_without_the_mode(call, mode, plain):
    model = vit()
    with MODES[mode]():
        made = CALLS[call](model)
        assert torch.is_inference_mode_enabled() == (mode == "inference")  # on again
        assert torch.is_autocast_enabled("cpu") == (mode == "autocast")
    assert same_state(made, plain[call])
    assert not any(tensor.is_inference() for tensor in made.state_dict(keep_vars=True).values())
    assert trains(made)


def test_what_is_restored_under_inference_mode_can_be_trained(tmp_path):
    lib.save(lib.prune(vit(), loader()), tmp_path / "small.safetensors")
    with torch.inference_mode():
        restored = lib.restore(tmp_path / "small.safetensors")
    assert trains(restored)


@pytest.mark.parametrize("mode", ["inference", "no_grad"])
def test_finetuning_equals_that_without_the_mode(mode):
    want = lib.finetune(vit(), loader(), loader(), epochs=1)
    with MODES[mode]():
        # also on tensors that are made under it
        batches = [(images.mul(1), labels.add(0)) for images, labels in loader()]
        trained = lib.finetune(vit(), batches, batches, epochs=1)
    outside = lib.finetune(vit(), batches, batches, epochs=1)
    assert same_state(trained, state_of(want)) and same_state(outside, state_of(want))
    assert trained.finetuning == want.finetuning


def test_weights_made_under_inference_mode_are_trained_in_a_copy_alone():
    with torch.inference_mode():
        model = vit()
    assert trains(lib.finetune(model, loader(), epochs=1))
    with pytest.raises(ValueError, match="was made under torch.inference_mode.*inplace=False"):
        lib.finetune(model, loader(), epochs=1, inplace=True)


def test_passes_of_finetuning_are_in_the_autocast_of_the_caller_and_steps_are_not():
    model, teacher = mixture(vit()), vit()
    seen = {"logits": set(), "taught": set(), "backward": set()}
    model.head.register_forward_hook(lambda *args: seen["logits"].add(args[-1].dtype))
    teacher.head.register_forward_hook(lambda *args: seen["taught"].add(args[-1].dtype))
    model.norm.register_full_backward_hook(
        lambda *_: seen["backward"].add(torch.is_autocast_enabled("cpu"))
    )
    with MODES["autocast"]():
        trained = lib.finetune(model, loader(), loader(), epochs=1, teacher=teacher)
    assert seen == {"logits": {torch.bfloat16}, "taught": {torch.bfloat16}, "backward": {False}}
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert not same_state(trained, state_of(model))


def test_autocast_to_float16_is_refused_where_losses_are_not_scaled():
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match="float16 rounds small gradients .* torch.bfloat16"),
    ):
        lib.finetune(vit(), loader())
