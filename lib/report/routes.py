"""Where whole models send things: shares by layer, main routes of classes, maps by position, the
checkerboard, GradCAM by expert.

Axis letters: **M** MoE layers from the shallowest to the deepest, **C** classes, **E** experts,
**N** tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..measure.routing import load_share
from .maps import (
    as_picture,
    bare,
    class_names,
    expert_bar,
    probe_images,
    spread,
    token_grid,
    token_view,
)
from .style import WIDTH, expert_colours, figure, style, text_colour

__all__ = [
    "cam_masks",
    "cam_shares",
    "checker_maps",
    "layer_shares",
    "main_route",
    "position_maps",
    "routes",
    "shared_routes",
]


def layer_shares(records: dict[str, Any]) -> Figure:
    """Share of assignments by layer and expert, a panel a model (Durham, Figures 5 and 6): rows are
    blocks, columns experts."""
    with style():
        fig, axes = figure(
            1,
            len(records),
            height=max(2.4, 1.2 + 0.28 * max(len(r.moe) for r in records.values())),
            sharey=True,
        )
        for ax, (label, record) in zip(axes[0], records.items(), strict=True):
            table = np.array([m["load"] for m in record.moe])
            image = ax.imshow(100 * table, vmin=0, vmax=100, aspect="auto")
            ax.set(title=label, xlabel="expert")
            ax.set_xticks(range(table.shape[1]))
            ax.set_yticks(range(len(table)), [m["block"] + 1 for m in record.moe])
            ax.grid(False)
            for (i, j), share in np.ndenumerate(table):
                ax.text(
                    j,
                    i,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=text_colour(image.cmap(image.norm(100 * share))[:3]),
                )
        axes[0, 0].set_ylabel("block (1 = first)")
        fig.colorbar(image, ax=list(axes[0]), label="share of assignments (%)", aspect=18)
    return fig


def main_route(record: Any, label: int) -> tuple[list[int], list[float]]:
    """(M,) the expert that gets most of a class's tokens in each layer, shallow to deep, and (M,)
    its share."""
    share = load_share(record.arrays["class_expert"][:, label])
    return share.argmax(1).tolist(), share.max(1).tolist()


def routes(record: Any, labels: Sequence[int]) -> Figure:
    """The main route of some classes through the layers (Durham, Figures 7 to 9). The width of a
    step is the share it carries."""
    names, experts = (
        class_names(record, len(record.arrays["class_expert"][0])),
        max(len(m["load"]) for m in record.moe),
    )
    with style():
        fig, axes = figure(1, len(labels), height=max(2.6, 0.9 + 0.45 * experts), sharey=True)
        for ax, label in zip(axes[0], labels, strict=True):
            path, share = main_route(record, label)
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
            ax.scatter(
                range(len(path)),
                path,
                s=[60 + 140 * v for v in share],
                color=[expert_colours(experts)[e] for e in path],
                edgecolor="#333333",
                zorder=3,
            )
            ax.set(
                title=names[label],
                xlabel="block (1 = first)",
                ylim=(experts - 0.5, -0.5),
                xlim=(-0.4, len(path) - 0.6),
            )
            ax.set_xticks(range(len(path)), [m["block"] + 1 for m in record.moe])
            ax.set_yticks(range(experts))
        axes[0, 0].set_ylabel("main expert")
    return fig


def shared_routes(record: Any, least: int = 2) -> list[dict[str, Any]]:
    """Classes with the same main route through all layers, largest groups first; groups of fewer
    than `least` are left out."""
    names, groups = class_names(record, len(record.arrays["class_expert"][0])), {}
    for label in range(len(names)):
        groups.setdefault(tuple(main_route(record, label)[0]), []).append(names[label])
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {
            "route (expert in each block)": " → ".join(map(str, route)),
            "classes": len(own),
            "which": ", ".join(own),
        }
        for route, own in ordered
        if len(own) >= least
    ]


def position_maps(
    records: dict[str, Any], layers: Sequence[int] | None = None, prefix: int = 1
) -> Figure:
    """Which expert a patch's place leads to, on average: a row a model, a column a layer.

    Colour: the expert with the largest share at a place; strength: that share. Even maps of full
    colour mean routing by place.
    """
    first = next(iter(records.values()))
    chosen = spread(len(first.moe)) if layers is None else list(layers)
    experts = max(len(m["load"]) for r in records.values() for m in r.moe)
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
                share = load_share(record.arrays["position_expert"][layer][prefix:])
                rows, columns = token_grid(len(share) + prefix, prefix, None)
                best, strength = share.argmax(1), share.max(1)[:, None]
                colour = strength * np.array(expert_colours(experts))[best] + (1 - strength)
                ax.imshow(colour.reshape(rows, columns, 3))
                for place, expert in enumerate(best):
                    if max(rows, columns) <= 8:
                        ax.text(
                            place % columns,
                            place // columns,
                            str(expert),
                            ha="center",
                            va="center",
                            fontsize=8,
                            color=text_colour(colour[place]),
                        )
                bare(ax)
            row[0].set_ylabel(label, fontsize=8.5)
        for ax, layer in zip(axes[0], chosen, strict=True):
            ax.set_title(f"block {first.moe[layer]['block'] + 1}")
        expert_bar(fig, list(axes.ravel()), experts)
    return fig


def checker_maps(records: dict[str, Any], cells: int = 4, prefix: int = 1) -> Figure:
    """Routing of the two-colour checkerboard (Durham, Figure 12): a row a model, the image and a
    column a layer."""
    first = next(iter(records.values()))
    where = np.arange(8 * cells) // 8
    board = np.where((where[:, None] + where) % 2, 0.75, 0.25)
    chosen = spread(len(first.moe))
    experts = max(len(m["load"]) for r in records.values() for m in r.moe)
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
                token_view(
                    ax, board, record.arrays["checker_expert"][layer], experts, prefix=prefix
                )
        for ax, title in zip(
            axes[0], ["image", *(f"block {first.moe[i]['block'] + 1}" for i in chosen)], strict=True
        ):
            ax.set_title(title)
        expert_bar(fig, list(axes.ravel()), experts)
    return fig


def cam_shares(record: Any, layer: int, prefix: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """(E,) share of the GradCAM of all probe images that lies on each expert's patches, and (E,)
    share of the patches.

    Raises ValueError if the record holds no GradCAM.
    """
    heat, experts = _heat(record, prefix), len(record.moe[layer]["load"])
    chosen = record.arrays["token_expert"][layer][:, prefix:]
    mass = np.array([heat[chosen == e].sum() for e in range(experts)])
    return mass / max(mass.sum(), 1e-12), np.array([(chosen == e).mean() for e in range(experts)])


def cam_masks(record: Any, layer: int = -1, shown: int = 4, prefix: int = 1) -> Figure:
    """Probe images, their GradCAM, and the GradCAM on the patches of each expert alone (Leiden,
    Figures 3 to 5), a row each."""
    heat, maps = (
        _heat(record, prefix)[:shown],
        record.arrays["token_expert"][layer][:shown, prefix:],
    )
    experts, found = len(record.moe[layer]["load"]), probe_images(record, shown)
    side = int(round(heat.shape[1] ** 0.5))
    titles = ["image"] * (found is not None) + ["GradCAM", *(f"expert {e}" for e in range(experts))]
    with style():
        fig, axes = figure(
            len(heat),
            len(titles),
            height=0.8 + 1.05 * len(heat),
            width=min(WIDTH, 0.9 + 1.05 * len(titles)),
        )
        for i, row in enumerate(axes):
            cells = [heat[i], *(np.where(maps[i] == e, heat[i], np.nan) for e in range(experts))]
            for ax, cell in zip(row[-len(cells) :], cells, strict=True):
                image = ax.imshow(cell.reshape(side, side), vmin=0, vmax=1)
                ax.set_facecolor("#d9d9d9")  # patches of other experts
                ax.set(xticks=[], yticks=[])
                ax.grid(False)
            if found is not None:
                row[0].imshow(as_picture(found[i][0]))
                bare(row[0])
                row[0].set_ylabel(class_names(record, 1 + found[i][1])[found[i][1]], fontsize=8.5)
        for ax, title in zip(axes[0], titles, strict=True):
            ax.set_title(title)
        fig.colorbar(
            image,
            ax=list(axes.ravel()),
            location="bottom",
            aspect=40,
            shrink=0.6,
            pad=0.12 / fig.get_figheight(),
            label="GradCAM of the predicted class, largest of an image = 1",
        )
    return fig


def _heat(record: Any, prefix: int) -> np.ndarray:
    """(P, patches) mean GradCAM over the pixels of each patch."""
    if "cam" not in record.arrays:
        raise ValueError(
            f"record {record.id} holds no GradCAM: give a record whose spec has cam_probe"
        )
    cam = record.arrays["cam"].astype(float)
    rows, columns = token_grid(record.arrays["token_expert"].shape[-1], prefix, None)
    cells = cam.reshape(len(cam), rows, cam.shape[1] // rows, columns, cam.shape[2] // columns)
    return cells.mean(axis=(2, 4)).reshape(len(cam), -1)
