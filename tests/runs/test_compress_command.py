"""The words of the command `compress` make a run, and refuse what cannot be one."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from data_folders import encoded, put
from safetensors.torch import load_file, save_file

import lib
from lib.__main__ import main
from lib.runs import compress

MODEL = "test_vit"


def words(*given):
    """The arguments of a command line, with a model and a file to write."""
    parser = argparse.ArgumentParser()
    compress.add(parser.add_subparsers())
    return parser.parse_args(
        ["compress", "--model", f"timm:{MODEL}", "-o", "a.safetensors", *given]
    )


@pytest.fixture
def rooms(home, tmp_path):
    """A folder of two classes, that is not under MOE_DATA."""
    folder = tmp_path / "pictures" / "rooms"
    values = {"bath": range(10, 40), "kitchen": range(200, 230)}
    for name, greys in values.items():
        put(folder, {f"{name}/{grey}.png": encoded(grey, (32, 32)) for grey in greys})
    return folder


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A file of weights with a head for two classes. What names its folder to a run is restored."""
    monkeypatch.delenv("MOE_WEIGHTS", raising=False)
    file = tmp_path / "shelf" / "mine.safetensors"
    file.parent.mkdir()
    torch.manual_seed(0)
    save_file(timm.create_model(MODEL, num_classes=2, img_size=32).state_dict(), file)
    return file


def test_a_folder_and_a_file_become_names_under_their_variables(rooms, weights, monkeypatch):
    monkeypatch.setenv("MOE_WEIGHTS", "elsewhere")
    given = ["--data", str(rooms), "--weights", f"file:{weights}", "--size", "32"]
    run = compress.dense_run(words(*given, "--epochs", "2", "--seed", "5", "--threads", "1"))
    sha256 = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (run.data.name, run.data.image_size, run.data.augment) == ("rooms", 32, "flip")
    assert (run.backbone.name, run.backbone.weights) == (MODEL, f"file:mine.safetensors@{sha256}")
    assert (run.train.epochs, run.train.lr, run.seed, run.threads) == (2.0, compress.LR, 5, 1)
    assert os.environ["MOE_DATA"] == str(rooms.parent)
    assert os.environ["MOE_WEIGHTS"] == str(weights.parent)


def test_the_grid_of_a_weight_file_is_that_of_the_command_line(rooms, weights):
    given = ["--data", str(rooms), "--weights", f"file:{weights}", "--size", "32"]
    assert compress.dense_run(words(*given)).backbone.grid is None
    assert compress.dense_run(words(*given, "--grid", "8", "2")).backbone.grid == (8, 2)
    with pytest.raises(ValueError, match="grid.*is of the positions in a weight file"):
        compress.dense_run(words("--data", "mnist5k", "--grid", "8", "2"))


def test_random_weights_take_larger_steps_and_the_size_is_the_architectures():
    run = compress.dense_run(words("--data", "mnist5k", "--weights", "none"))
    assert (run.backbone.weights, run.train.lr) == (None, compress.LR_FROM_NOTHING)
    assert run.data.image_size == timm.get_pretrained_cfg(MODEL).input_size[-1]


def test_a_trained_model_is_taken_as_it_is_if_it_has_a_head(rooms, weights):
    given = ["--data", str(rooms), "--weights", f"file:{weights}", "--size", "32", "--epochs", "0"]
    assert compress.dense_run(words(*given)).train is None
    put(rooms, {f"hall/{grey}.png": encoded(grey, (32, 32)) for grey in range(100, 130)})
    from lib.inputs import sources

    sources.forget()
    with pytest.raises(ValueError, match=r"no head for the 3 classes of rooms .*give --epochs 1"):
        compress.dense_run(words(*given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--weights", "file:absent.safetensors"], "no file absent.safetensors, here or under"),
        (["--weights", "best", "--epochs", "0"], "weights='best' is unknown"),
        (["--weights", "none", "--epochs", "0"], "no head for the 10 classes of mnist5k"),
        (["--weights", "none", "--epochs", "-1"], "epochs=-1.0"),
        (["--weights", "none", "--size", "0"], "image_size"),
    ],
)
def test_what_cannot_be_a_run_is_refused(given, says):
    with pytest.raises((ValueError, OSError)) as error:
        compress.dense_run(words("--data", "mnist5k", *given))
    assert says in str(error.value)


def test_a_folder_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for given in (str(tmp_path / "rooms"), "~/absent/rooms", "./rooms", "../rooms"):
        with pytest.raises(FileNotFoundError, match=f"--data {given}: no such folder"):
            compress.dense_run(words("--data", given))


