"""The reduced form of `stress.py`: a grid that is killed twice; `make faults` carries out all
parts."""

from __future__ import annotations

import stress


def test_nothing_is_lost_doubled_different_or_orphaned():
    count = stress.carry_out("grid", kills=2)
    assert {entry: count[entry] for entry in stress.MUST_BE_0} == dict.fromkeys(stress.MUST_BE_0, 0)
    assert count["kills"] == 2
