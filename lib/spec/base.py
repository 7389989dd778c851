"""Gives all descriptions what they share: they are frozen, strict, and named by a hash.

Which rules keep old hashes valid stands in `lib.spec`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

Share = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Spec(BaseModel):
    """Is the base of all descriptions: frozen, strict about types, closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    semantics: ClassVar[int] = 1  # bumped when a change to the code would alter results
    unhashed: ClassVar[frozenset[str]] = frozenset()  # fields that decide no result

    def canonical(self) -> dict[str, Any]:
        """Lists what is hashed: the fields that differ from their default, and every semantics."""
        content: dict[str, Any] = {"semantics": type(self).semantics}
        for name, field in type(self).model_fields.items():
            if name in self.unhashed:
                continue
            value = getattr(self, name)
            if isinstance(value, Spec):
                # in at its default, too: its semantics number belongs to the hash
                content[name] = value.canonical()
            elif value != field.get_default(call_default_factory=True):
                content[name] = value
        return content

    @property
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
