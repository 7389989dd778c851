"""Sentences that answer a question by the verdict on a claim: of the front page, and at the head of
each page, whose sentences stand beside the claims in `data/papers`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from ..verdicts import papers

if TYPE_CHECKING:
    from ..verdicts.claims import Verdict


def outcome(verdict: str | None, stands: bool = True) -> str:
    """Says whether a claim holds, fails or is open, as sentences name it.

    stands: whether it does so after the correction for many claims as well.
    """
    if not stands or verdict in (None, "undecided", "not tested"):
        return "open"
    return "holds" if verdict.startswith("holds") else "fails"


def sentence(words: Mapping[str, str], verdict: str | None, stands: bool = True) -> str | None:
    """Chooses the sentence for a verdict; None where there is none.

    words: sentences by outcome. What is opposite, or holds alone and not after the correction, may
    have one of its own ("opposite", "alone").
    """
    is_alone = not stands and (verdict or "").startswith("holds")
    special = "alone" if is_alone else verdict
    return words.get(special) or words.get(outcome(verdict, stands))


def of_page(
    key: str, judged: Sequence[Verdict], data: Callable[[Verdict], str]
) -> tuple[list[str], set[str]]:
    """Answers the title of a page; returns the sentences, and the claims that they speak of.

    judged: the verdicts of the page. data: names those on which a verdict stands where they stand
    in for others, else ""; said once. Raises ValueError for a sentence on a claim of another page.
    """
    from ..report.text import with_numbers

    study = key.partition("/")[0]
    answers = papers.load(study).get("answers", {}) if study in papers.names() else {}
    verdicts = {verdict.id: verdict for verdict in judged}
    sentences, spoken_of, said = [], set(), {""}
    for claim, words in answers.get(key, {}).items():
        if claim not in verdicts:
            raise ValueError(
                f"data/papers/{study}.yaml answers {key} by claim {claim}, which that page does "
                f"not judge: it judges {', '.join(verdicts)}"
            )
        verdict = verdicts[claim]
        chosen = sentence(words, verdict.verdict)
        decisive = verdict.decisive or verdict
        if chosen is None or decisive.estimate is None:
            continue
        on = data(decisive)
        ours = with_numbers(decisive) + ("" if on in said else f", on {on}")
        sentences.append(chosen.format(ours=ours))
        joint = verdict.entry.part_of if verdict.entry is not None else None
        spoken_of |= {claim, joint or claim}
        said.add(on)
    return sentences, spoken_of
