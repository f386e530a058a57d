"""A folder of episodes: one `.npz` or `.safetensors` file each, arrays with a leading time dimension. Runs no code.

An array's name is the policy's input name; `action` is what was executed. The instruction is the array or the metadata
`task`, or `{"task": …}` in a JSON file of the episode's name. Rows are read one by one, whatever a file's size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from vlaopt.calibration.card import TASK
from vlaopt.calibration.sources import ACTION, Kind, Steps, Watched, check_columns, check_value, plural
from vlaopt.calibration.sources.npz import open_npz
from vlaopt.calibration.sources.rows import Rows
from vlaopt.calibration.sources.safetensors import open_safetensors
from vlaopt.errors import InputError
from vlaopt.files import read_file
from vlaopt.tensors import Array

OPENERS: Mapping[str, Callable[[IO[bytes], Path], Rows]] = {".npz": open_npz, ".safetensors": open_safetensors}
_SIDECAR_LIMIT = 16 << 20


def episode_files(folder: Path) -> list[Path]:
    """The files of `folder` that are episodes, by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in OPENERS)


@dataclass(frozen=True)
class _Episode:
    path: Path
    length: int
    tasks: tuple[str, ...]


class EpisodeFolder:
    """See the module; keeps to `Source`."""

    def __init__(self, path: Path) -> None:
        """Looks at every file's layout, not at its rows. Raises InputError for files that are not alike or unsound."""
        self.path = path
        self._watched = Watched()
        self.columns: Mapping[str, Kind] = {}
        self._episodes = [self._look(file) for file in episode_files(path)]
        check_columns(self.columns, where=str(self._episodes[0].path))
        self.observed = tuple(name for name in self.columns if name != ACTION)
        self.steps = self._steps()
        self.origin = (
            f"{path.resolve().name}: {plural(len(self._episodes), 'episode file')}, {plural(len(self.steps), 'step')}"
        )

    def column(self, name: str, rows: Sequence[int]) -> Iterator[Array]:
        wanted = np.asarray(rows, dtype=np.int64)
        for number in dict.fromkeys(self.steps.episode[wanted].tolist()):
            episode = self._episodes[number]
            steps = self.steps.step[wanted[self.steps.episode[wanted] == number]]
            with self._watched.open(episode.path) as file:
                found = OPENERS[episode.path.suffix](file, episode.path)
                for value in found.read(name, steps.tolist()):
                    yield check_value(value, self.columns[name], where=f"{episode.path}: {name}")

    def check_unchanged(self) -> None:
        self._watched.check()

    def _look(self, path: Path) -> _Episode:
        with self._watched.open(path) as file:
            rows = OPENERS[path.suffix](file, path)
            lengths = {name: shape[0] for name, (_, shape) in rows.columns.items() if shape and name != TASK}
            odd = [name for name, (_, shape) in rows.columns.items() if not shape and name != TASK]
            if odd or not lengths:
                raise InputError(
                    f"{odd[0]} has no time dimension" if odd else "holds no arrays",
                    where=str(path),
                    hint="every array's first dimension is time",
                )
            if len(set(lengths.values())) > 1 or 0 in lengths.values():
                told = ", ".join(f"{name} {length}" for name, length in lengths.items())
                raise InputError(f"its arrays differ in their number of steps, or have none: {told}", where=str(path))
            columns = {name: (dtype, shape[1:]) for name, (dtype, shape) in rows.columns.items() if name != TASK}
            self._compare(columns, path)
            length = next(iter(lengths.values()))
            return _Episode(path, length, self._tasks(rows, path, length))

    def _compare(self, columns: dict[str, Kind], path: Path) -> None:
        if not self.columns:
            self.columns = columns
        for name in sorted({*self.columns, *columns}):
            if self.columns.get(name) != columns.get(name):
                here, there = (
                    f"{kind[0]} {list(kind[1])}" if kind else "missing"
                    for kind in (columns.get(name), self.columns.get(name))
                )
                raise InputError(f"{name} is {here}, in the first episode {there}", where=str(path))

    def _tasks(self, rows: Rows, path: Path, length: int) -> tuple[str, ...]:
        """The instruction at every step; empty when the episode has none."""
        sidecar = path.with_suffix(".json")
        told: object = rows.task()
        if told is None and sidecar.exists():
            self._watched.note(sidecar)
            told = _read_sidecar(sidecar)
        if told is None:
            return ()
        if isinstance(told, str):
            return (told,) * length
        if isinstance(told, list) and len(told) == length and all(isinstance(text, str) for text in told):
            return tuple(told)
        raise InputError("task is neither a sentence nor one sentence per step", where=str(path))

    def _steps(self) -> Steps:
        texts = [text for episode in self._episodes for text in episode.tasks]
        lengths = [episode.length for episode in self._episodes]
        if texts and len(texts) != sum(lengths):
            lacking = next(episode.path for episode in self._episodes if not episode.tasks)
            raise InputError("has no task, other episodes have one", where=str(lacking))
        instructions = tuple(dict.fromkeys(texts))
        numbers = {text: number for number, text in enumerate(instructions)}
        return Steps(
            task=np.array([numbers[text] for text in texts] or [0] * sum(lengths), dtype=np.int64),
            episode=np.repeat(np.arange(len(lengths), dtype=np.int64), lengths),
            step=np.concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
            instructions=instructions,
        )


def _read_sidecar(path: Path) -> object:
    try:
        value = json.loads(read_file(path, limit=_SIDECAR_LIMIT))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=str(path)) from error
    return value.get(TASK) if isinstance(value, dict) else None
