"""Draws where whole models send tokens: by layer, class, position and checkerboard.

Axis letters: **M** MoE layers from the shallowest to the deepest, **C** classes, **E** experts,
**P** probe images, **N** tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..measure.routing import BOARD_CELLS, load_share
from ..verdicts.masks import CLASS_TOKENS
from ..verdicts.routes import main_route, pairs_on_one_route
from .maps import class_names
from .overlays import (
    as_picture,
    bare,
    expert_bar,
    spread,
    tiles_in_words,
    token_grid,
    token_view,
)
from .style import WIDTH, centred_text, expert_colours, figure, number, print_values, style

__all__ = [
    "checker_maps",
    "layer_shares",
    "position_maps",
    "routes",
    "routes_of_sets",
    "shared_routes",
]

ROUTE = "route (expert in each block)"
PANELS = 4  # of routes, in a row


def layer_shares(records: dict[str, Any]) -> Figure:
    """Draws the share of assignments by layer and expert, a panel a model.

    After Durham, Figures 5 and 6: rows are blocks, columns experts.
    """
    layers = max(len(record.moe) for record in records.values())
    with style():
        fig, axes = figure(1, len(records), height=max(2.4, 1.2 + 0.28 * layers), sharey=True)
        for ax, (label, record) in zip(axes[0], records.items(), strict=True):
            table = np.array([m["load"] for m in record.moe])
            image = ax.imshow(100 * table, vmin=0, vmax=100, aspect="auto")
            ax.set(title=label, xlabel="expert")
            ax.set_xticks(range(table.shape[1]), map(number, range(table.shape[1])))
            ax.set_yticks(range(len(table)), [number(m["block"]) for m in record.moe])
            ax.grid(False)
            print_values(ax, image, 100 * table, "{:.0f}".format, 7.5)
        axes[0, 0].set_ylabel("block (1 = first)")
        fig.colorbar(image, ax=list(axes[0]), label="share of assignments (%)", aspect=18)
    return fig


def routes(record: Any, labels: Sequence[int]) -> Figure:
    """Draws the main route of some classes through the layers, a panel a class, four in a row.

    After Durham, Figures 7 to 9. The width of a step is the share it carries.
    """
    names = class_names(record, len(record.arrays["class_expert"][0]))
    experts = _most_experts([record])
    rows, columns = -(-len(labels) // PANELS), min(PANELS, len(labels))
    with style():
        fig, axes = figure(rows, columns, height=rows * max(2.6, 0.9 + 0.45 * experts), sharey=True)
        for ax in axes.flat[len(labels) :]:
            ax.remove()
        for ax, label in zip(axes.flat, labels, strict=False):
            _draw_route(ax, *main_route(record, label), experts)
            ax.set(title=fill(names[label], 20), xlabel="block (1 = first)")
            ax.set_xticks(range(len(record.moe)), [number(m["block"]) for m in record.moe])
        for ax in axes[:, 0]:
            ax.set_ylabel("main expert\n(thick: most tokens)")
    return fig


def _draw_route(ax: Axes, path: list[int], share: list[float], experts: int) -> None:
    """Draws the main experts of a class, one a layer, and lines of the share's width to each."""
    for i in range(len(path) - 1):
        ax.plot(
            [i, i + 1],
            path[i : i + 2],
            color="#333333",
            linewidth=0.5 + 5 * share[i + 1],
            marker="",
            linestyle="-",
            zorder=2,
        )
    colours = expert_colours(experts)
    ax.scatter(
        range(len(path)),
        path,
        s=[60 + 140 * v for v in share],
        color=[colours[e] for e in path],
        edgecolor="#333333",
        zorder=3,
    )
    ax.set(ylim=(experts - 0.5, -0.5), xlim=(-0.4, len(path) - 0.6))
    ax.set_yticks(range(experts), map(number, range(experts)))


