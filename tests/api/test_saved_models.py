"""A model that was saved and restored is the same function, whatever was done to it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from changed_vits import CHANGED, LAYER, Net, dropped, ensemble_of, extracted, images
from safetensors.torch import load_file
from timm.layers import DropPath
from torch import nn
from vits import build, moe, prune

import lib
from lib.api import save as files
from lib.models.experts import Experts

ROOT = Path(__file__).resolve().parents[2]


def same_function(model, restored, x=None):
    x = images() if x is None else x
    before, after = model.state_dict(), restored.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(module.training for module in restored.modules())
    with torch.no_grad():
        assert torch.equal(model(x), restored(x))


@pytest.mark.parametrize("name", CHANGED)
def test_restored_is_the_same_function(name, tmp_path):
    model = CHANGED[name]()
    lib.save(model, tmp_path / "model.safetensors")
    drawn_before = torch.get_rng_state()
    restored = lib.restore(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), drawn_before)  # nothing was drawn
    same_function(model, restored)
    lib.save(restored, tmp_path / "again.safetensors")
    first, again = ((tmp_path / f"{file}.safetensors").read_bytes() for file in ("model", "again"))
    assert first == again


def test_manual_routing_keeps_its_table(tmp_path):
    from lib.routers.manual import labelled

    model = build(moe=moe(router="manual", groups=((0, 3), (1,), (2, 4)), balance="none"))
    lib.save(model, tmp_path / "model.safetensors")
    restored = lib.restore(tmp_path / "model.safetensors")
    labels = torch.tensor([4, 1, 3, 2])
    with torch.no_grad(), labelled(model, labels), labelled(restored, labels):
        assert torch.equal(model(images()), restored(images()))


def test_random_routing_repeats(tmp_path):
    model = extracted(router="random")
    lib.save(model, tmp_path / "model.safetensors")
    same_function(model, lib.restore(tmp_path / "model.safetensors"))


def test_in_a_fresh_process(tmp_path):
    model = prune(build(moe=moe(shared=True, top_k=2)), 0.25)
    lib.save(model, tmp_path / "model.safetensors")
    with torch.no_grad():
        torch.save((images(), model(images())), tmp_path / "wanted.pt")
    code = (
        "import sys, lib, torch\n"
        "images, wanted = torch.load(sys.argv[1], weights_only=True)\n"
        "model = lib.restore(sys.argv[2])\n"
        "print(torch.equal(model(images), wanted))"
    )
    files_of_both = [str(tmp_path / name) for name in ("wanted.pt", "model.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", code, *files_of_both], capture_output=True, text=True, cwd=ROOT
    )
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        {"reg_tokens": 2, "no_embed_class": True, "in_chans": 1, "num_classes": 3},
        {"class_token": False, "global_pool": "avg", "fc_norm": True},
        {"init_values": 1e-5, "drop_path_rate": 0.3, "drop_rate": 0.1, "proj_drop_rate": 0.2},
        {"qkv_bias": False, "qk_norm": True, "pre_norm": True, "pos_embed": "none"},
        {"depth": 3, "num_heads": 3, "embed_dim": 30, "mlp_ratio": 1.5, "num_classes": 0},
    ],
)
def test_arguments_are_read_off_the_model(arguments, tmp_path):
    model = build(**arguments)
    lib.save(model, tmp_path / "model.safetensors")
    restored = lib.restore(tmp_path / "model.safetensors")
    same_function(model, restored, images()[:, : model.in_chans])
    before, after = (
        [
            (m.p if isinstance(m, nn.Dropout) else m.drop_prob)
            for m in net.modules()
            if isinstance(m, nn.Dropout | DropPath)
        ]
        for net in (model, restored)
    )
    assert before == after


@pytest.mark.parametrize(
    "name, arguments, size",
    [
        ("swin_tiny_patch4_window7_224", {"img_size": 56, "depths": (1, 1), "embed_dim": 24}, 56),
        ("convnext_atto", {"num_classes": 3, "depths": (1, 1, 1, 1), "drop_path_rate": 0.1}, 32),
        ("beit_base_patch16_224", {"img_size": 32, "depth": 1, "num_classes": 3}, 32),
        ("eva02_tiny_patch14_224", {"img_size": 28, "depth": 1}, 28),
        ("vit_small_patch16_dinov3", {"img_size": 32, "depth": 1}, 32),
    ],
)
def test_other_architectures(name, arguments, size, tmp_path):
    """Among them models with buffers that no state holds."""
    import timm

    model = timm.create_model(name, **arguments).eval()
    lib.save(model, tmp_path / "model.safetensors")
    restored = lib.restore(tmp_path / "model.safetensors")
    same_function(model, restored, torch.randn(2, 3, size, size))


def test_a_cut_depth_in_bfloat16_and_frozen(tmp_path):
    model = build(depth=4)
    model.blocks = model.blocks[:3]
    model = model.bfloat16()
    model.patch_embed.requires_grad_(False)
    lib.save(model, tmp_path / "model.safetensors")
    restored = lib.restore(tmp_path / "model.safetensors")
    same_function(model, restored, images().bfloat16())
    frozen = [name for name, weight in restored.named_parameters() if not weight.requires_grad]
    assert frozen == ["patch_embed.proj.weight", "patch_embed.proj.bias"]


# ---- modules of one's own


def test_a_module_of_ones_own(tmp_path):
    model = Net().eval()
    prune(model.trunk, 0.5, "mlp", "attention")
    lib.save(model, tmp_path / "net.safetensors")
    same_function(model, lib.restore(tmp_path / "net.safetensors", Net()))
    with pytest.raises(ValueError, match=r"holds a Net, a class of your own: .*Net\(...\)"):
        lib.restore(tmp_path / "net.safetensors")


def test_an_ensemble(tmp_path):
    model = ensemble_of()
    lib.save(model, tmp_path / "net.safetensors")
    same_function(model, lib.restore(tmp_path / "net.safetensors", ensemble_of()))


@pytest.mark.parametrize(
    "other, says",
    [
        (lambda: Net(heads=3), "trunk.blocks.0.attn: num_heads is 2 in the saved model, 3 here"),
        (lambda: Net(classes=4), r"head.1: out_features is 5 .* 4 here"),
        (lambda: Net().trunk, "a layer there and the VisionTransformer has none"),
        (lambda: nn.Sequential(Net()), "trunk.blocks.0.attn: the saved model has a layer there"),
    ],
)
def test_another_module_is_refused(other, says, tmp_path):
    lib.save(Net(), tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=says):
        lib.restore(tmp_path / "net.safetensors", other())


def test_another_activation_is_refused(tmp_path):
    model, other = Net(), Net()
    other.trunk.blocks[1].mlp.act = nn.ReLU()
    lib.save(model, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="trunk.blocks.1.mlp: .*GELU"):
        lib.restore(tmp_path / "net.safetensors", other)


def test_a_layer_that_is_a_mixture_already_is_refused(tmp_path):
    lib.save(build(moe=moe(experts=3)), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=f"{LAYER}: the module has another MoE layer"):
        lib.restore(tmp_path / "model.safetensors", build(moe=moe(experts=4)))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.second.weight = self.first.weight
        table = torch.randn(2, 3, 64)
        self.register_buffer("row", table[1])

    def forward(self, x):
        return self.second(self.first(x)) + self.row.sum(0)


def test_shared_memory_is_written_once_and_shared_again(tmp_path):
    model = Tied().eval()
    lib.save(model, tmp_path / "tied.safetensors")
    assert "second.weight" not in load_file(tmp_path / "tied.safetensors")
    restored = lib.restore(tmp_path / "tied.safetensors", Tied())
    assert restored.second.weight is restored.first.weight
    same_function(model, restored, torch.randn(2, 64))


# ---- what a file says


def test_a_file_says_what_it_is(tmp_path):
    model = prune(build(moe=moe(top_k=2, gate="renormalised")), 0.25, "mlp")
    model.extraction, model.pruning = [{"layer": LAYER, "error": 0.5}], [{"share": torch.tensor(1)}]
    preprocessing = {"mean": [0.5], "std": [0.25], "size": [28, 28], "interpolation": "bilinear"}
    names = ["bath", "bed", "hall", "kitchen", "office"]
    file = tmp_path / "model.safetensors"
    lib.save(model, file, class_names=names, preprocessing=preprocessing)
    said = files.description_of(file)
    assert said["format"] == 1 and torch.__version__.startswith(said["versions"]["torch"])
    assert said["architecture"]["timm"].startswith("vit_tiny_patch16_224")
    assert said["architecture"]["arguments"]["depth"] == 2
    layer = said["structure"][LAYER]
    assert layer["router"]["top_k"] == 2 and layer["router"]["gate"] == "renormalised"
    assert layer["experts"]["widths"] == [96, 96, 96]
    assert said["structure"]["blocks.0.mlp"]["shapes"]["fc1.weight"] == [72, 24]
    restored = lib.restore(file)
    assert restored.class_names == names and restored.preprocessing == preprocessing
    assert list(said["steps"]) == ["extraction", "pruning"]  # in the order of what was done
    assert restored.extraction == model.extraction and restored.pruning == [{"share": 1}]


def test_preprocessing_is_that_of_timm(tmp_path):
    for model in (build(), Net()):
        lib.save(model, tmp_path / "model.safetensors")
        said = files.description_of(tmp_path / "model.safetensors")["preprocessing"]
        assert said["size"] == [28, 28] and said["mean"] == [0.5, 0.5, 0.5]
        assert said["interpolation"] == "bicubic"


def test_small_models_are_small_files(tmp_path):
    sizes = {}
    built = {
        "dense": build(),
        "pruned": prune(build(), 0.5, "mlp"),
        "dropped": dropped("zero_update", build(moe=moe())),
        "upcycled": build(moe=moe()),
        "copies": extracted("copies"),
        "inputs": extracted("inputs"),
        "shared": extracted("shared"),
    }
    for name, model in built.items():
        file = tmp_path / f"{name}.safetensors"
        lib.save(model, file)
        sizes[name] = file.stat().st_size
        tensors = load_file(file)
        stored = sum(tensor.nbytes for tensor in tensors.values())
        # beside the tensors: the description, and a line of safetensors for each
        said = json.dumps(files.description_of(file))
        assert sizes[name] - stored < 1.2 * len(said) + 150 * len(tensors)
    removed = 2 * 48 * (24 + 1 + 24) * 4  # of two blocks: neurons, their weights, float32
    assert abs(sizes["dense"] - sizes["pruned"] - removed) < 100
    one_expert = (96 * 24 + 96 + 24 * 96 + 24) * 4
    assert abs(sizes["upcycled"] - sizes["dropped"] - one_expert) < 200
    assert sizes["shared"] < sizes["inputs"] < sizes["copies"]


# ---- refused


def changed_file(file, old, new):
    content = file.read_bytes()
    assert content.count(old) >= 1 and len(old) == len(new)
    file.write_bytes(content.replace(old, new, 1))


def test_damaged_and_edited_files_are_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    model = build(moe=moe(top_k=2))
    lib.save(model, file)
    whole = file.read_bytes()
    changed_file(file, b'\\"top_k\\": 2', b'\\"top_k\\": 1')
    with pytest.raises(ValueError, match="model.safetensors is damaged or was edited"):
        lib.restore(file)
    file.write_bytes(whole[:-3] + b"abc")
    with pytest.raises(ValueError, match="model.safetensors is damaged or was edited"):
        lib.restore(file)
    file.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="model.safetensors is not a readable safetensors file"):
        lib.restore(file)
    file.write_bytes(whole)
    changed_file(file, b'\\"format\\": 1', b'\\"format\\": 2')
    with pytest.raises(ValueError, match="is of format 2, and format 1 is what can be read"):
        lib.restore(file)


def test_files_of_others_are_refused(tmp_path):
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match="no file at"):
        lib.restore(tmp_path / "absent.safetensors")
    for suffix in ("pt", "pth", "pkl"):
        file = tmp_path / f"model.{suffix}"
        torch.save(build().state_dict(), file)
        with pytest.raises(ValueError, match="pickles, which can run code"):
            lib.restore(file)
        with pytest.raises(ValueError, match="pickles, which can run code"):
            lib.save(build(), file)
    save_file({"weight": torch.ones(2)}, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="it was not written by `save`"):
        lib.restore(tmp_path / "bare.safetensors")


def test_what_cannot_be_read_off_asks_for_arguments(tmp_path):
    file = tmp_path / "model.safetensors"
    model = build(scale_attn_norm=True, mlp_ratio=2.0)
    with pytest.raises(ValueError, match=r"blocks.0.attn.*Give `arguments=\{...\}` as they were"):
        lib.save(model, file)
    arguments = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 2}
    arguments |= {"num_classes": 5, "scale_attn_norm": True}
    lib.save(model, file, arguments=arguments)
    same_function(model, lib.restore(file))
    with pytest.raises(ValueError, match="does not build the given VisionTransformer"):
        lib.save(model, file, arguments=arguments | {"depth": 3})
    with pytest.raises(ValueError, match="timm.create_model.* fails here"):
        lib.save(model, file, arguments=arguments | {"height": 3})
    with pytest.raises(ValueError, match="a Net is no model of timm"):
        lib.save(Net(), file, arguments=arguments)


def test_a_model_changed_by_hand_is_one_of_ones_own(tmp_path):
    model = build()
    model.head = nn.Sequential(model.head, nn.ReLU())
    with pytest.raises(ValueError, match="head is a Sequential .*put it into an nn.Module"):
        lib.save(model, tmp_path / "model.safetensors")
    model = build()
    model.blocks[0].mlp.register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="blocks.0.mlp.*hooks"):
        lib.save(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_described_is_refused_by_name(tmp_path):
    class Odd(Experts):
        pass

    model = build(moe=moe())
    layer = model.get_submodule(LAYER)
    layer.experts.__class__ = Odd
    with pytest.raises(ValueError, match=f"{LAYER}: Odd is not experts that a file can describe"):
        lib.save(model, tmp_path / "model.safetensors")
    layer.experts.__class__ = Experts
    layer.router.__class__ = type("Coin", (type(layer.router),), {})
    with pytest.raises(ValueError, match=f"{LAYER}: Coin is not a router that a file can"):
        lib.save(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "names, says",
    [
        (["bath"], "class_names has 1 names, the model 5 outputs"),
        ("abcde", "is a str: give"),
    ],
)
def test_class_names_fit(names, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        lib.save(build(), tmp_path / "model.safetensors", class_names=names)


def test_others_may_read_a_file_as_far_as_the_umask_lets_them(tmp_path):
    beside = tmp_path / "any"
    beside.touch()
    lib.save(build(), tmp_path / "vit.safetensors")
    assert (tmp_path / "vit.safetensors").stat().st_mode == beside.stat().st_mode


def test_what_is_no_model_to_save(tmp_path):
    file = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="wraps a model: save model.module"):
        lib.save(nn.DataParallel(build()), file)
    with pytest.raises(ValueError, match="lies on the meta device, without values"):
        lib.save(build().to("meta"), file)
    with pytest.raises(ValueError, match="cannot be written to the file"):
        lib.save(build(), file, preprocessing={"mean": object()})


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file, model = tmp_path / "model.safetensors", build()
    lib.save(model, file)
    before = file.read_bytes()

    def fails(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(files, "save_file", fails)
    with pytest.raises(OSError, match="No space left"):
        lib.save(prune(model, 0.5), file)
    assert file.read_bytes() == before and [*tmp_path.iterdir()] == [file]
