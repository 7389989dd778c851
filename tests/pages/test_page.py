"""The page contract: two sides, and what every page says in the same way."""

from __future__ import annotations

import factory
import pandas as pd
import pytest

from lib import paths
from lib.pages import all_verdicts, parameters, profiles
from lib.pages import page as pages
from lib.report import NOT_YET, SPEED, tables
from lib.report.style import Shown
from lib.spec import TITLES
from lib.verdicts.evidence import compare, judge_count, judge_values

PARAMETERS = """profile: str = "quick"  # smoke, quick, small or paper
seeds: list[int] = None  # random starts
"""
BASE = "base: {data: {name: %s}, backbone: {patch: 7, width: 16, depth: 2, heads: 2}}\n"
LEDGER = """paper: {short: Doc, title: A document}
claims:
  - id: A1
    statement: MoE beats dense.
    source: Table 1
    direction: greater
    published: 2.5
    page: a/one
    arms: [moe, dense]
  - id: A.wide
    kind: ours
    statement: wide beats dense
    source: a control
    direction: greater
    smallest: 1
    page: a/one
    arms: [wide, dense]
"""
COUNTED = """
  - {id: A.number, kind: ours, statement: A number., source: a control, direction: greater,
     smallest: 1, statistic: a number, page: a/one, arms: [moe]}
  - {id: A.count, kind: ours, statement: A count., source: a control, direction: greater,
     smallest: 1, statistic: a count, page: a/one, arms: [moe], seeds: 1}
"""


@pytest.fixture
def book(tiny, monkeypatch):
    """The tiny book, whose page `a/one` has three seeds in its small profile and one in quick."""
    for module in (parameters, profiles):
        monkeypatch.setattr(module, "ROOT", tiny.root)
    monkeypatch.setattr(profiles, "asked", {})
    monkeypatch.setattr(paths, "PAPERS", tiny.root / "data" / "papers")
    tiny.ledger("a", LEDGER)
    tiny.notebook("a/one", parameters=PARAMETERS)
    tiny.profile("quick", BASE % "mnist5k" + "a/one: {seeds: [0]}\n")
    tiny.profile("small", BASE % "mnist5k" + "a/one: {seeds: [0, 1, 2]}\n")
    return tiny


@pytest.fixture
def records(monkeypatch):
    """The records that there are, by the id of their run; what a build lacks is invented."""
    by_id: dict[str, object] = {}

    def load(grid, any_device=False):
        return {name: [by_id.get(spec.id) for spec in specs] for name, specs in grid.items()}

    def collect(grid):
        for spec in [spec for specs in grid.values() for spec in specs]:
            by_id.setdefault(spec.id, record_of(spec))
        return load(grid)

    monkeypatch.setattr(pages, "load", load)
    monkeypatch.setattr(pages, "collect", collect)
    return by_id


def record_of(spec, status="ok"):
    """A record of a run, an MoE one 10 points better than a dense one."""
    return factory.record(
        spec.seed, spec=spec, top1=80.0 if spec.moe else 70.0, epochs=1, probes=1, status=status
    )


def grid(p):
    runs = {
        "dense": [p.base.but(seed=seed) for seed in p.seeds],
        "moe": [p.base.but(seed=seed, moe={"layers": 1, "experts": 2}) for seed in p.seeds],
    }
    if p.profile == "small":
        runs["wide"] = [p.base.but(seed=0, backbone={"width": 32})]
    return runs


def reproduce(records, names=("dense", "moe", "wide"), seeds=None) -> None:
    """Puts records of the small profile there. seeds: how many of each; None = all."""
    planned = grid(profiles.profile("a/one", "small"))
    records |= {spec.id: record_of(spec) for name in names for spec in planned[name][:seeds]}


def page_of(name="quick", **options):
    return pages.page(grid, profiles.profile("a/one", name), **options)


def claims(side):
    yield compare("A1", side["moe"], side["dense"])
    yield compare("A.wide", side.done("wide"), side["dense"])


# ---- sides


def test_two_sides_of_one_grid_the_second_is_computed(book, records):
    page = page_of()
    reproduced, build = page.sides
    assert (reproduced, build) == (page.reproduced, page.build)
    assert [side.name for side in page.sides] == ["Reproduced", "This build"]
    assert [side.label for side in page.sides] == ["reproduced", "this build"]
    assert [side.p.profile for side in page.sides] == ["small", "quick"]
    assert list(reproduced) == ["dense", "moe", "wide"] and len(build) == 2
    # seed 0 of both is also a run of this build, so only it is there
    assert [record and record.spec.seed for record in reproduced["dense"]] == [0, None, None]
    assert [record.spec.seed for record in build["dense"]] == [0]


