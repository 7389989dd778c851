"""V-MoE's released files: read without JAX, to the same logits, or refused by name."""

from __future__ import annotations

import re

import msgpack
import numpy as np
import pytest
import torch
import vmoe_files as theirs
from pydantic import ValidationError
from timm.layers import resample_abs_pos_embed

from lib.inputs import vmoe, weights
from lib.inputs.splits import scale_of
from lib.models.backbone import build
from lib.spec import BackboneSpec, DataSpec, MoESpec, RunSpec

SIZES = {"patch": theirs.P, "width": theirs.D, "depth": theirs.DEPTH, "heads": theirs.HEADS}
MOE = MoESpec(layers=2, blocks=(2, 4), experts=theirs.E, top_k=2, router="token")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_WEIGHTS", str(tmp_path))
    return tmp_path


def run_of(prefix, sha, moe=MOE):
    spec = BackboneSpec(**SIZES, hidden=theirs.H, weights=f"vmoe:{prefix}@{sha}")
    return RunSpec(data=DataSpec(image_size=28), backbone=spec, moe=moe)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_our_model_computes_what_theirs_does(folder, top_k):
    arrays = theirs.drawn()
    spec = run_of(*theirs.written(folder, arrays), moe=MOE.but(top_k=top_k))
    model = build(spec, theirs.CLASSES, 3).eval()
    images = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, wanted = model(images), theirs.logits(arrays, images, top_k)
    torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    assert wanted.std() > 0.1  # logits that say something


@pytest.mark.parametrize("shards, version", [(1, "20220622"), (4, "20220622"), (2, None)])
def test_any_number_of_data_files_and_both_versions(folder, shards, version):
    arrays = theirs.drawn()
    prefix, sha = theirs.written(folder, arrays, shards, version)
    found = vmoe.read_arrays(folder / prefix, sha)
    assert set(found) == set(arrays)
    assert all(np.array_equal(found[name].numpy(), array) for name, array in arrays.items())


def test_arrays_are_counted_in_the_order_of_jax(folder):
    """Ten blocks and more: 10 comes before 2."""
    tree = {f"Encoder/encoderblock_{i}/x": np.full(1, float(i), np.float32) for i in range(12)}
    prefix, sha = theirs.written(folder, tree)
    found = vmoe.read_arrays(folder / prefix, sha)
    assert {name: float(array) for name, array in found.items()} == {
        name: float(array[0]) for name, array in tree.items()
    }


def test_a_head_behind_another_layer_is_left_out(folder):
    prefix, sha = theirs.written(folder, theirs.drawn(pre_logits=True))
    state = weights.fetch(f"vmoe:{prefix}@{sha}", "")
    assert not [name for name in state if name.startswith(("head", "pre_logits"))]
    fresh = build(run_of(prefix, sha), 9, 3)  # of other classes: the head is ours
    assert fresh.head.weight.shape == (9, theirs.D)
    assert torch.equal(fresh.blocks[1].mlp.router.weight, state["blocks.1.mlp.router.weight"])


def test_pixels_are_those_that_it_was_trained_with(folder):
    mean, std = scale_of(3, BackboneSpec(weights="vmoe:small@0"))
    assert mean.flatten().tolist() == std.flatten().tolist() == [0.5] * 3


def test_positions_are_of_a_square(folder):
    """4 x 4 could be 2 x 8, but they trained on squares alone."""
    spec = run_of(*theirs.written(folder, theirs.drawn()))
    positions = torch.from_numpy(theirs.drawn()["Encoder/posembed_input/pos_embedding"])
    large = build(spec.but(data={"image_size": 56}), theirs.CLASSES, 3)
    wanted = resample_abs_pos_embed(positions, new_size=[8, 8], old_size=[4, 4])
    assert torch.equal(large.pos_embed, wanted)


def test_packed_for_another_machine_it_is_the_same(folder, tmp_path, monkeypatch):
    prefix, sha = theirs.written(folder, theirs.drawn())
    name = f"vmoe:{prefix}@{sha}"
    state = weights.fetch(name, "vit_tiny_patch16_224")
    weights.pack(tmp_path / "there", name, "vit_tiny_patch16_224")
    monkeypatch.setenv("MOE_WEIGHTS", str(tmp_path / "there"))
    again = weights.fetch(name, "vit_tiny_patch16_224")
    assert weights.sha256_state(again) == weights.sha256_state(state)


# ---- arrays that do not add up


