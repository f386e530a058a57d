"""A capture: what every component of the eager policy got and gave on real observations, one file per observation.

Written while the policy is exported, read for golden data, parity and calibration. Knows no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import first_problem
from vlaopt.artifact.policy_spec import AutoregressiveLoop, PolicySpec, TensorSpec, TokeniseProcessor
from vlaopt.errors import InputError, StageError
from vlaopt.tensors import Array, pack, unpack

INDEX = "capture/index.json"
_NOISE = "noise"


class CaptureIndex(BaseModel):
    """Which observations were captured: rows of the set whose digest is `digest`; those at `golden` are golden too."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_: Literal["vlaopt.capture/1"] = Field(default="vlaopt.capture/1", alias="schema")
    digest: str
    rows: tuple[int, ...] = Field(min_length=1)
    golden: tuple[int, ...]

    @model_validator(mode="after")
    def _golden_is_captured(self) -> CaptureIndex:
        if any(not 0 <= position < len(self.rows) for position in self.golden):
            raise ValueError("a golden observation was not captured")
        return self


@dataclass(frozen=True)
class Call:
    """One call of a component: its inputs and outputs by name, in the spec's order."""

    inputs: dict[str, Array]
    outputs: dict[str, Array]


Calls = Mapping[str, Sequence[Call]]
"""The calls of one prediction by component, in the order they were made."""


def sample_path(position: int) -> str:
    """Where the sample at `position` of the capture lies in an artifact."""
    return f"capture/{position:05d}.safetensors"


@dataclass(frozen=True)
class Capture:
    """An opened capture of a policy; samples are read one at a time and not kept."""

    spec: PolicySpec
    index: CaptureIndex
    _read: Callable[[str], bytes]

    @classmethod
    def of(cls, artifact: Artifact) -> Capture:
        """The capture in `artifact`. Raises InputError when it has none or an unsound one."""
        if not artifact.has(INDEX):
            raise InputError(
                "the artifact holds no capture", where=str(artifact.path), hint="export the policy again: vlaopt export"
            )
        return cls.read(artifact.spec(), artifact.read)

    @classmethod
    def read(cls, spec: PolicySpec, read: Callable[[str], bytes]) -> Capture:
        """The capture of a policy whose files `read` gives by path. Raises InputError for an unsound one."""
        try:
            return cls(spec, CaptureIndex.model_validate_json(read(INDEX)), read)
        except ValidationError as error:
            raise InputError(first_problem(error), where=INDEX) from error

    def __len__(self) -> int:
        return len(self.index.rows)

    def noise(self, position: int) -> Array | None:
        """The noise of the sample at `position`, None for a policy without."""
        return self._tensors(position).get(_NOISE)

    def calls(self, position: int, component: str, processed: Mapping[str, Array]) -> list[Call]:
        """Every call of `component` for the sample at `position`.

        `processed` are the tensors that the processors give for its observation; a capture does not repeat them.
        """
        stored = self._tensors(position)
        try:
            return self._calls(stored, component, processed)
        except KeyError as error:
            raise InputError(f"{sample_path(position)} has no tensor {error.args[0]!r}", hint="export again") from error

    def _calls(self, stored: Mapping[str, Array], name: str, processed: Mapping[str, Array]) -> list[Call]:
        component, kept = self.spec.components[name], _given_by_loop(self.spec, name)
        cache = _cache(self.spec) if name == self.spec.step() else {}
        loop = {tensor.name: stored[_input(tensor.name)] for tensor in kept}
        outputs = {tensor.name: stored[_output(tensor.name)] for tensor in component.outputs}

        def taken(tensor: str, k: int) -> Array:
            if tensor in processed:
                return processed[tensor]
            if tensor in loop:
                return np.asarray(loop[tensor][k])
            if k > 0 and tensor in cache:
                return np.asarray(outputs[cache[tensor]][k - 1])
            return np.asarray(stored[_output(tensor)][-1])

        return [
            Call(
                {tensor.name: taken(tensor.name, k) for tensor in component.inputs},
                {key: np.asarray(values[k]) for key, values in outputs.items()},
            )
            for k in range(len(next(iter(outputs.values()))))
        ]

    def _tensors(self, position: int) -> dict[str, Array]:
        path = sample_path(position)
        return unpack(self._read(path), where=path)


