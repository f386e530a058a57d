"""The form of observations: names, dtypes, shapes, the time steps of a history, the rows of a batch. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlaopt.artifact.policy_spec import ImageProcessor, NormaliseProcessor, PolicySpec, Processor
from vlaopt.errors import InputError
from vlaopt.tensors import Array, check

Observation = Mapping[str, Any]


def check_names(spec: PolicySpec, observation: Observation) -> None:
    """Raises InputError unless `observation` is a mapping with the policy's own names, no fewer and no more."""
    needed = spec.observation_names()
    if not isinstance(observation, Mapping):
        raise InputError(f"the observation is a {type(observation).__name__}, a dict of {', '.join(needed)} is needed")
    missing = [name for name in needed if name not in observation]
    unknown = [str(name) for name in observation if name not in needed]
    if missing or unknown:
        lacks = [f"lacks {', '.join(missing)}"] if missing else []
        has = [f"has unknown {', '.join(sorted(unknown))}"] if unknown else []
        raise InputError(f"the observation {' and '.join(lacks + has)}", hint=f"needed: {', '.join(needed)}")


def check_part(step: Processor, value: Any, times: tuple[int, ...] = ()) -> Any:
    """`value` when it is what `step` takes, with the time dimension `times` in front; else InputError naming it."""
    if isinstance(step, NormaliseProcessor):
        return check(step.input, value, dtype="float32", shape=(*times, step.size))
    if isinstance(step, ImageProcessor):
        return _check_image(step, value, times)
    if not isinstance(value, str):
        raise InputError(f"{step.input}: {type(value).__name__} given, a sentence (str) is needed")
    return value


def check_time_step(spec: PolicySpec, observation: Observation) -> None:
    """Raises InputError naming what is wrong with an observation of one time step."""
    check_names(spec, observation)
    for step in spec.preprocess:
        check_part(step, observation[step.input])


def stacked(spec: PolicySpec, steps: Sequence[Observation]) -> Observation:
    """Observations of one time step each, the newest last, as one with a time dimension; texts are the newest's."""
    ranks, newest = _ranks(spec), steps[-1]
    return {name: np.stack([step[name] for step in steps]) if name in ranks else newest[name] for name in newest}


def with_history(spec: PolicySpec, observation: Observation) -> Observation:
    """`observation` with the time dimension of the policy's history; one time step stands for all of them.

    Raises InputError when only some parts have a time dimension.
    """
    if spec.history == 1:
        return observation
    arrays = {name: observation[name] for name in _ranks(spec) if isinstance(observation[name], np.ndarray)}
    single = {name: value for name, value in arrays.items() if value.ndim == _ranks(spec)[name]}
    if single and len(single) != len(arrays):
        raise InputError(f"the observation's parts differ in their time dimension: {', '.join(sorted(single))} without")
    return {**observation, **{name: np.broadcast_to(v, (spec.history, *v.shape)) for name, v in single.items()}}


def batch_size(spec: PolicySpec, observation: Observation) -> int | None:
    """The length of the batch dimension, None without one. Raises InputError when parts disagree or it is 0.

    With a history, rows of a batch have their time dimension.
    """
    ranks, sizes = _ranks(spec), dict[str, int | None]()
    for name in spec.observation_names():
        value = observation[name]
        if isinstance(value, np.ndarray) and name in ranks:
            deepest = ranks[name] + (spec.history > 1)
            sizes[name] = len(value) if value.ndim == deepest + 1 else None
        elif isinstance(value, (list, tuple)):
            sizes[name] = len(value)
        elif isinstance(value, str):
            sizes[name] = None
    if len(set(sizes.values())) > 1:
        raise InputError(f"the observation's parts differ in their batch dimension: {sizes}")
    size = next(iter(sizes.values()), None)
    if size == 0:
        raise InputError("the observation's batch is empty")
    return size


def _ranks(spec: PolicySpec) -> dict[str, int]:
    """The number of dimensions of one time step, of every part that is an array."""
    arrays = (step for step in spec.preprocess if isinstance(step, (ImageProcessor, NormaliseProcessor)))
    return {step.input: 3 if isinstance(step, ImageProcessor) else 1 for step in arrays}


def _check_image(step: ImageProcessor, value: Any, times: tuple[int, ...]) -> Array:
    if not isinstance(value, np.ndarray) or value.dtype == np.uint8:
        return check(step.input, value, dtype="uint8", shape=(*times, step.height, step.width, 3))
    frame = check(step.input, value, dtype="float32", shape=(*times, 3, step.height, step.width))
    if frame.min() < 0 or frame.max() > 1:
        raise InputError(f"{step.input}: float image outside 0–1: {frame.min():g} … {frame.max():g}")
    return frame
