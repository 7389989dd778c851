"""What a notebook says about itself: parameters, profiles, plans."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import papermill
import pytest

from lib.pages import parameters, profiles
from lib.pages.parameters import NotebookError
from lib.runs import collect as runs

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    p.relative_to(ROOT / "notebooks").as_posix().removesuffix(".ipynb")
    for p in (ROOT / "notebooks").glob("*/*.ipynb")
)


@pytest.fixture
def book(tiny, monkeypatch):
    """The tiny book, seen by this process."""
    for module in (parameters, profiles):
        monkeypatch.setattr(module, "ROOT", tiny.root)
    monkeypatch.setattr(profiles, "asked", {})
    return tiny


def test_import_is_light_and_silent():
    code = (
        "import sys, lib; print('pydantic' in sys.modules); "
        "import lib.pages.profiles, lib.pages.manifest, lib.pages.build, lib.__main__; "
        f"lib.profile('{SOURCES[0]}', 'smoke'), lib.plan('{SOURCES[0]}', 'smoke'); "
        "print({'torch', 'numpy', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.stdout, done.stderr) == ("False\nset()\n", "")


def test_parameters_read_as_papermill_reads_them(book):
    ours = parameters.parameters("a/one")
    theirs = papermill.inspect_notebook(book.root / "notebooks" / "a" / "one.ipynb")
    assert list(ours) == list(theirs) == ["profile", "width", "scale", "layers"]
    for name, parameter in ours.items():
        assert theirs[name]["inferred_type_name"] == parameter.annotation
        assert theirs[name]["help"] == parameter.help
    assert (ours["width"].default, ours["scale"].default) == (None, 1.0)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("seed: int = 0", "needs a trailing comment"),
        ("seed: int = 0  # usual: seed = 0", "more than one '='"),
        ("seed = 0  # a seed", "only lines like"),
        ("seed: int | None = None  # a seed", "is annotated 'int | None'"),
        ("seed: int = 'a'  # a seed", "seed='a' for a/one is not int"),
        ("notebook: str = 'a'  # a name", "'notebook' is taken"),
    ],
)
def test_bad_parameter_lines_are_refused(book, line, says):
    book.notebook("a/one", parameters=f'profile: str = "quick"  # which\n{line}\n')
    with pytest.raises(NotebookError) as error:
        parameters.parameters("a/one")
    assert says in str(error.value)


def test_profile_must_come_first(book):
    book.notebook("a/one", parameters="seed: int = 0  # a seed\n")
    with pytest.raises(NotebookError, match="first line must be"):
        parameters.parameters("a/one")


def test_profile_fills_and_given_wins(book):
    p = profiles.profile("a/one", "quick", width=None, scale=2)
    assert (p.profile, p.notebook, p.width, p.scale, p.layers) == ("quick", "a/one", 3, 2.0, (0, 1))
    assert isinstance(p.scale, float)
    assert profiles.profile("a/one", "quick", width=5).width == 5


def test_a_notebook_hands_over_its_own_namespace(book):
    space = {
        "profile": "small",
        "width": 5,
        "layers": None,
        "scale": 1.0,
        "other": object(),
        "p": None,
    }
    p = profiles.profile("a/one", space)
    assert (p.profile, p.width, p.layers, p.scale) == ("small", 5, (0, 1), 1.0)
    with pytest.raises(NotebookError, match="width='wide' for a/one is not int"):
        profiles.profile("a/one", space | {"width": "wide"})
    assert profiles.profile("a/one", space, width=7).width == 7


def test_specs_may_be_several_cells(book):
    path = book.notebook("a/one")
    content = json.loads(path.read_text())
    [at] = [
        i for i, cell in enumerate(content["cells"]) if "specs" in cell["metadata"].get("tags", ())
    ]
    first = content["cells"][at] | {
        "source": "from lib.spec import RunSpec\nSEEDS = (1, 2)",
        "id": "first",
    }
    content["cells"][at]["source"] = (
        "import lib\n\n\ndef grid(p):\n    return {'all': [RunSpec(seed=s) for s in SEEDS]}\n\n\n"
        "p = lib.profile('a/one', globals())"
    )
    content["cells"].insert(at, first)
    path.write_text(json.dumps(content))
    assert [run.seed for run in profiles.plan("a/one", "quick")["all"]] == [1, 2]


@pytest.mark.parametrize(
    ("value", "want"),
    [(8, (8,)), ("2,4", (2, 4)), ([2, 4], (2, 4)), ("8", (8,)), (["2", 4], (2, 4)), ([], ())],
)
def test_lists_may_be_given_as_text(book, value, want):
    assert profiles.profile("a/one", "quick", layers=value).layers == want


@pytest.mark.parametrize(
    "given",
    [
        {"width": "wide"},
        {"width": 1.5},
        {"width": True},
        {"scale": "2"},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"scale": False},
        {"layers": "2,x"},
        {"layers": "2,"},
        {"layers": [1.5]},
        {"layers": [True]},
        {"layers": [[1]]},
    ],
)
def test_ill_typed_values_are_refused(book, given):
    name, value = next(iter(given.items()))
    with pytest.raises(NotebookError) as error:
        profiles.profile("a/one", "quick", **given)
    assert f"{name}={value!r}" in str(error.value) and "is not" in str(error.value)


KINDS = """profile: str = "quick"  # which
n: int = 1  # a count
x: float = 1  # a number
on: bool = False  # a switch
names: list[str] = "a, b"  # some names
rates: list[float] = [1, 2.5]  # some rates
"""


def test_defaults_are_typed(book):
    book.notebook("a/one", parameters=KINDS)
    known = {name: parameter.default for name, parameter in parameters.parameters("a/one").items()}
    assert known["names"] == ("a", "b") and known["rates"] == (1.0, 2.5)
    assert [type(value) for value in (known["x"], known["rates"][0])] == [float, float]


def test_what_a_notebook_hands_over_unchanged_is_what_its_profile_has(book):
    """Lists of a parameters cell are tuples in its profile; the manifest must list them anyway."""
    book.notebook("a/one", parameters=KINDS)
    book.profile("quick", "a/one: {}")
    space: dict = {}
    exec(KINDS, space)
    profiles.profile("a/one", space)
    assert profiles.asked["a/one", "quick"]["rates"] == (1.0, 2.5)
    profiles.asked.clear()
    profiles.profile("a/one", space | {"rates": [1, 2]})  # given by hand: no page of the book
    assert not profiles.asked


@pytest.mark.parametrize(
    ("name", "text", "want"),
    [
        ("n", "8", 8),
        ("x", "8", 8.0),
        ("x", "1e-3", 1e-3),
        ("on", "true", True),
        ("on", "False", False),
        ("names", "a,b", ("a", "b")),
        ("names", "8", ("8",)),
        ("rates", ".5, 2", (0.5, 2.0)),
        ("profile", "8", "8"),
    ],
)
def test_text_is_read_as_the_annotation_says(book, name, text, want):
    book.notebook("a/one", parameters=KINDS)
    value = parameters.from_text("a/one", {name: text})[name]
    assert value == want and type(value) is type(want)


@pytest.mark.parametrize(
    ("name", "text"), [("n", "1.0"), ("n", "true"), ("x", "wide"), ("on", "yes"), ("on", "1")]
)
def test_text_of_another_kind_is_refused(book, name, text):
    book.notebook("a/one", parameters=KINDS)
    parameter = parameters.parameters("a/one")[name]
    with pytest.raises(NotebookError) as error:
        parameters.from_text("a/one", {name: text})
    kind, help_ = parameter.annotation, parameter.help
    assert str(error.value) == f"{name}={text!r} for a/one is not {kind}: {help_}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a/two: {}", "has no entry for 'a/one'; it has a/two"),
        (
            "a/one: {width: 3}",
            "layers of a/one is None and notebooks/profiles/quick.yaml does not set it",
        ),
        ("a/one: {width: x, layers: [1]}", "width='x' for a/one is not int"),
        ("a/one: {height: 3, layers: [1]}", "sets the unknown parameter 'height'"),
        ("a/one: {scale: 2.0}", "whose default is 1.0"),
        ("[1, 2]", "must map notebooks"),
    ],
)
def test_bad_profiles_are_refused(book, text, says):
    book.profile("quick", text)
    with pytest.raises(NotebookError) as error:
        profiles.profile("a/one", "quick")
    assert says in str(error.value)


def test_null_and_defaults_in_profiles(book):
    book.profile("quick", "defaults: {width: 4, scale: 9.0, other: 1}\na/one: {layers: null}")
    p = profiles.profile("a/one", "quick")
    assert (p.width, p.layers, p.scale) == (4, None, 1.0)  # defaults fill only what is None


def test_names_are_checked(book):
    with pytest.raises(
        NotebookError, match="unknown parameter 'expert' for a/one; it has profile: str; width: int"
    ):
        profiles.profile("a/one", "quick", expert=8)
    with pytest.raises(
        NotebookError, match="unknown profile 'fast'; valid: smoke, quick, small, paper"
    ):
        profiles.profile("a/one", "fast")
    with pytest.raises(NotebookError, match="no notebook 'a/three'"):
        profiles.profile("a/three", "quick")
    with pytest.raises(NotebookError, match="no notebook 'three'; there are: a/one, a/two"):
        parameters.key_of("three")
    p = profiles.profile("a/one", "quick")
    with pytest.raises(AttributeError, match="no parameter 'witdh'; it has"):
        _ = p.witdh
    with pytest.raises(AttributeError, match="read-only"):
        p.width = 4


def test_keys_by_name_and_path(book, monkeypatch):
    monkeypatch.chdir(book.root / "notebooks" / "a")
    for name in (
        "a/one",
        "notebooks/a/one.ipynb",
        "one.ipynb",
        book.root / "notebooks" / "a" / "one.ipynb",
    ):
        assert parameters.key_of(name) == "a/one"


def test_plan_runs_two_cells_only(book):
    book.notebook("a/one", "raise SystemExit('a plan must not come here')")
    plan = profiles.plan("a/one", "quick", layers=[5, 6, 7], scale=0.5)
    assert [spec.seed for spec in plan["runs"]] == [5, 6, 7]
    assert plan["runs"][0].train.epochs == 0.5


def test_what_was_planned_is_planned_anew_once_a_file_changed(book, monkeypatch):
    first = profiles.plan("a/one", "quick")
    first["runs"].clear()
    first["more"] = []
    with monkeypatch.context() as patch:
        patch.setattr(profiles, "_planned", None)  # asked again, it need not plan
        again = profiles.plan("a/one", "quick")
    assert [spec.seed for spec in again["runs"]] == [0, 1] and "more" not in again
    assert len(profiles.plan("a/one", "quick", layers=[4])["runs"]) == 1
    book.profile("quick", "a/one: {width: 3, layers: [7]}")
    assert [spec.seed for spec in profiles.plan("a/one", "quick")["runs"]] == [7]
    notebook = book.root / "notebooks" / "a" / "one.ipynb"
    notebook.write_text(notebook.read_text().replace('\\"runs\\"', '\\"renamed\\"'))
    assert list(profiles.plan("a/one", "quick")) == ["renamed"]


def test_plan_checks_its_notebook(book):
    book.notebook("a/two").write_text((book.root / "notebooks" / "a" / "one.ipynb").read_text())
    with pytest.raises(NotebookError, match="asks lib.profile for 'a/one'; write 'a/two'"):
        profiles.plan("a/two", "quick")


def test_values_that_a_spec_refuses_are_refused_in_one_sentence(book):
    with pytest.raises(NotebookError) as error:
        profiles.plan("a/one", "quick", scale=-2.0)
    assert str(error.value) == (
        "a/one has no runs for scale=-2.0: epochs=-2.0: it should be greater than 0. "
        "Its quick profile has scale=1.0 (factor on the result, 0.5-2)"
    )
    book.profile("quick", "a/one: {width: 3, layers: [-1]}")
    with pytest.raises(ValueError, match="seed"):  # what no one gave is the page's own fault
        profiles.plan("a/one", "quick")


@pytest.mark.parametrize(
    ("key", "given", "says"),
    [
        (
            "moee/routing",
            {"level": 0.3},
            "moee/static_rival plans no runs called 'MoEfication, 30%' in its smoke profile; "
            "near it are 'MoEfication, 50%'",
        ),
        ("expert_pruning/scores", {"share": 0.3}, "near it are 'router_norm_change, 50%, zero upd"),
        ("leiden/masks", {"table": "roads"}, "near it are 'forestnet: moe, 0% pruned'"),
        ("leiden/why", {"controls_of": "roads"}, "near it are 'forestnet: dense, 0% pruned'"),
        ("leiden/why", {"passing_of": "pv4"}, "plans no runs called 'pv4: dense, 0% pruned'"),
        ("durham/strategies", {"decoder": [32, 2]}, "width, depth and heads of the pretraining de"),
        ("durham/strategies", {"decoder": [9]}, "they are not of the form that the page reads"),
        ("durham/strategies", {"decoder": [33, 2, 4]}, "width=33 must be a multiple of heads=4"),
    ],
)
def test_values_outside_the_grid_of_the_page_that_is_read(key, given, says):
    [(name, value)] = given.items()
    with pytest.raises(NotebookError) as error:
        profiles.plan(key, "smoke", **given)
    value = tuple(value) if isinstance(value, list) else value
    said = str(error.value)
    assert said.startswith(f"{key} has no runs for {name}={value!r}: ") and says in said
    assert f"Its smoke profile has {name}=" in said


def test_a_plan_names_runs_that_are_near(book):
    planned = profiles.plan("a/one", "quick")
    with pytest.raises(KeyError) as error:
        planned["run"]
    said = "a/one plans no runs called 'run' in its quick profile; near it are 'runs'"
    assert str(error.value) == said and isinstance(error.value, NotebookError)
    assert planned.get("run") is None and "run" not in planned


@pytest.mark.parametrize("key", SOURCES)
def test_real_notebooks(key):
    """No outputs, no long cell, parameters that papermill explains, a plan under each profile."""
    content = json.loads(parameters.source(key).read_text())
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in content["cells"])
    lengths = [
        len("".join(cell["source"]).splitlines())
        for cell in content["cells"]
        if cell["cell_type"] == "code"
    ]
    assert max(lengths) <= 30, "logic of more than 30 lines belongs in lib"
    code = [
        line for cell in content["cells"] if cell["cell_type"] == "code" for line in cell["source"]
    ]
    assert sum(map(bool, map(str.strip, code))) <= 240, (
        "methods and tables of any page belong in lib"
    )
    shown = papermill.inspect_notebook(parameters.source(key))
    assert list(shown) == list(parameters.parameters(key))
    assert all(entry["help"] and entry["inferred_type_name"] != "None" for entry in shown.values())
    for name in ("smoke", "quick", "small", "paper"):
        assert isinstance(profiles.plan(key, name), dict)


@pytest.mark.parametrize("name", ["small", "paper"])  # the other two are run as a whole
@pytest.mark.parametrize("key", SOURCES)
def test_runs_of_the_long_profiles_can_be_built(key, name):
    """A patch that does not divide the image must not wait for the hour of its run."""
    for group in profiles.plan(key, name).values():
        runs.check(group[0])


TAKES_MODEL = [key for key in SOURCES if "lib.model_of(" in parameters.source(key).read_text()]


@pytest.mark.parametrize("key", TAKES_MODEL)
def test_a_page_that_takes_a_model_asks_for_its_weights(key):
    """A run that leaves none is computed a second time for them."""
    (group,) = profiles.plan(key, "quick").values()
    assert all(spec.keep for spec in group)


def test_the_quick_book_trains_one_dense_model():
    """Each further one takes a minute of the default build; Durham's studies begin from scratch."""
    plans = [profiles.plan(key, "quick") for key in SOURCES if not key.startswith("durham/")]
    specs = [spec for plan in plans for group in plan.values() for spec in group]
    trained = [spec for spec in {*specs, *(s.init for s in specs)} if spec and spec.train]
    longest = max(spec.train.epochs for spec in trained)
    assert len({spec.id for spec in trained if spec.train.epochs > longest / 2}) == 1


