"""The reduced form of `stress.py`: each of its parts, with few kills."""

from __future__ import annotations

import pytest
import stress


@pytest.mark.parametrize("name", stress.PARTS)
def test_nothing_is_lost_doubled_different_or_orphaned(name):
    count = stress.carry_out(name, kills=2)
    assert {entry: count[entry] for entry in stress.MUST_BE_0} == dict.fromkeys(stress.MUST_BE_0, 0)
    assert count["kills"] >= 2 * (name in ("grid", "pool", "build"))
    if name == "builds":
        assert count["waited"] == 1
