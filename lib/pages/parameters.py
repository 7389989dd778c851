"""Source notebooks: their keys, their tagged cells, and the types of their parameters.

A source notebook starts with tagged cells. `parameters` holds annotated scalars with a trailing
comment; `specs`, one cell or several, holds `grid(p) -> dict[str, list[RunSpec]]`. Everything here
works from the text of these cells, so a build can be planned without running a notebook and
without importing torch.

A notebook is named by its key, the path below `notebooks/` without the ending: `vimoe/layer_scan`.

Allowed annotations are those that `papermill --help-notebook` prints well: `int`, `float`, `bool`,
`str`, and `list[int]`, `list[float]`, `list[str]`. A default of None means "the profile decides",
so no `| None` is written (papermill would not read the line). A list may be given as one value or
as text, `-p experts 8` or `-p experts 2,4,8`; it arrives as a tuple.
"""

from __future__ import annotations

import ast
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..paths import ROOT, need_checkout

if TYPE_CHECKING:
    from pydantic import TypeAdapter

TYPES: dict[str, type] = {
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "list[int]": list[int],
    "list[float]": list[float],
    "list[str]": list[str],
}
# How text becomes a value; pydantic's own reading takes "1.0" for an int and "yes" for a bool.
READERS: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda text: {"true": True, "false": False}[text.lower()],
    "str": str,
}


class NotebookError(ValueError):
    """Bad input to a notebook: the message names the field, the value and what is valid."""


class UnknownRuns(NotebookError, KeyError):
    """Asks a page for runs by a name that it does not plan."""

    __str__ = Exception.__str__  # KeyError's own puts the message in quotation marks

    def __init__(self, notebook: str, profile: str, name: object, planned: Iterable[str]):
        planned = list(planned)
        near = difflib.get_close_matches(str(name), planned, n=4, cutoff=0.5)
        listed = ", ".join(map(repr, near or planned[:8])) or "none"
        super().__init__(
            f"{notebook} plans no runs called {name!r} in its {profile} profile; "
            f"{'near it are' if near else 'it plans'} {listed}"
        )


@dataclass(frozen=True)
class Parameter:
    """One line of the parameters cell: `name: annotation = default  # help`."""

    name: str
    annotation: str
    default: Any
    help: str


# -- the source notebook -------------------------------------------------------


def key_of(name: str | Path) -> str:
    """Returns the key of a notebook that is there, from its key or from a path to its source.

    A path may begin here, at the project's root or in `notebooks`; its ending may be left out.
    """
    folder = ROOT / "notebooks"
    path = Path(name)
    for start in (Path.cwd(), ROOT, folder):  # an absolute path wins over each of them
        candidate = start / path.with_name(path.name.removesuffix(".ipynb") + ".ipynb")
        if candidate.is_file() and candidate.resolve().is_relative_to(folder.resolve()):
            return _key(candidate.resolve(), folder.resolve())
    known = sorted(_key(source, folder) for source in folder.glob("*/*.ipynb"))
    raise NotebookError(f"no notebook {str(name)!r}; there are: {', '.join(known) or 'none'}")


def keys_of(name: str) -> list[str]:
    """Returns the keys of a study, which is a folder of notebooks, or the one key of a notebook.

    Those of a study come in alphabetical order.
    """
    folder = ROOT / "notebooks"
    sources = sorted((folder / name).glob("*.ipynb")) if re.fullmatch(r"\w+/?", name) else []
    return [_key(source, folder) for source in sources] or [key_of(name)]


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix().removesuffix(".ipynb")


def source(key: str) -> Path:
    """Returns the path of the source notebook of a key, checked to exist."""
    need_checkout("a page of the book")
    path = ROOT / "notebooks" / f"{key}.ipynb"
    if not path.is_file():
        raise NotebookError(f"no notebook {key!r}: notebooks/{key}.ipynb is not there")
    return path


