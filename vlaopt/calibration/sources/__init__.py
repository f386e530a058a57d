"""What observations can be taken from: recorded episodes, read step by step and column by column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from vlaopt.errors import InputError
from vlaopt.tensors import Array

ACTION = "action"
Kind = tuple[str, tuple[int, ...]]
"""Dtype name and shape of one step of a column."""


@dataclass(frozen=True)
class Steps:
    """Every recorded step, episode after episode, in the order of time: equally long int64 arrays.

    `task` is a row of `instructions`, 0 throughout where the source tells none.
    """

    task: NDArray[np.int64]
    episode: NDArray[np.int64]
    step: NDArray[np.int64]
    instructions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.episode)

    def bounds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """For every row, the first row of its episode and the last one."""
        edges = np.flatnonzero(np.diff(self.episode, prepend=-1, append=-1))
        lengths = np.diff(edges)
        return np.repeat(edges[:-1], lengths), np.repeat(edges[1:] - 1, lengths)


class Source(Protocol):
    """Recorded episodes. `columns` says what one step holds; `action` is the action that was executed there."""

    path: Path
    origin: str
    """One line for the card: what it is and how large."""
    steps: Steps
    columns: Mapping[str, Kind]
    observed: tuple[str, ...]
    """The columns that are a policy's observations, as far as their names tell."""

    def column(self, name: str, rows: Sequence[int]) -> Iterator[Array]:
        """The values of a column at `rows`, which ascend. Raises InputError for a value that does not fit `columns`."""
        ...

    def check_unchanged(self) -> None:
        """Raises InputError when a file is no longer what it was when it was first read."""
        ...


@dataclass
class Watched:
    """Files as they were when they were first read: size, time of the last change, and identity."""

    _seen: dict[Path, tuple[int, int, int]] = field(default_factory=dict)

    def open(self, path: Path) -> IO[bytes]:
        """The file, open for reading. Raises InputError when it cannot be read, or changed since the first time."""
        self.note(path)
        return path.open("rb")

    def note(self, path: Path) -> None:
        """Remember the file, or compare it with what is remembered."""
        try:
            status = path.stat()
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
        now = (status.st_size, status.st_mtime_ns, status.st_ino)
        if self._seen.setdefault(path, now) != now:
            raise InputError(
                "changed while it was read", where=str(path), hint="start again on recordings nobody writes to"
            )

    def check(self) -> None:
        """Compare all of them again."""
        for path in list(self._seen):
            self.note(path)


def check_value(value: Array, kind: Kind, *, where: str) -> Array:
    """`value` when it is of `kind`. Raises InputError."""
    if (str(value.dtype), value.shape) != kind:
        raise InputError(
            f"{value.dtype} {list(value.shape)}, {kind[0]} {list(kind[1])} is what the first step has", where=where
        )
    return value


def check_columns(columns: Mapping[str, Kind], *, where: str) -> None:
    """Refuse layouts that no policy takes: images with the channels on the wrong side, or not of three."""
    for name, (dtype, shape) in columns.items():
        if dtype == "uint8" and len(shape) == 3 and shape[2] != 3:
            raise InputError(
                f"{name} is uint8 {list(shape)}, images are uint8 height, width, 3", where=where, hint=_turn(shape)
            )
        if dtype.startswith("float") and len(shape) == 3 and shape[0] != 3 and shape[2] == 3:
            raise InputError(
                f"{name} is {dtype} {list(shape)}, float images are float32 3, height, width in 0 to 1",
                where=where,
                hint="store it as uint8 height, width, 3",
            )


def _turn(shape: tuple[int, ...]) -> str:
    if shape[0] == 3:
        return "the channels are on the wrong side: numpy.moveaxis(images, 1, -1)"
    return "store three channels, red, green, blue"


def plural(count: int, word: str) -> str:
    """`1 episode`, `2 episodes`."""
    return f"{count} {word}{'' if count == 1 else 's'}"
