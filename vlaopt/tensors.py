"""Named arrays as safetensors bytes, and the checks that stand before any array is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from vlaopt.errors import InputError

Array = np.ndarray[Any, np.dtype[Any]]


def pack(tensors: Mapping[str, Array]) -> bytes:
    """`tensors` as the bytes of a safetensors file; equal tensors give equal bytes."""
    data: bytes = safetensors.numpy.save({name: np.asarray(tensors[name], order="C") for name in sorted(tensors)})
    return data


def unpack(data: bytes, *, where: str) -> dict[str, Array]:
    """The tensors in the bytes of a safetensors file.

    Raises InputError, with `where`, for a header that is too long, malformed or leaves holes or overlaps, for data cut
    short, and for element types that numpy does not have.
    """
    try:
        tensors: dict[str, Array] = safetensors.numpy.load(data)
    except KeyError as error:
        raise InputError(f"numpy has no element type {error.args[0]}", where=where) from error
    except (safetensors.SafetensorError, ValueError) as error:
        raise InputError(f"not a sound safetensors file: {error}", where=where) from error
    return tensors


def check(name: str, value: object, *, dtype: str, shape: tuple[int, ...]) -> Array:
    """`value` when it is a finite array of `dtype` and `shape` (-1: any length), else InputError naming it."""
    if not isinstance(value, np.ndarray):
        raise InputError(f"{name}: {type(value).__name__} given, a numpy array is needed")
    if value.dtype != np.dtype(dtype):
        raise InputError(f"{name}: dtype {value.dtype} given, {dtype} needed")
    if len(value.shape) != len(shape) or any(w not in (-1, h) for h, w in zip(value.shape, shape, strict=True)):
        raise InputError(f"{name}: shape {list(value.shape)} given, {list(shape)} needed")
    check_finite(name, value)
    return value


def check_finite(name: str, value: Array) -> None:
    """Raises InputError naming the first element of `value` that is NaN or infinite."""
    if value.dtype.kind == "f" and not np.isfinite(value).all():
        place = [int(index) for index in np.argwhere(~np.isfinite(value))[0]]
        raise InputError(f"{name}: not finite at {place}: {value[tuple(place)]}")
