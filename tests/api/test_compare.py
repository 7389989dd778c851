"""The table that sets models side by side, by hand, and what it refuses."""

import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lib
from lib.measure.accuracy import paired_difference, top1
from lib.measure.cost import count
from lib.measure.memory import stored_bytes
from lib.models.moe import RoutingTape
from lib.models.upcycle import upcycle
from lib.pruning.experts.dropping import drop_experts
from lib.spec import MoESpec

LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0])
RIGHT = torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
RIGHT_BESIDE = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 1, 0], dtype=torch.bool)


class Answers(nn.Module):
    """Knows which of the ten images it has right, by the number in the image's first pixel."""

    def __init__(self, right, dtype=torch.float32):
        super().__init__()
        predictions = torch.where(right, LABELS, (LABELS + 1) % 3)
        logits = nn.functional.one_hot(predictions, 3).to(dtype)
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.5)
        self.seen = []

    def forward(self, images):
        self.seen.append((tuple(images.shape), images.dtype, self.training))
        return self.dropout(self.logits[images[:, 0, 0, 0].long()])


class Loader:
    """Batches of four, four and two images; counts how often it is read."""

    def __init__(self, labels=LABELS):
        self.images = torch.arange(10.0).view(10, 1, 1, 1).repeat(1, 1, 2, 3)
        self.labels, self.reads = labels, 0

    def __iter__(self):
        self.reads += 1
        return iter(zip(self.images.split(4), self.labels.split(4), strict=True))


@pytest.fixture(scope="module")
def compared():
    models = {"dense": Answers(RIGHT), "small": Answers(RIGHT_BESIDE, torch.bfloat16)}
    models["small"].dropout.eval()
    loader = Loader()
    return models, loader, lib.compare(models, loader, batches=(1, 16))


def test_accuracy_and_difference_by_hand(compared):
    _, loader, frame = compared
    assert list(frame.index) == ["dense", "small"] and loader.reads == 1
    assert frame.top1.tolist() == [80, 60] and frame.difference.tolist() == [0, -20]
    # Wilson: z^2 = 3.841459; (k + z^2/2 -+ z sqrt(k (10 - k) / 10 + z^2/4)) / (10 + z^2)
    assert frame.top1_low.tolist() == pytest.approx([49.0162, 31.2674], abs=1e-4)
    assert frame.top1_high.tolist() == pytest.approx([94.3318, 83.1820], abs=1e-4)
    # One image gained and three lost of ten; with one more of each 2/12 and 4/12.
    half = 1.959964 * ((6 / 12 - (2 / 12) ** 2) / 12) ** 0.5
    assert frame.difference_low.tolist() == pytest.approx([0, 100 * (-2 / 12 - half)])
    assert frame.difference_high.tolist() == pytest.approx([0, 100 * (-2 / 12 + half)])
    assert frame.attrs["images"] == 10 and "paired" in frame.attrs["intervals"]


def test_size_time_and_machine(compared):
    _, _, frame = compared
    assert frame.params.tolist() == [30, 30] and frame.macs.tolist() == [0, 0]
    assert frame.mb.tolist() == pytest.approx([120e-6, 60e-6])
    for column in ("ms_1", "ms_16"):
        assert (frame[f"{column}_q10"] > 0).all()
        assert (frame[column] >= frame[f"{column}_q10"]).all()
    assert frame.dtype.tolist() == ["float32", "bfloat16"] and set(frame.device) == {"cpu"}
    assert (frame.load == frame.attrs["load"][0]).all() and len(frame.attrs["load"]) == 3
    assert frame.attrs["batches"] == (1, 16) and frame.attrs["repeats"] == 20
    assert frame.attrs["threads"] == torch.get_num_threads()


def test_models_run_in_turn_in_evaluation_mode_and_get_their_modes_back(compared):
    models, _, _ = compared
    # three batches of the pass, the timed ones of 1 and 16 images (repeated: there are ten)
    sizes = [4, 4, 2] + 23 * [1] + 23 * [16]
    for model, dtype in zip(models.values(), (torch.float32, torch.bfloat16), strict=True):
        called = [seen for seen in model.seen if seen[2] is False]
        assert [shape[0] for shape, _, _ in called] == sizes and len(called) == len(model.seen)
        assert {kind for _, kind, _ in called} == {dtype}
        assert model.training
    assert models["dense"].dropout.training and not models["small"].dropout.training