def tagged(key: str, tag: str) -> str:
    """Joins the source text of the code cells with a tag: a long grid is several cells."""
    cells = [
        "".join(cell["source"])
        for cell in json.loads(source(key).read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == "code" and tag in cell.get("metadata", {}).get("tags", ())
    ]
    if not cells:
        raise NotebookError(
            f"notebooks/{key}.ipynb has no code cell tagged {tag!r}; "
            "tag its cell in the cell's metadata"
        )
    return "\n\n\n".join(cells)


# -- the parameters cell -------------------------------------------------------


def parameters(key: str) -> dict[str, Parameter]:
    """Parses the parameters cell of a notebook, without running it.

    Raises NotebookError naming the line that papermill or the profiles could not read.
    """
    text, where = tagged(key, "parameters"), f"notebooks/{key}.ipynb, parameters cell"
    lines = text.splitlines()
    known: dict[str, Parameter] = {}
    for node in ast.parse(text).body:
        parameter = _parameter(key, where, node, lines[node.lineno - 1])
        known[parameter.name] = parameter
    if next(iter(known), None) != "profile" or known["profile"].annotation != "str":
        raise NotebookError(f'{where}: the first line must be `profile: str = "quick"  # ...`')
    if "notebook" in known:
        raise NotebookError(
            f"{where}: 'notebook' is taken, it holds the notebook's name; choose another name"
        )
    return known


def _parameter(key: str, where: str, node: ast.stmt, line: str) -> Parameter:
    """Reads one line of the parameters cell, its default typed."""
    if (
        not isinstance(node, ast.AnnAssign)
        or not isinstance(node.target, ast.Name)
        or node.value is None
    ):
        raise NotebookError(
            f"{where}: only lines like `seed: int = 0  # what it is` are allowed, got {line!r}"
        )
    name, annotation = node.target.id, ast.unparse(node.annotation)
    _check_line(where, line, name, annotation)
    default = ast.literal_eval(node.value)
    parameter = Parameter(name, annotation, default, line.split("#", 1)[1].strip())
    if default is None:
        return parameter
    return Parameter(name, annotation, typed(key, parameter, default), parameter.help)


def _check_line(where: str, line: str, name: str, annotation: str) -> None:
    """Refuses a line that papermill's inspector cannot read, so that its help is complete."""
    if annotation not in TYPES:
        raise NotebookError(
            f"{where}: {name} is annotated {annotation!r}; valid: {', '.join(TYPES)}"
        )
    if "#" not in line or not line.split("#", 1)[1].strip():
        raise NotebookError(
            f"{where}: {name} needs a trailing comment that says what it is, "
            "with unit and usual range"
        )
    if line.count("=") != 1:
        raise NotebookError(
            f"{where}: the line of {name} has more than one '='; "
            "papermill cannot read it, reword it"
        )


def known_parameter(key: str, known: Mapping[str, Parameter], name: str, trouble: str) -> Parameter:
    """Returns a parameter by name, or raises NotebookError: `trouble`, the name, what there is."""
    if name not in known:
        listing = "; ".join(f"{p.name}: {p.annotation}" for p in known.values())
        raise NotebookError(f"{trouble} {name!r} for {key}; it has {listing}")
    return known[name]


# -- values --------------------------------------------------------------------


def typed(key: str, parameter: Parameter, value: Any) -> Any:
    """Returns a value as the annotation of its parameter says, a list as a tuple.

    Nothing is guessed: True is no int, 1.5 is no int, 8 is a float. Only the items of a list may
    be text that is to be read. Raises NotebookError naming field, value, annotation and help.
    """
    from pydantic import ValidationError

    item = parameter.annotation.removeprefix("list[").removesuffix("]")
    is_list = item != parameter.annotation
    try:
        checked = _adapter(parameter.annotation).validate_python(
            _items(value, item) if is_list else value
        )
    except ValidationError:
        raise NotebookError(
            f"{parameter.name}={value!r} for {key} is not {parameter.annotation}: {parameter.help}"
        ) from None
    return tuple(checked) if is_list else checked


def from_text(key: str, given: Mapping[str, str]) -> dict[str, Any]:
    """Types the overrides of a command line; unknown names and bad values are refused."""
    known, values = parameters(key), {}
    for name, text in given.items():
        parameter = known_parameter(key, known, name, "unknown parameter")
        is_scalar = parameter.annotation in READERS
        values[name] = typed(
            key, parameter, _read(text, parameter.annotation) if is_scalar else text
        )
    return values


@cache
def _adapter(annotation: str) -> TypeAdapter:
    """Builds pydantic's check of an annotation, on first use: `import lib` must stay fast."""
    from pydantic import ConfigDict, TypeAdapter

    return TypeAdapter(TYPES[annotation], config=ConfigDict(strict=True, allow_inf_nan=False))


def _items(value: Any, item: str) -> list[Any]:
    """Splits "2,4,8", or takes one value for a list of it; items that are text are read."""
    if isinstance(value, str):
        value = value.split(",")
    items = value if isinstance(value, list | tuple) else [value]
    return [_read(part.strip(), item) if isinstance(part, str) else part for part in items]


def _read(text: str, scalar: str) -> Any:
    """Reads text as a scalar; what cannot be read stays text, for `typed` to refuse by name."""
    try:
        return READERS[scalar](text)
    except (ValueError, KeyError):
        return text
