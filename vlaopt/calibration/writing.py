"""Writing a calibration set: samples in, a folder that appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaopt.calibration.card import CARD, DATA, SCHEMA, TASK, Feature, parse_card
from vlaopt.calibration.images import encode_png, is_image
from vlaopt.calibration.reading import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.files import staged_directory, write_file
from vlaopt.hashing import digest_bytes, digest_json
from vlaopt.tensors import Array, pack


def write_calibration_set(
    path: Path,
    observations: Sequence[Mapping[str, Any]],
    actions: Sequence[NDArray[np.float32]] | None = None,
    *,
    episodes: Sequence[int],
    steps: Sequence[int],
    name: str,
    description: str,
    source: str,
    licence: str,
    created_by: str,
    seed: int,
) -> CalibrationSet:
    """Write a new set to the folder `path` and open it.

    `observations`: one dict per sample, all alike; uint8 arrays [H, W, 3] and, with a history, [T, H, W, 3] are kept as
    PNG, `task` must be a string. `actions`: the expert's chunks, float32 [chunk, action]. `episodes`, `steps`: where
    each sample is from. Raises InputError when `path` exists, there is no sample, or the samples differ in names,
    dtypes or shapes.
    """
    check_new(path)
    if not observations:
        raise InputError("no observations to write", where=str(path))
    if not len(observations) == len(episodes) == len(steps) == len(actions if actions is not None else steps):
        raise InputError("observations, actions, episodes and steps differ in number", where=str(path))
    features = _features(observations, path)
    texts = [str(row.get(TASK, "")) for row in observations]
    columns = Columns(episodes, steps, texts)
    for key in features:
        if key == TASK:
            columns.add_task()
        else:
            columns.add(key, (row[key] for row in observations))
    if actions is not None:
        columns.add_actions(actions)
    return columns.unwritten(path, Facts(name, description, source, licence, created_by, seed)).write()


def check_new(path: Path) -> None:
    """Raises InputError when there is something at `path` already."""
    if path.exists():
        raise InputError("already exists", where=str(path), hint="choose another folder or remove that one")


@dataclass(frozen=True)
class Facts:
    """What a set says of itself for people; see the card."""

    name: str
    description: str
    source: str
    licence: str
    created_by: str
    seed: int


class Columns:
    """The columns of a set as they come in; images become PNG at once, so that memory holds no pixels."""

    def __init__(self, episodes: Sequence[int], steps: Sequence[int], texts: Sequence[str]) -> None:
        """Where each sample is from, and its instruction."""
        self._instructions = tuple(dict.fromkeys(texts))
        numbers = {text: index for index, text in enumerate(self._instructions)}
        self._features: dict[str, Feature] = {}
        self._tensors: dict[str, Array] = {
            "task_index": np.array([numbers[text] for text in texts], dtype=np.int64),
            "episode_index": np.asarray(episodes, dtype=np.int64),
            "step_index": np.asarray(steps, dtype=np.int64),
        }
        self._episodes = len(set(episodes))

    def add(self, name: str, values: Iterable[Array]) -> None:
        """One value per sample, all of one dtype and shape."""
        arrays = (np.asarray(value) for value in values)
        first = next(iter(arrays))
        image = is_image(str(first.dtype), first.shape)
        self._features[name] = Feature(dtype=str(first.dtype), shape=first.shape, encoding="png" if image else "raw")
        if image:
            pieces = [encode_png(first), *(encode_png(array) for array in arrays)]
            self._tensors[f"{name}.png"] = np.frombuffer(b"".join(pieces), dtype=np.uint8)
            self._tensors[f"{name}.offsets"] = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
        else:
            self._tensors[name] = np.stack([first, *arrays])

    def add_task(self) -> None:
        """The policy is told the instruction, as `task`."""
        self._features[TASK] = Feature(dtype="string")

    def add_actions(self, chunks: Iterable[Array]) -> None:
        """The expert's chunk at every sample, [chunk, action]."""
        self._tensors["action"] = np.stack(list(chunks)).astype(np.float32)

    def unwritten(self, path: Path, facts: Facts) -> Unwritten:
        """The whole set, to be checked and then written to `path`."""
        data, actions = pack(self._tensors), self._tensors.get("action")
        card = {
            "schema": SCHEMA,
            **asdict(facts),
            "samples": len(self._tensors["step_index"]),
            "episodes": self._episodes,
            "instructions": list(self._instructions),
            "observation": {key: feature.model_dump(mode="json") for key, feature in self._features.items()},
            "action": {"shape": list(actions.shape[1:])} if actions is not None else None,
            "files": [{"path": DATA, "size": len(data), "sha256": digest_bytes(data)}],
        }
        text = (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode()
        checked, value = parse_card(text, path / CARD)
        return Unwritten(CalibrationSet(path, checked, digest_json(value), self._tensors), text, data)


@dataclass(frozen=True)
class Unwritten:
    """A set in memory. `samples` can be looked at and checked; nothing is on the disk yet."""

    samples: CalibrationSet
    card: bytes
    data: bytes

    def write(self) -> CalibrationSet:
        """Write it to its folder and open it from there."""
        path = self.samples.path
        with staged_directory(path) as staging:
            write_file(staging / DATA, self.data)
            write_file(staging / CARD, self.card)
        return CalibrationSet.open(path)


def _features(observations: Sequence[Mapping[str, Any]], path: Path) -> list[str]:
    """The names of all samples. Raises InputError for a sample that differs from the first."""
    first = {key: _kind(value) for key, value in observations[0].items()}
    for index, row in enumerate(observations):
        if {key: _kind(value) for key, value in row.items()} != first:
            raise InputError(f"sample {index} differs from sample 0 in names, dtypes or shapes", where=str(path))
    return list(first)


def _kind(value: Any) -> tuple[str, tuple[int, ...]]:
    if isinstance(value, str):
        return "string", ()
    array = np.asarray(value)
    return str(array.dtype), array.shape
