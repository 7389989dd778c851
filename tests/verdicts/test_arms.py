"""Claims on test top-1 are judged on the arms that the ledger names, and on no others."""

import pytest
from paired_runs import right_of, runs

from lib.verdicts import arms, ledger
from lib.verdicts.evidence import verdicts_on
from lib.verdicts.ledger import Claim


def claim(name, *names, **fields):
    fields = {"direction": "greater", "smallest": 1, "arms": names, "page": "a/one"} | fields
    return Claim(id=name, study="a", statement=name, source="", **fields)


LEDGER = [
    claim("X1", "sparse", "dense"),
    claim("X2", direction="joint", parts=(claim("X2a", "dense", "sparse"),), smallest=None),
    claim("X3", "sparse", "absent"),
    claim("X4", "sparse", "dense", statistic="loss"),
    claim("X5", "sparse"),
    Claim(id="X6", study="a", statement="", source="", reason="no data"),
]
SIDE = {
    "sparse": runs(right_of(60, 62, 64), "s"),
    "dense": runs(right_of(50, 52, 54), "d"),
    "other": [None],
}


@pytest.fixture
def evidence(monkeypatch):
    monkeypatch.setattr(ledger, "of_page", {"a/one": LEDGER}.get)
    return list(arms.compare_arms("a/one", SIDE))


def test_first_arm_less_the_second_for_claims_on_top_1(evidence):
    judged = verdicts_on(evidence, LEDGER)
    assert [(v.id, v.estimate.mean) for v in judged if v.estimate] == [
        ("X1", pytest.approx(10)),
        ("X2a", pytest.approx(-10)),
    ]


def test_arms_that_are_not_there_and_other_statistics_are_left_out(evidence):
    assert [piece.claim for piece in evidence] == ["X1", "X2a"]


def test_arms_without_records_are_evidence_of_nothing_yet(monkeypatch):
    monkeypatch.setattr(ledger, "of_page", lambda page: [claim("X1", "other", "dense")])
    [piece] = arms.compare_arms("a/one", SIDE)
    assert piece.estimate(None) is None