@pytest.mark.parametrize("name", ["smoke", "quick", "small", "paper"])
@pytest.mark.parametrize(
    "key, others",
    [
        ("durham/decomposition", ["durham/strategies"]),
        ("leiden/entropy", ["leiden/tables"]),
        ("leiden/masks", ["leiden/tables"]),
        ("moee/experts", ["moee/extraction"]),
        ("moee/routing", ["moee/extraction", "moee/static_rival"]),
    ],
)
def test_pages_without_runs_of_their_own_read_those_of_others(key, others, name):
    def ids(*keys, **change):
        plans = (profiles.plan(key, name) for key in keys)
        specs = [spec for planned in plans for group in planned.values() for spec in group]
        return {spec.but(**change).id for spec in specs if change or spec.seed in first}

    # a second stage of seeds, which its own claims ask for, may be its own
    first = getattr(profiles.profile(key, name), "seeds", range(100))
    assert ids(key) and ids(key) <= ids(*others)
    assert ids(key, seed=0) <= ids(*others, seed=0)


@pytest.mark.parametrize("key", SOURCES)
def test_a_device_moves_all_runs_of_a_page_and_those_they_start_from(key):
    def devices(spec):
        return {spec.device} | (devices(spec.init) if spec.init is not None else set())

    if any(profiles.plan(key, "small").values()):
        for device in ("cuda", "cpu"):
            planned = profiles.plan(key, "small", device=device).values()
            assert {d for specs in planned for spec in specs for d in devices(spec)} == {device}


