"""What a backend compiled while it opened a component, kept in a folder so that the next opening is short."""

from __future__ import annotations

from pathlib import Path

from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.files import read_file, replace_file
from vlaopt.hashing import digest_bytes

LARGEST = 32 << 20
"""Bytes. Reading larger ones in took as long as compiling them: LeRobot's ACT, 133 MB, 1.7 s either way."""

_DIGEST = 64


def recall(folder: Path, key: str) -> bytes | None:
    """The bytes kept under `key`; None where there are none, or they are not what was kept."""
    try:
        kept = read_file(folder / key, limit=LARGEST + _DIGEST)
    except InputError:
        return None
    digest, data = kept[:_DIGEST], kept[_DIGEST:]
    return data if digest == digest_bytes(data).encode() else None


def keep(folder: Path, key: str, data: bytes) -> None:
    """Keep `data`, whole or not at all. Nothing is kept that is above `LARGEST`, nor where nothing can be written."""
    if len(data) > LARGEST:
        return
    try:
        replace_file(folder / key, digest_bytes(data).encode() + data)
    except EnvironmentProblem:  # a robot whose disk is read-only compiles at every start, as it would without this
        return
