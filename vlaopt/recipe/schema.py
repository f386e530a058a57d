"""The recipe described: a JSON Schema for editors, and a flat list of keys for people. Made from `model` alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vlaopt.recipe.model import SCHEMA, RecipeFile
from vlaopt.recipe.problems import choices_of, section_of

DIALECT = "https://json-schema.org/draft/2020-12/schema"


@dataclass(frozen=True)
class Key:
    """One key of a recipe: its dotted path (`*` for an item of a list), its default, and what it means."""

    path: str
    default: str
    description: str


def recipe_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe's file. Editors complete and check recipes with it."""
    schema = RecipeFile.model_json_schema(by_alias=True)
    return {"$schema": DIALECT, "$id": SCHEMA, **schema, "title": "vlaopt recipe"}


def recipe_keys() -> tuple[Key, ...]:
    """Every key that a recipe may hold, in the order of the model; a section comes before its keys."""
    return tuple(_keys(RecipeFile, ""))


def keys_as_markdown() -> str:
    """The table of keys that `recipes/README.md` holds."""
    return "\n".join(["| key | default | meaning |", "|---|---|---|", *map(_row, recipe_keys())])


def _keys(model: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, info in model.model_fields.items():
        path = f"{prefix}{info.alias or name}"
        section, many = section_of(info.annotation)
        yield Key(path, _default(info, has_keys=section is not None and not many), _meaning(info))
        if section is not None:
            yield from _keys(section, f"{path}.*." if many else f"{path}.")


def _row(key: Key) -> str:
    # A bar inside of a cell would end it.
    return f"| `{key.path}` | {key.default} | " + key.description.replace("|", "\\|") + " |"


def _meaning(info: FieldInfo) -> str:
    choices = choices_of(info.annotation)
    return f"{info.description} One of {', '.join(choices)}." if len(choices) > 1 else info.description or ""


def _default(info: FieldInfo, *, has_keys: bool) -> str:
    if info.is_required():
        return "required"
    if isinstance(info.default, BaseModel) and has_keys:
        return "see its keys"
    return json.dumps(info.default)
