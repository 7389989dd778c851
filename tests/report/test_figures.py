"""Figures from synthetic records: labelled, inside the canvas, readable in grey."""

import base64
import html
import io
import json
import re
import subprocess
import sys
from itertools import pairwise
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from factory import record
from matplotlib.text import Text
from PIL import Image

from lib.report import (
    cost_figures,
    explorer,
    figures,
    maps,
    masks,
    overlays,
    process,
    relations,
    routes,
    schematic,
    style,
)
from lib.verdicts.stats import Interval

LONG = [f"sweet_pepper_{c}" for c in range(100)]
IMAGES = np.random.default_rng(0).random((4, 28, 28))
THREE = [record(s) for s in range(3)]
LS = [1, 2, 12]
ABOUT = ("class", "position")


def tokens(**kwargs):
    r = record(0, **kwargs)
    return r.arrays["token_expert"][:, :4], [m["block"] for m in r.moe], len(r.moe[0]["load"])


def points(n):
    return [
        cost_figures.Point(
            f"method {i}", 22 + 20 * i, 5.5 + 4 * i, Interval(80 + i, 79 + i, 81 + i, 3), i == 0
        )
        for i in range(n)
    ]


# Two branches of 8 and 7 tokens leave a root of 20 at density 0.5; five tokens fall out before, all
# others later.
TREE = np.array(
    [(20, i, 0.3, 1) for i in range(5)]
    + [(20, 21, 0.5, 8), (20, 22, 0.5, 7)]
    + [(21, i, 1.5, 1) for i in range(5, 13)]
    + [(22, i, 0.9, 1) for i in range(13, 20)],
    dtype=[("parent", "<i8"), ("child", "<i8"), ("lambda_val", "<f8"), ("child_size", "<i8")],
)
FIGURES = {
    "scan": lambda: figures.scan(
        {
            "published": [
                figures.Curve(LS, [91.5, 91.3, 52.9], "E=8", "no shared"),
                figures.Curve(LS, [91.6, 91.6, 91.5], "E=8", "shared"),
            ],
            "reproduced": [
                figures.Curve(LS, [Interval(63, 62, 64, 3), None, 30.0], "E=8", "no shared")
            ],
            "this build": [],
        },
        {"published": 91.3, "reproduced": Interval(62, 61, 63, 3)},
        missing="no record yet:\nmake book",
    ),
    "training": lambda: figures.training_curves(
        {"shared": THREE, "dense": [record(5, top1=60), None]}
    ),
    "training without records": lambda: figures.training_curves({"shared": [None]}),
    "information": lambda: figures.information_by_depth(
        {"image": [record(0, per_image=True)], "token": THREE}, threshold=0.3
    ),
    "frontier of small models": lambda: cost_figures.frontier(
        {
            "this build": [
                cost_figures.Point(
                    str(i),
                    0.2 + 0.03 * i,
                    0.0035 + 0.0004 * i,
                    Interval(94 + i, None, None, 1),
                    True,
                )
                for i in range(4)
            ]
        }
    ),
    "frontier": lambda: cost_figures.frontier(
        {"published": points(9), "reproduced": points(2), "this build": []}
    ),
    "ratio": lambda: cost_figures.cost_ratio(
        {f"Table 1, row {i}, total": 1 + 0.01 * (i == 3) for i in range(12)}
    ),
    "heatmap": lambda: maps.class_expert_heatmap(THREE[0]),
    "heatmap of 100 classes": lambda: maps.class_expert_heatmap(
        record(
            0,
            images=2000,
            classes=100,
            experts=8,
            blocks=range(12),
            per_image=True,
            class_names=LONG,
        )
    ),
    "heatmap, 32 experts": lambda: maps.class_expert_heatmap(record(0, experts=32), layers=[-1]),
    "counts of classes by experts": lambda: maps.class_expert_counts(
        {
            "token choice": record(0, experts=5, blocks=[0]),
            "manual": record(1, experts=5, blocks=[0], per_image=True),
            "manual, router learnt afterwards": record(2, experts=5, blocks=[0]),
        }
    ),
    "loads": lambda: maps.expert_loads(record(0, blocks=range(12), experts=8)),
    "loads of one layer": lambda: maps.expert_loads(record(0, blocks=[11])),
    "tokens": lambda: overlays.token_maps(IMAGES, *tokens(), names=LONG[:4]),
    "layer shares": lambda: routes.layer_shares(
        {"proposed": record(0), "expert choice": record(1)}
    ),
    "layer shares of two layers": lambda: routes.layer_shares(
        {f"arm {i}": record(i, blocks=[0, 1], experts=2) for i in range(4)}
    ),
    "routes": lambda: routes.routes(record(0, classes=100, class_names=LONG), [0, 33, 66, 99]),
    "routes in two rows": lambda: routes.routes(
        record(0, blocks=range(6), classes=100, class_names=LONG), range(7)
    ),
    "routes, two layers": lambda: routes.routes(record(0, blocks=[0, 1], experts=2), [0, 1, 2, 3]),
    "position maps": lambda: routes.position_maps(
        {"proposed": record(0), "token choice": record(1)}
    ),
    "checkerboard": lambda: routes.checker_maps({"proposed": record(0), "token choice": record(1)}),
    "reconstructions": lambda: maps.reconstructions(record(0)),
    "schematic": lambda: schematic.moe_layer(),
    "schematic of two blocks": lambda: schematic.blocks(),
    "scan over shares": lambda: figures.scan(
        {"this build": [figures.Curve([40.2 + 0.1 * i for i in range(30)], range(30), "x")]}
    ),
    "pictures of GradCAM": lambda: masks.cam_masks(record(0), shown=3),
    "pictures of masks": lambda: masks.expert_masks(
        [("95% pruned", record(0), 0), ("unpruned", record(1, class_names=LONG), 1)], (0, -1)
    ),
    "tokens without images": lambda: overlays.token_maps(None, *tokens(), names=LONG[:4]),
    "scatter": lambda: relations.scatter(
        {"first block": ([1e-8, 1e-5], [1e-4, 1e-2]), "last": ([1, 2], [3, 4])},
        xlabel="score",
        ylabel="effect",
        log=True,
    ),
    "surface": lambda: relations.surface(
        {
            "reproduced": [
                relations.Spot(f"m{i}", 40 + i, 38 + 9 * i, 80 + i, i % 2 == 0) for i in range(9)
            ],
            "this build": [relations.Spot("m", 40, 38, 80, False)],
        }
    ),
    "matrices": lambda: relations.matrices(
        {f"block {i}": np.eye(n) for i, n in enumerate((2, 6, 9, 32))}, "cosine", low=-1.0
    ),
    "clouds": lambda: relations.clouds(
        {"no cluster": ([0, 1], [0, 1])} | {f"cluster {i}": ([i], [i]) for i in range(5)},
        xlabel="first",
        ylabel="second",
    ),
    "process": lambda: process.extraction(
        np.random.default_rng(0).random((60, 2)),
        np.arange(60) % 7 - 1,
        np.random.default_rng(1).random((6, 64)) ** 8,
        np.random.default_rng(1).random((6, 64)) > 0.5,
        np.eye(6),
    ),
    "cluster tree": lambda: relations.cluster_tree(TREE, 20),
    "tokens, image level": lambda: overlays.token_maps(
        IMAGES, *tokens(per_image=True, tokens=257, experts=8)
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_labelled_and_nothing_leaves_the_canvas(name):
    fig = FIGURES[name]()
    with style.style():
        fig.draw_without_rendering()
        renderer = fig.canvas.get_renderer()
        width, height = fig.bbox.size
        for text in fig.findobj(Text):
            if not text.get_visible() or not text.get_text().strip():
                continue
            if text.get_text() in _hidden_ticks(fig):
                continue
            box = text.get_window_extent(renderer)
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, f"{text.get_text()!r} leaves the canvas: {box} in {width} x {height}"
        for ax in fig.axes:
            low, high = sorted(ax.get_xlim())
            ticks = [
                label
                for t in ax.xaxis.get_major_ticks()
                if low <= t.get_loc() <= high
                for label in (t.label1, t.label2)
                if label.get_visible() and label.get_text()
            ]
            boxes = sorted((t.get_window_extent(renderer) for t in ticks), key=lambda box: box.x0)
            assert all(one.x1 <= other.x0 for one, other in pairwise(boxes)), (
                f"{name}: {[t.get_text() for t in ticks]} touch"
            )
    for ax in fig.axes:
        if name.startswith(
            ("tokens", "position maps", "checkerboard", "reconstructions", "schematic", "pictures")
        ):
            continue  # pictures: rows, columns and colour bar are named instead
        shared = ax.get_shared_y_axes().get_siblings(ax)
        assert ax.get_xlabel() or ax.get_label() == "<colorbar>", name
        assert any(a.get_ylabel() for a in shared) or ax.get_label() == "<colorbar>", name


def _hidden_ticks(fig):
    """Labels of ticks outside the limits: matplotlib keeps them but never draws them."""
    hidden = set()
    for ax in fig.axes:
        for axis, (low, high) in (
            (ax.xaxis, sorted(ax.get_xlim())),
            (ax.yaxis, sorted(ax.get_ylim())),
        ):
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            hidden |= {t.label1.get_text() for t in ticks if not low <= t.get_loc() <= high}
    return hidden


def test_gradcam_shares_by_hand():
    r = record(0)
    r.arrays["cam"] = np.zeros((12, 16, 16), np.float16)
    r.arrays["cam"][:, :4, :4] = 1.0  # all of it on the first patch
    r.arrays["token_expert"] = np.zeros((4, 12, 17), np.int16)
    r.arrays["token_expert"][1, :, 1] = 3  # which goes to expert 3 in the second layer
    mass, patches = masks.cam_shares(r, 1)
    assert mass.tolist() == [0, 0, 0, 1] and patches.tolist() == [15 / 16, 0, 0, 1 / 16]
    r.arrays["token_expert"][1, 1:, 1] = 0  # of the first image alone
    of_first, of_its_patches = masks.cam_shares(r, 1, shown=1)
    assert of_first.tolist() == [0, 0, 0, 1] and of_its_patches[3] == 1 / 16
    r.arrays["cam"][:2] = 0.0
    assert masks.cam_shares(r, 1)[0].tolist() == [1, 0, 0, 0]
    assert masks.cam_shares(r, 1, shift=2)[0].tolist() == [0.9, 0, 0, 0.1]
    del r.arrays["cam"]
    with pytest.raises(ValueError, match="holds no GradCAM 'cam': .* has cam_probe"):
        masks.cam_masks(r)


def test_the_gradcam_of_the_first_block_is_drawn_where_it_is_asked_for():
    r = record(0)
    with pytest.raises(ValueError, match="holds no GradCAM 'cam_first': .* has cam_first"):
        masks.cam_masks(r, 0, cam="cam_first")
    r.arrays["cam_first"] = np.zeros((12, 16, 16), np.float16)
    r.arrays["cam_first"][:, -4:, -4:] = 1.0  # all of it on the last patch
    heat = masks.cam_masks(r, 0, 1, cam="cam_first").axes[-6].images[-1].get_array()
    assert heat[3, 3] == 1.0 and heat.sum() == 1.0
    r.arrays["token_expert"] = np.zeros((4, 12, 17), np.int16)
    r.arrays["token_expert"][0, :, -1] = 2  # the expert of the last patch
    assert masks.cam_shares(r, 0, cam="cam_first")[0].tolist() == [0, 0, 1, 0]


def test_front_by_hand():
    # best of all two | beaten | best in the third | equal to the first | better in one, worse in
    # another
    costs = [(1, 2, 3), (2, 2, 3), (5, 5, 1), (1, 2, 3), (0, 9, 9)]
    assert relations.front(costs) == [True, False, True, True, True]


def test_cluster_tree_by_hand():
    bars = [p for p in relations.cluster_tree(TREE, 20).axes[0].patches]
    places = [
        (
            round(b.get_x(), 3),
            round(b.get_width(), 3),
            round(b.get_y(), 3),
            round(b.get_height(), 3),
        )
        for b in bars
    ]
    assert places == [(0.0, 1.0, 0.0, 0.5), (0.0, 0.4, 0.5, 1.0), (0.4, 0.35, 0.5, 0.4)]


def test_report_needs_no_torch_and_leaves_matplotlib_alone():
    code = (
        "import sys, lib.report.figures, lib.report.maps, lib.report.tables\n"
        "import lib.report.explorer, lib.verdicts.claims\n"
        "assert 'torch' not in sys.modules and 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    before = dict(matplotlib.rcParams)
    style.png(FIGURES["loads of one layer"](), dpi=40)
    assert dict(matplotlib.rcParams) == before


def test_colours_survive_greyscale():
    lumas = [style.luma(c) for c in style.COLOURS]
    assert all(b - a >= 0.08 for a, b in pairwise(lumas)), lumas
    experts = [style.luma(c) for c in style.expert_colours(8)]
    assert all(b - a > 0.04 for a, b in pairwise(experts)), experts
    assert len(set(style.MARKERS)) == len(set(style.LINES)) == len(style.COLOURS)


def test_show_has_alt_text_caption_and_fits_a_phone():
    shown = style.show(FIGURES["loads of one layer"](), 'Load, "n" < 3', 'bars & "experts"')
    assert (
        'alt="bars &amp; &quot;experts&quot;"' in shown.html
        and "Load, &quot;n&quot; &lt; 3" in shown.html
    )
    assert (
        "overflow-x:auto;max-width:100%" in shown.html
        and f"max-width:max(100%,{style.NARROWEST}px)" in shown.html
        and "data:image/png;base64," in shown.html
        and repr(shown) == 'bars & "experts"'
    )
    for caption, alt in [("", "a"), ("c", " ")]:
        with pytest.raises(ValueError, match="alternative text"):
            style.show(FIGURES["loads of one layer"](), caption, alt)


def test_equal_figures_are_equal_bytes():
    assert style.png(FIGURES["ratio"](), 50) == style.png(FIGURES["ratio"](), 50)


def test_no_two_models_of_a_frontier_look_alike():
    fig = cost_figures.frontier({"reproduced": points(24)})
    looks = [(c.lines[0].get_color(), c.lines[0].get_marker()) for c in fig.axes[0].containers]
    assert len(set(looks)) == len(looks) == 24


def test_small_information_fills_its_axis():
    runs = [record(0, per_image=True)]
    largest = max(max(figures.depth_information(r, about)[1]) for r in runs for about in ABOUT)
    top = figures.information_by_depth({"image": runs}).axes[0].get_ylim()[1]
    assert max(largest, 0.1) < top <= max(1.2 * largest, 0.12)


def test_more_curves_than_colours_still_look_different():
    fig = figures.scan(
        {
            "this build": [
                figures.Curve([1, 2], [80.0 + i, 81.0 + i], f"method {i}") for i in range(8)
            ]
        }
    )
    looks = {
        (line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor())
        for line in fig.axes[0].lines
        if line.get_label().startswith("method") or len(line.get_xdata()) == 2
    }
    assert len(looks) == 8


def test_class_order_puts_blocks_on_the_diagonal():
    share = np.array([[0.1, 0.9], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    assert maps.class_order(share).tolist() == [3, 1, 0, 2]
    fig = maps.class_expert_heatmap(THREE[0], layers=[-1])
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert names[:3] == ["class 0", "class 4", "class 8"] and len(names) == 10
    assert re.fullmatch(r"block 4\nI/H = (0\.9\d|1\.00)", fig.axes[0].get_title())


def test_classes_by_expert_names_every_class_once():
    rows = maps.classes_by_expert(THREE[0])
    assert sorted(
        re.findall(r"class \d", " ".join(r["classes that prefer it (share, %)"] for r in rows))
    ) == [f"class {c}" for c in range(10)]
    assert rows[0]["classes that prefer it (share, %)"].startswith("class 0 100")


def test_counts_by_hand():
    by_image = record(0, blocks=[0], experts=2, classes=2, per_image=True)
    by_image.arrays["class_expert"] = np.array([[[12, 0], [3, 9]]])
    panel = maps.class_expert_counts({"manual": by_image}).axes[0]
    assert [text.get_text() for text in panel.texts] == ["12", "0", "3", "9"]
    assert panel.get_title() == "manual\n(images)"


def test_counts_of_images_where_tokens_are_routed_on_their_own():
    by_token = record(0, blocks=[0], experts=2, classes=2, images=3)
    by_token.arrays["image_loads"] = np.array([[[9, 8]], [[0, 17]], [[8, 9]]])
    panel = maps.class_expert_counts({"token choice": by_token}).axes[0]
    assert [text.get_text() for text in panel.texts] == ["1", "1", "0", "1"]  # labels are 0, 1, 0
    assert panel.get_title() == "token choice\n(images)"


def test_depth_information_of_a_sharp_layer():
    blocks, values = figures.depth_information(record(0, images=1000, per_image=True))
    assert (
        blocks.tolist() == [1, 2, 3, 4]
        and values[-1] == pytest.approx(1, abs=0.02)
        and values[0] < 0.2
    )
    assert figures.depth_information(record(0, per_image=True), "position")[1].tolist() == [
        0,
        0,
        0,
        0,
    ]


def test_the_class_token_has_no_position():
    """It goes to one expert alone; the patches do not go by place, then wholly."""
    even, by_place = [[100, 0], [50, 50], [50, 50]], [[100, 0], [100, 0], [0, 100]]
    run = SimpleNamespace(
        arrays={"position_expert": np.array([even, by_place])}, moe=[{"block": 0}, {"block": 1}]
    )
    assert figures.depth_information(run, "position", corrected=False)[1].tolist() == [0.0, 1.0]
    with_it = figures.depth_information(run, "position", corrected=False, prefix=0)[1]
    # H(expert) = H(2/3), H(expert | row) = 2/3 ln 2
    entropy = np.log(3) - 2 / 3 * np.log(2)
    assert with_it[0] == pytest.approx(1 - 2 / 3 * np.log(2) / entropy)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: figures.training_curves({}, ["accuracy"]), "val_top1"),
        (lambda: maps.class_expert_heatmap(THREE[0], [9]), "0..3"),
        (lambda: overlays.token_maps(IMAGES, np.zeros((1, 4, 15), int), [0], 2), "15 tokens"),
        (lambda: overlays.token_maps(IMAGES, np.zeros((1, 3, 17), int), [0], 2), "4 images"),
        (lambda: figures.depth_information(THREE[0], "colour"), "'colour'"),
        (lambda: cost_figures.cost_ratio({}), "empty"),
        (
            lambda: overlays.token_maps(np.zeros((4, 2, 2, 7)), np.zeros((1, 4, 17), int), [0], 2),
            "channels|must be",
        ),
    ],
)
def test_figures_refuse(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_routes_by_hand():
    """Two layers, two experts, three classes: classes 0 and 2 take the same way."""
    two_layers = record(0, blocks=[0, 1], experts=2, classes=3, class_names=["a", "b", "c"])
    two_layers.arrays["class_expert"] = np.array(
        [[[9, 1], [2, 8], [6, 4]], [[0, 5], [5, 0], [1, 4]]]
    )
    assert routes.shared_routes(two_layers) == [
        {"route (expert in each block)": "1 → 2", "classes": 2, "which": "a, c"}
    ]
    assert len(routes.shared_routes(two_layers, least=1)) == 2
    assert routes.shared_routes(two_layers, labels=[0, 1]) == []
    assert routes.routes_of_sets(two_layers, {"first two": ["a", "b"], "ends": ["a", "c"]}) == [
        {
            "classes": "first two",
            "number": 2,
            "route (expert in each block)": "1 → 2",
            "of them on it": 1,
            "pairs of them on one route (%)": 0.0,
            "pairs with another class (%)": 50.0,
        },
        {
            "classes": "ends",
            "number": 2,
            "route (expert in each block)": "1 → 2",
            "of them on it": 2,
            "pairs of them on one route (%)": 100.0,
            "pairs with another class (%)": 0.0,
        },
    ]


def test_reconstructions_need_a_masked_pretraining():
    without_pictures = record(0)
    del without_pictures.arrays["picture"]
    with pytest.raises(ValueError, match="train.mask"):
        maps.reconstructions(without_pictures)


def test_the_process_of_extraction_draws_the_largest_clusters():
    rng = np.random.default_rng(0)
    labels = np.repeat([-1, 0, 1, 2, 3, 4, 5, 6], [9, 2, 8, 7, 6, 5, 4, 3])
    variance = rng.random((7, 12))
    fig = process.extraction(
        rng.random((len(labels), 2)), labels, variance, variance > 0.5, np.eye(7)
    )
    tokens, variance_panel, neurons, sent = fig.axes[:4]
    # the first is the smallest
    named = [text.get_text() for text in fig.legends[0].get_texts()]
    assert named == [f"cluster {number}" for number in range(2, 8)]
    assert len(tokens.lines[0].get_xdata()) == 9 + 2  # in no cluster, or in one that is not drawn
    drawn = neurons.images[0].get_array()
    assert drawn.shape == (6, 12) and drawn.sum() == (variance[1:] > 0.5).sum()
    most = variance_panel.images[0].get_array().argmax(axis=0)
    assert list(most) == sorted(most), "neurons stand by the cluster on which they vary most"
    assert np.array_equal(sent.images[0].get_array(), 100 * np.eye(6))
    with pytest.raises(ValueError, match="no cluster: nothing was extracted from"):
        process.extraction(
            np.zeros((3, 2)),
            np.full(3, -1),
            np.zeros((0, 12)),
            np.zeros((0, 12), bool),
            np.zeros((0, 0)),
        )


# ---------------------------------------------------------------- explorer


def test_explorer_redraws_and_carries_the_static_figure():
    pytest.importorskip("ipywidgets")
    token_expert, blocks, experts = tokens()
    live = explorer.explorer(
        IMAGES, token_expert, blocks, experts, names=list("abcd"), caption="Tokens.", alt="Overlay."
    )
    image, layer, expert, picture = live.widget.children
    before = picture.value
    image.value, layer.value, expert.value = 1, 0, 2
    assert picture.value != before and picture.value == live.view(1, 0, 2)
    bundle = live._repr_mimebundle_()
    assert (
        'alt="Overlay."' in bundle["text/html"]
        and "application/vnd.jupyter.widget-view+json" in bundle
    )


def test_explorer_without_widgets(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    token_expert, blocks, experts = tokens()
    still = explorer.explorer(
        IMAGES, token_expert, blocks, experts, caption="Tokens.", alt="Overlay."
    )
    assert still.widget is None and set(still._repr_mimebundle_()) == {"text/html", "text/plain"}


def carried(shown):
    """The data that a page's explorer of routes is drawn from."""
    return json.loads(html.unescape(re.search(r'data-content="([^"]*)"', shown.html)[1]))


def test_a_page_carries_the_maps_of_all_images(monkeypatch):
    token_expert, blocks, experts = tokens()
    given = {"caption": "Tokens.", "alt": "Overlay."}
    live = explorer.explorer(IMAGES, token_expert, blocks, experts, names=list("abcd"), **given)
    content = carried(live.on_page)
    assert content["names"] == ["0: a", "1: b", "2: c", "3: d"]
    assert content["blocks"] == [block + 1 for block in blocks]
    assert content["experts"] == np.asarray(token_expert)[:, :, 1:].tolist()
    rows, columns = content["grid"]
    assert rows * columns == len(content["experts"][0][0])
    assert len(content["colours"]) == len(content["ink"]) == experts
    raw = base64.b64decode(content["images"][2].removeprefix("data:image/png;base64,"))
    wanted = overlays.as_picture(IMAGES[2])
    assert np.allclose(np.asarray(Image.open(io.BytesIO(raw))) / 255, wanted, atol=1 / 255)
    alone = explorer.explorer(None, token_expert, blocks, experts, **given)
    assert carried(alone.on_page)["images"] == [None] * 4
    assert live.on_page.html.startswith(live.static.html)


def test_a_page_carries_as_many_images_as_fit(monkeypatch):
    token_expert, blocks, experts = tokens()
    live = explorer.explorer(
        IMAGES, token_expert, blocks, experts, caption="Tokens.", alt="Overlay."
    )
    monkeypatch.setattr(explorer, "MOST_BYTES", len(live._content(2)))
    assert len(carried(live.on_page)["images"]) == 2
    monkeypatch.setattr(explorer, "MOST_BYTES", 10)
    assert carried(live.on_page)["names"] == []
