"""A lane's Python surface made into classes: what it lacks raises, calls are held against pybind's signatures."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from standin import signature
from standin.settings import Settings

API = Path(__file__).resolve().parents[1] / "api"


class EnumType(type):
    """Members by name, `__members__`, construction from a number, as pybind's enums have them."""

    __members__: dict[str, Any]

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"{cls.__module__} {cls._lane} has no {cls.__qualname__}.{name}")

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"{cls.__qualname__} cannot be changed")


class Enum(metaclass=EnumType):
    """A pybind11 enum: equal only to its own kind, no number by itself, yet `int()` gives its value."""

    _lane = ""

    def __new__(cls, value: int) -> Any:
        for member in cls.__members__.values():
            if member._value == int(value):
                return member
        raise ValueError(f"{value} is no value of {cls.__qualname__}")

    @property
    def name(self) -> str:
        return self._name

    @property
    def value(self) -> int:
        return self._value

    def __int__(self) -> int:
        return self._value

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self._value == other._value

    def __hash__(self) -> int:
        return self._value

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self._name}"

    def __repr__(self) -> str:
        return f"<{self}: {self._value}>"

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self} cannot be changed")


def make_enum(module: str, lane: str, qualname: str, members: Mapping[str, int]) -> type[Enum]:
    """The enum of these members; two names of one value are one member, as in C++."""
    kind = EnumType(
        qualname.rsplit(".", 1)[-1], (Enum,), {"__module__": module, "__qualname__": qualname, "_lane": lane}
    )
    named: dict[str, Any] = {}
    for name, value in members.items():
        same = next((known for known in named.values() if known._value == value), None)
        member = object.__new__(kind) if same is None else same
        if same is None:
            object.__setattr__(member, "_name", name)
            object.__setattr__(member, "_value", value)
        named[name] = member
        type.__setattr__(kind, name, member)
    type.__setattr__(kind, "__members__", named)
    return kind


class ClassType(type):
    """Refuses construction where pybind has no constructor, and objects whose base was never initialised."""

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        made = super().__call__(*arguments, **named)
        if "_made" not in made.__dict__:
            raise TypeError(f"{cls._bound()}.__init__() must be called when overriding __init__")
        return made

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(f"{cls.__module__} {getattr(cls, '_lane', '')} has no {cls.__qualname__}.{name}")

    def _bound(cls) -> str:
        return next(f"{kind.__module__}.{kind.__qualname__}" for kind in cls.__mro__ if "_surface" in kind.__dict__)


class Bound(metaclass=ClassType):
    """Base of every generated class. State of the stand-in lies in `__dict__`, out of reach of plain assignment."""

    _lane = ""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"{type(self).__module__} {self._lane} has no {type(self).__qualname__}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        found = next((kind.__dict__[name] for kind in type(self).__mro__ if name in kind.__dict__), None)
        if isinstance(found, property):
            if found.fset is None:
                raise AttributeError(f"{type(self).__qualname__}.{name} cannot be set")
            found.fset(self, value)
        elif "_surface" in type(self).__dict__:  # a subclass written in Python takes any attribute, pybind's own do not
            raise AttributeError(f"{type(self).__module__} {self._lane} has no {type(self).__qualname__}.{name} to set")
        else:
            object.__setattr__(self, name, value)

    @classmethod
    def make(cls, **state: Any) -> Any:
        """An object that only the library itself makes."""
        made = cls.__new__(cls)
        made.__dict__.update(state, _made=True)
        return made


