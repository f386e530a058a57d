"""pybind11's signature lines, and calls held against them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Resolve = Callable[[str], Any]
_NONE = object()


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    default: Any = _NONE


@dataclass(frozen=True)
class Form:
    """One overload. `bound` when it takes `self`."""

    text: str
    bound: bool
    arguments: tuple[Argument, ...]


def parse(text: str) -> Form:
    """The arguments of "name(self: Builder, flags: int = 0) -> INetworkDefinition"."""
    inside = text[text.index("(") + 1 : text.rindex(")", 0, text.rindex("->"))]
    parts = [part for part in _split(inside) if part]
    arguments = []
    for part in parts:
        name, _, rest = part.partition(":")
        kind, equals, default = rest.partition(" = ")
        arguments.append(Argument(name.strip(), kind.strip(), _default(default.strip()) if equals else _NONE))
    bound = bool(arguments) and arguments[0].name == "self"
    return Form(text, bound, tuple(arguments[1:] if bound else arguments))


def bind(
    label: str, forms: Sequence[Form], given: tuple[Any, ...], named: dict[str, Any], resolve: Resolve
) -> list[Any]:
    """The arguments in the order of the first overload that takes them. Raises TypeError as pybind11 does."""
    for form in forms:
        values = _fit(form, given, named, resolve)
        if values is not None:
            return values
    name = label.rsplit(".", 1)[-1]
    known = "\n".join(f"    {index}. {form.text}" for index, form in enumerate(forms, 1))
    shown = ", ".join([*map(repr, given), *(f"{key}={value!r}" for key, value in named.items())])
    raise TypeError(
        f"{name}(): incompatible function arguments. The following argument types are supported:\n{known}\n\n"
        f"Invoked with: {label} {shown[:400]}"
    )


def accepts(kind: str, value: Any, resolve: Resolve) -> bool:
    """Whether pybind11 would convert `value` to `kind`; types that this module does not know are let through."""
    kind = kind.removeprefix("nvinfer1::").removeprefix("nvonnxparser::")
    if kind in ("int", "typing.SupportsInt"):
        return not isinstance(value, float | str | bytes) and hasattr(value, "__int__")
    if kind in ("float", "typing.SupportsFloat"):
        return not isinstance(value, str | bytes) and hasattr(value, "__float__")
    if kind == "bool":
        return isinstance(value, bool) or type(value).__name__ == "bool"
    if kind == "str":
        return isinstance(value, str)
    if kind in ("bytes", "buffer", "typing_extensions.Buffer"):
        try:
            memoryview(value)
        except TypeError:
            return False
        return True
    if kind in ("tuple", "list"):
        return isinstance(value, tuple if kind == "tuple" else list)
    if found := re.fullmatch(r"(?:List|list|Iterable|collections\.abc\.(?:Sequence|Iterable))\[(.*)\]", kind):
        return isinstance(value, list | tuple) and all(accepts(found[1], item, resolve) for item in value)
    wanted = resolve(kind)
    if not isinstance(wanted, type):
        return True
    if isinstance(value, wanted):
        return True
    return wanted.__name__ in ("Dims", "Permutation") and _are_integers(value)


def _are_integers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(accepts("int", item, lambda _: None) for item in value)


def _fit(form: Form, given: tuple[Any, ...], named: dict[str, Any], resolve: Resolve) -> list[Any] | None:
    known = [argument.name for argument in form.arguments]
    if len(given) > len(known) or set(named) - set(known[len(given) :]):
        return None
    values = []
    for index, argument in enumerate(form.arguments):
        if index < len(given):
            value = given[index]
        elif argument.name in named:
            value = named[argument.name]
        elif argument.default is not _NONE:
            values.append(_member(argument.default, resolve))
            continue
        else:
            return None
        if value is None and argument.default is None:
            values.append(None)
        elif not accepts(argument.type, value, resolve):
            return None
        else:
            values.append(value)
    return values


@dataclass(frozen=True)
class _Member:
    kind: str
    name: str


def _member(default: Any, resolve: Resolve) -> Any:
    if not isinstance(default, _Member):
        return default
    kind = resolve(default.kind) or resolve(f"ILogger.{default.kind}")
    return getattr(kind, default.name)


def _default(text: str) -> Any:
    if found := re.fullmatch(r"<(\w+)\.(\w+): \d+>", text):
        return _Member(found[1], found[2])
    plain = {"None": None, "True": True, "False": False}
    if text in plain:
        return plain[text]
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if re.fullmatch(r"-?[\d.]+(?:e-?\d+)?", text):
        return float(text)
    return text.strip("'\"")


def _split(text: str) -> list[str]:
    parts, depth, last = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "[(<") - (letter in "])>")
        if letter == "," and depth == 0:
            parts.append(text[last:index])
            last = index + 1
    return [*parts, text[last:]]
