"""Test images by their main expert, on the images that come with a package."""

import numpy as np
import pytest
from factory import record

from lib.inputs.splits import load_splits
from lib.report import gallery, probes
from lib.spec import DataSpec, MoESpec, RunSpec

DATA = DataSpec(name="mnist5k", image_size=28, test=20)


@pytest.fixture
def run():
    """Three experts, of which the first gets 15 of 20 images, the second five, the third none."""
    test = load_splits(DATA).test
    spec = RunSpec(data=DATA, moe=MoESpec(layers=1, experts=3))
    run = record(0, spec=spec, images=20, experts=3, blocks=[0])
    run.arrays["test_label"] = test.labels.numpy()
    run.arrays["image_loads"] = np.array(
        [[[5, 12, 0]] if i % 4 == 1 else [[9, 8, 0]] for i in range(20)]
    )
    return run


def test_a_dozen_images_of_each_expert(run):
    rows = np.array(gallery.images_of_experts(run).axes).reshape(3, 12)
    shown = [[ax.images[0].get_array() for ax in row if ax.images] for row in rows]
    assert [len(row) for row in shown] == [12, 5, 0]
    expected = probes.test_images(run, [1, 5, 9, 13, 17])
    for picture, image in zip(shown[1], expected, strict=True):
        assert np.allclose(picture[..., 0], image[0] / 255)
    assert rows[2, 0].texts[0].get_text() == "no image"


def test_the_caption_counts_them(run):
    labels = run.arrays["test_label"][1::4]
    most = np.bincount(labels).argmax()
    share = 100 * (labels == most).mean()
    parts = gallery.what_experts_get(run).split("; ")
    assert parts[1] == f"expert 2: 5 images, {share:.0f}% of class class {most}"
    assert parts[2] == "expert 3: 0 images"


def test_images_of_another_copy_are_refused(run):
    run.arrays["test_label"] = np.roll(run.arrays["test_label"], 1)
    with pytest.raises(ValueError, match="other labels than record"):
        probes.test_images(run, [0])
