"""Profiles: the values of a notebook's parameters, the base run, and the runs that it plans.

A profile is a YAML file in `notebooks/profiles` that maps notebooks to values. `profile` puts them
together with what is given and with the defaults of the parameters cell; `plan` hands the result
to the notebook's `grid`. Neither runs the rest of the notebook or imports torch.
"""

from __future__ import annotations

import copy
import functools
import json
import traceback
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import yaml

from .. import paths
from ..paths import ROOT, need_checkout
from .parameters import (
    NotebookError,
    Parameter,
    UnknownRuns,
    known_parameter,
    parameters,
    tagged,
    typed,
)

if TYPE_CHECKING:
    from ..spec import RunSpec

PROFILES = ("smoke", "quick", "small", "paper")
PUBLISHED = "small"  # the profile whose records are committed
# Parameters of these names change the profile's base run; None leaves it as the profile says.
# name: (part of the run, field of the part)
BASE_FIELDS = {
    "data": ("data", "name"),
    "image_size": ("data", "image_size"),
    "train_images": ("data", "train"),
    "backbone": ("backbone", "name"),
    "weights": ("backbone", "weights"),
    "epochs": ("train", "epochs"),
    "lr": ("train", "lr"),
    "batch": ("train", "batch"),
    "device": (None, "device"),
}
# (notebook, profile) -> values that this process was asked for; part of the manifest
asked: dict[tuple[str, str], dict[str, Any]] = {}
# what was planned, by what was asked and the state of the files that decide it
_plans: dict[tuple[Any, ...], dict[str, list[RunSpec]]] = {}


class Profile:
    """Holds the parameters of one notebook under one profile, as attributes.

    `of_base` holds those that were given by hand and change the base run, but for the device: a
    page that reads the runs of another hands them on. Read-only; an unknown name is an error.
    """

    def __init__(self, notebook: str, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values, notebook=notebook)

    def but(self, **values: Any) -> Profile:
        """Returns the parameters with some of them changed."""
        fields = {name: value for name, value in self.__dict__.items() if name != "notebook"}
        return Profile(self.notebook, fields | values)

    @property
    def base(self) -> RunSpec:
        """Returns the run that a grid varies with `p.base.but(...)`: data, backbone, budget."""
        if not self.base_fields:
            raise NotebookError(
                f"notebooks/profiles/{self.profile}.yaml has no `base`: "
                "it describes the run that grids vary"
            )
        return _run_of(json.dumps(self.base_fields))

    def __getattr__(self, name: str) -> Any:  # only reached for names that are not there
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"{self.notebook} has no parameter {name!r}; it has {', '.join(sorted(self.__dict__))}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(
            f"parameters are read-only; give {name}={value!r} to lib.profile instead"
        )

    def __repr__(self) -> str:
        return f"Profile({', '.join(f'{k}={v!r}' for k, v in sorted(self.__dict__.items()))})"


@functools.lru_cache(maxsize=64)  # a grid asks for its base run once an arm
def _run_of(text: str) -> RunSpec:
    from ..spec import RunSpec

    return RunSpec.model_validate_json(text)


def check_profile(name: Any) -> str:
    """Returns the name of a profile, or raises NotebookError that lists those there are."""
    if name not in PROFILES:
        raise NotebookError(f"unknown profile {name!r}; valid: {', '.join(PROFILES)}")
    return name


def profile_table(name: str) -> dict[str, dict[str, Any]]:
    """Reads the YAML file of a profile: notebook key -> values.

    `defaults` holds values that notebooks share, `base` and `base/...` the runs that grids vary,
    `readings` what is done where a document's recipe cannot be followed, by study.
    """
    need_checkout("a profile")
    path = ROOT / "notebooks" / "profiles" / f"{check_profile(name)}.yaml"
    if not path.is_file():
        raise NotebookError(f"profile {name!r} has no file notebooks/profiles/{name}.yaml")
    table = _parsed(path.read_text(encoding="utf-8"))
    if not isinstance(table, dict) or not all(
        isinstance(values, dict | None) for values in table.values()
    ):
        raise NotebookError(
            f"notebooks/profiles/{name}.yaml must map notebooks to {{parameter: value}}"
        )
    return {key: values or {} for key, values in table.items()}


@functools.lru_cache(maxsize=32)  # of text, not of a file, so a change is never missed
def _parsed(text: str) -> Any:
    """Parses YAML; whoever gets the result leaves it as it is."""
    return yaml.safe_load(text) or {}


def readings(study: str, name: str) -> list[str]:
    """Returns what a profile does where the document of a study cannot be followed, in sentences.

    Raises NotebookError where they are no list of sentences.
    """
    sentences = profile_table(name).get("readings", {}).get(study, [])
    if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
        raise NotebookError(
            f"notebooks/profiles/{name}.yaml: readings of {study} must be a list of sentences, got "
            f"{sentences!r:.80}"
        )
    return sentences


def has_profile(key: str, name: str) -> bool:
    """Says whether a notebook has values for a profile: the paper profile may come later."""
    try:
        return key in profile_table(name)
    except NotebookError:
        return False