@pytest.mark.parametrize("key", SOURCES)
def test_a_model_and_data_given_by_hand_are_those_of_all_runs_of_a_page(key):
    """Also where a page reads the runs of another."""
    known = parameters.parameters(key).keys()
    given = {"backbone": "deit_tiny_patch16_224", "weights": "timm", "data": "rooms"}
    taken = {name: value for name, value in given.items() if name in known}
    if "backbone" not in taken:
        assert not taken.keys() - {"weights"}  # some pages only name a file that they show
        return
    planned = profiles.plan(key, "quick", **taken)
    runs = [run for specs in planned.values() for spec in specs for run in spec.lineage]
    assert {run.backbone.name for run in runs} == {given["backbone"]}
    assert "timm" in {run.backbone.weights for run in runs} <= {"timm", None}  # a control is random
    assert "data" not in taken or {run.data.name for run in runs} == {"rooms"}


BASE = {
    "data": {"name": "mnist5k", "image_size": 28},
    "backbone": {"patch": 7, "width": 16, "heads": 2},
    "train": {"epochs": 1.0, "lr": 0.001},
    "init": {"train": {"epochs": 5.0}},
}


@pytest.fixture
def based(monkeypatch):
    """A notebook with parameters that change the base run, and one that only shares such a name."""
    lines = (
        ("profile", "str", "quick"),
        ("epochs", "float", None),
        ("data", "str", None),
        ("weights", "str", None),
        ("backbone", "str", None),
        ("image_size", "int", 224),
    )
    known = {
        name: parameters.Parameter(name, annotation, default, "help")
        for name, annotation, default in lines
    }
    monkeypatch.setattr(profiles, "parameters", lambda key: known)
    table = {
        "base": BASE,
        "base/own": BASE | {"study": "own"},
        "base/own/four": BASE | {"study": "four"},
        "a/one": {},
        "own/two": {},
        "own/four": {},
        "a/three": {"epochs": 3.0},
    }
    monkeypatch.setattr(profiles, "profile_table", lambda name: table)


