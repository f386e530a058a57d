"""A LeRobotDataset folder, format v2.0, v2.1 or v3.0, read without LeRobot and torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlaopt.calibration.images import decode_image
from vlaopt.calibration.sources import ACTION, Kind, Steps, Watched, check_columns, plural
from vlaopt.calibration.sources.parquet import column_names, read_cells, read_columns, to_numpy
from vlaopt.calibration.sources.video import read_frames
from vlaopt.errors import InputError
from vlaopt.files import read_file
from vlaopt.tensors import Array

INFO = "meta/info.json"
_META_LIMIT = 256 << 20
_VERSIONS = re.compile(r"v(2\.[01]|3\.0)")
_INDEX = ("episode_index", "frame_index", "task_index", "timestamp")


class _Loose(BaseModel):
    """LeRobot's files say more than is needed here."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _FeatureInfo(_Loose):
    dtype: str
    shape: tuple[int, ...]
    names: Any = None

    def camera(self) -> bool:
        return self.dtype in ("image", "video")

    def depth(self) -> bool:
        """Whether it is a camera without three channels, which no policy takes as an image."""
        return self.camera() and (len(self.shape) != 3 or self.kind()[1][-1] != 3)

    def kind(self) -> Kind:
        """Of one step. A camera's shape is said in either order; its names tell which, or else where the 3 is."""
        if not self.camera():
            return self.dtype, self.shape
        named = isinstance(self.names, list) and len(self.names) == 3
        first = str(self.names[0]).startswith("channel") if named else self.shape[0] == 3 != self.shape[-1]
        return "uint8", (*self.shape[1:], self.shape[0]) if first else self.shape


class _Info(_Loose):
    codebase_version: str
    fps: float = Field(gt=0)
    features: dict[str, _FeatureInfo]
    chunks_size: int = Field(default=1000, ge=1)
    video_path: str | None = None
    robot_type: str | None = None