def profile(notebook: str, name: str | Mapping[str, Any], /, **given: Any) -> Profile:
    """Returns the parameters of `notebook` under profile `name`; a given value wins, unless None.

    name: a profile, or `globals()` of the notebook itself: its parameters cell has set them all,
    the profile too. Order: given, then the notebook's entry in `notebooks/profiles/<name>.yaml`,
    then that file's `defaults`, then the default in the parameters cell, then the base run. A
    parameter that is nowhere is an error; where the YAML says null, it is None.
    """
    known = parameters(notebook)
    if not isinstance(name, str):
        given = {field: name[field] for field in known} | given
        name = given.pop("profile")
    table = profile_table(name)
    _check_entry(notebook, name, table, known)
    for field in given:
        known_parameter(notebook, known, field, "unknown parameter")
    if given.get("profile", name) != name:
        raise NotebookError(f"profile is given twice: {name!r} and {given['profile']!r}")

    defaults = {field: p.default for field, p in known.items() if p.default is not None}
    shared = {
        field: value
        for field, value in table.get("defaults", {}).items()
        if field in known and field not in defaults
    }
    overrides = {field: value for field, value in given.items() if value is not None}
    overrides = _typed(notebook, known, overrides)
    entry = _typed(notebook, known, shared | table[notebook])
    base = _base_of(notebook, table)
    layers = ChainMap({"profile": name}, overrides, entry, defaults, _parameters_of(base))
    for field in known:
        if field not in layers:
            raise NotebookError(
                f"{field} of {notebook} is None and notebooks/profiles/{name}.yaml does not "
                f"set it; give {field}, or set it there"
            )
    values = {field: layers[field] for field in known}
    # A parameter with a default of its own is the notebook's business and only shares the name.
    chosen = {
        field: values[field]
        for field in BASE_FIELDS  # in this order: another backbone comes before its weights
        if field in known
        and field not in defaults
        and (field in overrides or field in table[notebook])
    }
    values["base_fields"] = _base_fields(notebook, base, chosen)
    by_hand = {field for field, value in overrides.items() if value != defaults.get(field)}
    if not by_hand - {"profile"}:  # values given by hand belong to no page of the book
        asked[notebook, name] = dict(values)
    of_base = {
        field: value
        for field, value in overrides.items()
        if field in BASE_FIELDS and field not in defaults and field != "device"
    }
    return Profile(notebook, values | {"of_base": of_base})


def _check_entry(
    notebook: str,
    name: str,
    table: Mapping[str, Mapping[str, Any]],
    known: Mapping[str, Parameter],
) -> None:
    """Refuses a profile without an entry for a notebook, or one that sets what it must not."""
    where = f"notebooks/profiles/{name}.yaml"
    if notebook not in table:
        listed = ", ".join(key for key in table if "/" in key and not key.startswith("base"))
        raise NotebookError(f"{where} has no entry for {notebook!r}; it has {listed or 'none'}")
    for field in table[notebook]:
        default = known_parameter(
            notebook, known, field, f"{where} sets the unknown parameter"
        ).default
        if default is not None:
            # the notebook hands its default over as an explicit value, so the profile's would be
            # lost in silence
            raise NotebookError(
                f"{where} sets {field} of {notebook}, whose default is {default!r}; "
                "a profile decides only what is None in the parameters cell"
            )


