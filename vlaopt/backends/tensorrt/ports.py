"""The ports of a TensorRT engine: names, types that numpy can hold, shapes, and the range of those that are dynamic."""

from __future__ import annotations

import importlib
from typing import Any

from vlaopt.backends import Port
from vlaopt.errors import InputError

_DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
    "BF16": "bfloat16",
    "FP8": "float8_e4m3fn",
}
_OF_ML_DTYPES = ("BF16", "FP8")

Range = tuple[tuple[int, ...], tuple[int, ...]]
"""The smallest and the largest shape that an input may have."""


def port_of(engine: Any, name: str) -> Port:
    """The tensor `name` of an engine. Raises InputError for a type that numpy cannot hold."""
    kind = engine.get_tensor_dtype(name).name
    if kind not in _DTYPES or (kind in _OF_ML_DTYPES and not _has_ml_dtypes()):
        raise InputError(f"tensor {name!r} is {kind}, which numpy cannot hold", hint="cast it inside the graph")
    return Port(name, _DTYPES[kind], tuple(int(size) for size in engine.get_tensor_shape(name)))


def profile_of(engine: Any, name: str) -> Range:
    """What the engine's only profile allows the tensor `name`."""
    least, _, most = engine.get_tensor_profile_shape(name, 0)
    return tuple(int(size) for size in least), tuple(int(size) for size in most)


def _has_ml_dtypes() -> bool:
    """Whether numpy knows bfloat16 and float8 by their names: importing ml_dtypes teaches it."""
    try:
        importlib.import_module("ml_dtypes")
    except ImportError:
        return False
    return True