class LeRobotDataset:
    """See the module; keeps to `Source`."""

    def __init__(self, path: Path) -> None:
        """Reads what the steps are, not what they hold. Raises InputError for another version and unsound files."""
        self.path = path
        self._watched = Watched()
        self._info = _read_info(path, self._watched)
        features = self._info.features
        self.columns: Mapping[str, Kind] = {
            name: feature.kind()
            for name, feature in features.items()
            if name not in (*_INDEX, "index") and feature.dtype != "string" and not feature.depth()
        }
        self.observed = tuple(name for name in self.columns if name.startswith("observation"))
        check_columns({name: self.columns[name] for name in self.observed}, where=str(path / INFO))
        self._files = sorted((path / "data").glob("*/*.parquet"))
        if not self._files:
            raise InputError(
                "holds no data/*/*.parquet", where=str(path), hint="download the whole dataset, not meta alone"
            )
        self.steps = self._index()
        self.origin = self._origin()

    def column(self, name: str, rows: Sequence[int]) -> Iterator[Array]:
        wanted = np.asarray(rows, dtype=np.int64)
        if self._info.features[name].dtype == "video":
            yield from self._video(name, wanted)
            return
        for number, group in groupby(wanted.tolist(), key=lambda row: int(self._file[row])):
            path, inside = self._files[number], list(group)
            with self._watched.open(path) as file:
                for row, cell in zip(inside, read_cells(file, name, self._place[inside].tolist(), path), strict=True):
                    where = f"{path}: {name} at frame {self.steps.step[row]} of episode {self.steps.episode[row]}"
                    yield self._value(name, cell, where)

    def check_unchanged(self) -> None:
        self._watched.check()

    def _value(self, name: str, cell: Any, where: str) -> Array:
        dtype, shape = self.columns[name]
        if self._info.features[name].dtype == "image":
            value = cell[0].as_py()
            data = value.get("bytes") if isinstance(value, dict) else None
            if not isinstance(data, bytes):
                raise InputError(
                    "the image is not inside the Parquet file",
                    where=where,
                    hint="save the dataset with embedded images",
                )
            return decode_image(data, shape, where=where, formats=("PNG", "JPEG"))
        number: Array = to_numpy(cell, shape, where=where)[0].astype(dtype, copy=False)
        return number

    def _video(self, name: str, rows: NDArray[np.int64]) -> Iterator[Array]:
        places = self._video_places(name)
        height, width, _ = self.columns[name][1]
        for path, group in groupby(rows.tolist(), key=lambda row: places[int(self.steps.episode[row])][0]):
            times = [places[int(self.steps.episode[row])][1] + float(self._time[row]) for row in group]
            with self._watched.open(path) as file:
                yield from read_frames(file, times, (height, width), 0.5 / self._info.fps, where=str(path))

    def _video_places(self, name: str) -> Mapping[int, tuple[Path, float]]:
        """Where each episode's video is: the file, and the second at which the episode begins in it."""
        template = self._info.video_path
        if template is None:
            raise InputError(f"says no video_path for {name}", where=str(self.path / INFO))
        if self._info.codebase_version.startswith("v2"):
            return {
                int(episode): (
                    self._inside(
                        template, name, episode_chunk=int(episode) // self._info.chunks_size, episode_index=int(episode)
                    ),
                    0.0,
                )
                for episode in np.unique(self.steps.episode)
            }
        keys = [f"videos/{name}/{key}" for key in ("chunk_index", "file_index", "from_timestamp")]
        found: dict[int, tuple[Path, float]] = {}
        for path in sorted((self.path / "meta/episodes").glob("*/*.parquet")):
            with self._watched.open(path) as file:
                columns = read_columns(file, ["episode_index", *keys], path)
            lists = [to_numpy(column, (), where=f"{path}: {key}").tolist() for key, column in columns.items()]
            for episode, chunk, number, begins_s in zip(*lists, strict=True):
                found[int(episode)] = (
                    self._inside(template, name, chunk_index=int(chunk), file_index=int(number)),
                    begins_s,
                )
        lacking = sorted(set(np.unique(self.steps.episode).tolist()) - set(found))
        if lacking:
            raise InputError(f"tells no {name} of episode {lacking[0]}", where=str(self.path / "meta/episodes"))
        return found

    def _inside(self, template: str, name: str, **numbers: int) -> Path:
        """The path of a video. Raises InputError for one that leaves the dataset's folder."""
        try:
            relative = PurePosixPath(template.format(video_key=name, **numbers))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            raise InputError(
                f"video_path {template!r} is not understood: {error}", where=str(self.path / INFO)
            ) from error
        if relative.is_absolute() or ".." in relative.parts:
            raise InputError(f"video_path leads out of the dataset: {relative}", where=str(self.path / INFO))
        return self.path / relative

    def _index(self) -> Steps:
        """Every frame's episode, place and task; and where it lies: `_file`, `_place` (row of that file), `_time`."""
        parts: list[dict[str, Array]] = []
        for number, path in enumerate(self._files):
            with self._watched.open(path) as file:
                columns = read_columns(file, _INDEX, path)
            part = {name: to_numpy(column, (), where=f"{path}: {name}") for name, column in columns.items()}
            rows = len(part["episode_index"])
            parts.append({**part, "file": np.full(rows, number), "place": np.arange(rows)})
        whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((whole["frame_index"], whole["episode_index"]))
        whole = {name: values[order] for name, values in whole.items()}
        self._file, self._place, self._time = whole["file"], whole["place"], whole["timestamp"]
        texts = self._tasks()
        numbers = whole["task_index"].astype(np.int64)
        unknown = sorted(set(numbers.tolist()) - set(texts))
        if unknown:
            raise InputError(f"says nothing of task {unknown[0]}, which frames name", where=str(self.path / "meta"))
        known = sorted(set(numbers.tolist()))
        steps = Steps(
            task=np.searchsorted(known, numbers).astype(np.int64),
            episode=whole["episode_index"].astype(np.int64),
            step=whole["frame_index"].astype(np.int64),
            instructions=tuple(texts[number] for number in known),
        )
        first, _ = steps.bounds()
        wrong = steps.step != np.arange(len(steps)) - first
        wrong[1:] |= (np.diff(self._place) < 0) & (np.diff(self._file) == 0)
        if wrong.any():
            episode = steps.episode[int(np.argmax(wrong))]
            raise InputError(
                f"episode {episode} lacks a frame, has one twice, or has them in another order than that of time",
                where=str(self.path / "data"),
            )
        return steps

    def _tasks(self) -> dict[int, str]:
        """The sentences by number: `meta/tasks.parquet`, or `meta/tasks.jsonl` in older versions."""
        lines, table = self.path / "meta/tasks.jsonl", self.path / "meta/tasks.parquet"
        if table.exists():
            return self._task_table(table)
        self._watched.note(lines)
        found = {}
        for number, line in enumerate(read_file(lines, limit=_META_LIMIT).splitlines(), 1):
            try:
                value = json.loads(line)
                found[int(value["task_index"])] = str(value["task"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(f"not a task: {error!r}", where=f"{lines}:{number}") from error
        return found

    def _task_table(self, path: Path) -> dict[int, str]:
        """The sentences are the table's index, which pandas stores as a column of its own."""
        with self._watched.open(path) as file:
            texts = [name for name in column_names(file, path) if name in ("task", "__index_level_0__")]
            if not texts:
                raise InputError("not a table of tasks", where=str(path))
            columns = read_columns(file, ["task_index", texts[0]], path)
        numbers = to_numpy(columns["task_index"], (), where=str(path)).tolist()
        return {int(number): str(text) for number, text in zip(numbers, columns[texts[0]].to_pylist(), strict=True)}

    def _origin(self) -> str:
        info = self._info
        robot = f" of a {info.robot_type}" if info.robot_type else ""
        episodes = plural(len(np.unique(self.steps.episode)), "episode")
        return (
            f"{self.path.resolve().name}: LeRobotDataset {info.codebase_version}{robot}, {info.fps:g} frames a second, "
            f"{episodes}, {plural(len(self.steps), 'frame')}"
        )


def _read_info(path: Path, watched: Watched) -> _Info:
    file = path / INFO
    watched.note(file)
    try:
        info = _Info.model_validate_json(read_file(file, limit=_META_LIMIT))
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(first["msg"], where=f"{file}:{'.'.join(str(part) for part in first['loc'])}") from error
    if not _VERSIONS.fullmatch(info.codebase_version):
        raise InputError(
            f"LeRobotDataset {info.codebase_version}, this version reads v2.0, v2.1 and v3.0",
            where=f"{file}:codebase_version",
            hint="convert it with LeRobot's own scripts",
        )
    if ACTION in info.features and len(info.features[ACTION].shape) != 1:
        raise InputError(f"action is {list(info.features[ACTION].shape)}, a vector is needed", where=f"{file}:features")
    return info
