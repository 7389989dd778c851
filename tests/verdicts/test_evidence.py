"""Evidence and the verdicts on it: from records, with the prior of the page; what is refused."""

from types import SimpleNamespace

import pytest
from paired_runs import right_of, runs

from lib.verdicts import evidence
from lib.verdicts.evidence import (
    compare,
    compare_at_size,
    compare_values,
    judge_count,
    judge_retained,
    judge_values,
    verdicts_on,
)
from lib.verdicts.ledger import Claim
from lib.verdicts.moderated import study_prior
from lib.verdicts.sizes import retained_change
from lib.verdicts.stats import Interval, beyond_line, paired_difference

A, B = runs(right_of(60, 61, 62), "a"), runs(right_of(50, 50, 50), "b")
COMMON = {"study": "a", "source": "Table 1", "page": "a/one"}


def claim(name, direction="greater", size=1.0, **more):
    return Claim(id=name, statement=name, direction=direction, smallest=size, **COMMON | more)


def judged(piece, direction="greater", size=1.0, **more):
    (verdict,) = verdicts_on([piece], [claim(piece.claim, direction, size, **more)])
    return verdict


def test_accuracy_against_a_published_size():
    verdict = judged(compare("A1", A, B), size=30.0)
    assert (verdict.verdict, verdict.n, verdict.id) == ("holds, below what counts", 3, "A1")
    printed = judged(compare("A1", A, B), size=None, published=30.0)
    assert printed.verdict == "holds, smaller than published"
    assert verdict.records == ("a0", "a1", "a2", "b0", "b1", "b2")
    assert judged(compare("A1", B, A)).verdict == "opposite"
    assert judged(compare("A1", B, A), "less").verdict == "holds"
    none = judged(compare("A1", A, [None]))
    assert (none.verdict, none.records, none.pilot) == ("not tested", (), False)
    # records of seeds that the other side lacks take no part
    assert judged(compare("A1", A, B[:1])).records == ("a0", "b0")
    assert judged(compare_values("A1", A, B[:2], value)).records == ("a0", "a1", "b0", "b1")
    assert none.text == "no seed has records of both sides"
    assert judged(compare("A1", [None], [None])).text == "no records"


def value(record):
    return float(record.spec.seed)


def test_a_number_of_each_record():
    assert judged(judge_values("A1", A, value)).estimate.mean == 1.0
    wide = runs(right_of(1, 2, 3), "w", seeds=[2, 0, 1])
    verdict = judged(compare_values("A1", A, wide, value), "equal", 0.5)
    assert verdict.verdict == "holds" and verdict.estimate.mean == 0.0  # by seed, not by order
    other = runs(right_of(1, 2), "o", seeds=[7, 8])
    assert judged(compare_values("A1", A, other, value)).verdict == "not tested"


def sized(records, macs):
    for record in records:
        record.cost = {"macs": macs}
    return records


def test_accuracy_against_a_rival_of_the_same_size():
    ours = sized(runs(right_of(60, 61, 62), "o"), 50.0)
    small, large = (sized(runs(right_of(*p), f"r{p[0]}-"), p[0]) for p in ([40, 42, 44], [60] * 3))
    whole = sized(runs(right_of(90), "w"), 100.0)
    rival = {0.4: small, 0.6: large}
    verdict = judged(compare_at_size("A1", ours, rival, whole, "macs"))
    assert verdict.estimate == beyond_line(ours, [small, large], whole, "macs")
    # half-way between 40, 42, 44 and 60
    assert verdict.estimate.mean == pytest.approx(10.0)
    names = {record.id for record in (*ours, *small, *large, *whole)}
    assert set(verdict.records) == names and len(names) == 10


def test_what_is_kept_of_the_whole_model():
    whole = runs(right_of(80), "w")
    verdict = judged(judge_retained("A1", A, whole), "not worse", 2.0)
    assert verdict.estimate == retained_change(A, whole) and verdict.verdict == "not reproduced"
    assert verdict.estimate.mean == pytest.approx(100 * 61 / 80 - 100)
    assert verdict.records == ("a0", "a1", "a2", "w0")
    assert judged(judge_retained("A1", A, [None])).verdict == "not tested"


def test_what_is_counted_needs_no_seeds_and_is_no_pilot():
    verdict = judged(judge_count("A1", 39.8), size=39.8, unit="percent")
    assert (verdict.verdict, verdict.p, verdict.pilot) == ("holds", None, False)
    assert verdict.text == "+39.8 percent, counted"
    assert (
        judged(judge_count("A1", 5.0), size=None, published=39.8).verdict
        == "holds, smaller than published"
    )
    assert judged(judge_count("A1", -5.0)).verdict == "opposite"
    assert judged(judge_count("A1", None)).verdict == "not tested"


def test_pilots_are_marked_until_their_second_stage_is_there():
    assert judged(compare("A1", A, B)).pilot
    assert judged(compare("A1", A, B), seeds=(3, 8)).pilot
    assert not judged(compare("A1", A, B), seeds=(3, 3)).pilot
    assert not judged(compare("A1", A, B), seeds=3).pilot


def test_the_comparisons_of_a_page_share_their_variance():
    right = [(60, 61, 62), (64, 64.5, 66), (70, 72, 73), (61, 60, 60.5), (55, 57, 58), (66, 65, 64)]
    pieces, entries = [], []
    for number, percents in enumerate(right):
        arm = runs(right_of(*percents), f"{number}-")
        pieces.append(compare(f"A{number}", arm, B))
        entries.append(claim(f"A{number}"))
    prior = study_prior([piece.sides for piece in pieces])
    verdicts = verdicts_on(pieces, entries)
    for verdict, piece in zip(verdicts, pieces, strict=True):
        assert verdict.estimate == paired_difference(*piece.sides, prior=prior)
        assert verdict.estimate.method.endswith("moderated")


def test_a_joint_claim_comes_before_its_parts():
    parts = [claim(f"A1{x}", part_of="A1") for x in "ab"]
    whole = claim("A1", "joint", None, parts=parts)
    pieces = [compare("A1b", B, A), compare("A1a", A, B)]
    verdicts = verdicts_on(pieces, [whole])
    assert [(v.id, v.verdict) for v in verdicts] == [
        ("A1", "not reproduced"),
        ("A1a", "holds"),
        ("A1b", "opposite"),
    ]
    assert verdicts[0].text == "A1a holds (pilot); A1b opposite (pilot)"
    # a side that has one of the parts, such as a small build, judges by this one
    assert [v.id for v in verdicts_on(pieces[:1], [whole])] == ["A1", "A1b"]
    assert verdicts_on([], [whole]) == []


def test_refused():
    with pytest.raises(ValueError, match="claim A2 is not one of this page in the ledger.*are A1"):
        verdicts_on([compare("A2", A, B)], [claim("A1")])
    with pytest.raises(ValueError, match="claim A1 has evidence twice"):
        verdicts_on([compare("A1", A, B), compare("A1", A, B)], [claim("A1")])


def test_records_that_failed_are_not_behind_a_verdict():
    failed = SimpleNamespace(id="x", status="failed")
    estimate = Interval(1.0, 0.5, 1.5, 3)
    verdict = judged(evidence.judge_estimate("A1", estimate, [None, failed, *A]))
    assert verdict.records == ("a0", "a1", "a2")