def _typed(
    notebook: str, known: Mapping[str, Parameter], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Types values as their parameters say; None, the null of YAML, stays."""
    return {
        field: None if value is None else typed(notebook, known[field], value)
        for field, value in values.items()
    }


def _base_of(notebook: str, table: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the base run of a notebook: its own, else that of its study, else the profile's.

    Their keys in the YAML: `base/moee/static_rival`, `base/moee`, `base`. Empty where none is.
    """
    study = notebook.split("/")[0]
    keys = (f"base/{notebook}", f"base/{study}", "base")
    return next((table[key] for key in keys if key in table), {})


def _parameters_of(base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the parameters of `BASE_FIELDS` as the base run has them; none without a base run."""
    if not base:
        return {}
    return {
        name: (base.get(part, {}) if part else base).get(field)
        for name, (part, field) in BASE_FIELDS.items()
    }


def _base_fields(
    notebook: str, base: Mapping[str, Any], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the base run of a profile as plain values, with the chosen parameters in it.

    Its records are filed under the notebook's folder, unless the YAML names a `study`. `init` of
    the YAML names only what differs from the base: a backbone that is trained once and started
    from. Another backbone or other weights start without it, and another backbone forgets the
    sizes of the old one.
    """
    fields = copy.deepcopy(dict(base))
    if fields:
        fields.setdefault("study", notebook.split("/")[0])
    parent = fields.pop("init", None)
    for name, value in chosen.items():
        part, field = BASE_FIELDS[name]
        if name == "backbone":
            fields[part] = {}
        (fields.setdefault(part, {}) if part else fields)[field] = value
    if parent is not None and not {"backbone", "weights"} & chosen.keys():
        fields["init"] = _changed(fields, parent)
    return fields


def _changed(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a run with changes in them; in a part only what is named changes."""
    changed = {**fields, **changes}
    for part in fields.keys() & changes.keys():
        if isinstance(fields[part], dict):
            changed[part] = fields[part] | changes[part]
    return changed


class Runs(dict):
    """Holds the runs that a notebook plans under a profile, by name; names those that are near one
    that it does not plan."""

    def __init__(self, runs: Mapping[str, list[RunSpec]], notebook: str, profile: str):
        super().__init__(runs)
        self.notebook, self.profile = notebook, profile

    def __missing__(self, name: object) -> list[RunSpec]:
        raise UnknownRuns(self.notebook, self.profile, name, self)


def plan(key: str, name: str, **given: Any) -> Runs:
    """Returns the runs that a notebook wants under a profile, from its tagged cells alone.

    Raises NotebookError where the cells do not define such a `grid`, or serve another notebook, and
    for given values with which the notebook has no runs.
    """
    # a build asks several times; a notebook may plan the runs of others, so all files count
    files = [*ROOT.glob("notebooks/*/*"), *paths.PAPERS.glob("*.yaml")]
    states = [(file, file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    question = (key, name, repr(given), *states)
    if question not in _plans:
        _plans[question] = _planned(key, name, given)
    return Runs({arm: list(runs) for arm, runs in _plans[question].items()}, key, name)


def _planned(key: str, name: str, given: Mapping[str, Any]) -> dict[str, list[RunSpec]]:
    space: dict[str, Any] = {"__name__": f"plan:{key}"}
    exec(compile(tagged(key, "parameters"), f"notebooks/{key}.ipynb[parameters]", "exec"), space)
    space.update(given, profile=check_profile(name))  # where papermill puts its injected cell
    exec(compile(tagged(key, "specs"), f"notebooks/{key}.ipynb[specs]", "exec"), space)
    if not callable(space.get("grid")):
        raise NotebookError(
            f"notebooks/{key}.ipynb: the specs cell must define grid(p) -> dict[str, list[RunSpec]]"
        )
    served = getattr(space.get("p"), "notebook", key)
    if served != key:
        raise NotebookError(f"notebooks/{key}.ipynb asks lib.profile for {served!r}; write {key!r}")
    p = profile(key, name, **given)
    try:
        runs = with_further_seeds(key, space["grid"], p)
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        by_hand = [field for field, value in given.items() if value is not None]
        if not by_hand:
            raise
        raise NotebookError(_no_runs(p, profile(key, name), by_hand, error)) from error
    if not isinstance(runs, dict) or not all(isinstance(v, list) for v in runs.values()):
        raise NotebookError(
            f"notebooks/{key}.ipynb: grid(p) must return dict[str, list[RunSpec]], got {runs!r:.80}"
        )
    return runs


def _no_runs(p: Profile, usual: Profile, by_hand: list[str], error: Exception) -> str:
    """Says for which values given by hand a notebook has no runs, why, and what its profile has."""
    from pydantic import ValidationError

    from ..spec import sentence

    reason = sentence(error) if isinstance(error, ValidationError) else str(error)
    if traceback.extract_tb(error.__traceback__)[-1].filename.startswith("notebooks/"):
        # Python's own words, of a value that the page's code does not fit
        reason = f"they are not of the form that the page reads ({reason})"
    asked = ", ".join(f"{field}={getattr(p, field)!r:.60}" for field in by_hand)
    known = parameters(p.notebook)
    profile_has = ", ".join(
        f"{field}={getattr(usual, field)!r:.60} ({known[field].help})" for field in by_hand
    )
    return (
        f"{p.notebook} has no runs for {asked}: {reason}. Its {p.profile} profile has {profile_has}"
    )


def with_further_seeds(
    key: str, grid: Callable[[Profile], dict[str, list[RunSpec]]], p: Profile
) -> dict[str, list[RunSpec]]:
    """Returns the runs of a grid, with the second stage of seeds where the ledger has fixed one.

    Only the arms of such claims get further seeds, and only in the published profile with its own
    seeds: whoever chooses seeds gets these.
    """
    from ..verdicts import ledger  # it reads all of data/papers

    runs = grid(p)
    if p.profile != PUBLISHED or "seeds" not in p.__dict__:
        return runs
    own = tuple(profile(key, PUBLISHED).seeds)
    if tuple(p.seeds) != own:
        return runs
    waiting = [claim for claim in ledger.on_runs_of(key) if claim.planned_seeds > len(own)]
    if waiting:
        wider = grid(p.but(seeds=tuple(range(max(claim.planned_seeds for claim in waiting)))))
        for claim in waiting:
            # one run a seed, in their order; an arm of another page may have more there already
            longer = {arm: wider[arm][: claim.planned_seeds] for arm in claim.arms if arm in wider}
            runs |= {arm: more for arm, more in longer.items() if len(more) > len(runs[arm])}
    return runs
