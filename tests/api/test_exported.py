"""The form for export: equal to the model in output, and taken by torch.export and torch.compile.

Axis letters: **B** images, **N** tokens of an image, **D** width.
"""

from __future__ import annotations

import pytest
import torch
from changed_vits import CHANGED, LAYER, Net, dropped, extracted, images
from vits import D, build, moe

import lib
from lib.models.moe import MoELayer, RoutingTape
from lib.routers.base import Router, falling_order

# what depends on how many images there are: traced for one number of them
FIXED = [name for name in CHANGED if name.endswith(("capacity", "token, priority", "batch"))]
ROUTED = [name for name in CHANGED if name.startswith("upcycled: ")]


@pytest.mark.parametrize("name", CHANGED)
def test_equal_in_output(name):
    model = CHANGED[name]()
    exported = lib.for_export(model)
    assert not any(isinstance(module, MoELayer) for module in exported.modules())
    with torch.no_grad():
        assert torch.allclose(model(images()), exported(images()), atol=1e-5)
    before, after = model.state_dict(), exported.state_dict()
    assert set(before) - set(after) <= {f"{LAYER}.kept"}
    assert all(torch.equal(before[name], after[name]) for name in after)


def equal_when_traced(model, x, y=None):
    """x: what is traced. y: another number of images, which the traced program takes, too."""
    batch = None if y is None else ({0: torch.export.Dim("batch", min=1, max=64)},)
    exported = lib.for_export(model)
    program = torch.export.export(exported, (x,), dynamic_shapes=batch).module()
    torch._dynamo.reset()  # each code object is compiled a few times only
    compiled = torch.compile(exported, fullgraph=True, backend="eager")
    with torch.no_grad():
        for inputs in [x] if y is None else [x, y]:
            assert torch.allclose(model(inputs), program(inputs), atol=1e-5)
        assert torch.allclose(model(x), compiled(x), atol=1e-5)


@pytest.mark.parametrize("name", ROUTED)
def test_layers_are_traced(name):
    layer = CHANGED[name]().get_submodule(LAYER)
    generator = torch.Generator().manual_seed(2)
    x, y = (torch.randn(b, 6, D, generator=generator) for b in (4, 7))
    equal_when_traced(layer, x, None if name in FIXED else y)


@pytest.mark.parametrize(
    "name", ["extracted: inputs", "dropped, then pruned unevenly", "pruned, then upcycled"]
)
def test_models_are_traced(name):
    equal_when_traced(CHANGED[name](), images(), images(7, seed=9))


def test_a_module_of_ones_own_and_windows_of_tokens():
    model = Net().eval()
    generator = torch.Generator().manual_seed(1)
    lib.upcycle(model.trunk, moe(top_k=2), generator=generator, inplace=True)
    with torch.no_grad():
        assert torch.allclose(model(images()), lib.for_export(model)(images()), atol=1e-5)
    layer = CHANGED["upcycled: token"]().get_submodule(LAYER)
    grid = torch.randn(2, 3, 4, D)  # as Swin has its tokens
    with torch.no_grad():
        assert torch.allclose(layer(grid), lib.for_export(layer)(grid), atol=1e-5)


def test_the_given_model_is_left_as_it_was():
    model = build(moe=moe()).train()
    exported = lib.for_export(model)
    assert model.training and isinstance(model.get_submodule(LAYER), MoELayer)
    assert not any(module.training for module in exported.modules())
    with RoutingTape(model) as tape:
        model(images())
    assert len(tape.routings()) == 1


@pytest.mark.parametrize(
    "model, says",
    [
        (
            lambda: build(moe=moe(router="manual", groups=((0, 3), (1,), (2, 4)), balance="none")),
            "blocks.1.mlp: a ManualRouter decides by the class",
        ),
        (lambda: extracted(router="random"), "blocks.0.mlp: a RandomRouter draws"),
    ],
)
def test_what_has_no_such_form_is_refused_by_name(model, says):
    with pytest.raises(ValueError, match=says):
        lib.for_export(model())


def test_a_router_that_says_no_factors_gets_them_from_its_routing():
    class Every(Router):
        """Sends token t to expert t modulo E, with weight 0.5."""

        def __init__(self):
            super().__init__(3)

        def forward(self, x):
            from lib.routers.base import assign

            tokens = x.shape[0] * x.shape[1]
            choice = (torch.arange(tokens) % 3).unsqueeze(1)
            blank = torch.zeros(tokens, 3)
            weight = torch.full((tokens, 1), 0.5)
            return assign(choice, weight, blank, blank, tuple(x.shape[:2]))

        def expert_rows(self, tokens, images):
            return tokens

        def experts_per_image(self):
            return None

        def decision_macs(self, tokens, images):
            return 0

    factors = Every().factors(torch.zeros(2, 2, D))
    assert factors.tolist() == [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0, 0]]


def test_the_order_is_stable_when_traced():
    values = torch.tensor([[1.0, 2.0, 1.0, -torch.inf, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    wanted = [[1, 4, 0, 2, 3], [0, 1, 2, 3, 4]]
    traced = torch.compile(falling_order, fullgraph=True, backend="eager")
    assert falling_order(values).tolist() == traced(values).tolist() == wanted


def test_dropped_experts_are_not_run():
    exported = lib.for_export(dropped("zero_update"))
    assert exported.get_submodule(LAYER).place == {0: 0, 2: 1}
