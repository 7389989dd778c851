"""The reduced form of `stress.py`: a grid of two runs that is killed once; `make faults` carries
out all parts."""

from __future__ import annotations

import stress


def test_nothing_is_lost_doubled_different_or_orphaned(monkeypatch):
    monkeypatch.setattr(stress, "SPECS", stress.SPECS[:1])
    count = stress.carry_out("grid", kills=1)
    assert {entry: count[entry] for entry in stress.MUST_BE_0} == dict.fromkeys(stress.MUST_BE_0, 0)
    assert count["kills"] == 1
