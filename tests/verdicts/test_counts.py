"""Counts in sentences: the noun agrees with its number, and the verb with that of its subject."""

import pytest

from lib.verdicts import agree, count


@pytest.mark.parametrize(
    "number, noun, said",
    [
        (1, "seed", "1 seed"),
        (0, "seed", "0 seeds"),
        (0.5, "pass", "0.5 passes"),
        (1.0, "pass", "1 pass"),
    ],
)
def test_a_noun_agrees_with_its_number(number, noun, said):
    assert count(number, noun) == said


@pytest.mark.parametrize(
    "verb, numbers, said",
    [
        ("hold", (1, 12), "holds"),
        ("hold", (2, 12), "hold"),
        ("hold", (0, 12), "hold"),
        ("hold", (0, 1), "holds"),
        ("are", (1,), "is"),
        ("do", (1,), "does"),
        ("have", (3,), "have"),
        ("have", (1,), "has"),
    ],
)
def test_a_verb_agrees_with_its_subject(verb, numbers, said):
    assert agree(verb, *numbers) == said
