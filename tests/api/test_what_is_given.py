"""Small mistakes in what is given get an answer in the caller's words, before any work."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_classifier import H, loader, same_state, state_of, vit

import lib
from lib.api.compress import Rules, compress
from lib.spec import RunSpec


@pytest.mark.parametrize("seed", [-1, 0.5, None, True, 2**63])
@pytest.mark.parametrize("call", [lib.prune, lib.extract], ids=lambda call: call.__name__)
def test_seeds_are_whole_numbers(call, seed):
    with pytest.raises(ValueError, match=f"seed={seed}: give a whole number of at least 0"):
        call(vit(), loader(), seed=seed)


def test_seeds_may_come_out_of_numpy():
    model = vit()
    same = [lib.prune(model, loader(), 0.5, images=8, seed=s) for s in (1, *np.arange(1, 2))]
    assert same_state(same[0], state_of(same[1]))


def wrapped():
    return torch.nn.DataParallel(vit()), torch.compile(vit(), backend="eager")


@pytest.mark.parametrize("wrapper", wrapped(), ids=lambda wrapper: type(wrapper).__name__)
def test_wrappers_are_refused_by_name(wrapper):
    """Compiled passes fire no hooks, and gradients of new parameters are averaged by nobody."""
    says = f"{type(wrapper).__name__} wraps a model: give model.(module|_orig_mod), and wrap"
    for call in (lib.prune, lib.extract, lib.drop_experts):
        with pytest.raises(ValueError, match=says):
            call(wrapper, loader())
    with pytest.raises(ValueError, match=says):
        lib.upcycle(wrapper, experts=2, layers=1)


@pytest.mark.parametrize("keep, stay", [(0.4, "1.6"), (0.1, "0.4")])
def test_a_share_of_experts_is_refused_in_the_words_that_were_given(keep, stay):
    model = lib.upcycle(vit(), layers=1, experts=4, router="token")
    with pytest.raises(ValueError, match=f"keep={keep} of the 4 experts of blocks.1.mlp is {stay}"):
        lib.drop_experts(model, loader(), keep=keep)
    with pytest.raises(ValueError, match="seed=-1: give a whole number"):
        lib.drop_experts(model, loader(), seed=-1)


@pytest.mark.parametrize("options", [{"keep": 0.5, "round_to": H}, {"keep": 0.999}], ids=str)
def test_what_keeps_all_neurons_is_not_repaired(options):
    model = vit()
    small = lib.prune(model, loader(), **options)
    assert same_state(small, state_of(model)) and small.pruning == []


def test_some_layers_that_keep_all_are_left_alone():
    small = lib.prune(vit(), loader(), {"blocks.0": 0.5, "*": 0.99}, round_to=H // 2)
    assert [(row["layer"], row["after"]) for row in small.pruning] == [("blocks.0.mlp", H // 2)]


@pytest.mark.parametrize("what", ["model", {"weight": torch.ones(2)}], ids=["word", "state"])
def test_only_modules_are_exported(what):
    with pytest.raises(ValueError, match="model is a (str|dict): give a torch.nn.Module"):
        lib.for_export(what)


@pytest.mark.parametrize("read", [lib.collect, lib.load], ids=["collect", "load"])
@pytest.mark.parametrize(
    "grid, kind",
    [
        ({"a": RunSpec()}, "RunSpec"),
        ([RunSpec()], "list"),
        (RunSpec(), "RunSpec"),
        ({"a": ["dense"]}, "list"),
        ({"a": (spec for spec in ())}, "generator"),
    ],
)
def test_a_grid_is_lists_of_specs_by_name(read, grid, kind):
    with pytest.raises(ValueError, match=f"a grid has a {kind} where a list of specs is to be"):
        read(grid)


def batches_of(channels, side, value=None):
    """Two batches of four images."""
    images = torch.randn(8, channels, side, side, generator=torch.Generator().manual_seed(4))
    if value is not None:
        images[6, 0, 0, 0] = value
    return list(zip(images.split(4), (torch.arange(8) % 5).split(4), strict=True))


READS_IMAGES = {
    "finetune": lambda given: lib.finetune(vit(), given),
    "val": lambda given: lib.finetune(vit(), loader(), given),
    "compare": lambda given: lib.compare({"small": vit()}, given, batches=(1,)),
    "prune": lambda given: lib.prune(vit(), given),
    "taylor": lambda given: lib.prune(vit(), given, score="taylor"),
    "extract": lambda given: lib.extract(vit(), given),
    "drop_experts": lambda given: lib.drop_experts(
        lib.upcycle(vit(), layers=1, experts=4, router="token"), given
    ),
    "compress": lambda given: compress(vit(), given, loader(), ["prune"], Rules(images=8)),
}


@pytest.mark.parametrize("channels, side", [(3, 20), (1, 14)], ids=["larger", "grey"])
@pytest.mark.parametrize("call", READS_IMAGES)
def test_images_that_a_model_does_not_run_on_are_named_with_what_it_is_built_for(
    call, channels, side
):
    says = (
        rf"fails on images \(\d, {channels}, {side}, {side}\) of (loader|val): .*\. Give it images "
    )
    with pytest.raises(ValueError, match=says + r"of what .* \(3 channels, 14 x 14\), .*img_size="):
        READS_IMAGES[call](batches_of(channels, side))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("call", READS_IMAGES)
def test_images_that_are_not_finite_are_no_fault_of_the_model(call, value):
    says = r"(loader|val) gave images with numbers that are not finite .*, 1 of the 4 of a batch:"
    with pytest.raises(ValueError, match=says):
        READS_IMAGES[call](batches_of(3, 14, value))


def test_images_that_a_model_takes_of_any_size_are_not_refused():
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model.append(torch.nn.Linear(3, 5))
    assert lib.finetune(model, batches_of(3, 14) + batches_of(3, 20), epochs=1) is not model
    with pytest.raises(
        ValueError, match=r"Sequential fails .* what it is built for, as torchvision"
    ):
        lib.finetune(model, batches_of(1, 14))
