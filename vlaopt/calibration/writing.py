"""Writing a calibration set: samples in, a folder that appears whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlaopt.calibration.card import CARD, DATA, SCHEMA, TASK, Feature, is_image
from vlaopt.calibration.reading import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.files import staged_directory, write_file
from vlaopt.hashing import digest_bytes
from vlaopt.optional import require
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

    `observations`: one dict per sample, all alike; uint8 [H, W, 3] arrays are kept as PNG, `task` must be a string.
    `actions`: the expert's chunks, float32 [chunk, action]. `episodes`, `steps`: where each sample is from.
    Raises InputError when `path` exists, there is no sample, or the samples differ in names, dtypes or shapes.
    """
    if path.exists():
        raise InputError("already exists", where=str(path), hint="choose another folder or remove that one")
    if not observations:
        raise InputError("no observations to write", where=str(path))
    if not len(observations) == len(episodes) == len(steps) == len(actions if actions is not None else steps):
        raise InputError("observations, actions, episodes and steps differ in number", where=str(path))
    features = _features(observations, path)
    instructions = tuple(dict.fromkeys(str(row.get(TASK, "")) for row in observations))
    tensors = _columns(observations, features, instructions)
    tensors["episode_index"] = np.asarray(episodes, dtype=np.int64)
    tensors["step_index"] = np.asarray(steps, dtype=np.int64)
    if actions is not None:
        tensors["action"] = np.stack(actions).astype(np.float32)
    data = pack(tensors)
    card = {
        "schema": SCHEMA,
        "name": name,
        "description": description,
        "source": source,
        "licence": licence,
        "created_by": created_by,
        "seed": seed,
        "samples": len(observations),
        "episodes": len(set(episodes)),
        "instructions": list(instructions),
        "observation": {key: feature.model_dump(mode="json") for key, feature in features.items()},
        "action": {"shape": list(tensors["action"].shape[1:])} if actions is not None else None,
        "files": [{"path": DATA, "size": len(data), "sha256": digest_bytes(data)}],
    }
    with staged_directory(path) as staging:
        write_file(staging / DATA, data)
        write_file(staging / CARD, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())
    return CalibrationSet.open(path)


def _features(observations: Sequence[Mapping[str, Any]], path: Path) -> dict[str, Feature]:
    features = {key: _feature(value) for key, value in observations[0].items()}
    for index, row in enumerate(observations):
        if {key: _feature(value) for key, value in row.items()} != features:
            raise InputError(f"sample {index} differs from sample 0 in names, dtypes or shapes", where=str(path))
    return features


def _feature(value: Any) -> Feature:
    if isinstance(value, str):
        return Feature(dtype="string")
    array = np.asarray(value)
    image = is_image(str(array.dtype), array.shape)
    return Feature(dtype=str(array.dtype), shape=array.shape, encoding="png" if image else "raw")


def _columns(
    observations: Sequence[Mapping[str, Any]], features: Mapping[str, Feature], instructions: tuple[str, ...]
) -> dict[str, Array]:
    numbers = {text: index for index, text in enumerate(instructions)}
    tensors: dict[str, Array] = {
        "task_index": np.array([numbers[str(row.get(TASK, ""))] for row in observations], dtype=np.int64)
    }
    for key, feature in features.items():
        if feature.encoding == "png":
            pieces = [_encode_png(row[key]) for row in observations]
            tensors[f"{key}.png"] = np.frombuffer(b"".join(pieces), dtype=np.uint8)
            tensors[f"{key}.offsets"] = np.cumsum([0, *(len(piece) for piece in pieces)], dtype=np.int64)
        elif key != TASK:
            tensors[key] = np.stack([row[key] for row in observations])
    return tensors


def _encode_png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    require("PIL.Image", "build").fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()
