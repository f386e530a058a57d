"""One file of arrays, read row by row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from vlaopt.calibration.sources import Kind
from vlaopt.errors import InputError
from vlaopt.tensors import Array

FILE_LIMIT = 16 << 30
"""Bytes that the arrays of one episode may say they have: half an hour of four cameras, and no bomb."""
_PIECE = 1 << 20


class Rows(Protocol):
    """The arrays of one file: names to dtype and whole shape, the first dimension being time."""

    columns: Mapping[str, Kind]

    def read(self, name: str, rows: Sequence[int]) -> Iterator[Array]:
        """Rows of an array, which ascend; bytes of other rows are passed over, never kept."""
        ...

    def task(self) -> object:
        """The instruction that the file itself tells: a sentence, a list of them, or None."""
        ...


class Readable(Protocol):
    """What rows are read from."""

    def read(self, count: int, /) -> bytes: ...
    def seek(self, count: int, whence: int, /) -> int: ...
    def seekable(self) -> bool: ...


def read_rows(
    file: Readable, dtype: np.dtype[np.generic], shape: tuple[int, ...], rows: Sequence[int], *, where: str
) -> Iterator[Array]:
    """Rows of a C-ordered array whose bytes begin where `file` stands; only reads forward."""
    size = dtype.itemsize * math.prod(shape[1:])
    place, last = 0, -1
    value = np.empty(0)
    for row in rows:
        if row != last:
            _skip(file, row * size - place)
            data = file.read(size)
            if len(data) != size:
                raise InputError(f"cut short: row {row} ends after {len(data)} of {size} bytes", where=where)
            value = np.frombuffer(data, dtype=dtype).reshape(shape[1:]).astype(dtype.newbyteorder("="))
            place, last = (row + 1) * size, row
        yield value


def check_size(total: int, *, where: str) -> None:
    """Refuse arrays that say they hold more than `FILE_LIMIT` bytes together."""
    if total > FILE_LIMIT:
        raise InputError(
            f"its arrays say they hold {total} bytes, more than the {FILE_LIMIT} allowed",
            where=where,
            hint="one episode per file",
        )


def _skip(file: Readable, count: int) -> None:
    if count and file.seekable():
        file.seek(count, 1)
        return
    while count > 0:
        piece = file.read(min(count, _PIECE))
        if not piece:
            return
        count -= len(piece)
