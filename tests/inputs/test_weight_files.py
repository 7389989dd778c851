"""What belongs to a weight file: how its pixels were normalised, the grid of its positions, the
names of its registers, and one head or two."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
import timm
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from lib import paths
from lib.inputs import splits, weights
from lib.inputs.sources import Source
from lib.measure import pictures
from lib.models.backbone import build, create, heads_of, load_weights, skeleton
from lib.models.ensemble import ensemble
from lib.models.mae import MaskedAutoencoder
from lib.models.upcycle import upcycle
from lib.spec import BackboneSpec, DataSpec, MaskSpec, MoESpec, RunSpec, TrainSpec
from lib.training.optimiser import freeze

TINY = BackboneSpec(patch=7, width=16, depth=2, heads=2)
HALF = torch.tensor([0.5, 0.5, 0.5]).view(1, 3, 1, 1)
IMAGENET = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)


# ---- how pixels are normalised


def split_of(images):
    """Images (n, C, h, w) uint8 of class 0."""
    source = Source(np.zeros(len(images), int), images.__getitem__, images.shape[1])
    return splits.Split(source, np.arange(len(images)), torch.zeros(len(images), dtype=torch.long))


def run_of(name, weights_name="timm", **data):
    return RunSpec(
        backbone=BackboneSpec(name=name, weights=weights_name),
        data=DataSpec(image_size=4, **data),
    )


@pytest.mark.parametrize(
    "name, mean, std",
    [
        ("vit_base_patch16_224", [0.5] * 3, [0.5] * 3),  # augreg
        ("beit_base_patch16_224", [0.5] * 3, [0.5] * 3),
        ("vit_base_patch16_siglip_224", [0.5] * 3, [0.5] * 3),
        (
            "vit_base_patch16_clip_224",
            [0.48145466, 0.4578275, 0.40821073],
            [0.26862954, 0.26130258, 0.27577711],
        ),
        ("vit_small_patch14_dinov2", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_weights_of_timm_get_the_pixels_that_they_were_trained_with(name, mean, std):
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    batch = split_of(pixels).batch(torch.arange(2), run_of(name))
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    torch.testing.assert_close(batch * std + mean, pixels / 255)


@pytest.mark.parametrize("weights_name", [None, weights.SALIENCY, "file:a", "pth:a@0"])
def test_other_weights_keep_the_pixels_that_they_had(weights_name):
    pixels = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
    batch = split_of(pixels).batch(torch.arange(2), run_of("vit_base_patch16_224", weights_name))
    assert torch.equal(batch, (pixels / 255 - IMAGENET[0]) / IMAGENET[1])
    grey = split_of(pixels[:, :1]).batch(torch.arange(2), run_of("vit_base_patch16_224"))
    assert torch.equal(grey, (pixels[:, :1] / 255 - 0.5) / 0.5)


def test_a_child_sees_pixels_as_its_parent_did():
    parent = run_of("vit_base_patch16_224")
    child = parent.but(init=parent, moe=MoESpec(), train=TrainSpec())
    image = split_of(torch.full((1, 3, 4, 4), 255, dtype=torch.uint8))
    assert torch.equal(image.batch(torch.arange(1), child), torch.ones(1, 3, 4, 4))


def test_pictures_undo_what_the_weights_asked_for():
    """A masked autoencoder that hides nothing that it sees: its pictures are the images."""
    torch.manual_seed(0)
    pixels = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    spec = RunSpec(backbone=TINY.but(weights="timm"), train=TrainSpec(mask=MaskSpec()))
    model = MaskedAutoencoder(create(TINY, 28, 2, 3), MaskSpec(width=16, depth=1, heads=2))
    found = pictures.reconstructions(model, split_of(pixels), spec, torch.arange(2))
    visible = ~torch.from_numpy(found["hidden"]).view(2, 1, 4, 4)
    visible = visible.repeat_interleave(7, 2).repeat_interleave(7, 3).expand(-1, 3, -1, -1)
    assert torch.equal(torch.from_numpy(found["picture"])[visible], pixels[visible])
    assert visible.float().mean() == 0.25


def test_the_checkerboard_is_normalised_like_images():
    seen = []
    model = upcycle(create(TINY, 28, 2, 3), MoESpec(layers=1, experts=2))
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for name in (None, "timm"):
        pictures.checkerboard(model, RunSpec(backbone=TINY.but(weights=name)), 3)
    plain, of_weights = seen
    torch.testing.assert_close(of_weights * HALF + HALF, plain * IMAGENET[1] + IMAGENET[0])


def test_no_page_and_no_room_makes_batches_without_their_run():
    """Of data alone nobody knows by which weights its images are seen."""
    files = [*paths.ROOT.glob("lib/**/*.py"), *paths.ROOT.glob("notebooks/**/*.ipynb")]
    text = {file.name: file.read_text() for file in files}
    assert not [name for name, code in text.items() if re.search(r"\.batch\([^\n]*\.data\b", code)]


# ---- the grid of positions


def positions_of(rows, columns, width=16):
    """Position embeddings (1, 1 + rows * columns, width) that rise along rows and columns."""
    grid = torch.stack(
        torch.meshgrid(torch.arange(float(rows)), torch.arange(float(columns)), indexing="ij"), -1
    )
    grid = grid.view(1, rows * columns, 2).repeat(1, 1, width // 2)
    return torch.cat([torch.full((1, 1, width), 9.0), grid], dim=1)


def loaded(rows, columns, grid=None, image_size=28, spec=TINY):
    model = create(spec, image_size, 5, 1)
    load_weights(model, model.state_dict() | {"pos_embed": positions_of(rows, columns)}, "w", grid)
    return model.pos_embed.detach()


@pytest.mark.parametrize("rows, columns", [(8, 2), (2, 8), (4, 4), (3, 6), (7, 7), (1, 16)])
def test_positions_are_resampled_by_their_own_grid(rows, columns):
    wanted = resample_abs_pos_embed(
        positions_of(rows, columns), new_size=[4, 4], old_size=[rows, columns]
    )
    assert torch.equal(loaded(rows, columns, (rows, columns)), wanted)


@pytest.mark.parametrize(
    "rows, columns, says",
    [
        (8, 2, r"weights of w have 16 positions, .* set backbone.grid, \(2, 8\) or \(4, 4\), or"),
        (4, 4, r"\(2, 8\) or \(4, 4\)"),
        (6, 6, r"\(2, 18\) or \(3, 12\) or \(4, 9\) or \(6, 6\)"),
        (17, 1, "have 17 positions.*if it is one"),
    ],
)
def test_a_grid_that_cannot_be_told_is_refused(rows, columns, says):
    with pytest.raises(ValueError, match=says):
        loaded(rows, columns)


def test_a_grid_that_can_be_told_is_taken():
    for side in (3, 5, 7, 14):  # nine positions can only be a square; 14 x 14: the next test
        patch = TINY.but(patch=16) if side == 14 else TINY
        wanted = resample_abs_pos_embed(positions_of(side, side), new_size=[4, 4])
        if side != 14:
            assert torch.equal(loaded(side, side, spec=patch), wanted)
    # the architecture was trained on 224 pixels: with patches of 16 that is 14 x 14
    assert loaded(14, 14, image_size=64, spec=TINY.but(patch=16)).shape == (1, 17, 16)


def test_a_grid_of_another_number_is_refused():
    with pytest.raises(ValueError, match="have 16 positions, which are not a grid of 3 x 5"):
        loaded(8, 2, (3, 5))


def test_a_parent_on_images_of_another_size_is_square():
    parent = RunSpec(backbone=TINY, data=DataSpec(image_size=28))
    state = build(parent, 10, 1).state_dict() | {"pos_embed": positions_of(4, 4)}
    child = RunSpec(backbone=TINY, data=DataSpec(image_size=42), init=parent)
    wanted = resample_abs_pos_embed(positions_of(4, 4), new_size=[6, 6])
    assert torch.equal(build(child, 10, 1, state).pos_embed, wanted)


def test_a_grid_is_said_of_a_file_alone():
    spec = BackboneSpec(weights="file:mine", grid=[8, 2])  # as YAML has it
    assert spec.grid == (8, 2) and BackboneSpec.model_validate_json(spec.model_dump_json()) == spec
    assert BackboneSpec(weights="file:mine").id != spec.id
    for name in ("timm", None, weights.SALIENCY):
        with pytest.raises(ValidationError, match="is of the positions in a weight file"):
            BackboneSpec(weights=name, grid=(4, 4))


def test_a_file_is_read_with_the_grid_of_its_spec(tmp_path, monkeypatch):
    monkeypatch.setenv("MOE_WEIGHTS", str(tmp_path))
    state = create(TINY, 28, 10, 1).state_dict() | {"pos_embed": positions_of(8, 2)}
    save_file(state, tmp_path / "oblong.safetensors")
    spec = RunSpec(backbone=TINY.but(weights="file:oblong.safetensors"))
    with pytest.raises(ValueError, match="set backbone.grid"):
        build(spec, 10, 1)
    told = build(spec.but(backbone={"grid": (8, 2)}), 10, 1)
    assert not torch.equal(told.pos_embed, state["pos_embed"])


# ---- registers


@pytest.mark.parametrize("rest", [{}, {"mask_token": torch.zeros(1, 16)}])
@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_dinov2_checkpoint_with_registers_is_one_thing_in_both_formats(
    tmp_path, monkeypatch, kind, rest
):
    """Under its publisher's names: register_tokens, and a position for the class token."""
    monkeypatch.setenv("MOE_WEIGHTS", str(tmp_path))
    spec = TINY.but(name="vit_small_patch14_reg4_dinov2")
    torch.manual_seed(0)
    ours = create(spec, 28, 0, 3)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter)
    theirs = dict(ours.state_dict())
    position = torch.randn(1, 1, 16)
    theirs["register_tokens"] = theirs.pop("reg_token")
    theirs["cls_token"] = theirs["cls_token"] - position
    theirs["pos_embed"] = torch.cat([position, theirs["pos_embed"]], dim=1)
    file = tmp_path / f"reg.{kind}"
    torch.save(theirs | rest, file) if kind == "pth" else save_file(theirs | rest, file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    name = f"{'pth' if kind == 'pth' else 'file'}:reg.{kind}@{sha}"
    model = create(spec, 28, 0, 3)
    load_weights(model, weights.fetch(name, spec.name), name, (4, 4))
    for key, tensor in ours.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor)


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_what_a_pretraining_has_beside_its_encoder_is_left_out_in_both_formats(tmp_path, kind):
    encoder = create(TINY, 28, 0, 3).state_dict()
    extra = {"mask_token": torch.zeros(1), "decoder_embed.weight": torch.zeros(2, 2)}
    file = tmp_path / f"mae.{kind}"
    torch.save(encoder | extra, file) if kind == "pth" else save_file(encoder | extra, file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    read = weights.load_published if kind == "pth" else weights.load_checked
    assert set(read(file, sha)) == set(encoder)


# ---- one head or two

DISTILLED = TINY.but(name="deit_tiny_distilled_patch16_224")


def test_a_distilled_deit_has_two_heads_and_others_one():
    assert heads_of(create(DISTILLED, 28, 5, 1)) == ("head.", "head_dist.")
    assert heads_of(create(TINY, 28, 5, 1)) == ("head.",)
    assert heads_of(skeleton("convnext_atto")) == ("head.fc.",)
    mixture = upcycle(create(TINY, 28, 5, 1), MoESpec(layers=1, experts=2, router="token"))
    assert heads_of(ensemble(mixture, 2)) == ("vit.head.",)


def test_both_heads_stay_where_the_classes_are_others():
    ten, two = create(DISTILLED, 28, 10, 1), create(DISTILLED, 28, 2, 1)
    before = {name: t.clone() for name, t in two.state_dict().items() if name.startswith("head")}
    load_weights(two, ten.state_dict(), "test", (4, 4))
    assert len(before) == 4 and all(torch.equal(two.state_dict()[k], t) for k, t in before.items())
    assert torch.equal(two.dist_token, ten.dist_token)
    headless = {k: t for k, t in ten.state_dict().items() if not k.startswith("head")}
    load_weights(two, headless, "test", (4, 4))
    same = create(DISTILLED, 28, 10, 1)
    load_weights(same, ten.state_dict(), "test", (4, 4))
    assert torch.equal(same.head_dist.weight, ten.head_dist.weight)


def test_a_child_of_other_classes_keeps_its_own_two_heads():
    parent = RunSpec(backbone=DISTILLED)
    state = build(parent, 10, 1).state_dict()
    child = RunSpec(backbone=DISTILLED, init=parent, data=DataSpec(classes=(0, 10)), seed=1)
    model = build(child, 10, 1, state)
    assert torch.equal(model.norm.weight, state["norm.weight"])
    for head in ("head.weight", "head_dist.weight"):
        assert not torch.equal(model.state_dict()[head], state[head])


@pytest.mark.parametrize(
    "make, trained",
    [
        (
            lambda: create(DISTILLED, 28, 5, 1),
            {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"},
        ),
        (lambda: create(TINY, 28, 5, 1), {"head.weight", "head.bias"}),
        (
            lambda: ensemble(
                upcycle(create(TINY, 28, 5, 1), MoESpec(layers=1, experts=2, router="token")), 2
            ),
            {"vit.head.weight", "vit.head.bias"},
        ),
        (
            lambda: timm.create_model("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)),
            {"head.fc.weight", "head.fc.bias"},
        ),
    ],
)
def test_head_only_training_moves_the_heads_alone(make, trained):
    model = make()
    freeze(model, "head")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
