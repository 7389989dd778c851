"""Routing probes against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from lib.measure import pictures
from lib.measure import routing as counts
from lib.routers.all import AllExperts
from lib.routers.base import assign
from lib.routers.top_k import TopKRouter
from lib.training.evaluate import whole_type
from lib.verdicts import routing as tables


def image_routing(choice, n, experts, weight=0.5):
    """Image-level Routing of hand-made (B, K) choices."""
    choice = torch.tensor(choice)
    b = len(choice)
    probs = torch.full((b, experts), 1 / experts)
    return assign(choice, torch.full(choice.shape, weight), probs, torch.zeros_like(probs), (b, n))


def test_load_numbers():
    assert counts.load_share([2, 1, 1]).tolist() == [0.5, 0.25, 0.25]
    assert counts.load_share([0, 0]).tolist() == [0.5, 0.5]
    assert tables.cv([1, 1, 1, 1]) == 0 and tables.max_vio([1, 1, 1, 1]) == 0
    assert tables.cv([4, 0, 0, 0]) == pytest.approx(math.sqrt(3))  # sqrt(E - 1)
    assert tables.max_vio([4, 0, 0, 0]) == 3  # E - 1
    assert tables.max_vio([3, 1]) == 0.5
    assert tables.load_profile([1, 1, 1], 4).tolist() == [1] * 4
    assert tables.load_profile([1, 3], 4).tolist() == [1.5, 1.5, 0.5, 0.5]
    assert tables.load_profile([0, 1, 4, 3], 2).tolist() == [1.5, 0]


def test_entropy_bounds():
    assert counts.entropy([0.25] * 4) == pytest.approx(math.log(4))
    assert counts.entropy([1.0, 0.0]) == 0


@pytest.mark.parametrize(
    "table, expected",
    [
        (np.diag([5, 5, 5]), 1.0),  # the class decides the expert
        (np.outer([1, 2, 3], [4, 5]), 0.0),  # independent
        (np.array([[7, 0], [3, 0]]), 0.0),  # one expert for all: H(expert) = 0
        (np.repeat(np.eye(4), 25, axis=0), 1.0),  # 100 classes, 4 experts: bound 1 is reached
        (
            np.array([[3, 1], [1, 3]]),
            1 - (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(2),
        ),
    ],
)
def test_normalised_information(table, expected):
    assert tables.information(table).normalised == pytest.approx(expected, abs=1e-12)


def test_information_bias_by_hand_and_by_simulation():
    info = tables.information(np.array([[3, 1], [1, 3]]))
    assert info.bias == pytest.approx((4 - 2 - 2 + 1) / 16)  # (cells - rows - columns + 1) / 2n
    assert tables.information(np.array([[3, 1], [1, 3]]), samples=4).bias == pytest.approx(1 / 8)
    rng = np.random.default_rng(0)
    drawn = [rng.multinomial(4000, np.full(160, 1 / 160)).reshape(20, 8) for _ in range(50)]
    plain = np.mean([tables.information(t).mutual for t in drawn])
    assert plain == pytest.approx(19 * 7 / 8000, rel=0.1)  # independent: all of it is bias
    assert np.mean([tables.information(t).corrected for t in drawn]) < plain / math.log(8) / 3


def test_information_refuses_an_empty_table():
    with pytest.raises(ValueError, match="positive sum"):
        tables.information(np.zeros((3, 2)))


def test_sharpness():
    assert tables.sharpness([[3, 1], [1, 3], [0, 0]]) == 0.75
    assert tables.sharpness([[1, 1], [2, 2]]) == 0.5


def test_routing_degree_of_the_paper():
    assert [tables.routing_degree(e, 1, n) for e, n in [(2, 5), (4, 3), (8, 2)]] == [32, 64, 64]
    assert tables.routing_degree(8, 2, 2) == 28**2
    assert tables.layers_for_degree(8, 1, 64) == 2 and tables.layers_for_degree(8, 1, 65) == 3
    assert tables.layers_for_degree(2, 1, 32) == 5 and tables.layers_for_degree(8, 1, 1) == 0
    with pytest.raises(ValueError, match="out of reach"):
        tables.layers_for_degree(2, 2, 4)
    with pytest.raises(ValueError, match="top_k=3"):
        tables.routing_degree(2, 3, 1)


def test_plateau_is_the_smallest_depth_that_is_as_good_as_the_best():
    scan = {1: 91.4, 2: 91.5, 4: 91.5, 6: 90.4}
    assert tables.plateau(scan) == 2
    assert tables.plateau(scan, within=0.1) == 1  # 91.5 - 91.4 is a little more than 0.1 in floats
    assert tables.plateau(scan | {9: 92.5}, within=1) == 2
    assert tables.plateau(scan | {9: None}) is None and tables.plateau({}) is None


def test_suggested_layers():
    assert tables.suggested_layers([0.9, 0.1, 0.5, 0.6], 0.3) == 2
    assert tables.suggested_layers([0.1, 0.2], 0.3) == 0


def test_probe_image_level_by_hand():
    probe = counts.RoutingProbe(num_classes=2)
    # labels 0 0 1 over two batches; experts 0 1 2; three tokens an image
    probe.update([image_routing([[0], [1]], 3, 4, weight=0.5)], [11], torch.tensor([0, 0]))
    probe.update([image_routing([[2]], 3, 4, weight=0.8)], [11], np.array([1]))
    (layer,) = probe.summary()
    assert layer["block"] == 11 and layer["dropped"] == 0 and layer["experts_per_image"] == 1
    assert layer["load"] == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    assert layer["weight"] == pytest.approx((0.5 + 0.5 + 0.8) / 3)
    assert layer["entropy"] == pytest.approx(math.log(4), abs=1e-6)
    arrays = probe.arrays()
    assert arrays["class_expert"].dtype == np.int32
    assert arrays["class_expert"].tolist() == [[[1, 1, 0, 0], [0, 0, 1, 0]]]
    assert arrays["position_expert"].tolist() == [[[1, 1, 1, 0]] * 3]
    assert tables.information(arrays["position_expert"][0]).mutual == pytest.approx(0, abs=1e-12)


def test_probe_token_level_with_dropping_and_padding():
    # 2 images x 2 tokens, K = 1: images choose (0, 0) and (0, 1); capacity ceil(1 * 4 / 2) = 2
    # refuses the third visit
    choice = torch.tensor([[0], [0], [0], [1]])
    probs = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    token = assign(choice, torch.ones(4, 1), probs, probs, (2, 2), capacity_factor=1.0)
    wide = image_routing([[3, 4], [3, 0]], 1, 5)  # K = 2, one token, five experts
    probe = counts.RoutingProbe(3)
    probe.update([token, wide], [2, 3], [2, 1])
    first, second = probe.summary()
    assert (
        first["dropped"] == 0.25
        and first["load"] == pytest.approx([2 / 3, 1 / 3])
        and first["entropy"] == 0
    )
    # Image 0: expert 0; image 1: expert 1 alone, its other token was refused.
    assert first["experts_per_image"] == 1
    assert second["experts_per_image"] == 2 and second["load"] == [0.25, 0, 0, 0.5, 0.25]
    arrays = probe.arrays()
    assert arrays["class_expert"].shape == (2, 3, 5) and arrays["position_expert"].shape == (
        2,
        2,
        5,
    )
    assert arrays["class_expert"][0].tolist() == [[0] * 5, [1, 1, 0, 0, 0], [2, 0, 0, 0, 0]]
    assert arrays["position_expert"][0].tolist() == [[2, 0, 0, 0, 0], [1, 1, 0, 0, 0]]
    assert arrays["position_expert"][1, 1].sum() == 0  # padded position
    maps = pictures.first_choices([token, wide], 2)
    assert maps.tolist() == [[[0, 0], [0, 1]], [[3, -1], [3, -1]]]


def test_image_loads_by_hand():
    # two images of two tokens that choose (0, 0) and (0, 1); one visit is refused, and still chosen
    choice = torch.tensor([[0], [0], [0], [1]])
    probs = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    by_token = assign(choice, torch.ones(4, 1), probs, probs, (2, 2), capacity_factor=1.0)
    by_image = image_routing([[2], [0]], 3, 3)  # three tokens an image
    probe = counts.RoutingProbe(2, image_loads=True)
    probe.update([by_token, by_image], [0, 1], [1, 0])
    probe.update([by_token, by_image], [0, 1], [1, 0])
    loads = probe.arrays()["image_loads"]
    assert loads.dtype == np.uint16
    assert loads[:2].tolist() == [[[2, 0, 0], [0, 0, 3]], [[1, 1, 0], [3, 0, 0]]]  # padded to 3
    assert np.array_equal(loads[2:], loads[:2])  # of the second batch, in the order of images
    assert "image_loads" not in counts.RoutingProbe(2).arrays()


def test_image_loads_refuse_what_their_type_cannot_hold():
    probe = counts.RoutingProbe(1, image_loads=True)
    probe.update([image_routing([[1]], 2**16, 2)], [3], [0])
    with pytest.raises(OverflowError, match="65536 tokens to one expert of block 3"):
        probe.arrays()


def test_probe_agrees_with_real_routers_and_batch_split():
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(12, 5, 8, generator=generator), torch.arange(12) % 3
    layers = [
        TopKRouter(8, 4, 2, std=1.0),
        TopKRouter(8, 6, 1, per_image=True, std=1.0),
        AllExperts(3),
    ]
    whole, parts = counts.RoutingProbe(3), counts.RoutingProbe(3)
    with torch.no_grad():
        whole.update([layer(x) for layer in layers], [0, 1, 2], labels)
        for i in range(0, 12, 4):
            parts.update([layer(x[i : i + 4]) for layer in layers], [0, 1, 2], labels[i : i + 4])
        token_counts = torch.zeros(3, 4, dtype=torch.long)
        routing = layers[0](x)
        for t, chosen in enumerate(routing.choice):
            for e in chosen:
                token_counts[labels[t // 5], e] += 1
    for key, value in whole.arrays().items():
        assert np.array_equal(value, parts.arrays()[key])
    assert np.array_equal(whole.arrays()["class_expert"][0, :, :4], token_counts.numpy())
    assert whole.summary()[1]["load"] == parts.summary()[1]["load"]
    assert whole.summary()[2]["experts_per_image"] == 3
    assert whole.summary()[0]["entropy"] == pytest.approx(parts.summary()[0]["entropy"])


def test_probe_takes_half_precision_weights():
    probs = torch.full((2, 2), 0.5, dtype=torch.bfloat16)
    routing = assign(torch.tensor([[0], [1]]), probs[:, :1], probs, probs, (2, 3))
    probe = counts.RoutingProbe(1)
    probe.update([routing], [0], [0, 0])
    assert probe.summary()[0]["weight"] == 0.5


@pytest.mark.parametrize(
    "labels, blocks, message",
    [
        ([0], [0], "2 images"),
        ([0, 9], [0], "num_classes=10"),
        ([0, 0], [0, 1], "1 routings and 2 blocks"),
        ([0, 0], [5], "changed between batches"),
    ],
)
def test_probe_refuses(labels, blocks, message):
    probe = counts.RoutingProbe(2)
    routing = image_routing([[0], [1]], 3, 4)
    probe.update([routing], [0], [0, 1])
    with pytest.raises(ValueError, match=message):
        probe.update([routing], blocks, labels)


def test_probe_without_layers_is_empty():
    probe = counts.RoutingProbe(2)
    probe.update([], [], [0, 1])
    assert probe.summary() == [] and probe.arrays()["class_expert"].shape == (0, 2, 0)


@pytest.mark.parametrize(
    "experts, dtype",
    [(2, "int8"), (128, "int8"), (129, "int16"), (256, "int16"), (40_000, "int32")],
)
def test_maps_hold_the_number_of_every_expert(experts, dtype):
    """A type of 8 bits ends at 127: expert 255 was -1, which means that there is no token."""
    choice = torch.tensor([0, 1, experts // 2, experts - 1])
    routing = assign(
        choice.unsqueeze(1),
        torch.ones(4, 1),
        torch.zeros(4, experts),
        torch.zeros(4, experts),
        (1, 4),
    )
    maps = pictures.first_choices([routing, small_routing()], 1)
    assert maps.numpy().dtype == dtype
    assert maps.tolist() == [[choice.tolist()], [[1, 0, -1, -1]]]


def small_routing():
    return assign(
        torch.tensor([[1], [0]]), torch.ones(2, 1), torch.zeros(2, 2), torch.zeros(2, 2), (1, 2)
    )


@pytest.mark.parametrize("classes, dtype", [(10, "int16"), (32_768, "int16"), (32_769, "int32")])
def test_predictions_hold_the_number_of_every_class(classes, dtype):
    assert str(whole_type(classes, torch.int16)) == f"torch.{dtype}"
    assert torch.tensor(classes - 1).to(whole_type(classes, torch.int16)) == classes - 1


def test_counts_beyond_their_type_are_refused_at_every_position():
    probe = counts.RoutingProbe(2)
    probe.update([small_routing()], [0], torch.tensor([1]))
    probe._layers[0].by_position[0, 0] = 2**31
    with pytest.raises(OverflowError, match="block 0 exceeds"):
        probe.arrays()
