"""The simulation of coverage, small, and the table of "How to read a page"."""

from itertools import takewhile

import pytest

from lib.paths import ROOT
from lib.verdicts.coverage import HEAD, Coverage, Setting, simulate

PAGE = ROOT / "book" / "how_to_read.md"


@pytest.mark.parametrize("images, unequal", [(2000, False), (2000, True), (10000, False)])
def test_intervals_cover_what_they_say(images, unequal):
    """300 comparisons that share a baseline: a standard error of about 2%. With the normal law in
    place of Student's t, intervals of three seeds cover about 81%."""
    result = simulate(Setting(images, 3, unequal), 25)
    assert 91 <= result.alone <= 99
    assert 90 <= result.moderated <= 99
    assert result.narrower > 15
    assert (result.wide_third is not None) == unequal


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows_of_page():
    lines = PAGE.read_text().splitlines()
    first = lines.index(f"| {' | '.join(HEAD)} |") + 2
    return [cells(line) for line in takewhile(lambda line: line.startswith("|"), lines[first:])]


def test_the_page_shows_each_setting_once():
    settings = [tuple(row[:3]) for row in rows_of_page()]
    assert len(settings) == len(set(settings)) == 2 * 3 * 3


def test_moderated_intervals_of_the_page_cover_between_93_and_97_percent():
    for row in rows_of_page():
        assert 93 <= float(row[4]) <= 97, row
        assert float(row[7]) <= float(row[6]), row


def test_the_page_is_what_the_simulation_gives():
    """Of the cheapest row; the last digit may differ with the processor."""
    again = cells(simulate(Setting(300, 3, False)).row())
    printed = next(row for row in rows_of_page() if row[:3] == again[:3])
    for now, then in zip(again[3:], printed[3:], strict=True):
        assert now == then or float(now) == pytest.approx(float(then), abs=0.3)


def test_a_row_by_hand():
    setting = Setting(2000, 3, True)
    row = Coverage(setting, 94.96, 95.04, 90.0, 8.0, 6.0).row()
    assert row == "| 2,000 | 3 | unequal | 95.0 | 95.0 | 90.0 | 8.0 | 6.0 | 25 |"