def test_a_build_of_the_small_profile_is_what_is_reproduced(book, records):
    page = page_of("small")  # what it lacks is computed before what is reproduced is read
    assert page.gaps() == "" and page.reproduced.records == page.build.records


def test_a_name_that_is_not_planned_is_an_error_that_lists_those_that_are(book, records):
    build = page_of().build
    with pytest.raises(KeyError) as error:
        build["wide"]
    said = "a/one plans no runs called 'wide' in its quick profile; it plans 'dense', 'moe'"
    assert error.value.args == (said,)
    assert "wide" not in build and "moe" in build
    assert build.get("wide") is None and build.done("wide") == [] and build.accuracy("wide") is None
    nothing = pages.Side("This build", build.p, {})
    with pytest.raises(KeyError, match="it plans none"):
        nothing["dense"]


def test_done_and_accuracy_count_finished_records_only(book, records):
    reproduce(records, ["dense"])
    spec = grid(profiles.profile("a/one", "small"))["dense"][2]
    records[spec.id] = record_of(spec, status="failed")
    side = page_of().reproduced
    assert [record.spec.seed for record in side.done("dense")] == [0, 1]
    assert side.validation("dense") == side.done("dense")[0].val["top1"]
    assert side.validation("wide") is None and side.validation("unplanned") is None
    accuracy = side.accuracy("dense")
    assert accuracy.n == 2 and accuracy.low is None
    tops = [record.test["top1"] for record in side.done("dense")]
    assert accuracy.mean == pytest.approx(sum(tops) / 2)
    assert side.accuracy("wide") is None


def test_starts_are_the_finished_runs_that_others_start_from(book, records):
    side = page_of().reproduced
    [first] = side.done("dense")[:1]
    children = [first.spec.but(init=first.spec, seed=seed) for seed in (5, 6)]
    lost = first.spec.but(init=first.spec.but(seed=9), seed=7)  # of its parent there is no record
    done = [record_of(child) for child in (*children, lost)]
    side = pages.Side("Reproduced", side.p, {"child": [*done, None], "dense": [first]})
    assert side.starts("child") == [first]
    assert side.starts("dense") == side.starts("unplanned") == []


def test_gaps_name_what_is_absent_among_what_is_shown(book, records):
    page = page_of()  # of 7 reproduced records, seed 0 of dense and moe is there
    assert page.gaps() == f" 5 of 7 records are {NOT_YET}."
    assert page.gaps(["dense", "unplanned"]) == page.reproduced.gaps(["dense"])
    assert page.gaps(["dense"]).startswith(" 2 of 3 records are not computed yet")
    assert page.gaps(lambda name: name != "dense").startswith(" 3 of 4 records are")
    assert page.gaps([]) == page.build.gaps() == ""
    reproduce(records, ["wide"])
    assert page_of().gaps(["wide"]) == ""


def test_a_caption_ends_with_the_gaps_of_its_figure(book, records, monkeypatch):
    shown = []
    monkeypatch.setattr(pages, "show", lambda *given: shown.append(given))
    page = page_of()
    page.show("figure", "Both.", "alt", ["wide"])
    page.reproduced.show("figure", "Reproduced.", "alt", ["moe"])
    page.build.show("figure", "This build.", "alt")
    assert shown == [
        ("figure", f"Both.{page.gaps(['wide'])}", "alt"),
        ("figure", f"Reproduced.{page.gaps(['moe'])}", "alt"),
        ("figure", "This build.", "alt"),
    ]
    assert " 1 record is not computed yet" in shown[0][1]


def test_a_side_without_records_leads_to_the_status_page(book, records):
    page = page_of()
    assert page.reproduced.not_yet == f"Reproduced: {NOT_YET}."
    assert page.build.not_yet == f"This build: {NOT_YET}."


# ---- what every page says


def test_intro_says_what_both_sides_were_computed_on(book, records):
    said = page_of().intro("And more.", "Still more.").data
    small, quick = (profiles.profile("a/one", name).base.describe() for name in ("small", "quick"))
    ours, fold = said.split("\n\n", 1)
    assert ours == f"**Reproduced:** {small}. And more. Still more."
    assert fold.startswith("<details><summary>What this build ran on</summary>\n\n**This build:** ")
    assert f"{quick}. It shows that the page runs; its numbers" in fold
    short = page_of().intro(describe=lambda p: f"{len(p.seeds)} seeds").data
    assert short.startswith("**Reproduced:** 3 seeds.\n\n<details>")
    assert "**This build:** 1 seeds. It" in short


