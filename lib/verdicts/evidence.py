"""What the records of a page say of the claims of the ledger, and the verdicts on them.

A page yields one piece of evidence for each of its claims, by id:

    yield compare("V3", side["shared"], side["none"])  # test top-1, by images and seeds
    yield compare_values("D10", with_, without, lambda record: record.experts_off["top1"])
    yield compare_at_size("M.vbp50", moee, static, dense, "macs")  # with a rival of the same size
    yield judge_retained("M.goal50", runs, dense)  # test top-1 in percent of the dense model's
    yield judge_values("L10", runs, information)  # the mean of one number a record
    yield judge_estimate("V9", estimate, runs)  # an interval that the page computed itself
    yield judge_count("E3", 39.8)  # counted, not measured: no chance in it

Direction, size, unit and sentence are the ledger's. Nothing is judged before all is there, because
the comparisons of a page share what they know of the variance between seeds (`moderated`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

from .claims import Verdict, judge, judge_jointly
from .ledger import Claim
from .moderated import study_prior
from .sizes import Family, retained_change
from .stats import Interval, beyond_line, finished, paired_difference, same_seed
from .values import Value, value_difference, value_interval

if TYPE_CHECKING:
    from .moderated import SeedPrior

__all__ = [
    "Evidence",
    "compare",
    "compare_at_size",
    "compare_values",
    "judge_count",
    "judge_estimate",
    "judge_retained",
    "judge_values",
    "verdicts_on",
]

Records = Sequence[Any]


@dataclass(frozen=True)
class Evidence:
    """Holds what records say of a claim.

    claim: its id. estimate: from the prior of the page, or None, to the interval. records: those
    that are behind it. sides: of a comparison of test top-1, from which the prior is fitted.
    """

    claim: str
    estimate: Callable[[SeedPrior | None], Interval | None]
    records: tuple[Any, ...] = ()
    sides: tuple[Records, Records] | None = None


def compare(claim: str, records_a: Records, records_b: Records) -> Evidence:
    """Compares test top-1 of a with b, paired by image and by seed, in points."""

    def estimate(prior: SeedPrior | None) -> Interval | None:
        return paired_difference(records_a, records_b, prior=prior)

    return Evidence(claim, estimate, _that_meet(records_a, records_b), (records_a, records_b))


def _that_meet(records_a: Records, records_b: Records) -> tuple[Any, ...]:
    """Keeps the finished records of seeds that both sides have; all, where they share none."""
    sides = zip(*same_seed(records_a, records_b), strict=True)
    return tuple(chain(*sides)) or (*finished(records_a), *finished(records_b))


def compare_values(claim: str, records_a: Records, records_b: Records, value: Value) -> Evidence:
    """Compares a number that each record gives, a with b, paired by seed."""
    estimate = value_difference(records_a, records_b, value)
    return judge_estimate(claim, estimate, _that_meet(records_a, records_b))


def compare_at_size(
    claim: str, records: Records, rival: Family, whole: Records, size: str
) -> Evidence:
    """Compares test top-1 with what a rival's family reaches at the same size; see `beyond_line`.

    size: "macs" or "params_stored".
    """
    line = list(rival.values())
    estimate = beyond_line(records, line, whole, size)
    return judge_estimate(claim, estimate, [*records, *chain(*line), *whole])


def judge_retained(claim: str, records: Records, whole: Records) -> Evidence:
    """Takes how far test top-1 is from the whole model's, in percent of it: -2 keeps 98%."""
    return judge_estimate(claim, retained_change(records, whole), [*records, *whole])


def judge_values(claim: str, records: Records, value: Value) -> Evidence:
    """Takes the mean of a number that each record of one setting gives."""
    return judge_estimate(claim, value_interval(records, value), records)


def judge_estimate(claim: str, estimate: Interval | None, records: Records = ()) -> Evidence:
    """Takes an interval as it is. records: those that it was computed from, None among them."""
    there = tuple(r for r in records if r is not None and r.status == "ok")
    return Evidence(claim, lambda prior: estimate, there)


def judge_count(claim: str, value: float | None, records: Records = ()) -> Evidence:
    """Takes a number that has no chance in it, such as parameters; None = not known yet."""
    exact = None if value is None else Interval(value, value, value, 1, "exact")
    return judge_estimate(claim, exact, records)


def verdicts_on(evidence: Iterable[Evidence], claims: Sequence[Claim]) -> list[Verdict]:
    """Judges the claims of a page by the evidence for them; a joint one comes before its parts.

    claims: entries of the ledger (`ledger.of_page`). A claim without evidence is left out, a joint
    one with some of its parts is judged on these: callers that must have all of them check the ids.
    Raises ValueError for evidence of a claim that is not among them, or that comes twice.
    """
    found: dict[str, Evidence] = {}
    wanted = [part.id for claim in claims for part in claim.judged()]
    for piece in evidence:
        if piece.claim in found:
            raise ValueError(f"claim {piece.claim} has evidence twice")
        if piece.claim not in wanted:
            raise ValueError(
                f"claim {piece.claim} is not one of this page in the ledger (data/papers), which "
                f"are {', '.join(wanted) or 'none'}: add it there first, with direction and size"
            )
        found[piece.claim] = piece
    prior = study_prior(piece.sides for piece in found.values() if piece.sides)
    judged = []
    for claim in claims:
        parts = [
            _verdict(part, found[part.id], prior) for part in claim.judged() if part.id in found
        ]
        if claim.parts and parts:
            judged.append(replace(judge_jointly(claim.statement, parts), entry=claim))
        judged += parts
    return judged


def _verdict(claim: Claim, piece: Evidence, prior: SeedPrior | None) -> Verdict:
    estimate = piece.estimate(prior if piece.sides else None)
    verdict = judge(
        claim.statement,
        estimate,
        claim.direction,
        claim.size,
        claim.unit,
        claim.decimals,
        published=claim.published is not None,
        threshold=claim.threshold,
    )
    counted = estimate is not None and estimate.method == "exact"
    pilot = verdict.n > 0 and not counted and claim.is_pilot(verdict.n)
    ids = tuple(dict.fromkeys(record.id for record in piece.records))
    one_sided = {"text": "no seed has records of both sides"} if estimate is None and ids else {}
    # a claim that is not tested has nothing behind it
    return replace(verdict, entry=claim, records=ids if estimate else (), pilot=pilot, **one_sided)
