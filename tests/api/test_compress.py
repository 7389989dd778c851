"""One model, every method, one table: what is made of what, what is refused, and what is saved."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest
import timm
import torch
from vits import batch, build

import lib
from lib import paths
from lib.api import compress
from lib.api.compress import AGAIN, METHODS, Rules
from lib.training.loop import Diverged

LOADER = [batch(12, seed=1), batch(12, seed=2)]
RULES = Rules(active=0.5, experts=4, layers=1, epochs=1.0, images=24)


@pytest.fixture(scope="module")
def outcome():
    """All methods on a two-block ViT, and the model that they were given."""
    dense = build()
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    found = compress.compress(dense, LOADER, LOADER, rules=RULES, batches=(1,))
    return dense, before, found


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_every_method_makes_its_model_and_the_given_one_stays(outcome):
    dense, before, found = outcome
    assert found.refused == {}
    assert list(found.models) == ["dense", AGAIN, *METHODS.values()] == list(found.table.index)
    assert found.models["dense"] is dense and not dense.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_models_have_the_size_that_the_rules_say(outcome):
    dense, _, found = outcome
    sizes = {name: parameters(model) for name, model in found.models.items()}
    width, hidden = dense.blocks[0].mlp.fc1.weight.T.shape
    expert = hidden * (2 * width + 1) + width
    # half of the neurons of two blocks
    assert sizes["dense"] - sizes["pruned, ridge"] == 2 * (hidden // 2) * (2 * width + 1)
    assert sizes["pruned, Taylor"] == sizes["pruned, ridge"]
    router = sizes["upcycled"] - sizes["dense"] - 3 * expert
    assert 0 < router <= 4 * (width + 1)  # a row an expert, perhaps a bias
    assert sizes["upcycled"] - sizes["experts dropped"] == 2 * expert + router // 2
    assert sizes[AGAIN] == sizes["dense"]


def test_without_further_passes_the_mixture_is_the_dense_function():
    dense = build()
    found = compress.compress(
        dense, LOADER, LOADER, ["upcycle"], Rules(layers=2, epochs=0), batches=(1,)
    )
    assert list(found.models) == ["dense", "upcycled"]
    images, _ = batch(4)
    assert torch.allclose(found.models["upcycled"](images), dense(images), atol=1e-5)


def test_what_a_model_does_not_admit_is_said_and_left_out(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("blocks.0.mlp has an inner norm")

    monkeypatch.setattr(compress, "prune", refuse)
    rules = Rules(epochs=0, images=24)
    found = compress.compress(build(), LOADER, LOADER, ["prune", "extract"], rules, batches=(1,))
    assert found.refused == {"pruned, ridge": "blocks.0.mlp has an inner norm"}
    assert list(found.models) == ["dense", "extracted"]
    assert "pruned, ridge: blocks.0.mlp has an inner norm" in compress.summary(found, {}, 2.0)


def test_a_model_that_no_method_fits_is_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(compress, "finetune", None)
    resnet = timm.create_model("test_resnet", num_classes=5)
    with pytest.raises(ValueError, match=r"no method .* fits this ResNet\. .*has no block MLP"):
        compress.compress(resnet, LOADER, LOADER)
    normed = build()
    for block in normed.blocks:
        block.mlp.norm = torch.nn.LayerNorm(block.mlp.fc2.in_features)
    read = []
    with pytest.raises(ValueError, match="extracted: blocks.0.mlp has a norm inside"):
        compress.compress(normed, Seen(LOADER, read), Seen(LOADER, read), ["extract"])
    assert not read


class Seen(list):
    """A loader that tells when it is read."""

    def __init__(self, batches, read):
        super().__init__(batches)
        self.read = read

    def __iter__(self):
        self.read.append(1)
        return super().__iter__()


def test_some_methods_that_fit_are_told_from_the_layers_alone():
    whole = timm.create_model("test_convnext2", num_classes=5)
    assert compress.refusals(whole, ["upcycle", "extract"]) == {}
    whole.stages[0].blocks[0].mlp.norm = torch.nn.LayerNorm(3)
    said = compress.refusals(whole.to("meta"))
    assert said["extracted"].startswith("stages.0.blocks.0.mlp has a norm inside")
    assert "upcycled" not in said and "experts dropped" not in said  # of the last blocks
    with pytest.raises(ValueError, match="unknown method cut"):
        compress.refusals(whole, ["cut"])


def test_test_images_that_the_model_does_not_take_are_refused_before_anything_is_trained(
    monkeypatch,
):
    monkeypatch.setattr(compress, "finetune", None)
    larger = [(torch.zeros(2, 3, 35, 35), torch.tensor([0, 1]))]
    with pytest.raises(ValueError, match=r"fails on images \(1, 3, 35, 35\) of test: .*28 x 28"):
        compress.compress(build(), LOADER, larger, rules=RULES)


def test_another_copy_is_trained_under_inference_mode_too():
    dense = build()
    with torch.inference_mode():
        found = compress.compress(dense, LOADER, LOADER, ["prune"], RULES, batches=(1,))
    for model in found.models.values():
        assert not any(parameter.is_inference() for parameter in model.parameters())


@pytest.mark.parametrize("error", [KeyError("aux.mlp"), Diverged(3, [1.0])], ids=["key", "loss"])
def test_a_method_that_fails_is_named_and_the_others_are_kept(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(compress, "prune", fail)
    rules = Rules(epochs=0, images=24)
    found = compress.compress(build(), LOADER, LOADER, ["extract", "taylor"], rules, batches=(1,))
    assert list(found.models) == ["dense", "extracted"] == list(found.table.index)
    assert found.refused == {"pruned, Taylor": f"failed, {type(error).__name__}: {error}"}


def test_a_loader_that_is_read_last_is_checked_first(monkeypatch):
    monkeypatch.setattr(compress, "finetune", None)
    with pytest.raises(ValueError, match="test is a list_iterator, which can be read once only"):
        compress.compress(build(), LOADER, iter(LOADER))


def test_experts_are_dropped_of_the_mixture_that_is_shown(monkeypatch):
    made = []
    monkeypatch.setattr(compress, "compare", lambda models, *_, **__: pd.DataFrame(index=models))
    finetune = compress.finetune
    monkeypatch.setattr(
        compress, "finetune", lambda m, *a, **k: made.append(m) or finetune(m, *a, **k)
    )
    found = compress.compress(build(), LOADER, LOADER, ["drop", "upcycle"], RULES)
    assert list(found.models) == ["dense", AGAIN, "upcycled", "experts dropped"]
    assert len(made) == 2  # dense again, and the mixture, once


def test_methods_are_checked_and_ordered():
    assert compress.checked(None) == tuple(METHODS)
    assert compress.checked(["extract", "drop", "extract"]) == ("drop", "extract")
    with pytest.raises(ValueError, match="unknown method cut, fold: valid are upcycle, drop"):
        compress.checked(["cut", "prune", "fold"])


def test_several_models_get_files_of_their_own_and_one_the_name_given(outcome, tmp_path):
    _, _, found = outcome
    files = compress.save_all(found, tmp_path / "small.safetensors")
    words = ["upcycled", "experts-dropped", "pruned-ridge", "pruned-taylor", "extracted"]
    assert [file.name for file in files.values()] == [f"small-{word}.safetensors" for word in words]
    one = compress.Compressed({"dense": build(), "extracted": found.models["extracted"]}, {}, None)
    assert compress.save_all(one, tmp_path / "one.safetensors") == {
        "extracted": tmp_path / "one.safetensors"
    }


def test_what_is_reloaded_computes_what_it_did_and_another_model_in_its_file_is_seen(
    outcome, tmp_path
):
    _, _, found = outcome
    files = compress.save_all(found, tmp_path / "small.safetensors")
    modes = [model.train(name == "extracted").training for name, model in found.models.items()]
    images, _ = batch(3)
    rows = compress.reloaded(found, files, images)
    assert rows["model"].tolist() == list(METHODS.values()) == list(files)
    assert rows["file"].tolist() == [file.name for file in files.values()]
    assert rows["mb"].tolist() == [file.stat().st_size / 1e6 for file in files.values()]
    assert rows["equal"].all()
    assert [model.training for model in found.models.values()] == modes

    wrong = {"pruned, Taylor": files["pruned, ridge"], "upcycled": files["upcycled"]}
    assert compress.reloaded(found, wrong, images)["equal"].tolist() == [False, True]
    none = compress.reloaded(found, {}, images)
    assert list(none) == ["model", "file", "mb", "equal"] and none.empty


def test_the_three_lines_reload_a_model_in_a_fresh_process(outcome, tmp_path):
    _, _, found = outcome
    files = compress.save_all(found, tmp_path / "small.safetensors", class_names=list("abcde"))
    images, _ = batch(3)
    torch.save(images, tmp_path / "images.pt")
    lines = compress.reloading(files["pruned, ridge"].name)
    code = f"import torch; images = torch.load('images.pt')\n{lines}\nprint(logits.tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(paths.ROOT), "PATH": "", "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        logits = found.models["pruned, ridge"].eval()(images)
    assert torch.allclose(torch.tensor(eval(done.stdout)), logits, atol=1e-5)
    assert len(lines.splitlines()) == 3
    assert lib.restore(files["extracted"]).class_names == list("abcde")


def table(**rows):
    """rows: difference and ms of each model; the low quantile of its times is 0.002 below."""
    low = 0.002
    return pd.DataFrame.from_dict(
        {
            name: {"difference": lost, "difference_low": lost - 0.5, "difference_high": lost + 0.5}
            | {"ms_1": ms, "ms_1_q10": ms - low}
            for name, (lost, ms) in rows.items()
        },
        orient="index",
    )


TIMED = {"dense": (0.0, 0.186), AGAIN: (0.1, 0.182)}


def test_models_that_are_level_in_time_are_told_apart_by_what_they_lose():
    made = {"pruned, ridge": (-0.2, 0.149), "pruned, Taylor": (-0.8, 0.148)}
    found = compress.Compressed({}, {}, table(**TIMED, **made))
    assert found.advice() == (
        "Take pruned, ridge: on this machine, in batches of 1, it takes 0.149 ms an image where "
        "dense takes 0.186 (1.25 times as fast), for -0.2 points of top-1 [-0.7, +0.3]; pruned, "
        "Taylor (0.148 ms) is level with it in time."
    )


def test_what_the_dense_model_takes_less_the_second_time_is_scatter():
    frame = table(**TIMED, pruned=(-0.2, 0.181))
    said = compress.Compressed({}, {}, frame).advice()
    assert "nothing here makes dense faster by more than times scatter" in said
    assert "of dense again is below 0.18 ms): pruned comes nearest" in said
    assert "takes 0.181 ms an image where dense takes 0.186 (1.03 times as fast)" in said
    alone = compress.Compressed({}, {}, frame.drop(index=AGAIN))
    assert alone.advice().startswith("Take pruned: ")


def test_nothing_is_advised_where_nothing_is_faster_or_nothing_was_made():
    slower = compress.Compressed({}, {}, table(**TIMED, upcycled=(0.4, 0.25)))
    said = slower.advice()
    assert "nothing here makes dense faster: upcycled comes nearest" in said and "Take" not in said
    none = "No method that was asked for can be applied to this model."
    assert compress.Compressed({}, {}, table(**TIMED)).advice() == none
    assert compress.Compressed({}, {}, table(dense=TIMED["dense"])).advice() == none