def shared_routes(
    record: Any, least: int = 2, labels: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Lists the main routes that classes share, those of most classes first.

    A row of the table is a route through all layers; one of fewer than `least` classes is left out.
    labels: the classes; None = all.
    """
    names = class_names(record, len(record.arrays["class_expert"][0]))
    classes_of_route: dict[tuple[int, ...], list[str]] = {}
    for label in range(len(names)) if labels is None else labels:
        route, _ = main_route(record, label)
        classes_of_route.setdefault(tuple(route), []).append(names[label])
    ordered = sorted(classes_of_route.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {
            ROUTE: " → ".join(str(number(e)) for e in route),
            "classes": len(classes),
            "which": ", ".join(classes),
        }
        for route, classes in ordered
        if len(classes) >= least
    ]


def routes_of_sets(record: Any, sets: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """Lists how far classes that belong together share their main route, a row a set.

    sets: names of classes, which the record must have. The route is that of most of them; pairs as
    in `pairs_on_one_route`, in percent.
    """
    rows = []
    for title, names in sets.items():
        labels = [record.class_names.index(name) for name in names]
        widest = shared_routes(record, least=1, labels=labels)[0]
        inside, mixed = pairs_on_one_route(record, names)
        rows.append(
            {
                "classes": title,
                "number": len(names),
                ROUTE: widest[ROUTE],
                "of them on it": widest["classes"],
                "pairs of them on one route (%)": inside,
                "pairs with another class (%)": mixed,
            }
        )
    return rows


def _most_experts(records: Iterable[Any]) -> int:
    """Counts the experts of the widest layer."""
    return max(len(layer["load"]) for record in records for layer in record.moe)


def position_maps(records: dict[str, Any]) -> Figure:
    """Draws which expert a patch's place leads to, on average: a row a model, a column a layer, up
    to four of them.

    Colour: the expert with the largest share at a place; strength: that share. Full colours
    that change from place to place mean routing by place; one colour all over is an expert that
    gets most of all tokens.
    """
    first = next(iter(records.values()))
    chosen = spread(len(first.moe))
    experts = _most_experts(records.values())
    side = (WIDTH - 1.6) / max(len(chosen), 4)
    with style():
        fig, axes = figure(
            len(records),
            len(chosen),
            height=0.7 + len(records) * (side + 0.25),
            width=1.6 + side * len(chosen),
        )
        for row, (label, record) in zip(axes, records.items(), strict=True):
            for ax, layer in zip(row, chosen, strict=True):
                share = load_share(record.arrays["position_expert"][layer][CLASS_TOKENS:])
                rows, columns = token_grid(len(share) + CLASS_TOKENS, CLASS_TOKENS, None)
                favourite, strength = share.argmax(1), share.max(1)[:, None]
                # (patches, 3): from white, where no expert is preferred, to the favourite's colour
                colour = strength * np.array(expert_colours(experts))[favourite] + (1 - strength)
                ax.imshow(colour.reshape(rows, columns, 3))
                if max(rows, columns) <= 8:
                    for place, expert in enumerate(favourite):
                        row_of_place, column = divmod(place, columns)
                        name = str(number(expert))
                        centred_text(ax, column, row_of_place, name, colour[place], 8)
                bare(ax)
            row[0].set_ylabel(label, fontsize=8.5)
        for ax, layer in zip(axes[0], chosen, strict=True):
            ax.set_title(f"block {number(first.moe[layer]['block'])}")
        expert_bar(fig, list(axes.ravel()), experts, "paler: fewer of a place's tokens")
    return fig


def checker_maps(records: dict[str, Any]) -> Figure:
    """Draws the routing of the two-colour checkerboard: a row a model, the image, a column a layer.

    After Durham, Figure 12.
    """
    first = next(iter(records.values()))
    cell_of_pixel = np.arange(8 * BOARD_CELLS) // 8
    board = np.where((cell_of_pixel[:, None] + cell_of_pixel) % 2, 0.75, 0.25)
    chosen = spread(len(first.moe))
    experts = _most_experts(records.values())
    side = (WIDTH - 1.6) / max(1 + len(chosen), 4)
    with style():
        fig, axes = figure(
            len(records),
            1 + len(chosen),
            height=0.7 + len(records) * (side + 0.3),
            width=1.6 + side * (1 + len(chosen)),
        )
        for row, (label, record) in zip(axes, records.items(), strict=True):
            row[0].imshow(as_picture(board))
            bare(row[0])
            row[0].set_ylabel(label, fontsize=8.5)
            for ax, layer in zip(row[1:], chosen, strict=True):
                token_view(ax, board, record.arrays["checker_expert"][layer], experts)
        titles = ["image", *(f"block {number(first.moe[layer]['block'])}" for layer in chosen)]
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
        tiles = [r.arrays["checker_expert"][chosen][:, CLASS_TOKENS:] for r in records.values()]
        expert_bar(fig, list(axes.ravel()), experts, tiles_in_words(np.stack(tiles), True))
    return fig
