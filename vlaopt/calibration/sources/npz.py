"""Numpy archives, read without numpy's loader: sizes are known before anything is unpacked, objects never made."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from vlaopt.calibration.card import TASK
from vlaopt.calibration.sources import Kind
from vlaopt.calibration.sources.rows import check_size, read_rows
from vlaopt.errors import InputError
from vlaopt.tensors import Array

_SUFFIX = ".npy"
_MEMBERS = 1024
_TASK_LIMIT = 64 << 20
_UNSOUND = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, SyntaxError)


@dataclass(frozen=True)
class _Header:
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


class Archive:
    """The arrays of an `.npz` file; keeps to `Rows`."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive = archive
        self._path = path
        self._headers = {member.filename[: -len(_SUFFIX)]: self._header(member) for member in self._members()}
        self.columns: Mapping[str, Kind] = {
            name: (str(header.dtype.newbyteorder("=")), header.shape) for name, header in self._headers.items()
        }

    def read(self, name: str, rows: Sequence[int]) -> Iterator[Array]:
        header, where = self._headers[name], f"{self._path}: {name}"
        with _sound(where), self._archive.open(name + _SUFFIX) as file:
            _read_header(file)
            yield from read_rows(_Forward(file), header.dtype, header.shape, rows, where=where)

    def task(self) -> object:
        header = self._headers.get(TASK)
        if header is None:
            return None
        where = f"{self._path}: {TASK}"
        if header.dtype.kind != "U" or len(header.shape) > 1:
            raise InputError(
                f"{header.dtype} {list(header.shape)}, text is needed: one sentence, or one per step", where=where
            )
        if header.dtype.itemsize * math.prod(header.shape) > _TASK_LIMIT:
            raise InputError("longer than any instruction", where=where)
        with _sound(where), self._archive.open(TASK + _SUFFIX) as file:
            _read_header(file)
            shape = (1, *header.shape)
            (value,) = read_rows(_Forward(file), header.dtype, shape, [0], where=where)
        return value.tolist()

    def _members(self) -> list[zipfile.ZipInfo]:
        members, where = self._archive.infolist(), str(self._path)
        names = [member.filename for member in members]
        if len(members) > _MEMBERS or len(set(names)) < len(names):
            raise InputError(f"{len(names)} members, or the same one twice", where=where)
        for member in members:
            if not member.filename.endswith(_SUFFIX):
                raise InputError(f"member {member.filename!r} is no array", where=where)
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"member {member.filename!r} is packed in another way than numpy packs", where=where)
        check_size(sum(member.file_size for member in members), where=where)
        return members

    def _header(self, member: zipfile.ZipInfo) -> _Header:
        where = f"{self._path}: {member.filename[: -len(_SUFFIX)]}"
        with _sound(where), self._archive.open(member) as file:
            shape, fortran, dtype = _read_header(file)
            begins = file.tell()
        if dtype.hasobject:
            raise InputError(
                "holds Python objects, which can run code", where=where, hint="store arrays of numbers or text"
            )
        if dtype.kind not in "biufU" or dtype.names:
            raise InputError(f"{dtype}: numbers or text are needed", where=where)
        if fortran and len(shape) > 1:
            raise InputError(
                "stored column by column", where=where, hint="numpy.ascontiguousarray puts the steps one after another"
            )
        size = dtype.itemsize * math.prod(shape)
        if begins + size != member.file_size:
            raise InputError(
                f"says {size} bytes of {dtype} {list(shape)}, {member.file_size - begins} are there", where=where
            )
        return _Header(dtype, shape)


def open_npz(file: IO[bytes], path: Path) -> Archive:
    """The arrays in an open `.npz` file. Raises InputError when it is unsound, or holds what a policy cannot take."""
    with _sound(str(path)):
        return Archive(zipfile.ZipFile(file), path)


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(file)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(file)
    raise ValueError(f"version {version} of numpy's format")


class _Forward:
    """A member as `read_rows` takes it: seeking in a packed file would unpack it from its beginning again."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def read(self, count: int, /) -> bytes:
        return self._file.read(count)

    def seek(self, count: int, whence: int, /) -> int:
        raise OSError("only reads forward")

    def seekable(self) -> bool:
        return False


@contextmanager
def _sound(where: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except _UNSOUND as error:
        raise InputError(f"not a sound .npz file: {error}", where=where) from error