def test_base_is_the_profiles_run_with_the_parameters_in_it(based):
    p = profiles.profile("a/one", "quick")
    assert p.base.train.epochs == p.epochs == 1.0
    assert p.base.data.image_size == 28 and p.image_size == 224
    assert p.base.init.train.epochs == 5.0 and p.base.init.train.lr == 0.001
    assert p.base.init.backbone == p.base.backbone
    longer = profiles.profile("a/one", "quick", epochs=2.0, image_size=224)
    assert longer.base.train.epochs == 2.0 and longer.base.init.train.epochs == 5.0
    assert longer.base.data.image_size == 28
    assert profiles.profile("a/three", "quick").base.train.epochs == 3.0
    assert profiles.profile("own/two", "quick").base.study == "own"
    assert profiles.profile("own/four", "quick").base.study == "four"


def test_records_are_filed_under_the_folder_of_their_notebook(based):
    assert profiles.profile("a/one", "quick").base.study == "a"
    assert profiles.profile("a/one", "quick").base.init.study == "a"
    assert profiles.profile("own/two", "quick").base.study == "own"  # the YAML names it


def test_another_backbone_starts_from_its_own_weights(based):
    base = profiles.profile("a/one", "quick", weights="w", backbone="vit_b").base_fields
    assert base["backbone"] == {"name": "vit_b", "weights": "w"} and "init" not in base


def test_another_backbone_forgets_sizes_and_parent_another_data_set_keeps_them(based):
    other = profiles.profile("a/one", "quick", backbone="vit_small_patch16_224").base
    assert other.backbone.name == "vit_small_patch16_224"
    assert other.init is None and other.backbone.width is None
    moved = profiles.profile("a/one", "quick", data="eurosat").base
    assert moved.data.name == moved.init.data.name == "eurosat" and moved.init.backbone.width == 16


def test_defaults_given_by_the_notebook_leave_the_manifest_alone(based):
    profiles.asked.clear()
    profiles.profile("a/one", "quick", image_size=224)
    by_hand = profiles.asked["a/one", "quick"]
    profiles.profile("a/one", "quick")
    assert profiles.asked["a/one", "quick"] == by_hand
