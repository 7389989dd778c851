"""Any values make a valid spec, or an error in one sentence that names a field of theirs."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from lib.pages import parameters, profiles
from lib.runs.collect import check
from lib.spec import RunSpec, sentence

FIXED = settings(
    deadline=None,
    derandomize=True,  # the same values each time
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
SCHEMA = RunSpec.model_json_schema()
NASTY: list[Any] = [
    *(-1, 0, 1, 2**31, 2**63, 10**20, 10**400, -(2**63) - 1),
    *(-0.0, 1e-300, 1e-9, 0.5, 1e18, 1e300, float("inf"), float("nan")),
    *("", "x", "../../x", "/etc", "a/../b", "a\x00b", "<b>", "`x`", "\ud800", "x" * 300, "8"),
    *(None, True, False, [], [0], [1, 2], {}, {"x": 1}),
]
NAMES = ["set", "photos [1]", "mnist5k", "hub:owner/name", "label", "timm", "vit_tiny_patch16_224"]


def valid(schema: dict[str, Any]) -> st.SearchStrategy:
    """Values that a JSON schema allows; rules over several fields may still refuse them."""
    if "$ref" in schema:
        return objects(schema["$ref"].rpartition("/")[2])
    if "anyOf" in schema:
        return st.one_of([valid(part) for part in schema["anyOf"]])
    if "const" in schema or "enum" in schema:
        return st.sampled_from(schema.get("enum") or [schema["const"]])
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            return st.tuples(*[valid(item) for item in schema["prefixItems"]])
        return st.lists(valid(schema["items"]), max_size=3).map(tuple)
    if kind in ("integer", "number"):
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0))
        high = schema.get("maximum", schema.get("exclusiveMaximum"))
        assert high is not None or "exclusiveMinimum" in schema, f"no upper bound: {schema}"
        if kind == "integer":
            high -= "exclusiveMaximum" in schema
            return st.sampled_from([low, min(2, high), min(8, high), high])
        return st.sampled_from([low, low + (high - low) / 2, high])
    values = {"boolean": st.booleans(), "null": st.none(), "string": st.sampled_from(NAMES)}
    return values[kind]


def objects(name: str) -> st.SearchStrategy:
    """A few fields of a spec, most of them with values that the schema allows."""
    fields = SCHEMA["$defs"][name]["properties"]
    some = st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True)

    def of(names: list[str]) -> st.SearchStrategy:
        values = {field: valid(fields[field]) for field in names}
        nasty = st.sampled_from(NASTY)
        often = {field: st.one_of([value] * 9 + [nasty]) for field, value in values.items()}
        return st.fixed_dictionaries(often)

    return st.deferred(lambda: some.flatmap(of))


def fields_in(content: Any) -> set[str]:
    """The names of all fields that are set, at any depth."""
    if not isinstance(content, dict):
        return set()
    return set(content).union(*map(fields_in, content.values()))


def test_every_number_has_bounds():
    def numbers(part: Any, path: str):
        if isinstance(part, dict):
            if part.get("type") in ("integer", "number"):
                yield path, part
            for key, value in part.items():
                yield from numbers(value, f"{path}/{key}")
        elif isinstance(part, list):
            for value in part:
                yield from numbers(value, path)

    listed = list(numbers(SCHEMA, ""))
    assert len(listed) > 70
    for path, part in listed:
        assert part.keys() & {"minimum", "exclusiveMinimum"}, path
        assert part.keys() & {"maximum", "exclusiveMaximum"}, path


def test_any_values(capsys):
    counts: Counter = Counter()

    @settings(FIXED, max_examples=300)
    @given(objects("RunSpec"))
    def any_values(content):
        try:
            spec = RunSpec(**content)
        except ValidationError as error:
            said = sentence(error)
            words = set(re.findall(r"\w+", said))
            assert words & fields_in(content) and "\n" not in said and "pydantic" not in said
            counts["refused"] += 1
            return
        counts["valid"] += 1
        again = RunSpec.model_validate_json(spec.model_dump_json())
        assert again == spec and again.id == spec.id and len(spec.id) == 16
        plain = json.dumps(spec.model_dump(mode="json"))
        assert RunSpec.model_validate_json(plain).id == spec.id
        assert "\n" not in spec.describe() and spec.on("cuda").on("cpu").id == spec.on("cpu").id

    any_values()
    with capsys.disabled():
        print(f"\nspecs: {dict(counts)}")
    assert counts.total() >= 300 and min(counts["valid"], counts["refused"]) > 60


# ---------------------------------------------------------------- specs against their models

SMALL = RunSpec(
    data={"image_size": 28},
    backbone={"patch": 7, "width": 32, "depth": 2, "heads": 2},
    train={"batch": 8},
)
# field: values, of which any may be refused together with others
CHANGES = {
    "data": {"image_size": [1, 7, 28, 30, 56, 65536], "train": [None, 20]},
    "backbone": {
        "name": ["vit_tiny_patch16_224", "convnext_tiny", "resnet18", "deit_tiny_patch16_224", "x"],
        "patch": [None, 1, 4, 7, 28, 64],
        "width": [None, 30, 32, 33, 64],
        "depth": [None, 1, 3],
        "heads": [None, 1, 2, 5],
        "hidden": [None, 1, 7, 64],
        "drop_path": [0.0, 0.9],
    },
    "moe": {
        "layers": [1, 2, 3, 500],
        "experts": [1, 2, 3, 8, 4096],
        "top_k": [1, 2, 4096],
        "router": ["token", "image", "expert_choice", "priority", "soft", "all"],
        "pool": ["class", "mean"],
        "balance": ["none", "switch"],
        "capacity_factor": [None, 1e-9, 0.01, 1.0, 4096.0],
        "shared": [True, False],
        "slots": [1, 65536],
        "members": [1, 2],
        "compete_rate": [None, 0.5],
    },
    "train": {
        "batch": [1, 64, 2**31 - 1],
        "mask": [None, {"ratio": 0.001}, {"ratio": 0.75, "width": 8, "heads": 2}],
        "single_expert_at": [None, 0.5],
    },
    "prune": {"share": [0.0, 0.5, 0.999], "parts": [None, ("mlp",), ("attention",)]},
    "extract": {"neurons": [{"active": 1e-9}, {"active": 0.5}, {"variance_percent": 100.0}]},
    "drop": {"share": [0.0, 0.5, 0.999], "missing": ["zero_update", "reroute"]},
}


@st.composite
def small_runs(draw) -> RunSpec:
    """A small run, and sometimes one that starts from it; ValidationError where they do not fit."""

    def changed(run: RunSpec, parts: list[str]) -> RunSpec:
        for part in parts:
            fields = draw(st.lists(st.sampled_from(sorted(CHANGES[part])), max_size=4, unique=True))
            values = {field: draw(st.sampled_from(CHANGES[part][field])) for field in fields}
            if part == "extract":
                values.setdefault("neurons", {"active": 0.5})
            run = run.but(**{part: values})
        return run

    some = st.lists(st.sampled_from(["data", "backbone", "moe", "train"]), max_size=3, unique=True)
    run = changed(SMALL, draw(some))
    step = draw(st.sampled_from(["none", "prune", "extract", "drop"]))
    if step == "none":
        return run
    child = run.but(init=None if step == "prune" else run)
    return changed(child.but(moe=None) if step == "extract" else child, [step])


def test_any_small_spec_fits_its_model_or_is_refused(capsys):
    counts: Counter = Counter()

    @settings(FIXED, max_examples=150)
    @given(st.data())
    def any_small_spec(data):
        try:
            spec = data.draw(small_runs())
        except ValidationError:
            counts["no spec"] += 1
            return
        try:
            check(spec)
        except ValueError as error:
            assert len(str(error)) > 20
            counts["refused"] += 1
        else:
            counts["fits"] += 1

    any_small_spec()
    with capsys.disabled():
        print(f"\nsmall specs against their models: {dict(counts)}")
    assert min(counts["fits"], counts["refused"]) > 10


# ---------------------------------------------------------------- parameters of pages

PAGES = ["vimoe/layer_scan", "durham/strategies", "leiden/why", "moee/routing", "leiden/masks"]
PAGES += ["expert_pruning/scores", "moee/static_rival", "foundations/moe_layer"]
TEXTS = {
    "int": ["-1", "0", "1", "2", "3", "4096", str(2**63), str(10**20), "0.3", "x"],
    "float": ["-1", "0", "0.3", "0.5", "0.001", "1", "1e300", "1e-300", "nan", "inf", "x"],
    "bool": ["true", "false", "1"],
    "str": ["x", "", "../../x", "<b>", "mnist5k", "photos [1]", "forestnet", "cpu", "cuda"],
}


def test_any_parameters(capsys):
    counts: Counter = Counter()

    @settings(FIXED, max_examples=100)
    @given(st.data())
    def any_parameters(data):
        page = data.draw(st.sampled_from(PAGES))
        known = parameters.parameters(page)
        names = st.sampled_from(sorted(set(known) - {"profile"}))
        text = {}
        for name in data.draw(st.lists(names, min_size=1, max_size=2, unique=True)):
            kind = known[name].annotation
            one = st.sampled_from(TEXTS[kind.removeprefix("list[").removesuffix("]")])
            several = (
                st.lists(one, min_size=1, max_size=3) if "list" in kind else one.map(lambda v: [v])
            )
            text[name] = ",".join(data.draw(several))
        try:
            runs = profiles.plan(page, "smoke", **parameters.from_text(page, text))
        except parameters.NotebookError as error:
            said = str(error)
            assert any(f"{name}=" in said for name in text) and "\n" not in said
            counts["refused"] += 1
        else:
            assert all(isinstance(run, RunSpec) for group in runs.values() for run in group)
            counts["planned"] += 1

    any_parameters()
    with capsys.disabled():
        print(f"\nsets of parameters: {dict(counts)}")
    assert min(counts["planned"], counts["refused"]) > 15
