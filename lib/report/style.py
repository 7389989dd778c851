"""Gives all figures one look, and puts them onto a page.

Colours come with a marker and a line style each, differ in lightness (greyscale print) and avoid
red against green alone. Figures are made without pyplot: no global state, nothing left open, no
second display at the end of a cell.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from PIL import Image

from . import CAPTION_STYLE, escaped
from .figure_data import csv_link

__all__ = [
    "COLOURS",
    "LINES",
    "MAP",
    "MARKERS",
    "WIDTH",
    "Shown",
    "centred_text",
    "expert_colours",
    "figure",
    "luma",
    "note",
    "number",
    "png",
    "print_values",
    "show",
    "style",
    "text_colour",
]

WIDTH = 7.2  # inches; 691 CSS pixels, the text width of the book
FEW_COLOURS = 4096  # with the shades of smoothed edges; photographs have tens of thousands
DPI = 180  # about twice the CSS resolution, sharp on phones and when zoomed
# CSS pixels to which a narrow screen shrinks a figure and no further: a 7-point label is then 8 px
# high, and what is wider than the screen scrolls
NARROWEST = 600
MAP = "cividis"  # for shares and counts: made for colour-blind readers, lightness rises evenly
# for experts: MAP is grey in its middle, and an expert in grey looks like a missing picture
EXPERT_MAP = "viridis"

# Dark to light; neighbours differ by at least 0.08 in luma.
COLOURS = ("#1f2f56", "#8c2a6b", "#c2542c", "#35b395", "#62b1e3", "#e3c14a")
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)

_RC = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "axes.prop_cycle": mpl.cycler(color=COLOURS, marker=MARKERS, linestyle=LINES),
    "image.cmap": MAP,
    "image.interpolation": "nearest",
    # $ in a name is no mathematics; what draws formulas sets this itself
    "text.parse_math": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 96,
}


@contextmanager
def style() -> Iterator[None]:
    """Sets matplotlib's settings for the time of a with block.

    Ticks are made while drawing, so drawing needs it too (`png`).
    """
    with mpl.rc_context({**mpl.rcParamsDefault, "backend": mpl.rcParams["backend"], **_RC}):
        yield


def figure(
    rows: int = 1, columns: int = 1, height: float = 3.0, width: float = WIDTH, **subplots
) -> tuple[Figure, np.ndarray]:
    """Makes a figure of `width` x `height` inches with a (rows, columns) array of axes.

    To be called inside `style()`. subplots: further arguments of `Figure.subplots` (sharey,
    width_ratios, ...). The constrained layout keeps labels inside.
    """
    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(rows, columns, squeeze=False, **subplots)


def number(index: int) -> int:
    """Returns the number by which pages know a block or an expert, of its index: the first is 1.

    Documents count blocks so, and experts of a figure stand beside blocks. Records count from 0.
    """
    return int(index) + 1


def note(ax: Axes, text: str) -> None:
    """Says in an empty panel why it is empty; ticks would suggest values.

    They are hidden and not removed: panels that share an axis share its ticks.
    """
    ax.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    ax.grid(False)
    ax.text(
        0.5,
        0.5,
        text,
        ha="center",
        va="center",
        transform=ax.transAxes,
        color="#444444",
        fontsize=8.5,
    )


def luma(colour) -> float:
    """Computes the lightness of a colour in greyscale, 0 black to 1 white (Rec. 601)."""
    r, g, b = mpl.colors.to_rgb(colour)
    return 0.299 * r + 0.587 * g + 0.114 * b


def text_colour(background) -> str:
    """Chooses black or white, whichever reads better on the background."""
    return "black" if luma(background) > 0.5 else "white"


def centred_text(ax: Axes, x: float, y: float, text: str, background, size: float) -> None:
    """Writes a text around a point, black or white as the background asks."""
    ax.text(x, y, text, ha="center", va="center", fontsize=size, color=text_colour(background))


def print_values(
    ax: Axes, image: AxesImage, values: np.ndarray, text_of: Callable[[float], str], size: float
) -> None:
    """Writes each value (rows, columns) of a heatmap into its cell, as `text_of` makes it."""
    for (row, column), value in np.ndenumerate(values):
        background = image.cmap(image.norm(value))[:3]
        centred_text(ax, column, row, text_of(value), background, size)


def expert_colours(experts: int) -> list[tuple[float, float, float]]:
    """Gives each of E experts a colour, dark to light in even steps.

    Pictures print the expert's number as well.
    """
    places = np.linspace(0, 1, experts) if experts > 1 else [0.5]
    return [tuple(mpl.colormaps[EXPERT_MAP](place)[:3]) for place in places]


# ---------------------------------------------------------------- onto the page


def png(fig: Figure, dpi: int = DPI) -> bytes:
    """Draws the figure as PNG, without the software's tag: equal figures are equal bytes.

    A figure of few colours, thus no photographs, is written with a palette, at half the size.
    """
    drawn, out = io.BytesIO(), io.BytesIO()
    with style():
        fig.savefig(drawn, format="png", dpi=dpi, metadata={"Software": None})
    picture = Image.open(drawn).convert("RGB")
    if picture.getcolors(FEW_COLOURS):
        # colours of areas stay as they are; some of the many shades at the edges of letters move
        picture = picture.quantize(256, dither=Image.Dither.NONE)
    picture.save(out, format="png", dpi=(dpi, dpi))
    return out.getvalue()


@dataclass(frozen=True)
class Shown:
    """Is what a cell displays: HTML where it is understood, the alternative text elsewhere."""

    html: str
    alt: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.alt


def show(fig: Figure, caption: str, alt: str) -> Shown:
    """Makes a figure the value of a cell: a PNG with alternative text and caption.

        show(figures.scan(...), "Top-1 against L.", "Accuracy falls with L. Line plot.")

    Wide screens show it whole; on a phone it stays legible and scrolls in its own box. caption:
    what is drawn, with n; plain text. alt: what it shows, for those who do not see it. Raises
    ValueError where one of them is empty. Written as HTML and not through cell metadata, because
    that is kept by papermill, nbclient and Sphinx alike.
    """
    if not caption.strip() or not alt.strip():
        raise ValueError(
            "a figure needs a caption and an alternative text, "
            f"got caption={caption!r} and alt={alt!r}"
        )
    data = base64.b64encode(png(fig)).decode()
    width = round(fig.get_size_inches()[0] * 96)
    # "dark-light" keeps the book theme from dimming a picture that brings its own white background.
    return Shown(
        '<figure style="margin:1em 0;max-width:100%">'
        '<div style="overflow-x:auto;max-width:100%" tabindex="0"><img class="dark-light" '
        f'alt="{html.escape(alt, quote=True)}" src="data:image/png;base64,{data}" '
        f'style="width:{width}px;max-width:max(100%,{NARROWEST}px);height:auto;background:#fff"></div>'
        f'<figcaption style="{CAPTION_STYLE}">{escaped(caption)}{csv_link(fig, caption)}'
        f"</figcaption>"
        f"</figure>",
        alt,
    )


def legend_above(fig: Figure, axes: Iterable[Axes], columns: int = 4) -> None:
    """Puts one legend for all panels above them, with each label once.

    columns: at most; fewer where long labels would leave the figure.
    """
    handle_of_label: dict[str, object] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            handle_of_label.setdefault(label, handle)
    if not handle_of_label:
        return
    longest = max(map(len, handle_of_label))
    columns = max(1, min(columns, 125 // (longest + 10)))  # letters to a width, and to a handle
    # matplotlib fills columns first: labels are dealt to them so that rows read in order
    labels = list(handle_of_label)
    labels = [label for column in range(columns) for label in labels[column::columns]]
    fig.legend(
        [handle_of_label[label] for label in labels],
        labels,
        loc="outside upper left",
        ncols=min(columns, len(labels)),
    )