def test_modes_come_back_after_an_error_too():
    models = {"dense": Answers(RIGHT), "broken": nn.Linear(2, 2)}
    with pytest.raises(ValueError):
        lib.compare(models, Loader())
    assert models["dense"].training and models["broken"].training


class Stream(IterableDataset):
    def __iter__(self):
        loader = Loader()
        return iter(zip(loader.images, loader.labels, strict=True))


def test_a_stream_without_length_is_a_loader():
    frame = lib.compare({"dense": Answers(RIGHT)}, DataLoader(Stream(), 4), batches=(1,))
    assert frame.top1.tolist() == [80] and frame.attrs["images"] == 10


def test_intervals_where_nothing_varies():
    alike = np.ones(50, bool)
    assert top1(alike).value == top1(alike).high == 100 and 90 < top1(alike).low < 100
    same = paired_difference(alike, alike)
    assert same.value == 0 and same.low == -same.high and 0 < same.high < 10
    assert paired_difference(~alike, alike).low >= -100


def vit(**moe):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=3)
    return upcycle(model, MoESpec(**moe)) if moe else model


def images_and_labels(count=6):
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return [(images[:4], torch.arange(4) % 3), (images[4:], torch.arange(count - 4) % 3)]


def test_multiply_adds_are_those_of_the_experts_that_served():
    """Dropped with zero updates: the experts that are left compute what they were chosen for."""
    token = {"layers": 1, "experts": 4, "router": "token", "top_k": 2}
    models = {"dense": vit(), "mixture": vit(**token), "dropped": vit(**token)}
    drop_experts(models["dropped"], {"blocks.1.mlp": [0, 3]}, "zero_update")
    batches = images_and_labels()
    frame = lib.compare(models, batches, batches=(1,))
    dropped = 0
    with torch.no_grad():
        for images, _ in batches:
            with RoutingTape(models["dropped"].eval()) as tape:
                models["dropped"](images)
            dropped += int(tape.routings()[0].dropped.sum())
    assert 0 < dropped < 6 * 5 * 2
    dense = count(models["dense"], 32).macs
    of_expert, router = 2 * 192 * 768, 4 * 192
    assert frame.macs["dense"] == dense
    assert frame.macs["mixture"] == dense + 5 * (of_expert + router)
    of_dropped = dense + 5 * (of_expert + router) - dropped * of_expert / 6
    assert frame.macs["dropped"] == pytest.approx(of_dropped, abs=2)
    for name, model in models.items():
        assert frame.params[name] == sum(p.numel() for p in model.parameters())
        state = model.state_dict().values()
        assert stored_bytes(model) == sum(t.numel() * t.element_size() for t in state)


def test_windows_are_part_of_their_images():
    torch.manual_seed(0)
    sizes = {"img_size": 64, "num_classes": 3}
    model = timm.create_model("maxvit_nano_rw_256", **sizes)
    dense = timm.create_model("maxvit_nano_rw_256", **sizes)
    upcycle(model, MoESpec(layers=2, experts=2, router="token"))
    images = torch.randn(3, 3, 64, 64)
    frame = lib.compare({"dense": dense, "moe": model}, [(images, torch.arange(3))], batches=(1,))
    assert frame.params["moe"] > frame.params["dense"] and frame.macs["moe"] > frame.macs["dense"]


def test_tied_weights_are_stored_once():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert stored_bytes(model) == 4 * 64


class Gives(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, images):
        return self.make(images)


def once():
    yield from Loader()


ONE = {"dense": Answers(RIGHT)}
IMAGES = torch.zeros(2, 1, 2, 3)


