"""What a notebook says about itself: its parameters, its profiles and the runs that it wants.

A source notebook starts with tagged cells. `parameters` holds annotated scalars with a trailing
comment; `specs`, one cell or several, holds `grid(p) -> dict[str, list[RunSpec]]`. Everything here
works from the text of these cells and from the YAML files in `notebooks/profiles`, so a build can
be planned without running a notebook and without importing torch.

A notebook is named by its key, the path below `notebooks/` without the ending: `vimoe/layer_scan`.

Allowed annotations are those that `papermill --help-notebook` prints well: `int`, `float`, `bool`,
`str`, and `list[int]`, `list[float]`, `list[str]`. A default of None means "the profile decides",
so no `| None` is written (papermill would not read the line). A list may be given as one value or
as text, `-p experts 8` or `-p experts 2,4,8`; it arrives as a tuple.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import yaml

from ..paths import ROOT
from .parameters import NotebookError, known_parameter, parameters, tagged, typed

if TYPE_CHECKING:
    from ..spec import RunSpec
PROFILES = ("smoke", "quick", "small", "paper")
# Parameters of these names change the profile's base run; None leaves it as the profile says.
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
asked: dict[
    tuple[str, str], dict[str, Any]
] = {}  # profiles that this process was asked for; part of the manifest


class Profile:
    """The parameters of one notebook under one profile, as attributes. Read-only; an unknown name
    is an error."""

    def __init__(self, notebook: str, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values, notebook=notebook)

    @property
    def base(self) -> RunSpec:
        """The run that the profile starts from: data, backbone, budget. A grid varies it with
        `p.base.but(...)`."""
        from ..spec import RunSpec

        if not self.base_fields:
            raise NotebookError(
                f"notebooks/profiles/{self.profile}.yaml has no `base`: it describes the run that grids vary"
            )
        return RunSpec.model_validate_json(json.dumps(self.base_fields))

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


def check_profile(name: Any) -> str:
    """A profile's name, checked."""
    if name not in PROFILES:
        raise NotebookError(f"unknown profile {name!r}; valid: {', '.join(PROFILES)}")
    return name


def profile_table(name: str) -> dict[str, dict[str, Any]]:
    """The YAML file of a profile: notebook key -> values, and `defaults` for values that notebooks
    share."""
    path = ROOT / "notebooks" / "profiles" / f"{check_profile(name)}.yaml"
    if not path.is_file():
        raise NotebookError(f"profile {name!r} has no file notebooks/profiles/{name}.yaml")
    table = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(table, dict) or not all(
        isinstance(v, (dict, type(None))) for v in table.values()
    ):
        raise NotebookError(
            f"notebooks/profiles/{name}.yaml must map notebooks to {{parameter: value}}"
        )
    return {key: values or {} for key, values in table.items()}


def has_profile(key: str, name: str) -> bool:
    """Whether a notebook has values for a profile at all (the paper profile may come later than the
    notebook)."""
    try:
        return key in profile_table(name)
    except NotebookError:
        return False


def profile(notebook: str, name: str | Mapping[str, Any], /, **given: Any) -> Profile:
    """The parameters of `notebook` under profile `name`; a value in `given` that is not None wins.

    name: a profile, or `globals()` of the notebook itself: its parameters cell has set them all,
    the profile too. Order: given, then the notebook's entry in `notebooks/profiles/<name>.yaml`,
    then that file's `defaults`, then the default in the parameters cell. A parameter that is None
    after all this is an error, unless the YAML says null.
    """
    known = parameters(notebook)
    if not isinstance(name, str):
        given = {field: name[field] for field in known} | given
        name = given.pop("profile")
    table = profile_table(name)
    where = f"notebooks/profiles/{name}.yaml"
    if notebook not in table:
        listed = ", ".join(key for key in table if key != "defaults" and not key.startswith("base"))
        raise NotebookError(f"{where} has no entry for {notebook!r}; it has {listed or 'none'}")
    for field in table[notebook]:
        if (
            known_parameter(notebook, known, field, f"{where} sets the unknown parameter").default
            is not None
        ):
            # the notebook hands its default over as an explicit value, so the profile's would be
            # lost in silence
            raise NotebookError(
                f"{where} sets {field} of {notebook}, whose default is {known[field].default!r}; a profile "
                f"decides only what is None in the parameters cell"
            )
    for field in given:
        known_parameter(notebook, known, field, "unknown parameter")
    if given.get("profile", name) != name:
        raise NotebookError(f"profile is given twice: {name!r} and {given['profile']!r}")
    shared, base = table.get("defaults", {}), _base_of(notebook, table)
    values: dict[str, Any] = {"profile": name}
    for field, parameter in known.items():
        if field == "profile":
            continue
        if given.get(field) is not None:
            values[field] = typed(notebook, parameter, given[field])
        elif field in table[notebook] or (field in shared and parameter.default is None):
            value = table[notebook].get(field, shared.get(field))
            values[field] = None if value is None else typed(notebook, parameter, value)
        elif parameter.default is not None:
            values[field] = parameter.default
        elif field in BASE_FIELDS and base:
            part, entry = BASE_FIELDS[field]
            values[field] = (base.get(part, {}) if part else base).get(entry)
        else:
            raise NotebookError(
                f"{field} of {notebook} is None and {where} does not set it; give {field}, or set it there"
            )
    # A parameter with a default of its own is the notebook's business and only shares the name.
    chosen = {
        field: values[field]
        for field in BASE_FIELDS
        if field in known
        and known[field].default is None
        and (given.get(field) is not None or field in table[notebook])
    }
    values["base_fields"] = _base_fields(notebook, base, chosen)
    if all(
        value is None or value == known[field].default
        for field, value in given.items()
        if field != "profile"
    ):
        # as the profile has them; overridden values belong to no page of the book
        asked[notebook, name] = dict(values)
    return Profile(notebook, values)


def _base_of(notebook: str, table: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The base run of a notebook, `base/moee/static_rival` say, or of its study, `base/durham`, or
    else the profile's `base`."""
    study = notebook.split("/")[0]
    return next(
        (table[key] for key in (f"base/{notebook}", f"base/{study}", "base") if key in table), {}
    )


def _base_fields(
    notebook: str, base: Mapping[str, Any], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """The base run of a profile as plain values, with the chosen parameters in it.

    `init` of the YAML names only what differs from the base: a backbone that is trained once and
    started from. Another backbone or other weights start without it, and another backbone forgets
    the sizes of the old one.
    """
    fields = json.loads(json.dumps(base))
    if fields:  # records are filed by study
        fields.setdefault("study", notebook.split("/")[0])
    parent = fields.pop("init", None)
    for name, value in chosen.items():
        part, entry = BASE_FIELDS[name]
        if name == "backbone":
            fields[part] = {}
        (fields.setdefault(part, {}) if part else fields)[entry] = value
    if parent is not None and not {"backbone", "weights"} & chosen.keys():
        fields["init"] = {
            name: {**fields[name], **parent.get(name, {})}
            if isinstance(fields.get(name), dict)
            else parent.get(name, fields.get(name))
            for name in {**fields, **parent}
        }
    return fields


def plan(key: str, name: str, **given: Any) -> dict[str, list[RunSpec]]:
    """The runs that a notebook wants, from its tagged cells alone."""
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
    runs = space["grid"](profile(key, name, **given))
    if not isinstance(runs, dict) or not all(isinstance(v, list) for v in runs.values()):
        raise NotebookError(
            f"notebooks/{key}.ipynb: grid(p) must return dict[str, list[RunSpec]], got {runs!r:.80}"
        )
    return runs
