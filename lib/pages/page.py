"""A page of the book: its two sides, and what every page says in the same way.

    p = lib.profile("vimoe/convergence", globals())
    page = lib.page(grid, p)
    page.intro()
    page.answer(claims)

A page has two sides with the same names of runs: what was **reproduced** (the committed records of
the `small` profile, only read) and **this build** (whatever the profile of the build asks for,
computed where it is missing). A function of a notebook takes one side and is called with both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd
from IPython.display import Markdown, display

from ..report import NOT_YET, SPEED, tables, text
from ..report.style import Shown, show
from ..runs.collect import Grid, collect, load
from ..verdicts import ledger, listed
from ..verdicts.claims import Verdict
from ..verdicts.costs import cost_rows
from ..verdicts.evidence import Evidence, verdicts_on
from ..verdicts.stats import MIN_SEEDS, Interval, accuracy_interval, finished, sources_of_chance
from . import answers, datasets, dense_models
from .parameters import UnknownRuns
from .profiles import PUBLISHED, Profile, has_profile, plan, profile, with_further_seeds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..runs.store import Record
    from ..spec import RunSpec

# what the numbers of a build are worth, wherever they are shown
BUILD = (
    "It shows that the page runs; its numbers, of few images and a small model, are no evidence."
)

# why one backbone has several accuracies on one data set
DENSE_MODELS = (
    "Other pages train their models in other ways: see "
    f'<a href="../../{dense_models.TABLE}">the dense models of this book</a>.'
)
SCALES = 3  # kinds of data and model that the head of a page names

Claims = Callable[["Side"], Iterable[Evidence]]
# names of the runs that are shown, or a condition on them; None = all
Keys = Iterable[str] | Callable[[str], bool] | None


class Side(Mapping):
    """Holds one side of a page: parameters `p`, and the records of each name of runs, or None.

    name: "Reproduced" or "This build", as sentences and captions begin. planned: how
    many runs the page itself plans of each name; beyond them are further seeds of claims, whose
    absence is no gap. None = all. stand_ins: what to call the data of each name of runs whose data
    stand in for the document's.
    """

    def __init__(
        self,
        name: str,
        p: Profile,
        records: dict[str, list[Record | None]],
        planned: Mapping[str, int] | None = None,
        stand_ins: Mapping[str, str] | None = None,
    ):
        self.name, self.p, self.records = name, p, records
        self.stand_ins = stand_ins or {}
        self.planned = planned or {}

    def __getitem__(self, key: str) -> list[Record | None]:
        try:
            return self.records[key]
        except KeyError:
            raise UnknownRuns(self.p.notebook, self.p.profile, key, self.records) from None

    def __contains__(self, key: object) -> bool:
        return key in self.records

    def __iter__(self) -> Iterator[str]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self.records)

    @property
    def label(self) -> str:
        """Returns the name as a sentence has it inside: "reproduced" or "this build"."""
        return self.name[0].lower() + self.name[1:]

    @property
    def not_yet(self) -> str:
        """Says instead of what a side shows that its records are absent; Markdown or a caption."""
        return f"{self.name}: {NOT_YET}."

    def done(self, key: str) -> list[Record]:
        """Returns the finished records of some runs, one a seed; none where no run is planned."""
        return finished(self.get(key, []))

    def accuracy(self, key: str) -> Interval | None:
        """Returns the test top-1 in percent over the seeds of some runs; None without a record."""
        return accuracy_interval(self.get(key, []))

    def starts(self, key: str) -> list[Record]:
        """Returns the finished records of the runs that the finished ones of a name start from."""
        first = dict.fromkeys(r.spec.init for r in self.done(key) if r.spec.init is not None)
        return finished(load({key: list(first)}, any_device=True)[key])

    def validation(self, key: str) -> float | None:
        """Returns the validation top-1 in percent of the first finished run; None without one."""
        return next((record.val["top1"] for record in self.done(key)), None)

    def data(self, keys: Keys = None) -> list[str]:
        """Names the data of runs that stand in for those of the document."""
        shown = self._shown(keys)
        return list(dict.fromkeys(data for name, data in self.stand_ins.items() if shown(name)))

    def about(self, caption: str, keys: Keys = None) -> str:
        """Ends a caption with the stand-ins that it does not name itself, and with the gaps."""
        unnamed = "; ".join(data for data in self.data(keys) if data not in caption)
        return caption + (f" {self.name} on {unnamed}." if unnamed else "") + self.gaps(keys)

    def _shown(self, keys: Keys) -> Callable[[str], bool]:
        return keys if callable(keys) else set(self if keys is None else keys).__contains__

    def gaps(self, keys: Keys = None) -> str:
        """Says in a caption how many records are absent; "" if none is."""
        shown = self._shown(keys)
        wanted = {name: group[: self.planned.get(name)] for name, group in self.items()}
        return text.gaps({name: group for name, group in wanted.items() if shown(name)})

    def show(self, figure: Figure, caption: str, alt: str, keys: Keys = None) -> Shown:
        """Puts a figure on the page; its caption ends as in `about`, of the runs that it shows."""
        return show(figure, self.about(caption, keys), alt)


class Page:
    """Holds the plumbing of a notebook: both sides, and common parts.

    grid: the notebook's function from parameters to runs. p: the parameters of this build.
    """

    def __init__(self, grid: Callable[[Profile], Grid], p: Profile):
        self.p, self.small, self._grid = p, profile(p.notebook, PUBLISHED), grid
        planned = with_further_seeds(p.notebook, grid, self.small)
        own = {name: len(runs) for name, runs in grid(self.small).items()}
        wanted = with_further_seeds(p.notebook, grid, p)
        starts = [past for runs in planned.values() for run in runs for past in run.lineage]
        self.trains_models = any(map(dense_models.is_whole, starts))
        self.build = Side("This build", p, collect(wanted))
        stand_ins = {
            name: datasets.called(runs[0].data.name, p.notebook)
            for name, runs in planned.items()
            if runs and datasets.is_stand_in(runs[0].data.name, p.notebook)
        }
        self.reproduced = Side(
            "Reproduced", self.small, load(planned, any_device=True), own, stand_ins
        )

    @property
    def sides(self) -> tuple[Side, Side]:
        """Returns what was reproduced, then this build."""
        return self.reproduced, self.build

    def intro(self, *more: str, describe: Callable[[Profile], str] | None = None) -> Markdown:
        """Says what was computed and on what, `more`, and, folded, what this build is of.

        describe: by default the base run.
        """
        describe = describe or (lambda p: p.base.describe())
        ours, build = (f"**{side.name}:** {describe(side.p)}." for side in self.sides)
        fold = (
            f"<details><summary>What this build ran on</summary>\n\n{build} {BUILD}\n\n</details>"
        )
        return text.say(" ".join((ours, *more, *self._other_models)) + f"\n\n{fold}")

    def reads(self, *more: str) -> Markdown:
        """Says on a page that reads the records of others what they were computed on, after `more`.

        Stands in the place of `intro`.
        """
        data = "; ".join(self.reproduced.data())
        on_stand_ins = [f"Reproduced on {data}."] if data else []
        return text.say(*more, *on_stand_ins, *self._other_models)

    @property
    def _other_models(self) -> list[str]:
        return [DENSE_MODELS] if self.trains_models else []

    def answer(self, claims: Claims) -> Markdown:
        """Puts answer and further claims into the box at the head, on the reproduced records."""
        judged, specs, key = self.judged(claims, self.reproduced), self._specs(), self.p.notebook
        said, spoken_of = answers.of_page(key, judged, lambda v: self._stand_ins(v, specs))
        return text.answer(judged, self.reproduced.name, self.sure(judged), said, spoken_of)

    def sure(self, judged: Sequence[Verdict]) -> str:
        """Says how sure the answer is: seeds, interval, and at what scale, beside the document's.

        A pilot is a claim whose number of seeds is not fixed, or not reached, yet. What is counted
        has no seeds.
        """
        measured = [v for v in judged if v.estimate is not None and v.estimate.method != "exact"]
        seeds = sorted({v.n for v in measured})
        if not seeds:
            return ""
        first, last = seeds[0], seeds[-1]
        counted = f"{first} to {last} seeds" if first < last else text.count(last, "seed")
        pilots = sum(v.pilot for v in judged if v.entry is None or v.entry.part_of is None)
        stage = f"; {text.count(pilots, 'claim')} with more seeds to come" if pilots else ""
        what = f"no interval below {MIN_SEEDS} seeds"
        if last >= MIN_SEEDS:
            what = f"95% intervals over {sources_of_chance([v.estimate for v in measured])}"
        intervals = f"{counted}{stage}; {what}."
        specs = self._specs()
        ours = _scales(specs[run] for v in judged for run in v.records if run in specs)
        if not ours:
            return intervals
        return f"{intervals} On {ours}.{self._scales_of_document(judged, ours)}"

    def _scales_of_document(self, judged: Sequence[Verdict], ours: str) -> str:
        """Says on what the document judges claims, as the ledger states it, or else what arms its
        profile has; "" without one, or where these are `ours`."""
        if not has_profile(self.p.notebook, "paper"):
            return ""
        theirs = profile(self.p.notebook, "paper")
        entries = [v.entry for v in judged if v.n and v.entry is not None]
        if stated := dict.fromkeys(entry.scale for entry in entries if entry.scale):
            return f" The document's own scale: {'; '.join(stated)}."
        arms = {arm for entry in entries for arm in entry.arms}
        planned = self._grid(theirs)
        of_arms = [run for name, runs in planned.items() if name in arms for run in runs[:1]]
        arms_have = _scales(of_arms or [theirs.base])
        return f" The profile `paper` has {arms_have}." if arms_have != ours else ""

    def called(self, data: str) -> str:
        """Names a data set of this page, and that of the document for which it stands in."""
        return datasets.called(data, self.p.notebook)

    def _specs(self) -> dict[str, RunSpec]:
        """Returns the spec of each reproduced record by its id."""
        return {r.id: r.spec for name in self.reproduced for r in self.reproduced.done(name)}

    def _on_its_data(self, verdict: Verdict, specs: Mapping[str, RunSpec]) -> Verdict:
        """Names in a claim the data that stand in for those that it is about."""
        if data := self._stand_ins(verdict, specs):
            return replace(verdict, claim=f"{verdict.claim.removesuffix('.')} ({data}).")
        return verdict

    def _stand_ins(self, verdict: Verdict, specs: Mapping[str, RunSpec]) -> str:
        """Names the data of a verdict that stand in for those that it is about; "" without any."""
        names = dict.fromkeys(specs[run].data.name for run in verdict.records if run in specs)
        page = self.p.notebook
        return "; ".join(datasets.called(n, page) for n in names if datasets.is_stand_in(n, page))

    def verdicts(self, claims: Claims, caption: str = text.RULE) -> tables.Table:
        """Tabulates the claims of both sides with the numbers behind them."""
        judged = {side.label: self.judged(claims, side) for side in self.sides}
        return text.verdicts(judged, caption)

    def judged(self, claims: Claims, side: Side) -> list[Verdict]:
        """Judges the page's claims of the ledger by what a function yields of one side.

        claims: see `verdicts.evidence`. Raises ValueError for a claim that is not in the ledger,
        and, on the reproduced side, for one of the ledger that is left out or judged on other runs
        than the ledger says.
        """
        entries, evidence = ledger.of_page(self.p.notebook), list(claims(side))
        judged = verdicts_on(evidence, entries)
        if side is self.reproduced:
            given = {piece.claim: piece for piece in evidence}
            plans = {key: plan(key, PUBLISHED) for key in {claim.runs_page for claim in entries}}
            for claim in ledger.judged_on(self.p.notebook):
                if claim.id not in given:
                    raise ValueError(
                        f"{self.p.notebook} yields no evidence of claim {claim.id}, which the "
                        "ledger (data/papers) gives to it: yield some, or change its `page`"
                    )
                _check_arms(claim, given[claim.id], plans[claim.runs_page])
            specs = self._specs()
            judged = [self._on_its_data(verdict, specs) for verdict in judged]
        return judged

    def table(
        self,
        settings: pd.DataFrame,
        published: tables.Columns,
        ours: Callable[[Side], tables.Columns],
        keys: Sequence[str] | None = None,
        **options: Any,
    ) -> tables.Table:
        """Sets published values, reproduced ones and those of this build beside each other.

        ours: the columns of one side, a cell for each row of `settings`. keys: the runs of each
        row; an empty reproduced cell is then marked only where their records are absent.
        options: of `report.tables.three_groups`.
        """

        def is_planned(row: int, group: str) -> bool:
            wanted = None if keys is None else self.reproduced.get(keys[row], [])
            absent = wanted is None or (len(wanted) > 0 and not finished(wanted))
            return group == self.reproduced.label and absent

        columns = [ours(side) for side in self.sides]
        options.setdefault("reproduced_on", "; ".join(self.reproduced.data(keys)))
        return tables.three_groups(settings, published, *columns, is_planned, **options)

    def rows(self, of: Callable[[Side], Iterable[Mapping[str, Any]]]) -> pd.DataFrame:
        """Puts the rows that a function gives of either side under each other, by source."""
        rows = [(side.label, row) for side in self.sides for row in of(side)]
        return pd.DataFrame([{"source": label, **row} for label, row in rows])

    def costs(self, dense: str | None = None, keys: Sequence[str] | None = None) -> tables.Table:
        """Tabulates size and multiply-adds, one run of each name.

        dense: name of the runs to whose multiply-adds the others' are compared. keys: the runs that
        are shown; None = all.
        """
        frame = self.rows(lambda side: cost_rows(side, dense, keys))
        return tables.table(
            frame,
            self.reproduced.about(
                "Stored and active parameters, in millions, and multiply-adds (MACs) of an image, "
                "in 10⁹, of the first seed. How fast such models run, timed alone, by device, "
                f"number format and batch: see {SPEED}.",
                keys,
            ),
            decimals=tables.COST_DECIMALS,
        )

    def each(self, draw: Callable[[Side], Any]) -> None:
        """Displays what a function makes of either side, the reproduced one first.

        None is skipped. What is of this build is folded below what was reproduced.
        """
        reproduced, build = (draw(side) for side in self.sides)
        if reproduced is not None:
            display(reproduced)
            if hasattr(build, "_repr_html_"):
                build = Shown(tables.folded(self.build.label, build._repr_html_()), repr(build))
        if build is not None:
            display(build)

    def gaps(self, keys: Keys = None) -> str:
        """Says how many reproduced records are absent; see `Side.gaps`."""
        return self.reproduced.gaps(keys)

    def show(self, figure: Figure, caption: str, alt: str, keys: Keys = None) -> Shown:
        """Puts a figure of both sides on the page; see `Side.show`."""
        return self.reproduced.show(figure, caption, alt, keys)


def _scales(runs: Iterable[RunSpec]) -> str:
    """Says in a line on which images runs work, and with which model, the most frequent first."""
    found: dict[str, dict[str, list[str]]] = {}
    for (title, images, rest), _ in Counter(map(_scale, runs)).most_common(SCALES):
        found.setdefault(rest, {}).setdefault(images, []).append(title)
    counted = {r: [f"{listed(t)} ({n})" for n, t in of.items()] for r, of in found.items()}
    return "; ".join(f"{listed(data)} {rest}" for rest, data in counted.items())


def _scale(run: RunSpec) -> tuple[str, str, str]:
    """Returns the data of a run, how many they are, and at what size and with which model."""
    weights = run.backbone.weights
    model = weights if weights not in (None, "timm") else run.backbone.name
    return run.data.title, run.data.training_images, f"at {run.data.image_size} px, {model}"


def _check_arms(claim: ledger.Claim, piece: Evidence, planned: Grid) -> None:
    """Refuses evidence from runs that the ledger does not name: `fill` would not compute them.

    planned: the runs of the page that plans those of the claim.
    """
    runs = [run for arm in claim.arms for run in planned.get(arm, [])]
    named = {run.id for run in runs} | {run.on("cpu").id for run in runs}
    strange = [record.id for record in piece.records if record.id not in named]
    if strange:
        arms = [arm for arm, runs in planned.items() if {run.id for run in runs} & set(strange)]
        raise ValueError(
            f"claim {claim.id} is judged on runs that its `arms` in the ledger do not name: they "
            f"are of {', '.join(map(repr, arms)) or 'no arm'} of {claim.runs_page}; the ledger "
            f"has {', '.join(map(repr, claim.arms)) or 'none'}"
        )


def page(grid: Callable[[Profile], Grid], p: Profile) -> Page:
    """Collects the runs of a notebook and returns its `Page`; see there."""
    return Page(grid, p)
