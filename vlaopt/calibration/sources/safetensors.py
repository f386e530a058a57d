"""A `.safetensors` file read row by row: its header is checked here, its bytes are never all in memory."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from vlaopt.calibration.card import TASK
from vlaopt.calibration.sources import Kind
from vlaopt.calibration.sources.rows import check_size, read_rows
from vlaopt.errors import InputError
from vlaopt.tensors import Array

_HEADER_LIMIT = 16 << 20
_DTYPES = {
    "BOOL": "bool",
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
}


class Stored:
    """The arrays of a `.safetensors` file; keeps to `Rows`."""

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._file = file
        self._path = path
        header, self._begins = _read_header(file, path)
        metadata = header.pop("__metadata__", {})
        self._task = metadata.get(TASK) if isinstance(metadata, dict) else None
        columns: dict[str, Kind] = {}
        self._places: dict[str, int] = {}
        end = 0
        for name, entry in sorted(header.items(), key=lambda item: _begin(item[1], path)):
            dtype, shape, begin, stop = _entry(entry, f"{path}: {name}")
            if begin != end:
                raise InputError("not a sound safetensors file: arrays overlap or leave a hole", where=str(path))
            columns[name], self._places[name], end = (dtype, shape), begin, stop
        self.columns: Mapping[str, Kind] = columns
        size = file.seek(0, 2)
        if self._begins + end != size:
            raise InputError(
                f"not a sound safetensors file: {size} bytes, {self._begins + end} are said", where=str(path)
            )
        check_size(end, where=str(path))

    def read(self, name: str, rows: Sequence[int]) -> Iterator[Array]:
        dtype, shape = self.columns[name]
        self._file.seek(self._begins + self._places[name])
        yield from read_rows(self._file, np.dtype(dtype), shape, rows, where=f"{self._path}: {name}")

    def task(self) -> object:
        if TASK in self.columns:
            raise InputError("task is an array", where=str(self._path), hint="put the sentence in the file's metadata")
        return self._task


def open_safetensors(file: IO[bytes], path: Path) -> Stored:
    """The arrays in an open file. Raises InputError when its header is unsound."""
    return Stored(file, path)


def _read_header(file: IO[bytes], path: Path) -> tuple[dict[str, Any], int]:
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _HEADER_LIMIT + 1
    if length > _HEADER_LIMIT:
        raise InputError("not a sound safetensors file: its header is cut short or too long", where=str(path))
    try:
        header = json.loads(file.read(length))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a sound safetensors file: {error}", where=str(path)) from error
    if not isinstance(header, dict):
        raise InputError("not a sound safetensors file: its header is no object", where=str(path))
    return header, 8 + length


def _begin(entry: Any, path: Path) -> int:
    try:
        return int(entry["data_offsets"][0])
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError("not a sound safetensors file: an array without a place", where=str(path)) from error


def _entry(entry: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """Dtype, shape, first byte and the byte after the last."""
    try:
        begin, stop = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), entry["dtype"]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a sound safetensors file: {entry!r:.80}", where=where) from error
    if dtype not in _DTYPES:
        raise InputError(f"numpy has no element type {dtype!r}", where=where)
    if not all(isinstance(size, int) and size >= 0 for size in (begin, stop, *shape)):
        raise InputError(f"not a sound safetensors file: {entry!r:.80}", where=where)
    if stop - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise InputError(f"not a sound safetensors file: {stop - begin} bytes for {dtype} {list(shape)}", where=where)
    return _DTYPES[dtype], shape, begin, stop
