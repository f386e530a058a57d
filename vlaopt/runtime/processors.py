"""Processors: an observation of the robot to the tensors of the components, and their actions back. Numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlaopt.artifact.policy_spec import (
    ImageProcessor,
    NormaliseProcessor,
    PolicySpec,
    Processor,
    TokeniseProcessor,
    Unnormalise,
)
from vlaopt.errors import InputError
from vlaopt.tensors import Array, check, check_finite, unpack

Observation = Mapping[str, Any]
Process = Callable[[Any], Array]


class Processors:
    """The processors of one policy, made from its PolicySpec and the bytes of its assets."""

    def __init__(self, spec: PolicySpec, read: Callable[[str], bytes]) -> None:
        """`read` gives the bytes of an asset by its name in `policy/`. Raises InputError for unsound assets."""
        self._spec = spec
        self._statistics = unpack(read(spec.statistics), where=spec.statistics)
        self._steps = [(step.input, step.output, self._process(step, read)) for step in spec.preprocess]
        self._mean, self._std = self._law(spec.postprocess.statistics, spec.action_dim)

    def prepare(self, observation: Observation) -> dict[str, Array]:
        """The components' input tensors for one observation (one time step, no batch dimension).

        Raises InputError naming a missing, unknown, misshapen, mistyped or non-finite part.
        """
        self.check_names(observation)
        return {output: process(observation[name]) for name, output, process in self._steps}

    def check_names(self, observation: Observation) -> None:
        """Raises InputError unless `observation` is a mapping with the policy's own names, no fewer and no more."""
        needed = self._spec.observation_names()
        if not isinstance(observation, Mapping):
            raise InputError(
                f"the observation is a {type(observation).__name__}, a dict of {', '.join(needed)} is needed"
            )
        missing = [name for name in needed if name not in observation]
        unknown = [str(name) for name in observation if name not in needed]
        if missing or unknown:
            lacks = [f"lacks {', '.join(missing)}"] if missing else []
            has = [f"has unknown {', '.join(sorted(unknown))}"] if unknown else []
            raise InputError(f"the observation {' and '.join(lacks + has)}", hint=f"needed: {', '.join(needed)}")

    def actions(self, outputs: Mapping[str, Array]) -> Array:
        """The chunk in the robot's units, float32 [chunk_size, action_dim], from the components' outputs.

        Raises InputError when the components gave another shape, or a value that is not finite.
        """
        post: Unnormalise = self._spec.postprocess
        raw = outputs[post.input]
        shape = (1, self._spec.chunk.size, self._spec.action_dim)
        if raw.shape != shape:
            raise InputError(f"{post.input}: the components gave shape {list(raw.shape)}, {list(shape)} needed")
        chunk = raw[0].astype(np.float32) * self._std + self._mean
        # Before clipping, which would hide an infinity.
        check_finite(post.input, chunk)
        low, high = (-np.inf if post.low is None else post.low), (np.inf if post.high is None else post.high)
        return np.asarray(np.clip(chunk, low, high), dtype=np.float32)

    def action_std(self) -> Array:
        """Standard deviation of each action in training, float32 [action_dim]: the unit of the action error."""
        return self._std

    def _process(self, step: Processor, read: Callable[[str], bytes]) -> Process:
        if isinstance(step, ImageProcessor):
            return _image(step)
        if isinstance(step, NormaliseProcessor):
            mean, std = self._law(step.statistics, step.size)
            return lambda value: ((check(step.input, value, dtype="float32", shape=(step.size,)) - mean) / std)[None]
        return _tokenise(step, read(step.asset))

    def _law(self, name: str, size: int) -> tuple[Array, Array]:
        """Mean and standard deviation called `name`, both float32 [size]."""
        try:
            mean, std = self._statistics[f"{name}.mean"], self._statistics[f"{name}.std"]
        except KeyError as error:
            raise InputError(f"no {error.args[0]} among the statistics", where=self._spec.statistics) from error
        check(f"{name}.mean", mean, dtype="float32", shape=(size,))
        check(f"{name}.std", std, dtype="float32", shape=(size,))
        if not (std > 0).all():
            raise InputError(f"{name}.std: not positive everywhere", where=self._spec.statistics)
        return mean, std


def _image(step: ImageProcessor) -> Process:
    def process(value: Any) -> Array:
        if not isinstance(value, np.ndarray) or value.dtype == np.uint8:
            frame = check(step.input, value, dtype="uint8", shape=(step.height, step.width, 3))
            scaled: Array = np.multiply(frame.transpose(2, 0, 1)[None], np.float32(1 / 255), order="C")
            return scaled
        frame = check(step.input, value, dtype="float32", shape=(3, step.height, step.width))
        if frame.min() < 0 or frame.max() > 1:
            raise InputError(f"{step.input}: float image outside 0–1: {frame.min():g} … {frame.max():g}")
        return frame[None]

    return process


def _tokenise(step: TokeniseProcessor, asset: bytes) -> Process:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(asset)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"not a tokenizer file: {error}", where=step.asset) from error
    remembered: dict[str, Array] = {}

    def process(value: Any) -> Array:
        if not isinstance(value, str):
            raise InputError(f"{step.input}: {type(value).__name__} given, a sentence (str) is needed")
        if value not in remembered:
            ids = np.asarray([tokenizer.encode(value).ids], dtype=np.int64)
            if ids.shape != (1, step.max_length):
                raise InputError(f"{step.asset}: gives {ids.shape[1]} tokens, the policy takes {step.max_length}")
            if len(remembered) >= 64:
                remembered.clear()
            remembered[value] = ids
        return remembered[value]

    return process