def spoilt(name, how):
    arrays = theirs.drawn()
    if how == "missing":
        del arrays[name]
    elif how == "surplus":
        arrays[name] = np.zeros((2, 3), np.float32)
    else:
        arrays[name] = np.zeros(how, np.float32)
    return arrays


B1, B2 = "Encoder/encoderblock_1/", "Encoder/encoderblock_2/"


@pytest.mark.parametrize(
    "name, how, says",
    [
        (B1 + "Moe/Router/dense/kernel", (16, 3), r"Dense_0/kernel is (4, 16, 24), expected (3,"),
        (B1 + "Moe/Router/dense/kernel", (16, 2, 2), "expected (D, E). The routers of an ensemble"),
        (B1 + "Moe/Mlp/Dense_1/kernel", (4, 24, 8), "is (4, 24, 8), expected (4, 24, 16)"),
        (B2 + "SelfAttention/out/kernel", (16, 16), "is (16, 16), expected (2, 8, 16)"),
        (B2 + "Mlp/Dense_0/bias", (1,), "Mlp/Dense_0/bias is (1,), expected (24,)"),
        ("Encoder/posembed_input/pos_embedding", (1, 17, 8), "expected (1, 17, 16)"),
        ("embedding/kernel", (7, 7, 3), "embedding/kernel is (7, 7, 3), expected (P, P, C, D)"),
        (B1 + "Moe/Router/dense/kernel", "missing", f"small lacks {B1}Moe/Router/dense/kernel, (D"),
        (B1 + "Moe/Mlp/Dense_0/bias", "missing", "Moe/Mlp/Dense_0/bias, expected (4, 24)"),
        (B2 + "SelfAttention/key/bias", "missing", f"{B2}SelfAttention/key/bias, expected (2, 8)"),
        ("cls", "missing", "small lacks cls, expected (1, 1, 16)"),
        ("head/bias", "missing", "small lacks head/bias, expected (5,)"),
        (B2 + "Moe2/x", "surplus", f"small has {B2}Moe2/x (2, 3), which no V-MoE has (1 such"),
        ("opt_state/mu", "surplus", "small has opt_state/mu (2, 3), which no V-MoE has"),
        ("Encoder/encoderblock_9/x", "surplus", "lacks Encoder/encoderblock_4/SelfAttention/query"),
    ],
)
def test_wrong_missing_and_surplus_arrays_are_named(folder, name, how, says):
    prefix, sha = theirs.written(folder, spoilt(name, how), shards=1)
    with pytest.raises(ValueError, match=re.escape(says)):
        weights.fetch(f"vmoe:{prefix}@{sha}", "")


def test_a_dense_vit_is_no_vmoe(folder):
    arrays = {name: array for name, array in theirs.drawn().items() if "/Moe/" not in name}
    prefix, sha = theirs.written(folder, arrays)
    with pytest.raises(ValueError, match="small has no block with experts"):
        weights.fetch(f"vmoe:{prefix}@{sha}", "")


# ---- files that do not add up


def test_hash_is_asked_for_and_checked(folder):
    prefix, _ = theirs.written(folder, theirs.drawn())
    with pytest.raises(ValueError, match=r"none was given: .*cat small.index small.data-\*"):
        weights.fetch(f"vmoe:{prefix}", "")
    with pytest.raises(ValueError, match=f"not {'0' * 64}: download it again"):
        weights.fetch(f"vmoe:{prefix}@{'0' * 64}", "")


@pytest.mark.parametrize("file", ["small.index", "small.data-00001-of-00002"])
@pytest.mark.parametrize("of_half", [True, False])
def test_a_half_copied_file_is_named(folder, file, of_half):
    """By the hash of the whole, and by that of the half."""
    prefix, sha = theirs.written(folder, theirs.drawn())
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    sha = theirs.sha256(folder) if of_half else sha
    with pytest.raises(ValueError, match=f"{file} is half copied: its .* Copy or download it ag"):
        weights.fetch(f"vmoe:{prefix}@{sha}", "")


