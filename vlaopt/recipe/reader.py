"""Strict YAML: the bytes of a file to plain values, with the line and column of every key.

Works on PyYAML's events without recursion. It must not know what the keys mean.

Scalars follow YAML 1.2's core schema, so `no`, `on` and `12:30` are text and `1e-3` is a number. A plain number
remembers how it was written (`PlainInt.text`, `PlainFloat.text`), so that a text field gets `10.10` and not `10.1`.
Numbers with leading zeros (`010`) or underscores stay text: readers of YAML disagree about them. Keys are always text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlaopt.errors import InputError, RecipeError
from vlaopt.files import read_file

KeyPath = tuple[str | int, ...]
"""Where a value lives: keys of mappings and indices of lists, from the top."""

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_NUMBER_LENGTH = 64
MAX_PROBLEMS = 100

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_PREFIXED_INTEGER = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: Mapping[str, bool | None] = {
    **dict.fromkeys(["", "~", "null", "Null", "NULL"], None),
    **dict.fromkeys(["true", "True", "TRUE"], True),
    **dict.fromkeys(["false", "False", "FALSE"], False),
}


class PlainInt(int):
    """A whole number that remembers how it was written."""

    text: str = ""


class PlainFloat(float):
    """A number that remembers how it was written."""

    text: str = ""


@dataclass(frozen=True)
class Document:
    """The values of one file, and for every key path the (line, column) of its key, counted from 1."""

    values: Any
    places: Mapping[KeyPath, tuple[int, int]]


def read_mapping(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping.

    Raises InputError for a file that is missing, above 1 MiB, binary or empty, and RecipeError with every problem of
    its YAML: duplicate keys, anchors, aliases, tags, merge keys, several documents, nesting deeper than 32, infinities.
    """
    source = str(path)
    return parse_mapping(_decoded(read_file(path, limit=MAX_BYTES), source), source)


def parse_mapping(text: str, source: str) -> Document:
    """Read YAML text whose top level is a mapping; `source` names it in errors (see `read_mapping`)."""
    document = parse(text, source)
    if document.values is None:
        raise InputError("empty file", where=source, hint="is it the file you meant?")
    if not isinstance(document.values, dict):
        raise InputError("the top level must be a mapping of keys", where=f"{source}:1:1")
    return document


def parse(text: str, source: str) -> Document:
    """Read YAML text with any value at its top level; an empty text is null. Raises RecipeError."""
    builder = _Builder(source)
    try:
        for event in _events(text, source):
            builder.take(event)
            if len(builder.problems) >= MAX_PROBLEMS:
                break
    except InputError as error:
        builder.problems.append(error)
    if builder.problems:
        raise RecipeError(builder.problems)
    return Document(builder.root, builder.places)


def _decoded(data: bytes, source: str) -> str:
    if b"\0" in data:
        raise InputError("a binary file, not YAML", where=source)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise InputError("not UTF-8 text", where=f"{source}:{line}:{column}") from error


