"""Arms "at the same compute" cost what the proposed arm's stages cost together, in each profile."""

import pytest

from lib.pages import profiles
from lib.runs.demand import demand_of

IMAGES = (10_000, 0, 0)  # no evaluation, which is no part of training


def training_macs(spec):
    return demand_of(spec, lambda run: (IMAGES, "given")).macs


@pytest.mark.parametrize("profile", ["smoke", "quick", "small", "paper"])
def test_rivals_at_the_same_compute_of_the_durham_strategies(profile):
    arms = {arm: runs[0] for arm, runs in profiles.plan("durham/strategies", profile).items()}
    last = arms["proposed"]
    proposed = sum(map(training_macs, (last, last.init, last.init.init)))
    assert last.init.train.has_teacher  # which passes each image once more
    # one number serves both sparse rivals, and expert choice drops no token
    for arm, within in {
        "token choice": 0.01,
        "expert choice": 0.06,
        "dense transformer": 0.01,
    }.items():
        fair = training_macs(arms[f"{arm}, same compute"])
        assert fair == pytest.approx(proposed, rel=within), arm
        assert arms[f"{arm}, same compute"].init == arms[arm].init
