"""The page that makes the reader's own model smaller: what its parameters ask for."""

from __future__ import annotations

import lib


def planned(**given):
    [run] = lib.plan("your_model/compress", "quick", **given)["dense"]
    return run


def test_with_no_epochs_the_given_weights_are_taken_as_they_are():
    run = planned(epochs=0.0, weights="file:mine.safetensors")
    assert run.train is None and run.backbone.weights == "file:mine.safetensors"
    assert planned(epochs=0.5).train.epochs == 0.5


def test_the_grid_of_a_weight_file_can_be_given():
    assert planned(weights="file:mine.safetensors", patch_grid=[8, 2]).backbone.grid == (8, 2)
    assert planned().backbone.grid is None


def test_by_default_the_model_is_trained_first():
    assert planned().train.epochs > 0
    assert planned().keep and planned().seed == 0


def test_only_a_model_or_images_that_are_named_make_it_the_readers_own():
    def named(**given):
        of_base = lib.profile("your_model/compress", "quick", **given).of_base
        return {"data", "backbone", "weights"} & of_base.keys()

    assert named() == named(epochs=0.5, seed=3, level=0.3, device="cpu") == set()
    assert named(data="rooms") == {"data"}
    assert named(backbone="deit_tiny_patch16_224", weights="timm") == {"backbone", "weights"}
