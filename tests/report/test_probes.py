"""Probe images: from the data set, from the project, or none, and never those of another record."""

from __future__ import annotations

import numpy as np
import pytest
from factory import record

from lib import paths
from lib.report import explorer, maps, masks, overlays, probes
from lib.report.style import style
from lib.runs.store import Record, store
from lib.spec import DataSpec, MoESpec, RunSpec

EUROSAT = DataSpec(name="eurosat", image_size=56)
LABELS = np.array([2, 0, 1, 1])
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 3, 56, 56)).astype(np.uint8)


@pytest.fixture
def without_data(monkeypatch):
    monkeypatch.delenv("MOE_DATA", raising=False)


@pytest.fixture
def file(tmp_path, monkeypatch, without_data):
    """A file of four images whose rows are 10, 20, 30 and 40."""
    monkeypatch.setattr(paths, "PROBES", tmp_path)
    file = tmp_path / "eurosat-56.npz"
    np.savez(file, images=PIXELS, index=[10, 20, 30, 40], labels=LABELS)
    return file


def of_eurosat(data=EUROSAT, rows=(20, 10, 40), labels=(0, 2, 1)):
    """A record whose probe images are the whole test split."""
    spec = RunSpec(data=data, moe=MoESpec(layers=4, experts=4))
    run = record(0, spec=spec, probes=len(rows), class_names=["Forest", "SeaLake", "pasture_land"])
    run.arrays |= {"probe_index": np.array(rows), "test_label": np.array(labels)}
    return run


def titles(fig):
    return [ax.get_title().replace("\n", " ") for ax in fig.axes if ax.get_title()]


def test_images_are_found_by_their_row(file):
    images = probes.probe_images(of_eurosat())
    assert np.array_equal(images, PIXELS[[1, 0, 3]])
    assert np.array_equal(probes.probe_images(of_eurosat(), 2), PIXELS[[1, 0]])
    numbered_anew = of_eurosat(EUROSAT.but(classes=(1, 3)), rows=(30, 10), labels=(0, 1))
    assert np.array_equal(probes.probe_images(numbered_anew), PIXELS[[2, 0]])


@pytest.mark.parametrize(
    "other",
    [
        {"rows": (20, 10, 41)},
        {"data": EUROSAT.but(image_size=112)},
        {"data": EUROSAT.but(name="cifar100")},
    ],
)
def test_no_image_of_another_index_size_or_data_set(file, other):
    assert probes.probe_images(of_eurosat(**other)) is None
    assert "(MOE_DATA)" in probes.absent_images(of_eurosat(**other))


def test_an_image_of_another_class_is_refused(file):
    with pytest.raises(ValueError, match=r"other classes than record .* python -m lib.report.prob"):
        probes.probe_images(of_eurosat(labels=(0, 1, 1)))


def test_the_data_set_comes_first(file, monkeypatch):
    mnist = record(0)  # comes with a package
    images = probes.probe_images(mnist, 2)
    assert [image.shape for image in images] == [(1, 28, 28)] * 2
    assert probes.absent_images(mnist) == ""


def test_names_need_no_data(without_data):
    cifar = of_eurosat(DataSpec(name="cifar100", label="fine_label", image_size=56))
    assert probes.probe_names(cifar) == ["Forest", "pasture land", "SeaLake"]
    del cifar.arrays["test_label"]
    assert probes.probe_names(cifar) == ["image 0", "image 1", "image 2"]


def test_without_images_maps_stand_alone_with_the_names_of_the_classes(without_data):
    cifar = of_eurosat(EUROSAT.but(name="cifar100"))
    shown = explorer.of_record(cifar)
    assert "CIFAR-100, run" in shown.static.html
    assert "The images are not shown: they need the data set cifar100" in shown.static.html
    assert shown.names == ["0: Forest", "1: pasture land", "2: SeaLake"] and shown.images is None
    assert shown.view(0, 0)[:4] == b"\x89PNG"
    maps_alone = overlays.token_maps(
        None, cifar.arrays["token_expert"], range(4), 4, names=probes.probe_names(cifar)
    )
    assert titles(maps_alone) == [f"block {block}" for block in (1, 2, 3, 4)]
    assert maps_alone.axes[8].get_ylabel() == "Sea Lake"
    # colours at full strength, and nothing below them
    first = maps_alone.axes[0]
    assert not first.images and {patch.get_alpha() for patch in first.patches} == {1}


def test_with_images_they_lie_below(file):
    run = of_eurosat()
    images = probes.probe_images(run)
    fig = overlays.token_maps(images, run.arrays["token_expert"], range(4), 4)
    assert titles(fig)[0] == "image" and len(fig.axes[1].images) == 1
    assert "MOE_DATA" not in explorer.of_record(run).static.html