class Surface:
    """One lane: `names` are the module's public ones, filled by `generate`."""

    def __init__(self, lane: str, settings: Settings, module: str = "tensorrt") -> None:
        self.lane, self.settings, self.module = lane, settings, module
        self.data: dict[str, Any] = json.loads((API / f"{lane}.json").read_text(encoding="utf-8"))
        self.version: str = self.data["version"]
        self.names: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return self.names[name]
        except KeyError:
            raise AttributeError(f"{self.module} {self.lane} has no {name}") from None

    def generate(self, written: Mapping[str, type], natives: Mapping[str, type]) -> None:
        """Fill `names`. `written[C]` holds what the stand-in does of class C; the rest of C is not implemented.

        `natives` are classes that must be a tuple or bytes, which are written whole.
        """
        for name, members in self.data["enums"].items():
            self.names[name] = make_enum(self.module, self.lane, name, members)
        levels = {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4}
        severity = make_enum(self.module, self.lane, "ILogger.Severity", levels)
        for name, base in natives.items():
            plain = {"_lane": self.lane, "_surface": self, "__module__": self.module}
            self.names[name] = type(name, (base,), plain)
        for name in self.data["classes"]:
            self._class(name, written, severity)
        for name, text in self.data["constants"].items():
            kind, _, member = text.rpartition(".")
            if kind in self.names:
                self.names[name] = getattr(self.names[kind], member)

    def resolve(self, name: str) -> Any:
        """The class or enum that a signature names, or None for a name that is not of this surface."""
        found: Any = self.names.get(name.split(".", 1)[0])
        for part in name.split(".")[1:]:
            found = None if found is None else getattr(found, part, None)
        return found

    def _class(self, name: str, written: Mapping[str, type], severity: type[Enum]) -> type:
        if name in self.names:
            found: type = self.names[name]
            return found
        entry = self.data["classes"][name]
        bases = tuple(self._class(base, written, severity) for base in entry["bases"]) or (Bound,)
        own = written.get(name)
        body: dict[str, Any] = {"__module__": self.module, "__qualname__": name, "_lane": self.lane, "_surface": self}
        for dunder, value in vars(own).items() if own else ():
            if re.fullmatch(r"__(?!init__|module__|qualname__|dict__|weakref__|doc__)\w+__|_[a-z]\w*", dunder):
                body[dunder] = value
        for method, signatures in entry["methods"].items():
            body[method] = self._method(name, method, signatures, getattr(own, method, None) if own else None)
        for label in entry["properties"]:
            level = severity.__members__.get(label)
            body[label] = level or self._property(name, label, vars(own).get(label) if own else None)
        if "Severity" in entry["methods"]:
            body["Severity"] = severity
        body.setdefault("__init__", _no_constructor)
        kind = ClassType(name, bases, body)
        self.names[name] = kind
        return kind

    def _method(self, kind: str, name: str, signatures: list[str], does: Callable[..., Any] | None) -> Any:
        label = f"{kind}.{name}"
        if name == "__init__" and not signatures:
            return _no_constructor
        static = not any(text.startswith(f"{name}(self") for text in signatures)
        forms: list[signature.Form] = []

        def call(self: Any, *arguments: Any, **named: Any) -> Any:
            if not forms:  # here, because few of the thousands of signatures are ever needed
                forms.extend(map(signature.parse, signatures))
            given = signature.bind(label, forms, arguments, named, surface.resolve)
            if name == "__init__":
                self.__dict__["_made"] = True
                surface.settings.note(kind, *given)
                return does(self, *given) if does else None
            surface.settings.note(label, *given)
            if does is None:
                raise NotImplementedError(f"stand-in: {label} of {surface.module} {surface.lane} is not written")
            return does(self, *given)

        surface = self
        call.__name__, call.__qualname__ = name, label
        return staticmethod(lambda *a, **n: call(None, *a, **n)) if static else call

    def _property(self, kind: str, name: str, does: Any) -> property:
        label = f"{kind}.{name}"
        if isinstance(does, property):
            note = self.settings.note

            def assign(self: Any, value: Any) -> None:
                note(f"{label} =", value)
                does.fset(self, value)

            return property(does.fget, assign if does.fset else None)

        def refuse(*_: Any) -> Any:
            raise NotImplementedError(f"stand-in: {label} of {self.module} {self.lane} is not written")

        return property(refuse, refuse)


def _no_constructor(self: Any, *_: Any, **__: Any) -> None:
    raise TypeError(f"{type(self).__module__}.{type(self).__qualname__}: No constructor defined!")