def _events(text: str, source: str) -> Iterator[yaml.Event]:
    try:
        yield from yaml.parse(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        raise InputError(f"not valid YAML: {error.problem or error.context}", where=where) from error
    except yaml.reader.ReaderError as error:
        raise InputError(f"not valid YAML: {error.reason}", where=source) from error


@dataclass
class _Frame:
    """A mapping or list that is being filled."""

    container: dict[str, Any] | list[Any]
    path: KeyPath
    lines: dict[str, int] = field(default_factory=dict)
    key: str | None = None
    duplicate: bool = False


class _Builder:
    """Builds values from events, one at a time. Problems that make what follows unreadable raise at once."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.root: Any = None
        self.places: dict[KeyPath, tuple[int, int]] = {(): (1, 1)}
        self.problems: list[InputError] = []
        self._frames: list[_Frame] = []
        self._documents = 0

    def take(self, event: yaml.Event) -> None:
        if isinstance(event, yaml.DocumentStartEvent):
            self._start_document(event)
        elif isinstance(event, yaml.AliasEvent):
            raise self._problem(
                event, f"alias `*{event.anchor}`", "write the value out; anchors and aliases are refused"
            )
        elif isinstance(event, yaml.NodeEvent):
            self._take_node(event)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._frames.pop()

    def _start_document(self, event: yaml.DocumentStartEvent) -> None:
        self._documents += 1
        if self._documents > 1:
            raise self._problem(event, "a second document starts here", "one file holds one document; remove the `---`")
        if event.version or event.tags:
            raise self._problem(event, "a YAML directive", "remove the line that starts with `%`")

    def _take_node(self, event: yaml.NodeEvent) -> None:
        if event.anchor is not None:
            raise self._problem(
                event, f"anchor `&{event.anchor}`", "anchors and aliases are refused; write the value out"
            )
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise self._problem(event, f"tag `{tag}`", "tags are refused; write the plain value")
        frame = self._frames[-1] if self._frames else None
        expects_key = frame is not None and isinstance(frame.container, dict) and frame.key is None
        if isinstance(event, yaml.ScalarEvent):
            self._check_characters(event)
            if frame is not None and expects_key:
                self._take_key(event, frame)
            else:
                self._put(self._scalar(event), event)
        elif expects_key:
            raise self._problem(event, "a list or mapping used as a key", "keys are plain text")
        else:
            self._open(event)

    def _open(self, event: yaml.NodeEvent) -> None:
        if len(self._frames) >= MAX_DEPTH:
            raise self._problem(event, f"nested deeper than {MAX_DEPTH} levels", None)
        container: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        path = self._put(container, event)
        self._frames.append(_Frame(container, path))

    def _take_key(self, event: yaml.ScalarEvent, frame: _Frame) -> None:
        key, line = event.value, _position(event)[0]
        if key == "<<" and not event.style:
            self.problems.append(self._problem(event, "merge key `<<`", "write the keys out"))
        if key == "":
            self.problems.append(self._problem(event, "a key is missing in front of `:`", None))
        frame.key, frame.duplicate = key, key in frame.lines
        if frame.duplicate:
            message = f"duplicate key `{key}` (first on line {frame.lines[key]})"
            self.problems.append(self._problem(event, message, "keep one of them"))
        else:
            frame.lines[key] = line
            path: KeyPath = (*frame.path, key)
            self.places[path] = _position(event)

    def _put(self, value: Any, event: yaml.Event) -> KeyPath:
        """Store `value` where the open frame wants it; returns its path."""
        if not self._frames:
            self.root = value
            return ()
        frame = self._frames[-1]
        if isinstance(frame.container, list):
            path: KeyPath = (*frame.path, len(frame.container))
            self.places.setdefault(path, _position(event))
            frame.container.append(value)
            return path
        key = frame.key if frame.key is not None else ""
        if not frame.duplicate:
            frame.container[key] = value
        frame.key = None
        return (*frame.path, key)

    def _scalar(self, event: yaml.ScalarEvent) -> Any:
        text: str = event.value
        if event.style:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _NOT_FINITE.fullmatch(text):
            return self._refuse(event, f"`{text}` is not a finite number")
        if _INTEGER.fullmatch(text) or _PREFIXED_INTEGER.fullmatch(text):
            return self._integer(event, text)
        return self._float(event, text) if _FLOAT.fullmatch(text) else text

    def _integer(self, event: yaml.ScalarEvent, text: str) -> Any:
        if len(text) > MAX_NUMBER_LENGTH:
            return self._refuse(event, f"a number of {len(text)} digits")
        number = PlainInt(text, 0)
        number.text = text
        return number

    def _float(self, event: yaml.ScalarEvent, text: str) -> Any:
        if len(text) > MAX_NUMBER_LENGTH:
            return self._refuse(event, f"a number of {len(text)} digits")
        number = PlainFloat(text)
        if not math.isfinite(number):
            return self._refuse(event, f"`{text}` is not a finite number")
        number.text = text
        return number

    def _refuse(self, event: yaml.Event, message: str) -> None:
        self.problems.append(self._problem(event, message, None))

    def _check_characters(self, event: yaml.ScalarEvent) -> None:
        if "\0" in event.value or any("\ud800" <= letter <= "\udfff" for letter in event.value):
            raise self._problem(event, "a character that is not text", None)

    def _problem(self, event: yaml.Event, message: str, hint: str | None) -> InputError:
        line, column = _position(event)
        return InputError(message, where=f"{self.source}:{line}:{column}", hint=hint)


def _position(event: yaml.Event) -> tuple[int, int]:
    """Line and column of an event, counted from 1."""
    mark = event.start_mark
    return (mark.line + 1, mark.column + 1) if mark else (1, 1)
