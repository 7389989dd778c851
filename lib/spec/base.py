"""What all descriptions share: frozen, strict, and named by a hash of what differs from the
defaults."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Spec(BaseModel):
    """Base of all descriptions: frozen, strict about types, closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    semantics: ClassVar[int] = 1
    unhashed: ClassVar[frozenset[str]] = frozenset()

    def canonical(self) -> dict[str, Any]:
        """The hashed content: fields that differ from their default, and the semantics of every
        part."""
        out: dict[str, Any] = {"semantics": type(self).semantics}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            nested = isinstance(
                value, Spec
            )  # always in, at its default too: its semantics number belongs to the hash
            if name in self.unhashed or (
                value == field.get_default(call_default_factory=True) and not nested
            ):
                continue
            out[name] = value.canonical() if nested else value
        return out

    @property
    def id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the canonical content."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def but(self, **changes: Any):
        """A validated copy with some fields changed; a dict for a nested spec changes fields inside
        it."""
        merged = {name: getattr(self, name) for name in type(self).model_fields}
        for name, value in changes.items():
            old = merged.get(name)
            merged[name] = (
                old.but(**value) if isinstance(old, Spec) and isinstance(value, dict) else value
            )
        return type(self)(**merged)