def test_files_that_are_absent_or_too_many(folder):
    prefix, sha = theirs.written(folder, theirs.drawn())
    name = f"vmoe:{prefix}@{sha}"
    (folder / "small.data-00002-of-00003").write_bytes(b"")
    with pytest.raises(
        FileNotFoundError, match="3 of 3 data files, and not small.data-00000-of-00"
    ):
        weights.fetch(name, "")
    (folder / "small.data-00002-of-00003").unlink()
    (folder / "small.data-00000-of-00001").write_bytes(b"")
    with pytest.raises(ValueError, match="small.data-00000-of-00001 beside the 2 data files"):
        weights.fetch(name, "")
    (folder / "small.data-00000-of-00001").unlink()
    (folder / "small.data-00000-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="not small.data-00000-of-00002: copy it"):
        weights.fetch(name, "")
    (folder / "small.index").unlink()
    with pytest.raises(FileNotFoundError, match="no weights at .*small.index and small.data-0"):
        weights.fetch(name, "")


def repacked(folder, change):
    """Changes the content of the one data file, whose extension values stay as they are."""
    file = folder / "small.data-00000-of-00001"
    content = msgpack.unpackb(file.read_bytes())
    change(content)
    file.write_bytes(msgpack.packb(content))
    return f"vmoe:small@{theirs.sha256(folder)}"


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c.pop("3"), "there are 0 values, and the index says"),
        (lambda c: c["3"][0][0].pop(), r"a part of .* has \d+ values, and its slices are"),
        (lambda c: c.update({"3": c["6"]}), "does not fit into .*, as the index has it"),
        (lambda c: c.update({"999": c["4"]}), "has an array 999, and the index has"),
        (lambda c: c.clear(), "is no data file of a V-MoE checkpoint"),
        (lambda c: c.update({"3": [[[msgpack.ExtType(9, b"")], 0]]}), "a value of type 9"),
    ],
)
def test_data_that_are_not_what_the_index_says(folder, change, says):
    theirs.written(folder, theirs.drawn(), shards=1)
    with pytest.raises(ValueError, match=says):
        weights.fetch(repacked(folder, change), "")


def test_another_version_is_refused(folder):
    prefix, sha = theirs.written(folder, theirs.drawn(), version="20990101")
    with pytest.raises(ValueError, match="small.index is of version '20990101'"):
        weights.fetch(f"vmoe:{prefix}@{sha}", "")


def test_other_bytes_are_refused(folder):
    prefix, _ = theirs.written(folder, theirs.drawn(), shards=1)
    (folder / "small.index").write_bytes(b"\xc1\xc1")
    with pytest.raises(ValueError, match="small.index does not read as a file of a V-MoE"):
        weights.fetch(f"vmoe:{prefix}@{theirs.sha256(folder)}", "")


# ---- the spec


@pytest.mark.parametrize(
    "moe, asks",
    [
        (MOE.but(blocks=(3, 4)), "4 experts in blocks 3, 4"),
        (MOE.but(experts=8), "8 experts in blocks 2, 4"),
        (MOE.but(layers=1, blocks=None), "4 experts in blocks 4"),
    ],
)
def test_experts_and_layers_must_be_those_of_the_file(folder, moe, asks):
    spec = run_of(*theirs.written(folder, theirs.drawn()), moe=moe)
    says = f"have 4 experts in blocks 2, 4, and moe asks for {asks}: set moe.layers=2, moe.blocks"
    with pytest.raises(ValueError, match=says):
        build(spec, 5, 3)


@pytest.mark.parametrize(
    "moe, says",
    [
        (None, "set moe to its layers, .*got moe=None"),
        (MOE.but(router="image"), "router='token', members=1, got moe=router='image'"),
        (MOE.but(members=2), "got moe=router='token', members=2"),
        (MOE.but(shared=True), "brings its experts, so none is copied"),
        (MOE.but(copy_noise=0.1), "brings its experts, so none is copied"),
    ],
)
def test_a_spec_that_has_no_place_for_the_experts(moe, says):
    with pytest.raises(ValidationError, match=says):
        run_of("small", "0" * 64, moe=moe)


def test_another_architecture_is_refused(folder):
    prefix, sha = theirs.written(folder, theirs.drawn())
    spec = BackboneSpec(name="convnext_atto", weights=f"vmoe:{prefix}@{sha}")
    with pytest.raises(ValueError, match="are of a ViT, and the backbone is a ConvNeXt: name"):
        build(RunSpec(backbone=spec, moe=MOE), 5, 3)


def test_a_child_starts_from_a_run_that_started_from_it(folder):
    parent = run_of(*theirs.written(folder, theirs.drawn()))
    state = build(parent, theirs.CLASSES, 3).state_dict()
    child = build(parent.but(init=parent, seed=1), theirs.CLASSES, 3, state)
    assert all(torch.equal(child.state_dict()[name], tensor) for name, tensor in state.items())
    assert type(child.blocks[1].mlp.experts.act).__name__ == "GELUTanh"
