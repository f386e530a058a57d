"""Turns pydantic's errors into errors a person can act on: what, at which line and key, and how to mend it."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from vlaopt.errors import InputError
from vlaopt.recipe.reader import KeyPath, PlainFloat, PlainInt

_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
}
_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}
_ORDER_WORDS = {"order", "stages", "steps", "pipeline"}


@dataclass(frozen=True)
class Place:
    """Where one value was written: a file's line, or an option of the command line."""

    source: str
    line: int | None
    prefix: KeyPath = ()


class Places:
    """Where every value of a recipe or target came from."""

    def __init__(self, places: Mapping[KeyPath, Place]) -> None:
        self._places = dict(places)

    @classmethod
    def of(cls, source: str, places: Mapping[KeyPath, tuple[int, int]], below: KeyPath = ()) -> Places:
        """The places of a file's keys; `below` keeps only those under that key, named from it."""
        size = len(below)
        kept = {path: line for path, (line, _) in places.items() if path[:size] == below}
        return cls({path[size:]: Place(source, line, below) for path, line in kept.items()})

    def over(self, other: Places) -> Places:
        """These places, and those of `other` for values that have none here."""
        return Places({**other._places, **self._places})

    def replaced(self, path: KeyPath, place: Place) -> Places:
        """These places, with the value at `path` and all below it now coming from `place`."""
        kept = {own: had for own, had in self._places.items() if own[: len(path)] != path}
        return Places({**kept, path: place})

    def nearest(self, path: KeyPath) -> Place:
        """The place of the value, else of the nearest mapping around it."""
        return next(self._places[path[:size]] for size in range(len(path), -1, -1) if path[:size] in self._places)

    def where(self, path: KeyPath) -> str:
        """`file:line:key`, or `--set key` for a value of the command line."""
        place = self.nearest(path)
        key = dotted((*place.prefix, *path))
        if place.line is None:
            return f"{place.source} {key}"
        return f"{place.source}:{place.line}:{key}" if key else f"{place.source}:{place.line}"

    def line(self, path: KeyPath) -> int:
        """For sorting: the line of `path`; values of the command line come last."""
        line = self.nearest(path).line
        return line if line is not None else 1 << 30


def dotted(path: Sequence[str | int]) -> str:
    """A key path as it is written for people: `quantize.rules.0.scheme`."""
    return ".".join(map(str, path))


def validation_errors(model: type[BaseModel], values: Any) -> list[ErrorDetails]:
    """All of pydantic's errors for `values`; empty when they are valid."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        return error.errors(include_url=False)
    return []


def problems_of(model: type[BaseModel], values: Any, places: Places) -> list[InputError]:
    """Everything wrong with `values` as a `model`, in the order of the lines."""
    errors = sorted(validation_errors(model, values), key=lambda error: places.line(error["loc"]))
    return [as_problem(model, error, places) for error in errors]


def as_problem(model: type[BaseModel], error: ErrorDetails, places: Places) -> InputError:
    """One of pydantic's errors as it is shown to a person."""
    path = tuple(part for part in error["loc"] if part != "[key]")
    message, hint = _explain(model, error, path)
    return InputError(message, where=places.where(path), hint=hint)


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The words that a value of this annotation can be; empty when it is not a choice of words."""
    bare = _bare(annotation)
    return tuple(map(str, get_args(bare))) if get_origin(bare) is Literal else ()


def section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a value of this annotation holds (None for a plain value), and whether as a list of them."""
    bare = _bare(annotation)
    many = get_origin(bare) is tuple
    inner = _bare(get_args(bare)[0]) if many else bare
    return (inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None), many


def _explain(model: type[BaseModel], error: ErrorDetails, path: KeyPath) -> tuple[str, str | None]:
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    key = dotted(path[-1:])
    if kind == "missing":
        return f"`{dotted(path)}` is missing", _description_hint(model, path)
    if kind == "extra_forbidden":
        return f"unknown key `{key}`", _unknown_key_hint(model, path)
    if kind == "literal_error":
        return _explain_choice(model, path, value)
    if kind in _WANTED:
        return f"`{key}` should be {_WANTED[kind]}, not {_described(value)}", _type_hint(kind, value)
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"`{key}` is {_described(value)}, but must be {words} {context[bound]}", None
    if kind == "value_error":
        reason = str(context["error"])
        return (f"`{key}`: {reason}" if key else reason), None
    if kind == "too_short":
        return f"`{key}` is an empty list", None
    return f"`{key}`: {error['msg']}", None


def _explain_choice(model: type[BaseModel], path: KeyPath, value: Any) -> tuple[str, str | None]:
    key, choices = dotted(path[-1:]), choices_of(_annotation_at(model, path))
    if not choices:  # then it is a key that is at fault, of a mapping whose keys are fixed
        keys = get_args(_annotation_at(model, path[:-1]))[0]
        return f"unknown key `{key}`", _near(key, choices_of(keys), "known keys")
    return f"`{key}` cannot be {_described(value)}", _near(str(value), choices, "one of")


def _unknown_key_hint(model: type[BaseModel], path: KeyPath) -> str:
    if len(path) == 1 and path[0] in _ORDER_WORDS:
        return "stages have one order: export, prune, quantize, onnx, engine, verify, bench; leave the key out"
    parent = _annotation_at(model, path[:-1])
    known = [info.alias or name for name, info in _fields(parent)]
    return _near(str(path[-1]), known, "known keys")


def _near(word: str, choices: Sequence[str], label: str) -> str:
    close = difflib.get_close_matches(word, choices, n=1)
    listed = f"{label}: {', '.join(choices)}"
    return f"did you mean `{close[0]}`? {listed}" if close else listed


def _description_hint(model: type[BaseModel], path: KeyPath) -> str | None:
    for name, info in _fields(_annotation_at(model, path[:-1])):
        if (info.alias or name) == path[-1]:
            description: str | None = info.description
            return description
    return None


def _type_hint(kind: str, value: Any) -> str | None:
    if kind in ("int_type", "float_type") and isinstance(value, str):
        return "write a number without quotes, underscores or leading zeros"
    if kind == "string_type" and isinstance(value, bool):
        return "put it in quotes"
    return None


def _described(value: Any) -> str:
    """A value in words, short enough for one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, PlainInt | PlainFloat):
        return value.text
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57]!r}..."
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else repr(value)


def _fields(annotation: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from annotation.model_fields.items()


def _annotation_at(model: type[BaseModel], path: KeyPath) -> Any:
    """The annotation of the value at `path`, without Optional and Annotated; None where there is none."""
    annotation: Any = model
    for part in path:
        annotation = _step(_bare(annotation), part)
    return _bare(annotation)


def _step(annotation: Any, part: str | int) -> Any:
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0]
    if get_origin(annotation) is dict:
        return get_args(annotation)[1]
    found = (info.annotation for name, info in _fields(annotation) if (info.alias or name) == part)
    return next(found, None)


def _bare(annotation: Any) -> Any:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _bare(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return _bare(next(arg for arg in get_args(annotation) if arg is not type(None)))
    return annotation
