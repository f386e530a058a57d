"""Does the policy draw its noise by the law of its spec? A wrong law ruins a policy and shows in no comparison of
graphs, which share their noise.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlaopt.artifact.policy_spec import DiffusionLoop, EulerLoop, Noise
from vlaopt.errors import StageError
from vlaopt.policies import EagerPolicy
from vlaopt.tensors import Array

UNLIKELY = 6.0
"""The limit of `unlikeliness`: policies of the right law are beyond it once in a million."""

_CERTAIN = 300.0
_VALUES = 4096
_FEWEST_DRAWS, _MOST_DRAWS = 2, 32
_ALTERNATIVES = (
    Noise(law="normal"),
    Noise(law="uniform"),
    Noise(law="uniform", low=-1.0, high=1.0),
)


@dataclass(frozen=True)
class LawCheck:
    """The noise that a policy draws beside the law of its spec.

    `unlikeliness` is −log10 of the probability that such draws, or such that fit worse, come from the spec's law, by
    the Kolmogorov–Smirnov test; `values` is how many numbers were drawn.
    """

    component: str
    spec: str
    drawn: str
    values: int
    unlikeliness: float


class _Seen(Exception):
    """The step was called: the rest of the prediction is not needed."""


def check_law(eager: EagerPolicy, observation: Mapping[str, Any]) -> LawCheck | None:
    """The policy's own draws held against its spec's law; None for a policy whose loop starts from no noise.

    Raises StageError when the step is not called, or starts from another shape than the spec says.
    """
    loop, law = eager.spec.loop, eager.spec.noise
    if not isinstance(loop, (EulerLoop, DiffusionLoop)):
        return None
    draws: list[Array] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        while len(draws) < _FEWEST_DRAWS or (len(draws) * draws[0].size < _VALUES and len(draws) < _MOST_DRAWS):
            draws.append(_first_state(eager, loop, observation))
            if draws[-1].shape != law.shape:
                shapes = f"{list(draws[-1].shape)}, its spec says {list(law.shape)}"
                raise StageError(f"component {loop.step}: the policy draws noise of shape {shapes}")
    repeated = all(np.array_equal(draw, draws[0]) for draw in draws[1:])
    values = draws[0].ravel() if repeated else np.concatenate([draw.ravel() for draw in draws])
    wrong_seed = repeated and law.seed == "per-call"
    return LawCheck(
        component=loop.step,
        spec=describe(law),
        drawn=_describe_values(values) + (", the same at every call" if repeated else ""),
        values=values.size,
        unlikeliness=_CERTAIN if wrong_seed else min(unlikeliness(values, law), _CERTAIN),
    )


def _first_state(eager: EagerPolicy, loop: EulerLoop | DiffusionLoop, observation: Mapping[str, Any]) -> Array:
    """What the step is given first when the policy draws its own noise; the prediction ends there."""
    seen: list[Array] = []

    def tap(name: str, inputs: dict[str, Array], outputs: dict[str, Array]) -> None:
        if name == loop.step:
            seen.append(inputs[loop.state_input])
            raise _Seen

    with contextlib.suppress(_Seen):
        eager.predict_chunk(observation, tap=tap)
    if not seen:
        raise StageError(f"component {loop.step} was not called by the eager policy")
    return seen[0]


def unlikeliness(values: Array, law: Noise) -> float:
    """−log10 p of the Kolmogorov–Smirnov test that independent `values` follow `law`; infinite where p is 0.

    p = 2 Σ (−1)^(k−1) exp(−2 k² λ²) with λ = (√n + 0.12 + 0.11 / √n) D (Stephens, 1970), D the largest distance
    between the two distribution functions.
    """
    ordered = np.sort(values.astype(np.float64), axis=None)
    expected = _distribution(law)(ordered)
    ranks = np.arange(ordered.size + 1) / ordered.size
    distance = max(float(np.abs(expected - ranks[1:]).max()), float(np.abs(expected - ranks[:-1]).max()))
    root = math.sqrt(ordered.size)
    exponent = 2.0 * ((root + 0.12 + 0.11 / root) * distance) ** 2
    if exponent < 0.5:
        return 0.0  # p is above 0.9, where the sum below converges slowly
    # The first term taken out, so that p far below what a double holds still has a logarithm.
    rest = sum((-1) ** (k - 1) * math.exp(-(k * k - 1) * exponent) for k in range(1, 10))
    return max(0.0, (exponent - math.log(2.0 * rest)) / math.log(10.0))


def describe(law: Noise) -> str:
    """The law in words."""
    return f"uniform from {law.low:g} to {law.high:g}" if law.law == "uniform" else law.law


def _distribution(law: Noise) -> Callable[[Array], Array]:
    if law.law == "normal":
        return lambda values: np.asarray(torch.special.ndtr(torch.from_numpy(values)).numpy())
    if law.law == "uniform":
        return lambda values: np.clip((values - law.low) / (law.high - law.low), 0.0, 1.0)
    return lambda values: np.asarray(values >= 0.0, dtype=np.float64)  # no noise: all zeros


def _describe_values(values: Array) -> str:
    """The well-known law that the values follow, else their mean and deviation."""
    for law in _ALTERNATIVES:
        if unlikeliness(values, law) <= UNLIKELY:
            return describe(law)
    return f"of mean {values.mean():.3g} and deviation {values.std():.3g}"
