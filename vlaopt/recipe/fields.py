"""The kinds of value that recipes and targets are made of. Knows no key by name."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from vlaopt.recipe.reader import PlainFloat, PlainInt

T = TypeVar("T")

_SLUG = r"^[a-z0-9][a-z0-9._-]*$"
_SEMVER = r"^(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)\.(0|[1-9][0-9]*)(-[0-9A-Za-z.-]+)?$"


class Section(BaseModel):
    """A mapping of known keys: frozen, nothing unknown, no coercion except a whole number given for a float."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def as_json(self) -> dict[str, Any]:
        """The section with every default written out, as plain JSON values under the keys of the file."""
        return self.model_dump(mode="json", by_alias=True)


def _as_written(value: object) -> object:
    return value.text if isinstance(value, PlainInt | PlainFloat) else value


def _slug(value: str) -> str:
    if not re.fullmatch(_SLUG[1:-1], value) or len(value) > 64:
        raise ValueError(f"{value!r} is not a name: up to 64 of a-z 0-9 . _ - and a letter or digit first")
    return value


def _semver(value: str) -> str:
    if not re.fullmatch(_SEMVER[1:-1], value):
        raise ValueError(f"{value!r} is not a version: three numbers such as 1.0.0 (or 1.0.0-rc.1)")
    return value


def _path(value: str) -> str:
    if not value:
        raise ValueError("an empty path")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
        raise ValueError(f"{value!r} is not a path: it holds a control character")
    return value


Text = Annotated[str, BeforeValidator(_as_written)]
"""Text; a plain number is taken as it was written."""

Slug = Annotated[Text, AfterValidator(_slug), Field(json_schema_extra={"pattern": _SLUG})]
SemanticVersion = Annotated[Text, AfterValidator(_semver), Field(json_schema_extra={"pattern": _SEMVER})]
PathText = Annotated[Text, AfterValidator(_path), Field(json_schema_extra={"minLength": 1})]

# YAML has lists only; a strict tuple would refuse them. What the tuple holds stays strict.
Many = Annotated[tuple[T, ...], Strict(False)]

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
