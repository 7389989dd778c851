"""Rows of the benchmark are well formed, on small layers and models; no time is asserted."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch

from benchmarks import (
    attention,
    extraction,
    frontier,
    growth,
    inputs,
    layers,
    machine,
    models,
    pruning,
    trainer,
)
from benchmarks.__main__ import line
from benchmarks.dense import EqualChunks, OneMlp, packed
from benchmarks.layers import PASSES, SHORT, Setting, settings
from benchmarks.peers import INSTALL, PEERS, MaskLoop, Peer
from lib import paths
from lib.models.packed import dense_maps_gain
from lib.spec import BackboneSpec, DataSpec, PruneSpec, RunSpec, TrainSpec
from lib.verdicts.speed import PARTS, Ratio, Timing

SMALL = Setting(2, 8, 4, 2)


@pytest.fixture
def small_layers(monkeypatch):
    monkeypatch.setattr(layers, "D", 16)
    monkeypatch.setattr(layers, "H", 32)


@pytest.fixture
def without_bf16(monkeypatch):
    """A machine that multiplies fp32 alone, and cannot pack weights."""
    can = dict.fromkeys(machine.capabilities(), False)
    monkeypatch.setattr(machine, "capabilities", lambda: can)


def small_vit():
    sizes = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", img_size=28, num_classes=3, **sizes).eval()


def well_formed(rows):
    """Each row is of a known part, stands once, and has times or says why not."""
    rows = list(rows)
    seen = Counter((r.part, r.what, r.shape, r.dtype, r.ours_is, r.against) for r in rows)
    assert rows and set(seen.values()) == {1}
    for row in rows:
        assert row.part in PARTS and row.dtype in ("fp32", "bf16", "autocast")
        if row.ratio is None:
            assert row.note and row.ours_is in line(row) and row.note in line(row)
            continue
        assert 0 < row.ours.low <= row.ours.median and row.ideal > 0
        assert (row.reached is None) == (row.goal is None)
        assert f"{row.ratio:.3f}" in line(row)
    return rows


@pytest.mark.parametrize("what", PASSES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "autocast"])
def test_rows_of_a_layer(small_layers, dtype, what):
    rows = well_formed(layers.compared(SMALL, dtype, what, repeats=3))
    if machine.why_not(dtype, packed=False):
        assert len(rows) == 1 and rows[0].note
        return
    freezes = what == "forward" and dtype != "autocast"
    packs = freezes and not machine.why_not(dtype, packed=True)
    expected = 1 + packs * (1 + dense_maps_gain())
    assert len([row for row in rows if row.part == "layer"]) == expected
    against = {row.against: row for row in rows if row.part == "peers"}
    assert set(against) == {peer.name for peer in PEERS} | {"fastest peer", "median peer"}
    for peer in PEERS:
        note = against[peer.name].note
        if against[peer.name].ratio is None:
            assert note == INSTALL or note == f"does not run in {dtype}"
        else:
            assert ("drops tokens" in note) == peer.drops
    # the fastest is one that computes the same
    same = [against[peer.name] for peer in PEERS if not peer.drops]
    times = [row.other.median for row in same if row.other]
    assert against["fastest peer"].other.median == min(times)


@pytest.mark.parametrize(("others", "goal"), [(1, None), (2, layers.MEDIAN_PEER_GOAL)])
def test_a_median_of_one_peer_is_no_goal(others, goal):
    peers = [Peer(f"peer {i}", make=MaskLoop) for i in range(others)]
    times = {peer.name: Timing(2.0, 2.0) for peer in peers} | {"layer": Timing(1.0, 1.0)}
    setting = Setting(2, 8, layers.MEDIAN_PEER_EXPERTS[0], 1)
    about = {"what": "forward", "shape": str(setting), "dtype": "fp32"}
    rows = list(layers._against_peers(times, setting, about, peers, "layer"))
    assert rows[-1].against == "median peer" and rows[-1].goal == goal


def test_a_peer_that_cannot_compute_one_expert_a_token_has_no_row_there(small_layers):
    rows = layers.compared(Setting(2, 8, 4, 1), "fp32", "forward", repeats=3)
    against = {row.against for row in rows if row.part == "peers"}
    singles = {peer.name for peer in PEERS if peer.top_k in (None, 1)}
    assert against == singles | {"fastest peer", "median peer"}


def test_rows_of_a_skewed_layer_say_how_busy_the_busiest_expert_is(small_layers):
    setting = Setting(8, 32, 4, 1, skewed=True)
    layer, x = layers.moe_layer(setting), layers.inputs(setting)
    share = layers.busiest_share(layer, x)
    even = Setting(8, 32, 4, 1)
    assert share > 0.4 > layers.busiest_share(layers.moe_layer(even), layers.inputs(even))
    rows = [r for r in layers.compared(setting, "fp32", "forward", 3) if r.part == "layer"]
    assert all(f"{share:.0%}" in row.note for row in rows)


def test_a_machine_says_which_rows_it_cannot_measure(small_layers, without_bf16):
    rows = well_formed(layers.compared(SMALL, "bf16", "forward", repeats=3))
    assert [row.ratio for row in rows] == [None] and "no bf16 products" in rows[0].note
    rows = well_formed(layers.compared(SMALL, "fp32", "forward", repeats=3))
    assert {row.ours_is for row in rows} == {"layer"}
    assert len([sentence for sentence in machine.cannot() if "bf16" in sentence]) == 2
    assert any("packed weights" in sentence for sentence in machine.cannot())


def test_goals_are_set_for_settings_that_the_short_table_measures():
    measured = {
        (setting, dtype, what)
        for setting, dtypes, passes in SHORT
        for dtype in dtypes
        for what in passes
    }
    assert {setting for setting, _, _ in measured} <= set(settings())
    promised = {
        (setting, dtype, what)
        for setting in settings()
        for dtype in ("fp32", "bf16", "autocast")
        for what in PASSES
        for ours in (layers.PLAIN, layers.FROZEN)
        for is_packed in (False, True)
        if layers.goal(setting, dtype, what, ours, is_packed) is not None
    }
    assert not any(setting.skewed for setting, _, _ in promised)
    left_out = promised - measured
    # two experts a token: forward+backward takes as long as the rest of the short table
    assert {(s.top_k, s.experts) for s, _, _ in left_out} == {(2, 8), (1, 32)}


@pytest.mark.parametrize("bound", [OneMlp(16, 32, 2), EqualChunks(16, 32, 4, 2)])
def test_packed_bounds_compute_what_plain_ones_do(bound):
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    if reason := machine.why_not("fp32", packed=True):
        assert "packed" in reason
        return
    with torch.no_grad():
        torch.testing.assert_close(packed(bound, 12)(x), bound(x), rtol=1e-4, atol=1e-5)


def test_equal_chunks_go_to_different_mlps():
    chunks, x = EqualChunks(4, 8, 3, 1), torch.randn(9, 4)
    with torch.no_grad():
        each = [mlp(x[3 * i : 3 * i + 3]) for i, mlp in enumerate(chunks.mlps)]
        torch.testing.assert_close(chunks(x), torch.cat(each))


def test_rows_of_growth(small_layers):
    rows = well_formed(growth.rows(repeats=3, full=False))
    fp32 = [row for row in rows if row.dtype == "fp32"]
    assert [row.ideal for row in fp32] == [1, 1, 1 / 4, 1 / 16]


def test_rows_of_models(monkeypatch):
    monkeypatch.setattr(models, "SIDE", 28)
    monkeypatch.setattr(models, "DEPTH", 2)
    monkeypatch.setattr(models, "SHORT_DEPTHS", (1, 2))
    monkeypatch.setattr(models, "SHORT_BATCHES", (1, 4))
    monkeypatch.setattr(models, "dense_model", small_vit)
    rows = well_formed(models.rows(repeats=3, full=False))
    extracted = [row for row in rows if row.ours_is == "extracted"]
    assert {row.against for row in extracted} == {"whole model", "static model"}
    for row in extracted:
        # half of the neurons are left, so the whole model has more multiply-adds, the static not
        assert (row.ideal > 1.1) == (row.against == "whole model")
        assert row.goal is not None and row.cause
    single = [row for row in extracted if "batch 1," in row.shape]
    assert all(row.goal * row.ideal == 1 for row in single if row.against == "whole model")
    assert [row.shape.split(",")[1] for row in rows if row.part == "growth"] == [
        " 1 MoE layers of 8 experts",
        " 2 MoE layers of 8 experts",
    ]


@pytest.mark.parametrize("module", [attention, pruning, trainer], ids=lambda m: m.__name__)
def test_rows_of_the_full_benchmark(module, monkeypatch):
    for name, value in (("NAME", "vit_tiny_patch16_224"), ("SIDE", 32), ("BATCH", 2)):
        monkeypatch.setattr(module, name, value)
    well_formed(module.rows(3))


def test_rows_of_the_input_say_how_many_images_a_second(monkeypatch):
    small = {"NAME": "vit_tiny_patch16_224", "SIDE": 32, "CARD_SECONDS": 0.001}
    small |= {"PROCESSES": (0, 1), "BATCH": 2, "STEPS": 4, "MODEL_BATCH": 1, "MODEL_STEPS": 4}
    for name, value in small.items():
        monkeypatch.setattr(inputs, name, value)
    rows = well_formed(inputs.rows(3))
    assert len(rows) == 2 * 4 and all("images/s" in row.note for row in rows)
    assert {row.ours_is for row in rows} == {"0 processes", "1 process"}


def test_rows_of_extraction_say_whether_labels_agree_and_what_memory_it_takes(monkeypatch):
    for name, value in (("TOKENS", 300), ("MANY_TOKENS", 300), ("CLUSTER_SHARE", 0.05)):
        monkeypatch.setattr(extraction, name, value)
    monkeypatch.setattr(models, "SIDE", 28)
    monkeypatch.setattr(extraction, "dense_model", small_vit)
    clustering, whole = well_formed(extraction.rows(turns=2))
    assert "adjusted Rand index of the labels 1.000" in clustering.note
    assert "MiB" in clustering.note and "recording took" in whole.note
    assert whole.shape == "2 layers, 300 tokens"


def test_a_measurement_names_the_command_that_made_it(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks/__main__.py", "--repeats", "9", "--out", "a b"])
    about = machine.about("benchmarks", 9, 0.0, 0.0)
    assert about["command"] == "python -m benchmarks --repeats 9 --out 'a b'"
    monkeypatch.setattr("sys.argv", ["benchmarks/frontier.py"])
    about = machine.about("benchmarks.frontier", 9, 0.0, 0.0)
    assert about["command"] == "python -m benchmarks.frontier"


def test_a_line_says_whether_the_goal_is_reached():
    sides = {"part": "layer", "what": "forward", "shape": "B=1", "dtype": "fp32"}
    sides |= {"ours_is": "layer", "against": "one MLP"}
    beside = {"one MLP": Timing(1.0, 1.0), "equal chunks": Timing(1.5, 1.4)}
    times = {"ours": Timing(2.0, 1.0), "other": Timing(1.0, 1.0), "beside": beside}
    assert line(Ratio(**sides, **times, goal=0.5)).endswith("0.500 (1.000)  0.50 reached")
    short = line(Ratio(**sides, **times, goal=0.6))
    assert "0.60 SHORT" in short and "several weights in place of one +0.5 ms" in short


def test_models_of_one_dense_model_are_timed_beside_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("MOE_CACHE", str(tmp_path / "cache"))
    backbone = BackboneSpec(patch=7, width=32, depth=2, heads=2)
    data = DataSpec(train=64, val=20, test=30)
    dense = RunSpec(data=data, backbone=backbone, train=TrainSpec(), threads=1)
    runs = {
        "dense": dense,
        "half": dense.but(prune=PruneSpec(share=0.5, images=32)),
        "child": dense.but(init=dense.but(seed=1)),
    }
    made = frontier.models(runs)
    assert list(made) == ["dense", "half"] and "not timed: child: " in capsys.readouterr().out
    monkeypatch.setattr(frontier, "BATCHES", (2,))
    rows = list(frontier.rows(made, 28, 3))
    well_formed(rows)
    assert {(row.ours_is, row.against) for row in rows} == {("half", "dense")}
    assert all(1 < row.ideal < 3 for row in rows)
