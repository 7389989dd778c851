"""Moments, ridge regression and the choice of neurons with it in mind, by hand."""

from __future__ import annotations

import numpy as np
import torch
from small_mlps import (
    calibration_of,
    rules,
    small_mlp,
)

from lib.extraction import closed_form
from lib.extraction import neurons as choosing
from lib.extraction.closed_form import (
    keep_by_update,
    moments_of,
    moments_of_union,
    ridge_regression,
)


def test_moments_of_some_neurons_and_mixed_ones_by_hand():
    generator = torch.Generator().manual_seed(0)
    hidden, target = (
        torch.randn(60, 4, generator=generator),
        torch.randn(60, 2, generator=generator),
    )
    own, everyone = moments_of(hidden[:20], target[:20]), moments_of(hidden, target)
    some = torch.tensor([3, 1])
    for got, want in zip(
        own.of_neurons(some), moments_of(hidden[:20][:, some], target[:20]), strict=True
    ):
        torch.testing.assert_close(got, want)
    mixed = own.mixed_with(everyone, 0.25)
    cov = [np.cov(np.hstack([hidden[:n], target[:n]]).T, bias=True) for n in (20, 60)]
    want = torch.tensor(0.75 * cov[0] + 0.25 * cov[1], dtype=torch.float32)
    torch.testing.assert_close(
        torch.cat([mixed.covariance, mixed.cross_covariance], dim=1), want[:4], atol=1e-5, rtol=0
    )
    assert torch.equal(mixed.mean_hidden, own.mean_hidden) and torch.equal(
        mixed.mean_target, own.mean_target
    )
    for got, want in zip(
        moments_of_union([own, moments_of(hidden[20:], target[20:])], torch.tensor([20, 40])),
        everyone,
        strict=True,
    ):
        torch.testing.assert_close(got, want)
    exact = own._replace(covariance=own.covariance.double())
    ridge_regression(exact, 0.5)
    # A penalty is not left in what it was given.
    assert torch.equal(exact.covariance.float(), own.covariance)


def test_the_neuron_that_goes_is_the_one_whose_loss_the_others_make_up_for():
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(400, 5, generator=generator) @ torch.randn(5, 5, generator=generator)
    target = hidden @ torch.randn(5, 3, generator=generator) + 0.1 * torch.randn(
        400, 3, generator=generator
    )

    def left(kept):
        design = np.hstack([hidden[:, kept].numpy(), np.ones((400, 1))])
        best, *_ = np.linalg.lstsq(design, target.numpy(), rcond=None)
        return ((design @ best - target.numpy()) ** 2).sum()

    without = [left([i for i in range(5) if i != j]) for j in range(5)]
    one = torch.ones(1)
    kept = keep_by_update([moments_of(hidden, target)], one, 4, 1e-9)[0].tolist()
    assert kept == [i for i in range(5) if i != int(np.argmin(without))]
    twins = torch.cat(
        [hidden, 3 * hidden[:, :1] + 1e-3 * torch.randn(400, 1, generator=generator)], dim=1
    )
    found = keep_by_update([moments_of(twins, 5 * twins[:, 5:] + target)], one, 5, 1e-9)[0].tolist()
    # Of two that say the same one goes, however large it is.
    assert found in ([0, 1, 2, 3, 4], [1, 2, 3, 4, 5])


def test_moments_made_in_pieces_are_those_of_the_whole():
    # Several pieces of tokens and of neurons, the last ones short.
    n, s = 2 * closed_form.ROWS + 7, closed_form.BLOCK + 5
    generator = torch.Generator().manual_seed(0)
    hidden, target = (
        3 + torch.randn(n, s, generator=generator),
        torch.randn(n, 2, generator=generator),
    )
    found, want = (
        moments_of(hidden, target),
        np.cov(torch.cat([hidden, target], dim=1).double().numpy().T, bias=True),
    )
    np.testing.assert_allclose(found.covariance, want[:s, :s], atol=2e-6)
    np.testing.assert_allclose(found.cross_covariance, want[:s, s:], atol=2e-6)
    assert torch.equal(found.covariance, found.covariance.t())


def test_pooled_moments_are_the_same_whether_made_of_the_experts_or_anew():
    calibration, halves = calibration_of(small_mlp()), torch.arange(60).chunk(2)
    everyone = torch.arange(60)
    for score in ("update", "weighted"):
        changed_rules = rules(
            correction={"method": "ridge", "pooled": 0.3}, neurons={"score": score}
        )
        experts = [
            choosing.ExpertTokens(
                calibration.tokens.hidden, calibration.target, half, changed_rules
            )
            for half in halves
        ]
        choosing.pool_moments(experts, calibration.tokens.hidden, calibration.target, everyone)
        want = moments_of(calibration.tokens.hidden[:60], calibration.target[:60])
        for part in (
            part
            for expert in experts
            for part in zip(expert.moments_of_all_tokens, want, strict=True)
        ):
            torch.testing.assert_close(*part)
