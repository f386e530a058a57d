"""A set's card: what it says, how it is read, and the layout it promises of the tensors beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlaopt.calibration.images import is_image
from vlaopt.errors import InputError
from vlaopt.files import read_file
from vlaopt.tensors import Array

SCHEMA = "vlaopt.observations/1"
CARD, DATA, TASK = "card.json", "observations.safetensors", "task"
_CARD_LIMIT = 16 << 20


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Feature(_Frozen):
    """One named input of the policy, without batch dimension.

    Where the policy looks back, the first dimension of arrays is time, the newest step last.
    """

    dtype: str
    shape: tuple[int, ...] = ()
    encoding: Literal["raw", "png"] = "raw"


class ActionFeature(_Frozen):
    """The expert's chunk at every sample, float32, in the robot's units."""

    shape: tuple[int, int]


class FileEntry(_Frozen):
    """A file beside the card."""

    path: Literal["observations.safetensors"]
    size: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Card(_Frozen):
    """What a set is, where it is from, and the digest of its bytes."""

    schema_: str = Field(alias="schema", serialization_alias="schema")
    name: str = Field(min_length=1)
    description: str
    source: str
    licence: str = Field(min_length=1)
    created_by: str
    seed: int
    samples: int = Field(ge=0)
    episodes: int = Field(ge=0)
    instructions: tuple[str, ...]
    observation: dict[str, Feature]
    action: ActionFeature | None
    files: tuple[FileEntry, ...] = Field(min_length=1, max_length=1)


def read_card(path: Path) -> tuple[Card, Any]:
    """The card in the file `path`, and the JSON value it was made from."""
    return parse_card(read_file(path, limit=_CARD_LIMIT), path)


def parse_card(data: bytes, path: Path) -> tuple[Card, Any]:
    """As `read_card`, from bytes. Raises InputError, naming the field of `path`, for what is no card."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=str(path)) from error
    schema = value.get("schema") if isinstance(value, dict) else None
    if not isinstance(schema, str) or schema.split(".")[:2] != SCHEMA.split("."):
        raise InputError(f"schema is {schema!r}, this version reads {SCHEMA!r}", where=f"{path}:schema")
    try:
        return Card.model_validate_json(data), value
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(first["msg"], where=f"{path}:{'.'.join(str(part) for part in first['loc'])}") from error


def check_layout(tensors: Mapping[str, Array], card: Card, path: Path) -> None:
    """The tensors are exactly those the card describes, with one row per sample and offsets that stay inside."""
    index = ("int64", (card.samples,))
    want: dict[str, tuple[str, tuple[int, ...]]] = {"task_index": index, "episode_index": index, "step_index": index}
    for name, feature in card.observation.items():
        if feature.encoding == "png":
            if not is_image(feature.dtype, feature.shape):
                raise InputError(
                    f"{name} is no image but says PNG: {feature.dtype} {list(feature.shape)}", where=str(path)
                )
            want[f"{name}.offsets"] = ("int64", (card.samples + 1,))
            want[f"{name}.png"] = ("uint8", (-1,))
        elif name != TASK:
            want[name] = (feature.dtype, (card.samples, *feature.shape))
    if card.action is not None:
        want["action"] = ("float32", (card.samples, *card.action.shape))
    for name in sorted(want.keys() ^ tensors.keys()):
        raise InputError(f"{'lacks' if name in want else 'has an unknown'} tensor {name}", where=str(path))
    for name, (dtype, shape) in want.items():
        tensor = tensors[name]
        if str(tensor.dtype) != dtype or (shape != (-1,) and tensor.shape != shape):
            raise InputError(
                f"tensor {name} is {tensor.dtype} {list(tensor.shape)}, the card says {dtype} {list(shape)}",
                where=str(path),
            )
    _check_ranges(tensors, card, path)


def _check_ranges(tensors: Mapping[str, Array], card: Card, path: Path) -> None:
    tasks = tensors["task_index"]
    if card.samples and (tasks.min() < 0 or tasks.max() >= len(card.instructions)):
        raise InputError("task_index points outside the card's instructions", where=str(path))
    for name, feature in card.observation.items():
        if feature.encoding == "png":
            offsets, size = tensors[f"{name}.offsets"], tensors[f"{name}.png"].size
            if offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 0).any():
                raise InputError(f"{name}.offsets do not divide {name}.png", where=str(path))
