"""`--set key.path=value`: one value of a recipe, written by the same rules as in its file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vlaopt.errors import InputError
from vlaopt.recipe.reader import KeyPath, parse


@dataclass(frozen=True)
class Override:
    """One value and the key path it replaces."""

    path: KeyPath
    value: Any

    @property
    def where(self) -> str:
        return f"--set {'.'.join(map(str, self.path))}"


def parse_override(text: str) -> Override:
    """Read `key.path=value`; an index names an item of a list, as in `quantize.rules.0.scheme=fp32`.

    Raises InputError (RecipeError for the value's YAML) that starts with `--set`.
    """
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        hint = "such as --set quantize.scheme=none"
        raise InputError(f"{text!r} is not key=value", where="--set", hint=hint)
    path = tuple(parts)
    return Override(path, parse(value, source=f"--set {key.strip()}").values)


def apply_override(values: dict[str, Any], override: Override) -> KeyPath:
    """Put the value into `values`, in place; mappings on the way are made. Returns the path of what is new by it.

    Raises InputError when the path leads through a value that holds no keys, or to an item that a list lacks.
    """
    path: KeyPath = ()
    new: KeyPath | None = None
    container: Any = values
    for part in override.path[:-1]:
        key = _key(container, part, override)
        path += (key,)
        if isinstance(container, dict) and container.get(key) is None:
            container[key] = {}
            new = new or path
        container = container[key]
        if not isinstance(container, dict | list):
            raise InputError(f"`{part}` holds a value, not keys", where=override.where)
    key = _key(container, override.path[-1], override)
    container[key] = override.value
    return new or (*path, key)


def _key(container: dict[str, Any] | list[Any], part: str | int, override: Override) -> str | int:
    if isinstance(container, dict):
        return part
    text = str(part)
    if not (text.isascii() and text.isdigit() and int(text) < len(container)):
        hint = f"the list has {len(container)} items, counted from 0; set the whole list to change its length"
        raise InputError(f"no item `{part}` in the list", where=override.where, hint=hint)
    return int(text)
