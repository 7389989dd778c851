"""The patch model of the theory: data, gates and steps by hand, and what the theorem says over
several seeds."""

from __future__ import annotations

import math

import pytest
import torch

from lib.pruning.experts.theory import (
    PatchModel,
    PatchSpec,
    PatchTest,
    draw,
    proficiency,
    sgd_step,
    simulate,
    simulate_and_test,
    start,
)

TINY = PatchSpec(
    patterns=3,
    patches=2,
    taken=2,
    experts=2,
    neurons=1,
    lr_expert=0.5,
    lr_router=1.0,
    specialists=0,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_images_have_one_pattern_with_a_label_and_different_others():
    spec = PatchSpec(patterns=10, patches=5)
    patches, label = draw(spec, 200, seeded())
    assert patches.shape == (200, 5) and set(label.tolist()) == {1.0, -1.0}
    # Pattern 0 for class +1, pattern 1 for class -1.
    assert torch.equal(patches[:, 0], (label < 0).long())
    assert patches[:, 1:].min() == 2 and patches.max() == 9
    assert all(len(set(row)) == 5 for row in patches.tolist())
    assert torch.equal(draw(spec, 200, seeded())[0], patches)


def test_a_step_moves_router_rows_as_the_formula_says():
    """With two patches taken, df/dw_s[j] = a_s G_j (v_j - sum_i G_i v_i) for the value v_j = relu
    of the hidden row at j."""
    model = PatchModel(
        router=torch.tensor([[math.log(3.0), 0, 0], [0, 0, 0]]),
        hidden=torch.tensor([[[0.4, 0, 0.2]], [[-0.1, 0, 0.6]]]),
        sign=torch.tensor([1.0, -1.0]),
    )
    made, loss = sgd_step(model, torch.tensor([[0, 2]]), torch.tensor([1.0]), TINY)
    # Expert 0: gates 3/4 and 1/4, output 0.3 + 0.05; expert 1: gates 1/2, values 0 (a negative row)
    # and 0.6, output -0.3.
    assert loss == pytest.approx(1 - (0.35 - 0.3))
    # The loss falls by the step along +df/dw (y = 1). Expert 0: 3/4 (0.4 - 0.35), 1/4 (0.2 - 0.35);
    # expert 1: -1/2 (0 - 0.3), ...
    assert (made.router - model.router)[0].tolist() == pytest.approx([0.0375, 0, -0.0375], abs=1e-6)
    assert (made.router - model.router)[1].tolist() == pytest.approx([0.15, 0, -0.15], abs=1e-6)
    # Hidden rows: rate 0.5 times a_s G_j where the neuron is on.
    assert (made.hidden - model.hidden)[:, 0].flatten().tolist() == pytest.approx(
        [0.375, 0, 0.125, 0, 0, -0.25], abs=1e-6
    )


def test_a_gate_over_one_patch_has_no_slope():
    spec = TINY.but(taken=1)
    model = PatchModel(
        router=torch.tensor([[1.0, 0, 0.5], [0, 1.0, 0.5]]),
        hidden=torch.tensor([[[0.2, 0, 0.1]], [[0, 0.3, 0.1]]]),
        sign=torch.tensor([1.0, -1.0]),
    )
    made, loss = sgd_step(model, torch.tensor([[0, 2]]), torch.tensor([1.0]), spec)
    # Expert 0 takes pattern 0 (value 1), expert 1 takes pattern 2 (0.5 against 0): f = 0.2 - 0.1,
    # loss 1 - 0.1.
    assert loss == pytest.approx(0.9)
    assert made.hidden[0, 0].tolist() == pytest.approx([0.7, 0, 0.1])
    assert made.hidden[1, 0].tolist() == pytest.approx([0, 0.3, -0.4])
    assert torch.equal(made.router, model.router)


def test_nothing_moves_beyond_the_margin_and_losses_are_means_over_images():
    sure = PatchModel(
        torch.zeros(2, 3),
        torch.tensor([[[4.0, 0, 4.0]], [[0.0, 4, 4.0]]]) * torch.tensor([[[1.0]], [[0.0]]]),
        torch.tensor([1.0, -1.0]),
    )
    made, loss = sgd_step(sure, torch.tensor([[0, 2]]), torch.tensor([1.0]), TINY)
    assert (
        loss == 0.0
        and torch.equal(made.router, sure.router)
        and torch.equal(made.hidden, sure.hidden)
    )
    # The same vote of +4 on an image of class -1 costs 1 + 2, since its own pattern has value 0: (0
    # + 4) / 2.
    assert sgd_step(sure, torch.tensor([[0, 2], [1, 2]]), torch.tensor([1.0, -1.0]), TINY)[
        1
    ] == pytest.approx((0 + 3) / 2)


def test_votes_add_up_and_pruning_takes_rows_away():
    spec = PatchSpec(patterns=8, patches=4, taken=2, experts=4, specialists=0)
    model = start(spec, seeded())
    patches, _ = draw(spec, 5, seeded(1))
    votes = model.votes(patches, 2)
    for s in range(4):
        for b, image in enumerate(patches.tolist()):
            best = sorted(image, key=lambda j, s=s: -model.router[s, j].item())[:2]
            gate = torch.stack([model.router[s, j] for j in best]).softmax(0)
            value = torch.stack([model.hidden[s, :, j].relu().sum() for j in best])
            assert votes[s, b].item() == pytest.approx(
                (model.sign[s] * (gate * value).sum()).item(), abs=1e-6
            )


def test_proficiency_by_hand():
    # An image: its pattern, and both others.
    spec = PatchSpec(patterns=4, patches=3, taken=2, experts=4, specialists=0)
    router = torch.tensor(
        [
            [2.0, 0, 1.0, 0.0],  # class +1: pattern 0 first: always above a half
            [0.5, 9, 1.0, 0.0],  # taken, as the lesser of two: its gate is below a half
            [9.0, 0.5, 1.0, 2.0],  # class -1: pattern 1 is not taken, and pattern 0 does not count
            [0.0, 3.0, 1.0, 2.0],
        ]
    )
    model = PatchModel(
        router, torch.zeros(4, spec.neurons, 4), torch.tensor([1.0, 1.0, -1.0, -1.0])
    )
    assert proficiency(model, spec, seeded(), images=100).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_a_simulation_is_its_seed_and_logs_both_ends():
    spec = PatchSpec(steps=25)
    run, again = (simulate(spec, seeded(3), every=10) for _ in range(2))
    assert run.step == [0, 10, 20, 25] and run.norm.shape == (4, 16) and len(run.loss) == 4
    assert torch.equal(run.norm, again.norm) and torch.equal(
        run.before.router, start(spec, seeded(3)).router
    )
    assert torch.equal(run.norm[0], run.before.router.norm(dim=1)) and torch.equal(
        run.norm[-1], run.after.router.norm(dim=1)
    )
    assert torch.equal(run.scores()["router_norm_change_abs"], (run.norm[-1] - run.norm[0]).abs())
    assert not torch.equal(simulate(spec, seeded(4), every=10).norm, run.norm)


def test_accuracy_counts_the_votes_of_the_kept_experts():
    votes = torch.tensor([[2.0, -1, 3, 1], [0.0, 2, -4, -2]])
    tested = PatchTest(None, votes, torch.tensor([1.0, 1, -1, -1]))
    # The first expert alone is right of the first image; the second of all but the first, on which
    # it has no vote; together they give +2, +1, -1, -1.
    assert tested.accuracy(torch.tensor([0])) == 25.0
    assert tested.accuracy(torch.tensor([1])) == 75.0
    assert tested.accuracy(torch.tensor([0, 1])) == 100.0
    assert tested.accuracy(torch.tensor([], dtype=torch.long)) == 0.0


def test_a_simulation_is_tested_once_and_on_images_of_its_own():
    spec = PatchSpec(steps=5)
    tested = simulate_and_test(spec, 3, images=50)
    assert simulate_and_test(spec, 3, images=50) is tested
    assert torch.equal(tested.run.norm, simulate(spec, seeded(3)).norm)
    patches, label = draw(spec, 50, seeded(10_003))
    assert torch.equal(tested.label, label)
    assert torch.equal(tested.votes, tested.run.after.votes(patches, spec.taken))


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_proficient_experts_grow_the_others_hardly_and_half_can_go(seed):
    spec = PatchSpec(steps=150)
    run = simulate(spec, seeded(seed))
    growth, good = run.scores()["router_norm_change"], run.proficiency >= 0.5
    # the experts with a head start
    assert run.proficiency[[0, 1, 8, 9]].min() > run.proficiency.median()
    assert 2 <= good.sum() <= 8 and growth[good].mean() > 10 * growth[~good].mean().abs()
    patches, label = draw(spec, 1000, seeded(100 + seed))
    votes = run.after.votes(patches, spec.taken)
    order = growth.argsort(descending=True)
    right = [
        (votes[kept].sum(dim=0) * label > 0).float().mean().item()
        for kept in (order, order[:8], order[8:])
    ]
    # All, the eight that grew most, the eight that grew least.
    assert right[0] > 0.99 and right[1] > 0.99 and right[2] < 0.9


@pytest.mark.parametrize(
    "given, says",
    [
        ({"specialists": 9}, "more than the 8 experts"),
        ({"lr_router": 0.0}, "lr_router"),
        ({"patches": 64}, "at most 63"),
        ({"taken": 17}, "taken=17"),
        ({"depth": 2}, "depth"),
        ({"experts": 3}, "must be even"),
    ],
)
def test_settings_that_make_no_sense(given, says):
    with pytest.raises(ValueError, match=says):
        PatchSpec(**given)