@pytest.fixture
def planned(monkeypatch):
    """The plan of the tiny page is the grid of this file, as its notebook's would be."""
    monkeypatch.setattr(
        pages, "plan", lambda key, name: {**grid(profiles.profile(key, name)), "third": []}
    )


def test_an_answer_of_one_seed_has_no_interval(book, records, planned):
    reproduce(records, ["dense", "moe"], seeds=1)
    assert "**How sure.** 1 seed; " in (said := page_of().answer(claims).data)
    assert "; no interval below 3 seeds. On" in said


def test_the_answer_is_on_reproduced_records_and_all_verdicts_read_it(book, records, planned):
    reproduce(records, ["dense", "moe"])
    answer = page_of().answer(claims)
    assert answer.data.startswith('<div class="answer">\n\n**Answer.**')
    assert "- ✔ *Holds (pilot):* MoE beats dense (A1): paper +2.5 points, ours +" in answer.data
    sure = "**How sure.** 3 seeds; 1 claim with more seeds to come; 95% intervals over seeds"
    assert f"{sure} and test images. On" in answer.data
    assert "- *Further claims*, below: 1 (not tested: 1)." in answer.data
    data, metadata = answer._repr_markdown_()
    cell = {
        "cell_type": "code",
        "outputs": [{"data": {"text/markdown": data}, "metadata": {"text/markdown": metadata}}],
    }
    said = all_verdicts.answered([{"cell_type": "markdown"}, cell])
    assert [(claim["id"], claim["verdict"], claim["n"]) for claim in said] == [
        ("A1", "holds", 3),
        ("A.wide", "not tested", 0),
    ]


def test_how_sure_leaves_out_what_is_counted_and_says_what_intervals_vary_over(
    book, records, planned
):
    reproduce(records)
    book.ledger("a", LEDGER + COUNTED)

    def every(side):
        yield from claims(side)
        yield judge_values("A.number", side["moe"], lambda record: record.test["top1"])
        yield judge_count("A.count", 1.0, side["moe"])

    page = page_of()
    verdict_on = {v.id: v for v in page.judged(every, page.reproduced)}

    def sure(*ids):
        return page.sure([verdict_on[name] for name in ids])

    assert verdict_on["A.count"].n == 1
    assert sure("A1", "A.count").startswith("3 seeds; 1 claim with more seeds to come; 95% inter")
    assert "95% intervals over seeds and test images." in sure("A1", "A.count")
    assert "95% intervals over seeds." in sure("A.number")
    assert "over seeds, some over test images as well." in sure("A1", "A.number")
    assert sure("A.count") == ""


def test_how_sure_takes_the_scale_that_the_ledger_states(book, records, planned):
    book.profile("paper", BASE % "cifar100" + "a/one: {seeds: [0]}\n")
    reproduce(records)
    book.ledger(
        "a", LEDGER.replace("    published: 2.5\n", "    published: 2.5\n    scale: 9 images\n")
    )
    said = page_of().answer(claims).data
    assert "The document's own scale: 9 images." in said and "CIFAR" not in said


def test_how_sure_names_the_data_that_the_document_has_for_the_claims(book, records, planned):
    book.profile("paper", BASE % "cifar100" + "a/one: {seeds: [0]}\n")
    reproduce(records)
    base = pages.page(grid, profiles.profile("a/one", "quick")).answer(claims).data
    assert "The profile `paper` has CIFAR-100 (all training images) at 28 px, vit" in base

    def of_digits(p):  # the arms of a claim may have data of their own
        runs = grid(p)
        if p.profile == "paper":
            digits = {"name": "mnist5k", "image_size": 14}
            runs["moe"] = [run.but(data=digits) for run in runs["moe"]]
        return runs

    page = pages.page(of_digits, profiles.profile("a/one", "quick"))
    every, model = "(all training images)", "vit_tiny_patch16_224"
    digits = f"MNIST (5,000 images) {every} at 14 px, {model}."
    assert f"has CIFAR-100 {every} at 28 px, {model}; {digits}" in page.answer(claims).data


def test_data_of_one_size_and_model_are_listed_together():
    base = profiles.profile("vimoe/layer_scan", "small").base
    images_of = {"cifar100": 5000, "eurosat": 2000, "imagenet": None}
    runs = [base.but(data={"name": name, "train": n}) for name, n in images_of.items()]
    first, rest = "CIFAR-100 (5,000 training images)", "EuroSAT (2,000 training images)"
    assert pages._scales(runs).startswith(f"{first}, {rest} and ImageNet (all training images) at ")
    assert pages._scales(runs[:2]).startswith(f"{first} and {rest} at ")
    whole = [run.but(data={"train": None}) for run in runs]
    said = "CIFAR-100, EuroSAT and ImageNet (all training images) at "
    assert pages._scales(whole).startswith(said)
    assert pages._scales([*runs[:1], *whole[:1]]).startswith(f"{first} and CIFAR-100 (all ")
    assert pages._scales(runs[:1]).startswith(f"{first} at ") and pages._scales([]) == ""


