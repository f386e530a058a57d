"""Golden data: observations and the reference's actions on them, in the artifact, so that it is checked anywhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaopt.artifact.artifact import Artifact
from vlaopt.errors import InputError
from vlaopt.tensors import Array, pack, unpack

OBSERVATIONS = "golden/observations.safetensors"
TEXT = "golden/text.json"
INPUTS = "golden/inputs.safetensors"
ACTIONS = "golden/actions.safetensors"
HELD_OUT = "golden/held_out.safetensors"

Observation = Mapping[str, Any]
Sample = tuple[Observation, Array | None]
"""An observation and the noise that belongs to it."""


@dataclass(frozen=True)
class Golden:
    """`observations[i]` gave the reference `actions[i]` (float32 [samples, chunk, action_dim]) with `noise[i]`."""

    observations: tuple[Observation, ...]
    actions: Array
    noise: Array | None

    @classmethod
    def of(cls, artifact: Artifact) -> Golden:
        """The golden data of `artifact`. Raises InputError when it has none."""
        if not artifact.has(ACTIONS):
            raise InputError("the artifact holds no golden data", where=str(artifact.path))
        arrays = unpack(artifact.read(OBSERVATIONS), where=OBSERVATIONS)
        text: dict[str, list[str]] = json.loads(artifact.read(TEXT))
        recorded = unpack(artifact.read(ACTIONS), where=ACTIONS)
        if "actions" not in recorded:
            raise InputError(f"{ACTIONS} holds no actions", where=str(artifact.path))
        count = len(recorded["actions"])
        columns: dict[str, Any] = {**arrays, **text}
        if any(len(column) != count for column in [*columns.values(), *recorded.values()]):
            raise InputError("golden observations and actions differ in number", where=str(artifact.path))
        rows = tuple({name: column[row] for name, column in columns.items()} for row in range(count))
        return cls(rows, recorded["actions"], recorded.get("noise"))

    def files(self, inputs: Sequence[Mapping[str, Array]]) -> dict[str, bytes]:
        """The golden files by path; `inputs[i]` are the components' input tensors for observation i.

        Tensors are stacked over samples, the batch dimension of one dropped.
        """
        first = self.observations[0]
        text = {name: [row[name] for row in self.observations] for name in first if isinstance(first[name], str)}
        arrays = {name: np.stack([row[name] for row in self.observations]) for name in first if name not in text}
        stacked = {name: np.stack([row[name][0] for row in inputs]) for name in inputs[0]}
        recorded = {"actions": self.actions} if self.noise is None else {"actions": self.actions, "noise": self.noise}
        return {
            OBSERVATIONS: pack(arrays),
            TEXT: json.dumps(text, sort_keys=True).encode(),
            INPUTS: pack(stacked),
            ACTIONS: pack(recorded),
        }

    def run(self, predict_chunk: Callable[[Observation, Array | None], Array]) -> Array:
        """What `predict_chunk(observation, noise)` gives on every observation, [samples, chunk, action_dim]."""
        return np.stack([predict_chunk(observation, noise) for observation, noise in self.samples])

    @property
    def samples(self) -> tuple[Sample, ...]:
        """What a policy is asked with."""
        noises = [None] * len(self.observations) if self.noise is None else list(self.noise)
        return tuple(zip(self.observations, noises, strict=True))


def of_sample(predict_chunk: Callable[[Observation, Array | None], Array]) -> Callable[[Sample], Array]:
    """`predict_chunk` as a function of one sample, as measurements call it."""
    return lambda sample: predict_chunk(*sample)