def test_the_bar_of_experts_says_what_differs_from_it():
    assert overlays.tiles_in_words([[0, 1]], over_image=False) == ""
    assert overlays.tiles_in_words([0, -1], over_image=False) == "no tile: no expert"
    both = "paler over an image; no tile: no expert"
    assert overlays.tiles_in_words([0, -1], over_image=True) == both


def test_maps_say_in_words_how_many_experts_share_an_image(without_data):
    run = of_eurosat(EUROSAT.but(name="cifar100"))
    run.arrays["token_expert"][:] = 2
    run.arrays["token_expert"][0, 1, 1:4] = [0, 1, -1]
    said = explorer.of_record(run).static.alt
    assert "Block 1: 1 to 3 of 4 experts an image. Block 2: 1 of 4" in said


@pytest.mark.parametrize("draw", [masks.cam_masks, maps.reconstructions])
def test_columns_without_images_are_left_out_whole(draw, file):
    with_images, without = draw(of_eurosat()), draw(of_eurosat(rows=(1, 2, 3)))
    assert titles(with_images) == ["image", *titles(without)]
    for fig in (with_images, without):
        names = [ax.get_ylabel() for ax in fig.axes if ax.get_ylabel()]
        assert names == ["Forest", "pasture land", "Sea Lake"]
        with style():
            fig.draw_without_rendering()
        assert all(ax.images for ax in fig.axes if ax.get_label() != "<colorbar>")


def test_the_heat_lies_on_the_dimmed_image_and_nowhere_on_grey(file):
    def cell(run):  # the last expert of the first image
        return masks.cam_masks(run).axes[5 if probes.probe_images(run) else 4]

    below, veil, heat = cell(of_eurosat()).images
    assert below.get_array().shape == (56, 56, 3) and heat.get_alpha() < 1
    # white over the image where no heat lies, and nothing where it does
    bare = np.ma.getmaskarray(heat.get_array())
    assert (veil.get_array() == 1).all()
    assert ((veil.get_alpha() > 0.5) == bare).all() and (veil.get_alpha()[~bare] == 0).all()
    (alone,) = cell(of_eurosat(rows=(1, 2, 3))).images
    assert alone.get_alpha() == 1 and is_white(cell(of_eurosat(rows=(1, 2, 3))))


def is_white(ax):
    return ax.get_facecolor() == (1, 1, 1, 1)


def test_masks_by_hand(file):
    run = of_eurosat()
    expert_of_token = np.zeros((4, 3, 17), int)
    expert_of_token[0, :, 1] = 3  # the first patch of the first layer
    run.arrays["token_expert"] = expert_of_token
    rows = [("a", run, 0), ("b", run, 2)]
    assert masks.say_masks(rows, (0, -1)) == (
        "In block 1 one expert has all patches in 0 of 2 rows. "
        "In block 4 one expert has all patches in 2 of 2 rows."
    )
    fig = masks.expert_masks(rows, (0,))
    assert titles(fig) == ["image", *(f"block 1 expert {e}" for e in (1, 2, 3, 4))]
    image, *of_experts = [ax.images[0].get_array() for ax in fig.axes[:5]]
    first_patch = np.zeros((56, 56, 1), bool)
    first_patch[:14, :14] = True
    faded = 0.85 + 0.15 * image
    assert np.allclose(of_experts[3], np.where(first_patch, image, faded))
    assert np.allclose(of_experts[0], np.where(first_patch, faded, image))
    assert np.allclose(of_experts[1], faded)
    alone = masks.expert_masks([("", of_eurosat(rows=(1, 2, 3)), 0)])
    assert alone.axes[0].images[0].get_array().shape == (4, 4) and "image" not in titles(alone)
    with pytest.raises(ValueError, match="no rows"):
        masks.expert_masks([])


# ---- the project's own file


def committed(name):
    files = sorted(store().published.glob("leiden/*.json"))
    runs = (store().peek(file.stem) for file in files)
    return [run for run in runs if run.spec.data.name == name and "probe_index" in run.arrays]


def test_probe_images_are_evenly_spread_over_the_test_split():
    """Where all of a stored test split was used, the place of an image is its row."""
    (run, *_) = committed("solar_pv")
    run = Record(run.spec, run.content, run.file)  # of its own, so that its arrays can be changed
    run.arrays["test_label"] = np.arange(len(run.arrays["test_label"]))
    assert np.array_equal(probes.probe_labels(run), run.arrays["probe_index"])


def test_only_data_sets_with_a_licence_are_written(without_data):
    assert {data.name for data, _ in probes._records_by_data().values()} == {"eurosat"}
    with pytest.raises(FileNotFoundError, match="eurosat"):
        probes.write()