def test_verdicts_of_both_sides_are_headed_by_their_source(book, records, planned):
    reproduce(records)
    table = page_of().verdicts(claims)
    assert table.frame[["source", "claim", "published", "verdict"]].values.tolist() == [
        ["reproduced", "MoE beats dense.", "+2.5 points", "holds (pilot)"],
        ["reproduced", "wide beats dense", "smallest that counts: 1 point", "undecided (pilot)"],
        ["this build", "MoE beats dense.", "+2.5 points", "undecided (pilot)"],
        ["this build", "wide beats dense", "smallest that counts: 1 point", "not tested"],
    ]
    assert page_of().verdicts(claims, "By hand.").caption == "By hand."


def test_a_page_judges_what_the_ledger_gives_to_it_and_nothing_else(book, records, planned):
    reproduce(records)
    page = page_of()
    with pytest.raises(ValueError, match="a/one yields no evidence of claim A.wide, which the"):
        page.answer(lambda side: list(claims(side))[:1])
    with pytest.raises(ValueError, match="claim A3 is not one of this page in the ledger"):
        page.answer(lambda side: [*claims(side), judge_count("A3", 1.0)])
    # a small build may lack an arm, so what it leaves out is no error
    assert page.judged(lambda side: [], page.build) == []


def test_a_page_judges_the_runs_that_the_ledger_names(book, records, planned):
    reproduce(records)

    def other_runs(side):
        yield compare("A1", side["moe"], side.done("wide"))
        yield compare("A.wide", side.done("wide"), side["dense"])

    with pytest.raises(ValueError) as error:
        page_of().answer(other_runs)
    assert "claim A1 is judged on runs that its `arms`" in str(error.value)
    assert "they are of 'wide' of a/one; the ledger has 'moe', 'dense'" in str(error.value)


def test_a_second_stage_gives_further_seeds_to_the_arms_of_its_claim(book, records):
    book.ledger(
        "a",
        LEDGER.replace(
            "page: a/one\n    arms: [moe", "page: a/one\n    seeds: [3, 5]\n    arms: [moe"
        ),
    )
    small = profiles.profile("a/one", "small")

    def seeds(p):
        wanted = profiles.with_further_seeds("a/one", grid, p)
        return {name: [run.seed for run in runs] for name, runs in wanted.items()}

    assert seeds(small) == {"dense": [0, 1, 2, 3, 4], "moe": [0, 1, 2, 3, 4], "wide": [0]}
    assert seeds(profiles.profile("a/one", "quick"))["moe"] == [0]
    # whoever chooses seeds gets these
    assert seeds(profiles.profile("a/one", "small", seeds=(1, 2)))["moe"] == [1, 2]

    # runs that come from another page, where a claim wants more of them
    def borrowed(p):
        return grid(p) | {"dense": [p.base.but(seed=seed) for seed in range(7)]}

    wanted = profiles.with_further_seeds("a/one", borrowed, small)
    assert (len(wanted["dense"]), len(wanted["moe"])) == (7, 5)
    assert [record and record.spec.seed for record in page_of().reproduced["moe"]] == [0] + [
        None
    ] * 4


def test_a_table_sets_both_sides_beside_what_was_published(book, records):
    reproduce(records, ["dense"])
    page, names = page_of(), ["dense", "wide", "unplanned"]

    def ours(side):
        return {"top-1 (%)": [side.accuracy(name) for name in names]}

    settings, published = pd.DataFrame({"model": names}), {"top-1 (%)": [91.3, None, 90.0]}
    table = page.table(settings, published, ours, names, caption="Accuracy.")
    assert list(table.frame.columns) == [
        ("setting", "model"),
        ("published", "top-1 (%)"),
        ("reproduced", "top-1 (%)"),
        ("this build", "top-1 (%)"),
    ]
    assert table.caption == "Accuracy."
    dense, wide, unplanned = table.frame.values.tolist()
    assert dense[1] == "91.3" and "n=3" in dense[2] and "n=1" in dense[3]
    # an empty cell is marked where a record is absent, and is blank where none is planned
    assert wide[1:] == ["", tables.MISSING, ""] and unplanned[1:] == ["90.0", "", ""]
    assert table.notes[-1] == f"{tables.MISSING} {NOT_YET}"
    no_value = page.table(settings, published, lambda side: {"top-1 (%)": [None] * 3}, names)
    assert no_value.frame.values.tolist()[0][2] == ""  # the records of `dense` are all there
    last = grid(profiles.profile("a/one", "small"))["dense"][-1]
    del records[last.id]  # a further seed would not bring a number that the others lack
    fewer = page_of().table(settings, published, lambda side: {"top-1 (%)": [None] * 3}, names)
    assert fewer.frame.values.tolist()[0][2] == ""
    without_keys = page.table(settings, published, ours).frame.values.tolist()
    assert without_keys[2][1:] == ["90.0", tables.MISSING, ""]


