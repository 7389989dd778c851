"""Shows models side by side: the table of `lib.compare` in words of a page, and the front."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .relations import front
from .style import COLOURS, LINES, figure, style

__all__ = ["DECIMALS", "draw", "fronts", "in_words", "machine", "rows"]

_MARKERS = "osD^v<>PX*hp"  # more than colours: a model has a look of its own
_PASS = "ms an image, batch of {}"
DECIMALS = {"parameters (10⁶)": 2, "MACs (10⁶)": 1, "file (MB)": 2}


def rows(frame: pd.DataFrame) -> pd.DataFrame:
    """Writes a row a model with units in the names of columns, the times as median and quantile.

    frame: of `lib.compare`.
    """
    shown = pd.DataFrame(
        {
            "model": frame.index,
            "top-1 (%)": _with_interval(frame, "top1", "{:.1f}"),
            "difference to the first (points)": _with_interval(frame, "difference", "{:+.1f}"),
        }
    )
    for size in frame.attrs["batches"]:
        times = zip(frame[f"ms_{size}"], frame[f"ms_{size}_q10"], strict=True)
        shown[_PASS.format(size)] = [f"{_three(median)} ({_three(low)})" for median, low in times]
    sizes = {
        "parameters (10⁶)": frame["params"] / 1e6,
        "MACs (10⁶)": frame["macs"] / 1e6,
        "file (MB)": frame["mb"],
    }
    return shown.assign(**{name: column.tolist() for name, column in sizes.items()})


def _three(value: float) -> str:
    """Writes three digits, zeros at the end included: 0.500 beside 0.511."""
    return f"{value:#.3g}".rstrip(".")


def _with_interval(frame: pd.DataFrame, name: str, form: str) -> list[str]:
    """Writes values with their intervals; the first model's difference to itself is empty."""
    columns = [frame[name], frame[f"{name}_low"], frame[f"{name}_high"]]
    texts = [
        f"{form.format(value)} [{form.format(low)}, {form.format(high)}]"
        for value, low, high in zip(*columns, strict=True)
    ]
    return ["", *texts[1:]] if name == "difference" else texts


def machine(frame: pd.DataFrame) -> str:
    """Says for a caption how times and intervals were measured, and what else the machine did."""
    said = frame.attrs
    return (
        f"Intervals: {said['intervals']}. Times: median, in brackets the 10% quantile, of "
        f"{said['repeats']} passes of the models in turn on {said['device']}; threads: "
        f"{said['threads']}, cores: {said['cores']}, load of the machine before: "
        f"{said['load'][0]:.1f}."
    )


def fronts(frame: pd.DataFrame) -> dict[int, list[str]]:
    """Lists for each size of batch the models that no other beats in accuracy and time, the fastest
    first."""
    found = {}
    for size in frame.attrs["batches"]:
        costs = list(zip(frame[f"ms_{size}"], -frame["top1"], strict=True))
        on_front = frame[front(costs)]
        found[size] = list(on_front.sort_values(f"ms_{size}").index)
    return found


def draw(frame: pd.DataFrame) -> Figure:
    """Draws accuracy with its interval over the time of an image, a panel for each size of batch.

    A line joins the models of `fronts`.
    """
    sizes = frame.attrs["batches"]
    with style():
        fig, axes = figure(1, len(sizes), height=3.4, sharey=True)
        for ax, (size, names) in zip(axes[0], fronts(frame).items(), strict=True):
            times = frame[f"ms_{size}"]
            best = frame.loc[names]
            ax.plot(times[names], best["top1"], color="#888888", linestyle=LINES[1], marker="")
            for i, (name, model) in enumerate(frame.iterrows()):
                below, above = model.top1 - model.top1_low, model.top1_high - model.top1
                ax.errorbar(
                    [times[name]],
                    [model.top1],
                    yerr=[[below], [above]],
                    color=COLOURS[i % len(COLOURS)],
                    marker=_MARKERS[i % len(_MARKERS)],
                    markersize=7,
                    linestyle="",
                    capsize=2,
                    elinewidth=1,
                    label=name,
                )
            ax.set(xlabel=_PASS.format(size), ylabel="top-1 accuracy (%)", xlim=(0, None))
            ax.yaxis.set_tick_params(labelleft=True)
            ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
    return fig


def in_words(frame: pd.DataFrame) -> str:
    """Says which models the front of each size of batch holds, with their numbers."""
    said = []
    for size, names in fronts(frame).items():
        points = (
            f"{name} with {frame.top1[name]:.1f}% in {frame[f'ms_{size}'][name]:.3g} ms"
            for name in names
        )
        said.append(f"With a batch of {size} no model beats {', '.join(points)}.")
    return " ".join(said)
