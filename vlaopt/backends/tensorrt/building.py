"""Building a TensorRT engine of an ONNX graph: what classic TensorRT and TensorRT for RTX have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlaopt.backends import EngineOptions
from vlaopt.errors import InputError

LEVELS = range(6)
"""Of `optimization_level`: how long the builder searches."""


def settings_of(options: EngineOptions, defaults: Mapping[str, Any], backend: str) -> dict[str, Any]:
    """The settings of a build, all of them: those of `options` over the defaults. Raises InputError by name."""
    if unknown := sorted(set(options.settings) - set(defaults)):
        raise InputError(f"unknown {backend} setting {unknown[0]!r}", hint=f"settings: {', '.join(defaults)}")
    settings = {**defaults, **options.settings}
    for name, value in settings.items():
        if wanted := _wanted(name, value):
            raise InputError(f"{backend} setting {name!r} is {wanted}, not {value!r}")
    return settings


def _wanted(name: str, value: Any) -> str | None:
    """What a setting must be, where `value` is not; else None."""
    number = isinstance(value, int) and not isinstance(value, bool)
    if name == "workspace_mib":
        return None if number and value >= 0 else "a number of MiB"
    if name == "optimization_level":
        return None if number and value in LEVELS else "a level from 0 to 5"
    if name == "profiles":
        return None if isinstance(value, Mapping) and all(map(_profile, value.values())) else "[min, opt, max] by name"
    return None if isinstance(value, bool) else "true or false"


def _profile(sizes: Any) -> bool:
    """Whether these are three sizes of one dimension."""
    whole = isinstance(sizes, (tuple, list)) and all(isinstance(size, int) and size > 0 for size in sizes)
    return whole and len(sizes) == 3