def test_rows_of_both_sides_stand_under_each_other(book, records):
    frame = page_of().rows(lambda side: [{"name": name} for name in side])
    assert frame.to_dict("list") == {
        "source": ["reproduced"] * 3 + ["this build"] * 2,
        "name": ["dense", "moe", "wide", "dense", "moe"],
    }


def test_costs_of_both_sides_beside_the_dense_ones(book, records):
    reproduce(records, ["dense", "wide"])
    page = page_of()
    table = page.costs("dense")
    assert table.frame[["source", "model"]].values.tolist() == [
        ["reproduced", "dense"],
        ["reproduced", "moe"],  # seed 0, which this build has computed
        ["reproduced", "wide"],
        ["this build", "dense"],
        ["this build", "moe"],
    ]
    assert set(table.frame["MACs (% of dense)"]) == {"100.0"}  # all records cost the same
    assert not [column for column in table.frame if "/s" in column]
    assert f"timed alone, by device, number format and batch: see {SPEED}." in table.caption
    assert table.caption.endswith(page.gaps()) and "2 of 7 records are" in table.caption

    some = page.costs(keys=["wide"])
    assert some.frame["model"].tolist() == ["wide"]
    assert "MACs (% of dense)" not in some.frame and "not computed yet" not in some.caption


@pytest.fixture
def standing_in(monkeypatch):
    """The data of the tiny page stand in for another set."""
    monkeypatch.setattr(pages.datasets, "stand_ins", lambda study: {"mnist5k": "m-forest"})
    return f"{TITLES['mnist5k']}, standing in for m-forest"


def test_stand_ins_are_named_in_claim_header_and_caption(
    book, records, planned, monkeypatch, standing_in
):
    shown = []
    monkeypatch.setattr(pages, "show", lambda *given: shown.append(given[1]))
    reproduce(records)
    page = page_of()
    assert f"MoE beats dense ({standing_in}) (A1): paper" in page.answer(claims).data
    said = page.verdicts(claims).frame["claim"].tolist()
    assert said[0] == f"MoE beats dense ({standing_in})."
    assert said[2] == "MoE beats dense."  # of this build: it is on nobody's data
    names = ["dense"]
    table = page.table(
        pd.DataFrame({"model": names}), {}, lambda side: {"a": [side.accuracy("dense")]}, names
    )
    assert ("reproduced on " + standing_in, "a") in table.frame.columns
    assert f" Reproduced on {standing_in}." in page.costs().caption
    page.show("figure", "Both.", "alt", ["dense"])
    page.show("figure", f"Both; {standing_in}.", "alt", ["dense"])  # which names it itself
    page.build.show("figure", "This build.", "alt")
    assert shown == [
        f"Both. Reproduced on {standing_in}.",
        f"Both; {standing_in}.",
        "This build.",
    ]
    assert page.reads("More.").data == f"More. Reproduced on {standing_in}."
    assert page.called("mnist5k") == standing_in and page.called("eurosat") == "EuroSAT"


def test_each_side_is_drawn_the_reproduced_one_first(book, records, monkeypatch):
    displayed = []
    monkeypatch.setattr(pages, "display", displayed.append)
    page = page_of()
    assert page.each(lambda side: side.label) is None
    page.each(lambda side: side.name if "wide" not in side else None)  # None is skipped
    assert displayed == ["reproduced", "this build", "This build"]


def test_what_is_of_this_build_is_folded_below_what_was_reproduced(book, records, monkeypatch):
    displayed = []
    monkeypatch.setattr(pages, "display", displayed.append)
    page = page_of()
    page.each(lambda side: Shown(f"<b>{side.label}</b>", side.name))
    first, second = displayed
    assert first.html == "<b>reproduced</b>" and repr(second) == "This build"
    assert second.html == "<details><summary>this build</summary><b>this build</b></details>"
    # nothing was reproduced that it could be taken for
    page.each(lambda side: None if side is page.reproduced else Shown("<b>alone</b>", ""))
    assert displayed[2].html == "<b>alone</b>"
