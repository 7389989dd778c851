"""Numbers of the front page that no verdict has: how fast cut models are, what comes nearest to a
wish, and arms of a page beside each other. All are read from measurements and records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..verdicts import speed
from .profiles import PUBLISHED, plan

ARMS = ("first", "second")  # that a sentence sets beside each other
NO_CARD = "Times were taken on processors alone, on no graphics card."


def clock() -> tuple[dict[str, float], str, str]:
    """Finds how many times as fast each kind of cut model is at best, on whichever machine, by the
    name of the kind; says how far multiply-adds shrink, and how fast each kind is and where."""
    from ..report import speeds

    try:
        machines = [speed.read(speed.file_of("short")), *speed.elsewhere("short")]
    except FileNotFoundError:
        return {}, "No time is measured yet (`make bench`).", ""
    fastest = {name: speeds.fastest_cut(machines, kind) for kind, name in speeds.CUT.items()}
    times = speeds.cut_times(machines)
    if not speed.file_of("short", "cuda").is_file():
        times += f" {NO_CARD}"
    return fastest, speeds.cut_limit(machines), times


def at_best(fastest: Mapping[str, float]) -> str:
    """Says how many times as fast as the whole model each kind of cut model is at best; "" without
    a measurement."""
    if not fastest:
        return ""
    kinds = " and ".join(f"{name} {times:.2f}" for name, times in fastest.items())
    return (
        "With half of the MLPs' neurons active, times as fast as the whole model at best on the "
        f"clock: {kinds} (ViT-S at 224 px, see below)."
    )


def nearest(key: str, within: float) -> str:
    """Names the model of the page of all methods that is best within a budget of time, in percent
    of the dense model's, or of multiply-adds where no time is measured; "" without records."""
    from ..runs.collect import load  # numpy, which an import of the build does without
    from ..verdicts.budgets import TIMED, candidates, forward_times, winner
    from ..verdicts.stats import format_interval

    times = forward_times()
    models = candidates(load(plan(key, PUBLISHED), any_device=True), times)
    won = winner(models, "forward" if times else "macs", within)
    if won is None or won.gain is None:
        return ""
    gain = format_interval(won.gain, signed=True, unit="points")
    percent = won.best.costs
    timed = percent.get("forward")
    time = f" and {timed:.0f}% of the time ({', '.join(TIMED)})" if timed is not None else ""
    return (
        f"The nearest of [all methods](notebooks/{key}.ipynb), after one further pass over the "
        f"images, is *{won.best.name}*, with {percent['macs']:.0f}% of the multiply-adds{time}: "
        f"{gain}, compared with the dense model after the same pass."
    )


def measured(sentence: Mapping[str, Any]) -> str:
    """Fills in a sentence of `book/front.yaml` from two arms of a page; "" where one has no record.

    sentence: `page`, `first` and `second`, its arms, and `text`, in which {first} and {second} are
    their accuracies, {gain} is the first less the second over the same seeds, and {stored} how many
    percent of the second's parameters the first stores. Raises UnknownRuns for another arm.
    """
    from ..runs.collect import load
    from ..verdicts.stats import accuracy_interval, finished, format_interval, paired_difference

    runs = plan(sentence["page"], PUBLISHED)
    first, second = load({arm: runs[sentence[arm]] for arm in ARMS}, any_device=True).values()
    if not finished(first) or not finished(second):
        return ""
    stored = [finished(side)[0].cost["params_stored"] for side in (first, second)]
    return sentence["text"].format(
        first=format_interval(accuracy_interval(first)),
        second=format_interval(accuracy_interval(second)),
        gain=format_interval(paired_difference(first, second), signed=True, unit="points"),
        stored=f"{100 * stored[0] / stored[1]:.0f}",
    )
