"""Simulates how often the interval of a paired difference covers the truth, and how wide it is.

A simulated study compares each of its arms with one baseline, as most pages do. All arms see the
same images, drawn anew for each study. A run of an arm is right on an image with a probability that
adds up from the difficulty of the image, the gain of the arm (GAIN points for all, which is the
truth), what the arm gains or loses on this image, and the skill of the seed. Runs become records,
and the intervals are those of the pages (`stats.paired_difference`).

`python -m lib.verdicts.coverage` prints the table of "How to read a page".

Axis letters: **S** seeds, **I** test images.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace

import numpy as np

from .moderated import study_prior
from .stats import Interval, paired_difference

__all__ = ["Coverage", "Setting", "simulate", "table"]

GAIN = 3.0  # points, of each arm over the baseline
IMAGE_EFFECT = 0.1  # at most, either way, in the probability of an arm to be right on an image
NARROW, WIDE = 0.7, 3.0  # points, deviations of the skill of a seed
STUDIES, COMPARISONS = 100, 12

HEAD = (
    "test images",
    "seeds",
    "variances of seeds",
    "covers, alone (%)",
    "covers, moderated (%)",
    "its wide third (%)",
    "width, alone",
    "width, moderated",
    "narrower by (%)",
)


@dataclass(frozen=True)
class Setting:
    """Describes the studies of one row of the table.

    unequal: whether every third arm has seeds with the deviation WIDE; all others have NARROW.
    """

    images: int
    seeds: int
    unequal: bool
    comparisons: int = COMPARISONS


@dataclass(frozen=True)
class Coverage:
    """Holds the share of intervals that cover the truth, in percent, and their mean width.

    alone: each comparison by its own seeds; moderated: with the prior of its study; wide_third:
    moderated, of the arms with the deviation WIDE (None where there are none). Widths in points.
    """

    setting: Setting
    alone: float
    moderated: float
    wide_third: float | None
    width_alone: float
    width_moderated: float

    @property
    def narrower(self) -> float:
        """Returns by how many percent moderated intervals are narrower."""
        return 100 * (1 - self.width_moderated / self.width_alone)

    def row(self) -> str:
        """Writes the row of the Markdown table."""
        setting = self.setting
        cells = (
            f"{setting.images:,}",
            setting.seeds,
            "unequal" if setting.unequal else "equal",
            f"{self.alone:.1f}",
            f"{self.moderated:.1f}",
            "" if self.wide_third is None else f"{self.wide_third:.1f}",
            f"{self.width_alone:.1f}",
            f"{self.width_moderated:.1f}",
            f"{self.narrower:.0f}",
        )
        return f"| {' | '.join(map(str, cells))} |"


def simulate(setting: Setting, studies: int = STUDIES) -> Coverage:
    """Simulates the studies of a setting; the same numbers each time."""
    rng = np.random.default_rng([setting.images, setting.seeds, setting.unequal])
    wide = setting.unequal & (np.arange(setting.comparisons) % 3 == 0)
    alone, moderated = [], []
    for _ in range(studies):
        arms, baseline = _study(setting, np.where(wide, WIDE, NARROW) / 100, rng)
        prior = study_prior((arm, baseline) for arm in arms)
        for arm in arms:
            draws = np.random.default_rng(rng.integers(2**32))
            alone.append(paired_difference(arm, baseline, draws))
            moderated.append(paired_difference(arm, baseline, draws, prior))
    of_wide = [x for x, is_wide in zip(moderated, np.tile(wide, studies), strict=True) if is_wide]
    wide_third = _covered(of_wide) if of_wide else None
    covered = _covered(alone), _covered(moderated)
    return Coverage(setting, *covered, wide_third, _width(alone), _width(moderated))


def _study(
    setting: Setting, deviations: np.ndarray, rng: np.random.Generator
) -> tuple[list[list[SimpleNamespace]], list[SimpleNamespace]]:
    """Draws the records of a study's arms, one list an arm, and of its baseline.

    deviations: (comparisons,) of the skill of a seed, as shares.
    """
    # from 0.2 to 0.7: with gain, image effect and three deviations still between 0 and 1
    difficulty = 0.2 + 0.5 * rng.beta(2, 1, setting.images)
    baseline = _records("baseline", difficulty, NARROW / 100, setting.seeds, rng)
    arms = []
    for arm, deviation in enumerate(deviations):
        image_effect = rng.uniform(-IMAGE_EFFECT, IMAGE_EFFECT, setting.images)
        chance = difficulty + GAIN / 100 + image_effect
        arms.append(_records(f"arm {arm}", chance, deviation, setting.seeds, rng))
    return arms, baseline


def _records(
    name: str, chance: np.ndarray, deviation: float, seeds: int, rng: np.random.Generator
) -> list[SimpleNamespace]:
    """Draws records with what intervals read of them, one per seed.

    chance: (I,) to be right on an image. deviation: of the skill of a seed, which is added.
    """
    label = np.zeros(chance.size, np.uint8)
    records = []
    for seed in range(seeds):
        wrong = rng.random(chance.size) >= chance + rng.normal(0, deviation)
        records.append(
            SimpleNamespace(
                id=f"{name}, seed {seed}",
                status="ok",
                spec=SimpleNamespace(seed=seed, device="cpu"),
                arrays={"test_label": label, "test_pred": wrong.astype(np.uint8)},
            )
        )
    return records


def _covered(intervals: Sequence[Interval]) -> float:
    return 100 * float(np.mean([x.low <= GAIN <= x.high for x in intervals]))


def _width(intervals: Sequence[Interval]) -> float:
    return float(np.mean([x.high - x.low for x in intervals]))


def table(studies: int = STUDIES, comparisons: int = COMPARISONS) -> Iterator[str]:
    """Writes the Markdown table line by line, as its rows are simulated."""
    yield f"| {' | '.join(HEAD)} |"
    yield "| --- " * len(HEAD) + "|"
    for unequal, seeds, images in product((False, True), (3, 5, 8), (300, 2000, 10000)):
        yield simulate(Setting(images, seeds, unequal, comparisons), studies).row()


def main() -> None:
    """Prints the table, in two or three minutes on one core with 100 studies a row."""
    parser = argparse.ArgumentParser(prog="python -m lib.verdicts.coverage")
    parser.add_argument("--studies", type=int, default=STUDIES, help="simulated a row")
    parser.add_argument("--comparisons", type=int, default=COMPARISONS, help="of a study")
    given = parser.parse_args()
    for line in table(given.studies, given.comparisons):
        print(line, flush=True)


if __name__ == "__main__":
    main()
