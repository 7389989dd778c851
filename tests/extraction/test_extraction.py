"""Experts extracted from whole models: in runs, in sequence, broken off, saved, refused."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_mlps import (
    OF_NEURONS,
    STATIC,
    rules,
)
from timm.layers import Mlp

from lib.extraction import calibrate, extract, saved
from lib.extraction import neurons as choosing
from lib.extraction import record as recording
from lib.extraction.layer import extract_layer
from lib.extraction.step import ExtractStep
from lib.inputs.splits import load_splits
from lib.measure import pictures
from lib.measure.cost import count
from lib.models.backbone import build
from lib.models.moe import MoELayer, RoutingTape
from lib.models.step import StepInputs
from lib.routers.hard import HardRouter
from lib.runs import collect as runs
from lib.runs.restore import restored
from lib.spec import BackboneSpec, DataSpec, ExtractSpec, RunSpec, TrainSpec

BASE = RunSpec(
    data=DataSpec(train=400, val=20, test=60),
    threads=1,
    train=TrainSpec(epochs=1.0, batch=40, lr=3e-3),
    backbone=BackboneSpec(patch=7, width=16, depth=2, heads=2, hidden=24),
)


def record(where, spec):
    return runs.collect({"one": [spec.but(keep=True)]}, where=where)["one"][0]


def extracted(**parts):
    clusters = parts.get("clusters", {})
    if isinstance(clusters, dict):
        parts |= {"clusters": {"count": 4, "sample": 400} | clusters}
    parts["calibration"] = {"images": 100, "tokens": 800} | parts.get("calibration", {})
    return BASE.but(init=BASE, train=None, extract=rules(**parts))


@pytest.mark.parametrize(
    "fields, kind",
    [
        (
            {
                "correction": {"method": "ridge"},
                "neurons": {"statistics": "routed"},
                "clusters": {"space": "input"},
                "router": "nearest",
            },
            MoELayer,
        ),
        (
            {"clusters": STATIC, "correction": {"method": "mean"}, "neurons": {"budget": "model"}},
            Mlp,
        ),
        ({"neurons": {"variance_percent": 90.0}}, MoELayer),
        ({"storage": "shared"}, MoELayer),
        ({"clusters": {"class_token": "apart"}}, MoELayer),
        ({"storage": "inputs", "correction": {"method": "ridge"}}, MoELayer),
        ({"router": "oracle"}, MoELayer),
        ({"router": "random"}, MoELayer),
        ({"clusters": OF_NEURONS, "router": "trained"}, MoELayer),
        ({"neurons": {"common": 0.25}, "correction": {"method": "mean"}}, MoELayer),
        ({"correction": {"sequential": True, "method": "ridge", "head": 0.1}}, MoELayer),
        (
            {
                "correction": {"sequential": True, "method": "ridge"},
                "neurons": {"score": "update", "budget": "model"},
            },
            MoELayer,
        ),
    ],
)
def test_a_run_records_saves_and_goes_on(where, fields, kind):
    spec = extracted(**fields)
    made = record(where, spec)
    assert [row["layer"] for row in made.extract] == ["blocks.0.mlp", "blocks.1.mlp"] and made.val[
        "n"
    ] == 20
    model = runs.model_of(spec, where)
    assert type(model.blocks[0].mlp) is kind
    stored = sum(row["stored"] for row in made.extract)
    base = where.get(BASE)
    columns = sum(row["columns"] for row in made.extract)
    extra = made.cost["params_stored"] - (base.cost["params_stored"] - 2 * (24 * 33 + 16))
    experts = sum(row["clusters"] if kind is MoELayer else 1 for row in made.extract) + (
        2 if "common" in fields.get("neurons", {}) else 0
    )
    routers = sum(
        t.numel()
        for m in model.modules()
        if isinstance(m, HardRouter)
        for t in (*m.parameters(), *m.buffers())
    )
    assert extra == stored * 17 + columns * 16 + experts * 16 + routers
    child = spec.but(init=spec, extract=None, train=BASE.train.but(distil_logits=0.5))
    after = record(where, child)
    assert (
        after.cost["params_stored"] == made.cost["params_stored"]
        and "train_distil_loss" in after.history[-1]
    )
    splits = load_splits(spec.data)
    images = splits.test.batch(torch.arange(8), spec.data)
    again = restored(child, load_file(where.state(child.id)), 10, 1).eval()
    assert not torch.equal(again(images), model(images))


def test_multiply_adds_are_those_of_the_neurons_that_tokens_pass(where):
    made, base = record(where, extracted(neurons={"variance_percent": 70.0})), record(where, BASE)
    loads, widths = (
        [row[key] for row in part] for part, key in ((made.moe, "load"), (made.extract, "widths"))
    )
    neurons = sum(
        sum(s * h for s, h in zip(*pair, strict=True)) for pair in zip(loads, widths, strict=True)
    )
    centres = sum(row["clusters"] for row in made.extract)
    gone = 17 * 16 * (2 * (2 * 24 - neurons) - centres)
    assert base.cost["macs"] - made.cost["macs"] == pytest.approx(gone, abs=4)
    static = record(where, extracted(clusters=STATIC))
    assert base.cost["macs"] - static.cost["macs"] == 17 * 16 * 2 * 24


def test_sequential_extraction_makes_up_for_the_layers_before(where):
    model = build(BASE.but(init=BASE, train=None), 10, 1, _state(where))
    splits = load_splits(BASE.data)
    images = splits.train.batch(torch.arange(100), BASE.data)
    with torch.no_grad():
        want = model.forward_features(images)
    far = []
    for how in ({}, {"sequential": True, "catch_up": 0.5}, {"sequential": True}):
        spec = extracted(
            clusters=STATIC, correction={"method": "ridge"} | how, neurons={"active": 0.2}
        )
        changed_model = copy.deepcopy(model)
        extract.extract(changed_model, spec, splits.train, 10)
        with torch.no_grad():
            far.append((changed_model.forward_features(images) - want).square().mean().item())
    assert far == sorted(far, reverse=True)


def test_a_stream_records_what_a_pass_through_the_whole_model_would(where):
    model, splits = (
        build(BASE.but(init=BASE, train=None), 10, 1, _state(where)).train(),
        load_splits(BASE.data),
    )
    batches = [splits.train.batch(part, BASE.data) for part in torch.arange(40).split(16)]
    drawn = {"per_image": 5, "limit": 120, "seed": 1}
    dense, changed = calibrate.streams_of(model, batches)
    for name in recording.mlps_of(model):
        for stream, vit in ((dense, dense.vit), (changed, model)):
            names = {name: vit.get_submodule(name)}
            there = {name: vit.get_submodule(name.removesuffix("mlp") + "norm2")}
            want, got = (
                recording.record_tokens(vit, batches, names, norms=there, **drawn)[name],
                stream.record(name, **drawn),
            )
            for field in ("inputs", "hidden", "image", "residual"):
                torch.testing.assert_close(getattr(got, field), getattr(want, field))
        # A changed layer: what follows it is seen by one of the streams.
        model.get_submodule(name).fc2.bias.data += 0.1
    assert model.training and not torch.allclose(dense.batches[0], changed.batches[0])


def test_layers_are_ranked_by_what_they_add_to_the_stream(where):
    model, splits = (
        build(BASE.but(init=BASE, train=None), 10, 1, _state(where)),
        load_splits(BASE.data),
    )
    spec = extracted(
        clusters=STATIC,
        correction={"method": "ridge", "sequential": True},
        neurons={"score": "update", "budget": "model", "active": 0.5},
    )
    even = extracted(
        clusters=STATIC,
        correction={"method": "ridge", "sequential": True},
        neurons={"score": "update", "active": 0.5},
    )
    images = splits.train.batch(torch.arange(100), BASE.data)

    def left(whole, given):
        made = copy.deepcopy(whole)
        reports = extract.extract(made, given, splits.train, 10)
        with torch.no_grad():
            apart = (
                (made.forward_features(images) - whole.forward_features(images))
                .square()
                .mean()
                .item()
            )
        return [row["active"] for row in reports], apart

    for quiet in (0, 1):  # a layer that adds next to nothing to the stream has neurons to spare
        whole = copy.deepcopy(model).eval()
        whole.blocks[quiet].mlp.fc2.weight.data *= 1e-4
        widths, apart = left(whole, spec)
        assert (
            widths[quiet] == choosing.LEAST
            and widths[1 - quiet] == 24
            and left(whole, even)[0] == [12, 12]
        )
        assert apart < 0.1 * left(whole, even)[1]
    loud = copy.deepcopy(model).eval()
    loud.blocks[0].mlp.fc2.weight.data[:, 12:] = 0  # twelve neurons say all that this layer says
    widths, _ = left(loud, spec)
    assert widths[0] <= 12 <= widths[1] and sum(widths) == 24


def _state(where):
    record(where, BASE)
    return load_file(where.state(BASE.id))


def test_a_whole_model_at_100_percent_is_the_dense_one_through_experts(where):
    whole = build(BASE.but(init=BASE), 10, 1, _state(where)).eval()
    splits, changed_model = load_splits(BASE.data), copy.deepcopy(whole)
    reports = extract.extract(
        changed_model, extracted(neurons={"variance_percent": 100.0}), splits.train, 10
    )
    images = splits.test.batch(torch.arange(20), BASE.data)
    with torch.no_grad(), RoutingTape(changed_model) as tape:
        torch.testing.assert_close(changed_model(images), whole(images), atol=1e-5, rtol=0)
    assert len(reports) == 2 and all((routing.load() > 0).sum() >= 2 for routing in tape.routings())


@pytest.mark.parametrize("sequential", [False, True])
def test_a_broken_off_extraction_goes_on(where, tmp_path, monkeypatch, sequential):
    model, splits, spec = (
        build(BASE.but(init=BASE), 10, 1, _state(where)),
        load_splits(BASE.data),
        extracted(correction={"method": "ridge"}),
    )
    spec = spec.but(extract={"correction": {"sequential": sequential}})
    whole = copy.deepcopy(model)
    want = extract.extract(whole, spec, splits.train, 10)
    file, done = tmp_path / "run.pt", []

    def once(*args, **kwargs):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return extract_layer(*args, **kwargs)

    broken = copy.deepcopy(model)
    monkeypatch.setattr(extract, "extract_layer", once)
    with pytest.raises(KeyboardInterrupt):
        extract.extract(broken, spec, splits.train, 10, file)
    calls = []
    monkeypatch.setattr(
        extract,
        "extract_layer",
        lambda *args, **kwargs: calls.append(1) or extract_layer(*args, **kwargs),
    )
    again = copy.deepcopy(model)
    assert extract.extract(again, spec, splits.train, 10, file) == want and len(calls) == 1
    assert all(torch.equal(t, whole.state_dict()[name]) for name, t in again.state_dict().items())


def test_the_step_extracts_files_and_fits_as_its_spec_says(where, tmp_path):
    spec, splits = extracted(storage="shared"), load_splits(BASE.data)
    dense = build(BASE.but(init=BASE), 10, 1, _state(where)).eval()
    step, model, want = ExtractStep(spec.extract), copy.deepcopy(dense), copy.deepcopy(dense)
    step.check(model, spec)
    inputs = StepInputs(spec, splits.train, 10, {}.__getitem__, tmp_path / "run.pt")
    result = step.apply(model, inputs)
    assert result.report == extract.extract(want, spec, splits.train, 10) and not result.masks
    assert len(list(tmp_path.glob("run.pt.*.safetensors"))) == 2
    fresh = step.fit(copy.deepcopy(dense), model.state_dict())
    fresh.load_state_dict(model.state_dict())
    images = splits.test.batch(torch.arange(8), spec.data)
    with torch.no_grad():
        assert torch.equal(fresh(images), want(images))
        assert not torch.equal(want(images), dense(images))
    assert (ExtractStep.name, type(dense.blocks[0].mlp)) == ("extract", Mlp)


@pytest.mark.parametrize(
    "name, size", [("swin_tiny_patch4_window7_224", 224), ("convnext_tiny", 64)]
)
def test_other_families_are_extracted_saved_and_run(name, size, tmp_path):
    torch.manual_seed(0)
    swin, convnext = (
        {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4)},
        {"dims": (16, 24, 32, 32), "depths": (1,) * 4},
    )
    sizes = swin if "swin" in name else convnext
    model = timm.create_model(name, num_classes=10, in_chans=1, **sizes).eval()
    splits = load_splits(DataSpec(train=100, val=20, test=20, image_size=size))
    spec = RunSpec(
        data=DataSpec(train=100, val=20, test=20, image_size=size),
        init=RunSpec(),
        threads=1,
        extract=ExtractSpec(
            clusters={"method": "kmeans", "count": 3, "sample": 200},
            neurons={"active": 0.5},
            correction={"method": "ridge"},
            calibration={"images": 20, "tokens": 300},
        ),
    )
    want = copy.deepcopy(model)
    reports = extract.extract(model, spec, splits.train, 10)
    assert all(row["clusters"] == 3 and not row["dense"] for row in reports)
    images = splits.test.batch(torch.arange(2), spec.data)
    maps = pictures.token_maps(model, splits.test, spec, torch.arange(2))
    assert maps.shape[:2] == (len(reports), 2) and (maps[-1] == -1).any() and (maps[0] >= 0).all()
    fresh = saved.fit_extracted(want, model.state_dict(), spec.extract)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh.eval()(images), model(images))
    assert (
        count(model, size, experts_per_image=3.0 * len(reports)).macs
        < count(timm.create_model(name, num_classes=10, in_chans=1, **sizes), size).macs
    )


def test_too_few_images_to_calibrate_on(where):
    with pytest.raises(
        RuntimeError, match="images=900 were asked for to calibrate on, the training split has 400"
    ):
        record(where, extracted(calibration={"images": 900}))


@pytest.mark.parametrize(
    "name, fields, says",
    [
        (
            "convnextv2_atto",
            {},
            r"GlobalResponseNormMlp\) .*what is taken is timm.layers.Mlp.*no experts are extracted",
        ),
        (
            "convnext_atto",
            {"correction": {"sequential": True}},
            "compares residual streams before norm2 of each block",
        ),
        (
            "convnext_atto",
            {"clusters": {"class_token": "apart"}},
            "class_token='apart' treats the class token apart from the patches, and ConvNeXt",
        ),
    ],
)
def test_models_without_plain_mlps_are_refused_before_anything_trains(where, name, fields, says):
    whole = BASE.but(backbone=BackboneSpec(name=name), data={"image_size": 32})
    with pytest.raises(ValueError, match=says):
        runs.collect(
            {"extracted": [whole.but(init=whole, train=None, extract=rules(**fields))]}, where=where
        )
    assert not list(where.states.glob("*"))
