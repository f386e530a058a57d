"""What a calibration set holds, counted and measured: per instruction, per episode, per feature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from vlaopt.calibration.card import TASK, Card
from vlaopt.calibration.checks import Expected, find_problems
from vlaopt.calibration.reading import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.tensors import Array


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FeatureStatistics(_Frozen):
    """Of all values of all samples; None where there are none, or where they are not numbers."""

    dtype: str
    shape: tuple[int, ...]
    minimum: float | None
    maximum: float | None
    mean: float | None
    std: float | None


class Inspection(_Frozen):
    """One set. `problems` is what `CalibrationSet.check` would refuse, each with its hint."""

    digest: str
    card: Card
    tasks: dict[str, int]
    episodes: dict[int, int]
    features: dict[str, FeatureStatistics]
    problems: tuple[tuple[str, str | None], ...]


def inspect(samples: CalibrationSet, expected: Expected | None = None) -> Inspection:
    """Measure a set; every sample is decoded once, one in memory at a time.

    `expected` is what a policy takes, the set's own layout for None. Damaged images are a problem, not an error.
    """
    wanted = expected if expected is not None else samples.layout()
    instructions = samples.card.instructions
    tasks = Counter(instructions[samples.task_index(index)] for index in range(len(samples)))
    episodes = Counter(samples.episode(index)[0] for index in range(len(samples)))
    names = [name for name in samples.card.observation if name != TASK]
    return Inspection(
        digest=samples.digest,
        card=samples.card,
        tasks=dict(tasks),
        episodes=dict(sorted(episodes.items())),
        features={name: _measure(samples, name) for name in names},
        problems=tuple((problem.message, problem.hint) for problem in find_problems(samples, wanted)),
    )


def _measure(samples: CalibrationSet, name: str) -> FeatureStatistics:
    feature = samples.card.observation[name]
    count, total, squares, low, high = 0, 0.0, 0.0, np.inf, -np.inf
    for value in _values(samples, name):
        exact = value.astype(np.float64)
        count, total, squares = count + exact.size, total + exact.sum(), squares + float((exact**2).sum())
        low, high = min(low, exact.min(initial=np.inf)), max(high, exact.max(initial=-np.inf))
    told: dict[str, Any] = dict.fromkeys(("minimum", "maximum", "mean", "std"))
    if count and np.isfinite([total, squares, low, high]).all():
        mean = total / count
        std = float(np.sqrt(max(squares / count - mean * mean, 0.0)))
        told = {"minimum": float(low), "maximum": float(high), "mean": float(mean), "std": std}
    return FeatureStatistics(dtype=feature.dtype, shape=feature.shape, **told)


def _values(samples: CalibrationSet, name: str) -> Iterator[Array]:
    """Every sample's value that can be decoded."""
    for index in range(len(samples)):
        try:
            yield samples.value(name, index)
        except InputError:
            continue