@pytest.mark.parametrize(
    "models, loader, message",
    [
        ({}, Loader(), "models is empty: give at least one by its name"),
        (Answers(RIGHT), Loader(), "models is Answers: give at least one by its name"),
        ({"a": 3}, Loader(), "'a' is a int: valid is an nn.Module"),
        (
            {"a": Answers(RIGHT), "b": Answers(RIGHT).to("meta")},
            Loader(),
            "several devices .'a' on cpu, 'b' on meta.",
        ),
        (ONE, once(), "loader is a generator, which can be read once only"),
        (ONE, 3, "loader is a int, which cannot be iterated: give a torch DataLoader"),
        (ONE, [], "the loader gives no images"),
        (ONE, [IMAGES], "loader gave a Tensor: give pairs .images, labels."),
        (ONE, [{"image": IMAGES}], "loader gave a dict with image: give .images, labels."),
        (ONE, [(IMAGES,)], "loader gave a tuple of 1: give pairs .images, labels."),
        (ONE, [(IMAGES, [0, 1])], r"loader gave .Tensor, list.: both must be tensors"),
        (
            ONE,
            [(IMAGES, torch.zeros(2))],
            r"loader gave labels of shape .2,. and type torch.float32 for 2 images",
        ),
        (
            ONE,
            [(IMAGES, torch.zeros(3).long())],
            r"labels of shape .3,. and type torch.int64 for 2 images",
        ),
        (
            ONE,
            [(IMAGES.byte(), torch.zeros(2).long())],
            "images of shape .2, 1, 2, 3. and type torch.uint8: they must be normalised floats",
        ),
        (
            {"a": Answers(RIGHT).to("meta")},
            [(IMAGES, torch.zeros(2).long())],
            r"images on cpu and the models lie on meta: .*model.to\('cpu'\)",
        ),
        ({"a": Gives(lambda x: x)}, Loader(), r"'a' gives Tensor .4, 1, 2, 3. for 4 images"),
        ({"a": Gives(lambda x: {"y": x})}, Loader(), "'a' gives dict for 4 images: valid is one"),
        ({"a": Gives(lambda x: x[:2, 0, 0])}, Loader(), "'a' gives Tensor .2, 3. for 4 images"),
        ({"a": Gives(lambda x: x[:, 0, 0] / 0)}, Loader(), "'a' gives NaN for some images"),
        (
            {"a": Gives(lambda x: x[:, 0, 0])},
            Loader(LABELS + 1),
            "'a' tells 3 classes apart, and the loader gives labels from 1 to 3: valid is 0 to 2",
        ),
    ],
)
def test_what_cannot_be_compared_is_named(models, loader, message):
    with pytest.raises(ValueError, match=message):
        lib.compare(models, loader)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batches": ()}, r"batches=\(\): give numbers of images"),
        ({"batches": (1, 0)}, r"batches=\(1, 0\): give numbers of images of 1 or more"),
        ({"repeats": 5}, "repeats=5 is too few"),
    ],
)
def test_bad_options_are_named_before_the_loader_is_read(options, message):
    loader = Loader()
    with pytest.raises(ValueError, match=message):
        lib.compare(ONE, loader, **options)
    assert loader.reads == 0


def quantised():
    layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        return torch.ao.quantization.quantize_dynamic(layers, {torch.nn.Linear}, torch.qint8)


def test_packed_weights_that_no_counter_sees_are_refused():
    plain = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4))
    with pytest.raises(ValueError, match="'small' holds packed weights that are not counted .1._p"):
        lib.compare({"dense": plain, "small": quantised()}, Loader())
    inside = torch.nn.Sequential(plain, torch.nn.Sequential(quantised()))
    with pytest.raises(ValueError, match="'small' holds packed weights .*1.0.1._packed_params"):
        lib.compare({"dense": plain, "small": inside}, Loader())


def test_a_model_of_other_images_is_named_and_batches_are_several():
    models = {
        name: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(width, 4))
        for name, width in (("dense", 6), ("small", 8))
    }
    with pytest.raises(ValueError, match=r"'small' fails on images \(4, 1, 2, 3\) of loader"):
        lib.compare(models, Loader())
    with pytest.raises(ValueError, match="batches=4: give numbers of images"):
        lib.compare(models, Loader(), batches=4)
