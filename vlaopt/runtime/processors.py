"""Processors: an observation of the robot to the tensors of the components, and their actions back. Numpy only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vlaopt.artifact.policy_spec import ImageProcessor, NormaliseProcessor, PolicySpec, Processor, TokeniseProcessor
from vlaopt.errors import InputError
from vlaopt.runtime.normalisation import Normalisation, Statistics
from vlaopt.runtime.observations import Observation, check_names, check_part, with_history
from vlaopt.tensors import Array, check_finite, unpack

Process = Callable[[Any], dict[str, Array]]


class Processors:
    """The processors of one policy, made from its PolicySpec and the bytes of its assets."""

    def __init__(self, spec: PolicySpec, read: Callable[[str], bytes]) -> None:
        """`read` gives the bytes of an asset by its name in `policy/`. Raises InputError for unsound assets."""
        self._spec = spec
        self._times = (spec.history,) if spec.history > 1 else ()
        statistics = Statistics(unpack(read(spec.statistics), where=spec.statistics), where=spec.statistics)
        self._steps = [(step, self._process(step, statistics, read)) for step in spec.preprocess]
        post = spec.postprocess
        self._action = statistics.action(post.statistics, post.mode, post.eps, spec.action_dim)
        self._deviation = statistics.deviation(post.statistics, spec.action_dim)

    def prepare(self, observation: Observation) -> dict[str, Array]:
        """The components' input tensors for one observation, without batch dimension.

        Where the policy has a history, its parts have a time dimension; one without stands for every time step.
        Raises InputError naming a missing, unknown, misshapen, mistyped or non-finite part.
        """
        check_names(self._spec, observation)
        observation = with_history(self._spec, observation)
        tensors: dict[str, Array] = {}
        for step, process in self._steps:
            tensors |= process(check_part(step, observation[step.input], self._times))
        return tensors

    def actions(self, outputs: Mapping[str, Array]) -> Array:
        """The chunk in the robot's units, float32 [chunk_size, action_dim], from the components' outputs.

        Raises InputError when the components gave fewer rows or columns, or a value that is not finite.
        """
        post, chunk, width = self._spec.postprocess, self._spec.chunk, self._spec.action_dim
        raw, end = outputs[post.input], chunk.start + chunk.size
        if raw.ndim != 3 or raw.shape[0] != 1 or raw.shape[1] < end or raw.shape[2] < width:
            needed = [1, end, width]
            raise InputError(f"{post.input}: the components gave shape {list(raw.shape)}, {needed} needed at the least")
        actions = raw[0, chunk.start : end, :width].astype(np.float32)
        if self._action:
            actions = self._action.undo(actions)
        # Before clipping, which would hide an infinity.
        check_finite(post.input, actions)
        low, high = (-np.inf if post.low is None else post.low), (np.inf if post.high is None else post.high)
        return np.asarray(np.clip(actions, low, high), dtype=np.float32)

    def in_policy_units(self, actions: Array) -> Array:
        """The opposite of `actions` but for clipping: float32 [n, action_dim] in the units of the policy's output."""
        return self._action.apply(actions.copy()) if self._action else actions

    def action_std(self) -> Array:
        """The unit of the action error, float32 [action_dim]: each action's standard deviation in training.

        It is 1 in the robot's units for an action that never changed in training.
        """
        return np.where(self._deviation > 0, self._deviation, np.float32(1))

    def _process(self, step: Processor, statistics: Statistics, read: Callable[[str], bytes]) -> Process:
        if isinstance(step, ImageProcessor):
            return _image(step, statistics.input(step.statistics, step.mode, step.eps, 3))
        if isinstance(step, NormaliseProcessor):
            return _vector(step, statistics.input(step.statistics, step.mode, step.eps, step.size))
        return _tokenise(step, read(step.asset))


def _image(step: ImageProcessor, law: Normalisation | None) -> Process:
    def process(frame: Array) -> dict[str, Array]:
        if frame.dtype == np.uint8:
            image = np.multiply(np.moveaxis(frame, -1, -3)[None], np.float32(1 / 255), order="C")
        else:
            image = frame[None] if law is None else frame[None].copy()
        if law is not None:
            law.apply(np.moveaxis(image, -3, -1))  # a view: channels last, for statistics per channel
        return {step.output: image}

    return process


def _vector(step: NormaliseProcessor, law: Normalisation | None) -> Process:
    def process(values: Array) -> dict[str, Array]:
        return {step.output: (values if law is None else law.apply(values.copy()))[None]}

    return process


def _tokenise(step: TokeniseProcessor, asset: bytes) -> Process:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(asset)
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"not a tokenizer file: {error}", where=step.asset) from error
    remembered: dict[str, dict[str, Array]] = {}

    def encode(sentence: str) -> dict[str, Array]:
        encoding = tokenizer.encode(sentence if sentence.endswith(step.suffix) else sentence + step.suffix)
        if len(encoding.ids) != step.max_length:
            raise InputError(f"{step.asset}: gives {len(encoding.ids)} tokens, the policy takes {step.max_length}")
        tensors = {step.output: np.asarray([encoding.ids], dtype=np.int64)}
        if step.mask is not None:
            tensors[step.mask] = np.asarray([encoding.attention_mask], dtype=np.bool_)
        return tensors

    def process(sentence: str) -> dict[str, Array]:
        if sentence not in remembered:
            if len(remembered) >= 64:
                remembered.clear()
            remembered[sentence] = encode(sentence)
        return remembered[sentence]

    return process
