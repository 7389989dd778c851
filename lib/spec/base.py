"""Gives all descriptions what they share: they are frozen, strict, and named by a hash.

Which rules keep old hashes valid stands in `lib.spec`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar
from urllib.parse import quote

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

MOST_EXPERTS = 4096

# Values with which a run can work in principle; whether a machine is large enough shows there.
Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]  # a number of images, tokens or neighbours
Size = Annotated[int, Field(ge=1, le=2**16)]  # of one axis: products of four fit 64 bits
Depth = Annotated[int, Field(ge=1, le=1024)]  # a number of blocks, or that of one
Experts = Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
ClassNumber = Annotated[int, Field(ge=0, lt=2**20)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what NumPy and scikit-learn take, not torch alone
# What float32 holds: with a value that is only foolish a run ends and says that it diverged.
Rate = Annotated[float, Field(ge=1e-12, le=1e38)]  # of learning; below it no weight moves
Weight = Annotated[float, Field(ge=0, le=1e38)]  # of a loss, or a standard deviation
Guard = Annotated[float, Field(ge=1e-38, le=1e6)]  # a divisor, or what is added to one


def _printable(name: str) -> str:
    """Refuses text that a page or a file name cannot show as it is."""
    if not name.isprintable() or any(mark in name for mark in "<>`"):
        raise ValueError("a name has no control character, no <, no > and no backtick")
    return name


@functools.lru_cache(maxsize=1024)  # a plan of thousands of runs has the same few names
def _file_name(name: str) -> str:
    """Refuses a name that leads out of a folder, or that no file can have."""
    parts = re.sub("^(hub|file|pth|satmae|vmoe):", "", name).split("/")
    if {"", ".", ".."} & set(parts):
        raise ValueError(
            "a name is a path below a folder: no / at its start or end, no part that is empty, . "
            "or .."
        )
    _printable(name)
    if len(quote(name, safe="")) > 200:  # the name of a packed data set is written like this
        raise ValueError("a name has at most 200 letters; others than A to Z count 3 and more")
    return name


@functools.lru_cache(maxsize=1024)
def _folder_name(name: str) -> str:
    """Refuses a name that has other than letters, digits, _, - and . between its slashes."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*", name):
        raise ValueError("a folder's name has letters, digits, _, - and ., and / inside")
    return _file_name(name)


ColumnName = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
FileName = Annotated[str, AfterValidator(_file_name)]
FolderName = Annotated[str, AfterValidator(_folder_name)]


class Spec(BaseModel):
    """Is the base of all descriptions: frozen, strict about types, closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    semantics: ClassVar[int] = 1  # bumped when a change to the code would alter results
    unhashed: ClassVar[frozenset[str]] = frozenset()  # fields that decide no result

    def canonical(self) -> dict[str, Any]:
        """Lists what is hashed: the fields that differ from their default, and every semantics."""
        content: dict[str, Any] = {"semantics": type(self).semantics}
        for name, default in _defaults(type(self)).items():
            value = getattr(self, name)
            if isinstance(value, Spec):
                # in at its default, too: its semantics number belongs to the hash
                content[name] = value.canonical()
            elif value != default:
                content[name] = value
        return content

    @functools.cached_property  # a plan of thousands of runs asks for it again and again
    def id(self) -> str:
        """Names the description: 16 hexadecimal digits of the SHA-256 of its canonical content."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def but(self, **changes: Any):
        """Gives a validated copy with some fields changed.

        A dict for a nested spec changes fields inside it.
        """
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        for name, value in changes.items():
            old = fields.get(name)
            if isinstance(old, Spec) and isinstance(value, dict):
                value = old.but(**value)
            fields[name] = value
        return type(self)(**fields)


@functools.cache
def _defaults(kind: type[Spec]) -> dict[str, Any]:
    """Lists the defaults of the fields that are hashed."""
    return {
        name: field.get_default(call_default_factory=True)
        for name, field in kind.model_fields.items()
        if name not in kind.unhashed
    }


def sentence(error: ValidationError) -> str:
    """Says in one line what specs refuse: field, value, what is valid."""
    return "; ".join(dict.fromkeys(map(_said, error.errors(include_url=False))))


def _said(one: Any) -> str:
    """Says one error of pydantic's list. Rules over several fields name these themselves."""
    # a choice of types, such as a number or None, ends in the type that was tried
    field = ".".join(part for part in map(str, one["loc"]) if not part.startswith("constrained-"))
    reason = one["msg"].removeprefix("Value error, ").replace("Input should", "it should")
    if one["type"] == "extra_forbidden":
        reason = f"there is no such field{_near(str(one['loc'][-1]))}"
    if isinstance(one["input"], dict | Spec) and one["type"] == "value_error":
        return f"{field}: {reason}" if field else reason
    return f"{field}={_short(one['input'])}: {reason}"


def _near(name: str) -> str:
    """Lists fields of specs whose names are like one that is none."""
    kinds = [kind for kind in Spec.__subclasses__() if kind.__module__.startswith(__package__)]
    fields = {field for kind in kinds for field in kind.model_fields}
    near = get_close_matches(name, sorted(fields))
    return f"; near it: {', '.join(near)}" if near else ""


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        text = f"a {type(value).__name__} too long to write"
    return text if len(text) <= 60 else f"{text[:57]}..."
