"""Dropping during a run: proficiencies by hand, masks that change nothing else, one expert left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from one_moe_layer import refused
from vits import batch, build, moe, refused_unchanged

from lib.models.moe import RoutingTape
from lib.pruning.experts import dropping
from lib.pruning.experts.progressive import ProgressiveDrop
from lib.routers.top_k import TopKRouter


def given(expert, weight, experts=3):
    """A routing with these assignments."""
    blank = TopKRouter(3, experts, 1)(torch.zeros(1, len(expert), 3))
    return replace(blank, expert=torch.tensor(expert), weight=torch.tensor(weight))


def test_proficiency_is_hit_rate_times_gate_averaged_over_steps():
    model = build(moe=moe(experts=3, layers=2))
    a, b = dropping.routed(model)
    drop = ProgressiveDrop(model, steps=10, decay=0.75)
    drop.update(a, given([0, 0, 1, 2], [0.5, 0.5, 0.5, 0.5]))  # equal gates: hits decide
    assert (
        drop.proficiency[a].tolist() == pytest.approx([0.5, 0.25, 0.25])
        and drop.proficiency[b] is None
    )
    drop.update(a, given([0, 1, 2, 2], [0.2, 0.2, 0.8, 0.8]))
    assert drop.proficiency[a].tolist() == pytest.approx(
        [0.75 * 0.5 + 0.25 * 0.1, 0.75 * 0.25 + 0.25 * 0.1, 0.75 * 0.25 + 0.2]
    )
    drop.update(b, given([0], [0.0]))  # no gate at all: nobody is better than the others
    assert drop.proficiency[b].tolist() == pytest.approx([1 / 3] * 3)
    drop.mask(a, 4)  # threshold 0.8: 0.4, 0.2125, 0.3875
    assert drop.routers[a].alive.tolist() == [True, False, True]
    assert drop.proficiency[a].tolist() == pytest.approx([0.4 / 0.7875, 0, 0.3875 / 0.7875])
    drop.mask(b, 4)
    assert drop.routers[b].alive.all()
    drop.update(a, given([2], [1.0]))
    drop.mask(b, 5)  # half-way: the best alone, of equals the first
    assert (
        drop.routers[b].alive.tolist() == [True, False, False]
        and drop.threshold(0) == 0.0
        and drop.threshold(9) == 1.0
    )
    held = drop.state_dict()
    again = ProgressiveDrop(build(moe=moe(experts=3, layers=2)), steps=10, decay=0.75)
    again.load_state_dict(held)
    assert all(torch.equal(again.proficiency[name], held[name]) for name in (a, b))


def test_a_masked_expert_gets_no_token_and_the_rest_share_its_probability():
    model = build(moe=moe(experts=4, router_std=1.0))
    [name] = dropping.routed(model)
    drop = ProgressiveDrop(model, steps=4)
    drop.routers[name].alive[1] = False
    images = batch()[0]
    with RoutingTape(model) as tape:
        out = model(images)
    [routing] = tape.routings()
    assert (
        routing.load()[1] == 0
        and not routing.probs[:, 1].any()
        and torch.allclose(routing.probs.sum(1), torch.ones(1))
    )
    # Removal changes nothing but shapes.
    torch.testing.assert_close(drop.finish()(images), out, rtol=1e-5, atol=1e-6)
    layer = model.get_submodule(name)
    assert (
        type(layer.router) is TopKRouter
        and layer.experts.experts == 3
        and "alive" not in dict(layer.router.named_buffers())
    )


def test_until_one_expert_a_layer_is_left_half_way():
    model = build(moe=moe(experts=4, layers=2, router_std=1.0))
    drop, left = ProgressiveDrop(model, steps=12), []
    for step in range(12):
        with RoutingTape(model) as tape:
            model(batch(seed=step)[0])
        drop.after(step, tape)
        left.append([int(router.alive.sum()) for router in drop.routers.values()])
    assert left[0] == [4, 4] and left[6:] == [[1, 1]] * 6 and left == sorted(left, reverse=True)
    assert all(layer.experts.experts == 1 for layer in dropping.routed(drop.finish()).values())


@pytest.mark.parametrize("steps", [1, 10])
def test_one_expert_is_left_after_the_last_step_also_where_that_is_the_end(steps):
    model = build(moe=moe(experts=4, layers=2, router_std=1.0))
    drop = ProgressiveDrop(model, steps=steps, end=1.0)
    for step in range(steps):
        with RoutingTape(model) as tape:
            model(batch(seed=step)[0])
        drop.after(step, tape)
    assert all(layer.experts.experts == 1 for layer in dropping.routed(drop.finish()).values())


@pytest.mark.parametrize("settings", [{"steps": 0}, {"end": 0.0}, {"end": 1.5}, {"decay": 1.0}])
def test_bad_settings_of_a_progressive_drop(settings):
    refused_unchanged(
        lambda model: ProgressiveDrop(model, **{"steps": 4, **settings}), "must be at least 1"
    )


def test_a_progressive_drop_needs_top_1():
    model = build(moe=moe(top_k=2))
    with refused("top_k=2: dropping until one expert"):
        ProgressiveDrop(model, 4)
    assert type(next(iter(dropping.routed(model).values())).router) is TopKRouter