@pytest.mark.parametrize("out", ["small.pth", "small"])
def test_other_files_are_refused_before_any_work(out):
    with pytest.raises(ValueError, match="end in .safetensors"):
        compress.run(words("--data", "mnist5k", "-o", out))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--active", "0"], "--active 0.0: give a share above 0 and at most 1"),
        (["--active", "1.5"], "--active 1.5: give a share"),
        (["--active", "nan"], "--active nan: give a share"),
        (["--tune", "-1"], "--tune -1.0: give passes over the images, 0 or more"),
        (["--epochs", "-2"], "--epochs -2.0: give passes"),
        (["--tune", "inf"], "--tune inf: give passes"),
        (["--seed", "-1"], "--seed -1: give a whole number"),
    ],
)
def test_options_are_refused_in_their_words_before_any_work(given, says, monkeypatch):
    monkeypatch.setattr(compress, "dense_run", None)
    with pytest.raises(ValueError, match=says):
        compress.run(words("--data", "mnist5k", *given))


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(compress, "dense_run", None)
    (tmp_path / "notes").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    for out, says in (
        (tmp_path / "notes" / "a.safetensors", "notes is no folder: name a file in a folder"),
        (tmp_path / "folder.safetensors", "models are saved as files"),
    ):
        with pytest.raises(ValueError, match=says):
            compress.run(words("--data", "mnist5k", "-o", str(out)))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be written to: name a file"):
        compress.run(words("--data", "mnist5k", "-o", str(tmp_path / "new" / "a.safetensors")))
    assert not (tmp_path / "new").exists()


def test_unknown_methods_are_refused_before_any_work():
    with pytest.raises(ValueError, match="unknown method shrink: valid are upcycle, drop, prune"):
        compress.run(words("--data", "mnist5k", "--method", "prune", "shrink"))


def test_the_file_is_relative_to_the_folder_of_the_user():
    assert words("--data", "mnist5k").out == Path("a.safetensors")


def command(rooms, out, *given):
    """Calls the command for a few passes of a small model."""
    sizes = ["--size", "32", "--epochs", "1", "--tune", "0", "--threads", "1"]
    model = ["--model", f"timm:{MODEL}", "--weights", "none", "--data", str(rooms)]
    return main(["compress", *model, *sizes, "-o", str(out), *given])


def test_from_a_folder_to_a_file_that_reloads(rooms, tmp_path, capsys):
    out = tmp_path / "small.safetensors"
    assert command(rooms, out, "--method", "prune", "--active", "0.25") == 0
    said = capsys.readouterr().out
    assert "top1" in said and "pruned, ridge" in said and f'restore("{out}")' in said
    small = lib.restore(out)
    whole = timm.create_model(MODEL, num_classes=2, img_size=32)
    assert small.blocks[0].mlp.fc1.out_features == whole.blocks[0].mlp.fc1.out_features // 4
    assert small.class_names == ["bath", "kitchen"] and small.preprocessing["size"] == 32
    assert small(torch.zeros(2, 3, 32, 32)).shape == (2, 2)


def test_the_table_stands_before_a_file_fails(rooms, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr("lib.api.compress.save_all", full)
    assert command(rooms, tmp_path / "small.safetensors", "--method", "prune") != 0
    said = capsys.readouterr()
    assert "top1" in said.out and "pruned, ridge" in said.out
    assert "No space left on device" in said.err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (
            ["--model", "timm:test_resnet"],
            r"fits this ResNet\. .*extracted: ResNet has no block MLP",
        ),
        (["--model", "timm:pvt_v2_b0", "--size", "56"], "fits this Pyramid.*takes x, feat_size"),
        (
            ["--model", "timm:maxvit_rmlp_pico_rw_256", "--size", "40"],
            r"fails on images \(1, 3, 40, 40\) of --data at --size 40: .* 256 x 256",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name_before_the_training(
    given, says, rooms, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("lib.runs.collect.model_of", None)
    out = tmp_path / "small.safetensors"
    assert command(rooms, out, *given) == 2
    assert re.search(says, capsys.readouterr().err)
    assert not out.exists()


@pytest.mark.parametrize("epochs", ["0", "1"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
            r"expected cls_token .* absent.*begin with 'module.', .*name.removeprefix\('module.'",
        ),
        (
            lambda state: state | {"norm.weight": torch.ones(7)},
            r"do not fit VisionTransformer: .*norm.weight is \(7,\), expected \(64,\)",
        ),
    ],
    ids=["prefixed", "other size"],
)
def test_weights_that_do_not_fit_are_named_and_not_the_head(
    change, says, epochs, rooms, weights, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("lib.runs.collect.model_of", None)
    save_file(change(load_file(weights)), weights)
    given = ["--weights", f"file:{weights}", "--epochs", epochs]
    assert command(rooms, tmp_path / "small.safetensors", *given) == 2
    said = capsys.readouterr().err
    assert re.search(says, said) and "no head" not in said
