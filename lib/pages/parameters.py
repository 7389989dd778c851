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

import ast
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..paths import ROOT

if TYPE_CHECKING:
    pass
SCALARS: dict[str, type] = {"int": int, "float": float, "bool": bool, "str": str}


class NotebookError(ValueError):
    """Bad input to a notebook: the message names the field, the value and what is valid."""


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell."""

    name: str
    annotation: str
    default: Any
    help: str


def key_of(name: str | Path) -> str:
    """`vimoe/cost`, `notebooks/vimoe/cost.ipynb` or a path to the source -> the key, checked to
    exist."""
    folder = ROOT / "notebooks"
    path = Path(name)
    for candidate in (
        path if path.is_absolute() else Path.cwd() / path,
        ROOT / path,
        folder / path,
    ):
        candidate = candidate.with_name(candidate.name.removesuffix(".ipynb") + ".ipynb")
        if candidate.is_file() and candidate.resolve().is_relative_to(folder.resolve()):
            return (
                candidate.resolve().relative_to(folder.resolve()).as_posix().removesuffix(".ipynb")
            )
    known = sorted(
        p.relative_to(folder).as_posix().removesuffix(".ipynb") for p in folder.glob("*/*.ipynb")
    )
    raise NotebookError(f"no notebook {str(name)!r}; there are: {', '.join(known) or 'none'}")


def source(key: str) -> Path:
    """The source notebook of a key."""
    path = ROOT / "notebooks" / f"{key}.ipynb"
    if not path.is_file():
        raise NotebookError(f"no notebook {key!r}: notebooks/{key}.ipynb is not there")
    return path


def tagged(key: str, tag: str) -> str:
    """Source text of the cells with a tag, one after the other: a long grid is several cells."""
    found = [
        "".join(item["source"])
        for item in json.loads(source(key).read_text(encoding="utf-8"))["cells"]
        if item["cell_type"] == "code" and tag in item.get("metadata", {}).get("tags", ())
    ]
    if not found:
        raise NotebookError(
            f"notebooks/{key}.ipynb has no code cell tagged {tag!r}; tag its cell in the cell's metadata"
        )
    return "\n\n\n".join(found)


def _check_line(where: str, line: str, name: str, annotation: str) -> None:
    """The form that papermill's inspector reads too, so that its help is complete."""
    base = re.fullmatch(r"list\[(\w+)\]", annotation)
    if (base.group(1) if base else annotation) not in SCALARS:
        raise NotebookError(
            f"{where}: {name} is annotated {annotation!r}; valid: {', '.join(SCALARS)}, list[int], ..."
        )
    if "#" not in line or not line.split("#", 1)[1].strip():
        raise NotebookError(
            f"{where}: {name} needs a trailing comment that says what it is, with unit and usual range"
        )
    if line.count("=") != 1:
        raise NotebookError(
            f"{where}: the line of {name} has more than one '='; papermill cannot read it, reword it"
        )


def parameters(key: str) -> dict[str, Parameter]:
    """The parameters cell, parsed but not run."""
    text, where = tagged(key, "parameters"), f"notebooks/{key}.ipynb, parameters cell"
    lines, out = text.splitlines(), {}
    for node in ast.parse(text).body:
        if (
            not isinstance(node, ast.AnnAssign)
            or not isinstance(node.target, ast.Name)
            or node.value is None
        ):
            raise NotebookError(
                f"{where}: only lines like `seed: int = 0  # what it is` are allowed, got "
                f"{lines[node.lineno - 1]!r}"
            )
        line, name, annotation = (
            lines[node.lineno - 1],
            node.target.id,
            ast.unparse(node.annotation),
        )
        _check_line(where, line, name, annotation)
        default = ast.literal_eval(node.value)
        out[name] = Parameter(name, annotation, default, line.split("#", 1)[1].strip())
        if default is not None:
            out[name] = Parameter(name, annotation, typed(key, out[name], default), out[name].help)
    if next(iter(out), None) != "profile" or out["profile"].annotation != "str":
        raise NotebookError(f'{where}: the first line must be `profile: str = "quick"  # ...`')
    if "notebook" in out:
        raise NotebookError(
            f"{where}: 'notebook' is taken, it holds the notebook's name; choose another name"
        )
    return out


def typed(key: str, parameter: Parameter, value: Any) -> Any:
    """`value` as the annotation says, or an error. Nothing is guessed: True is no int, 1.5 is no
    int, 8 is a float."""
    kind = parameter.annotation
    if kind.startswith("list["):
        items = value.split(",") if isinstance(value, str) else value
        items = list(items) if isinstance(items, (list, tuple)) else [items]
        return tuple(
            _scalar(key, parameter, kind[5:-1], i.strip() if isinstance(i, str) else i, value)
            for i in items
        )
    return _scalar(key, parameter, kind, value, value)


def _scalar(key: str, parameter: Parameter, kind: str, item: Any, given: Any) -> Any:
    if (
        isinstance(item, str)
        and kind in ("int", "float")
        and parameter.annotation.startswith("list[")
    ):
        item = _number(item, kind)  # parts of "2,4,8"
    ok = isinstance(item, SCALARS[kind]) and (kind == "bool" or not isinstance(item, bool))
    if kind == "float" and isinstance(item, int) and not isinstance(item, bool):
        item, ok = float(item), True
    if not ok or (isinstance(item, float) and not math.isfinite(item)):
        raise NotebookError(
            f"{parameter.name}={given!r} for {key} is not {parameter.annotation}: {parameter.help}"
        )
    return item


def _number(text: str, kind: str) -> Any:
    try:
        return SCALARS[kind](text)
    except ValueError:
        return text  # left as it is: the caller refuses it with the name of the parameter


def from_text(key: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Overrides as typed on a command line -> typed values; unknown names and bad values are
    refused."""
    known, out = parameters(key), {}
    for name, text in given.items():
        parameter = known_parameter(key, known, name, "unknown parameter")
        kind, value = parameter.annotation, text
        if kind in ("int", "float"):
            value = _number(text, kind)
        elif kind == "bool":
            value = {"true": True, "false": False}.get(text.lower(), text)
        out[name] = typed(key, parameter, value)
    return out


def known_parameter(key: str, known: Mapping[str, Parameter], name: str, what: str) -> Parameter:
    if name not in known:
        listing = "; ".join(f"{p.name}: {p.annotation}" for p in known.values())
        raise NotebookError(f"{what} {name!r} for {key}; it has {listing}")
    return known[name]