class Recorder:
    """Collects the calls of one prediction: `tap` goes to `predict_chunk`, then `calls` has them.

    What a component gave and others take is held once, however often the loop's step takes it.
    """

    def __init__(self, spec: PolicySpec) -> None:
        self._spec = spec
        self._calls: dict[str, list[Call]] = {name: [] for name in spec.order()}
        self._known: dict[str, Array] = {}

    def tap(self, name: str, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        """One call, its arrays the recorder's own from now on. Raises StageError for other shapes than the spec's."""
        component = self._spec.components[name]
        for tensors, arrays in ((component.inputs, inputs), (component.outputs, outputs)):
            for tensor in tensors:
                _check(name, tensor, arrays[tensor.name])
        taken = {tensor.name: self._shared(tensor.name, inputs[tensor.name]) for tensor in component.inputs}
        given = {tensor.name: outputs[tensor.name] for tensor in component.outputs}
        self._known |= given
        self._calls[name].append(Call(taken, given))

    def calls(self) -> Calls:
        """What was seen. Raises StageError for a component that was not called, or more than once outside the loop."""
        for name, calls in self._calls.items():
            if not calls:
                raise StageError(f"component {name} was not called by the eager policy")
            if len(calls) > 1 and name != self._spec.step():
                raise StageError(f"component {name} was called {len(calls)} times by the eager policy, not once")
        return self._calls

    def _shared(self, name: str, value: Array) -> Array:
        known = self._known.get(name)
        if known is not None and np.array_equal(known, value):
            return known
        self._known[name] = value
        return value


def pack_sample(spec: PolicySpec, calls: Calls, noise: Array | None) -> bytes:
    """The file of one sample. Its tensors have the component's calls as their first dimension.

    Stored are the outputs of every component and what the loop gives them. What the processors give is left out, as it
    follows from the observation, and so is what a component takes from another.
    """
    tensors: dict[str, Array] = {} if noise is None else {_NOISE: noise}
    for name, made in calls.items():
        for tensor in _given_by_loop(spec, name):
            tensors[_input(tensor.name)] = np.stack([call.inputs[tensor.name] for call in made])
        for tensor in spec.components[name].outputs:
            tensors[_output(tensor.name)] = np.stack([call.outputs[tensor.name] for call in made])
    return pack(tensors)


def processed_names(spec: PolicySpec) -> set[str]:
    """The tensors that the processors give."""
    names = (step.outputs() if isinstance(step, TokeniseProcessor) else (step.output,) for step in spec.preprocess)
    return {name for outputs in names for name in outputs}


def _given_by_loop(spec: PolicySpec, name: str) -> list[TensorSpec]:
    """The inputs of a component that neither the processors nor a component give: state and time, tokens."""
    elsewhere = processed_names(spec) | {t.name for part in spec.components.values() for t in part.outputs}
    return [tensor for tensor in spec.components[name].inputs if tensor.name not in elsewhere]


def _cache(spec: PolicySpec) -> dict[str, str]:
    """By tensor that the step takes, the one it gave the step before."""
    loop = spec.loop
    return {taken: given for given, taken in loop.cache.items()} if isinstance(loop, AutoregressiveLoop) else {}


def _check(component: str, tensor: TensorSpec, value: Array) -> None:
    same = len(value.shape) == len(tensor.shape) and all(
        isinstance(wanted, str) or size == wanted for size, wanted in zip(value.shape, tensor.shape, strict=True)
    )
    if not same or value.dtype != tensor.dtype:
        raise StageError(
            f"component {component}: {tensor.name} is {value.dtype} {list(value.shape)}, "
            f"its spec says {tensor.dtype} {list(tensor.shape)}"
        )


def _input(name: str) -> str:
    return f"inputs/{name}"


def _output(name: str) -> str:
    return f"outputs/{name}"
