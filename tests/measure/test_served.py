"""What experts served, by hand and against the probe of a run's evaluation."""

import pytest
import timm
import torch

from lib.measure.cost import count
from lib.measure.routing import RoutingProbe
from lib.measure.served import ServedExperts
from lib.models.experts import Experts
from lib.models.moe import RoutingTape
from lib.models.upcycle import upcycle
from lib.routers.base import assign
from lib.spec import MoESpec


def model_of(**moe):
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2).eval()
    return upcycle(model, MoESpec(layers=2, experts=3, **moe))


def choosing(experts_of_tokens, images):
    """The Routing of tokens with one expert each, (T,)."""
    choice = torch.tensor(experts_of_tokens).view(-1, 1)
    probs = torch.nn.functional.one_hot(choice[:, 0], 3).float()
    shape = (images, len(choice) // images)
    return assign(choice, torch.ones(choice.shape), probs, probs, shape)


def test_windows_of_an_image_are_one_image():
    """Two images of four tokens, which the second layer sees as four windows of two."""
    model = model_of(router="token", shared=True)
    tape = RoutingTape(model)
    served = ServedExperts(tape.layers)
    served.update([choosing([0, 0, 1, 1, 2, 2, 2, 2], 2), choosing([0, 0, 1, 0, 2, 2, 2, 1], 4)], 2)
    served.update([choosing([0, 1, 2, 0], 1), choosing([1, 1, 1, 1], 2)], 1)
    # experts of the three images 2, 1, 3 and 2, 2, 1, and the shared one of each layer
    assert served.measured() == {
        "experts_per_image": pytest.approx(6 / 3 + 5 / 3 + 2),
        "loads": [None, None],
        "unserved": [0, 0],
    }


@pytest.mark.parametrize(
    "moe",
    [
        {"router": "token", "top_k": 2, "capacity_factor": 0.7},
        {"router": "image"},
        {"router": "expert_choice", "group": "batch"},
    ],
)
def test_agrees_with_the_probe(moe):
    model = model_of(**moe)
    # experts of unequal width, whose loads count
    weights = list(model.blocks[0].mlp.experts.each())
    narrow = (weights[0][0][:8], weights[0][1][:8], weights[0][2][:, :8], weights[0][3])
    model.blocks[0].mlp.experts = Experts.of([narrow, *weights[1:]])
    tape, probe = RoutingTape(model), RoutingProbe(1000)
    served = ServedExperts(tape.layers)
    generator = torch.Generator().manual_seed(1)
    for size in (4, 3):
        with torch.no_grad(), tape:
            model(torch.randn(size, 3, 32, 32, generator=generator))
        probe.update(tape.routings(), [0, 1], torch.zeros(size))
        served.update(tape.routings(), size)
    rows, got = probe.summary(), served.measured()
    assert got["unserved"] == pytest.approx([row["dropped"] for row in rows])
    assert got["experts_per_image"] == pytest.approx(sum(row["experts_per_image"] for row in rows))
    assert got["loads"] == [pytest.approx(rows[0]["load"]), None]
    by_load = count(model, 32, loads=got["loads"]).macs
    assert by_load == pytest.approx(count(model, 32, loads=[row["load"] for row in rows]).macs)
    uneven = len({round(share, 9) for share in got["loads"][0]}) > 1
    assert (by_load != count(model, 32).macs) == uneven == (moe["router"] == "image")
