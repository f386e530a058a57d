"""What a policy costs over the number of its loop's steps, and over the size of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np

from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.benchmark.actions import compare_actions
from vlaopt.benchmark.compare import interleave
from vlaopt.benchmark.record import Curve, CurvePoint
from vlaopt.benchmark.schedule import SYSTEM_CLOCK, Clock
from vlaopt.benchmark.statistics import minimum_samples, percentile
from vlaopt.errors import InputError
from vlaopt.runtime.adjust import adjusted
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.loop import draw_noise, noise_shape
from vlaopt.runtime.policy import Policy
from vlaopt.tensors import Array

ROUNDS, ITERATIONS = 20, 5
SECONDS = 5.0
"""What measuring one point may cost; a fast one is called a hundred times."""


def cost_over_steps(
    policy: Policy, golden: Golden, steps: Sequence[int], *, seconds: float = SECONDS, clock: Clock = SYSTEM_CLOCK
) -> Curve:
    """Latency of a chunk and action error by the number of the loop's steps, on the sessions that `policy` has.

    The error is the mean over executed actions, in their standard deviations, against the golden actions, which were
    recorded at the number of steps that the policy was exported with. A ddpm loop takes as many of the recorded draws
    as it has steps, and more by its law. Raises InputError where the loop has no such number or cannot take one of
    `steps`.
    """
    values = _checked("steps", steps)
    policies = {
        value: Policy(adjusted(policy.spec, steps=value), policy.processors, policy.sessions, backend=policy.backend)
        for value in values
    }
    noises = {value: [_stretched(one.spec, noise) for _, noise in golden.samples] for value, one in policies.items()}

    def call(value: int) -> Callable[[int], Array]:
        return lambda row: policies[value].predict_chunk(golden.observations[row], noises[value][row])

    calls = {value: call(value) for value in values}
    errors = {value: _error(policy, golden, calls[value]) for value in values}
    return _measured("steps", calls, len(golden.observations), seconds, clock, errors)


def cost_over_batch(
    policy: Policy, golden: Golden, sizes: Sequence[int], *, seconds: float = SECONDS, clock: Clock = SYSTEM_CLOCK
) -> Curve:
    """Latency of a whole batch by its size: golden observations from each on, from the first again after the last.

    All rows have the noise of the first. Raises InputError for a size below 1.
    """
    values = _checked("batch", sizes)
    samples, count = golden.samples, len(golden.observations)
    names = golden.observations[0]

    def call(size: int) -> Callable[[int], Array]:
        rows = [[golden.observations[(first + k) % count] for k in range(size)] for first in range(count)]
        batches = [{name: [row[name] for row in batch] for name in names} for batch in rows]
        return lambda first: policy.predict_chunk(batches[first], samples[first][1])

    return _measured("batch", {size: call(size) for size in values}, count, seconds, clock, {})


def _checked(over: str, values: Sequence[int]) -> list[int]:
    """Each value once, ascending."""
    if not values:
        raise InputError(f"{over}: no value to measure at")
    for value in values:
        if value < 1:
            raise InputError(f"{over}: {value} given, 1 is the least")
    return sorted(set(values))


def _stretched(spec: PolicySpec, noise: Array | None) -> Array | None:
    """Recorded noise as `spec` takes it: only of a ddpm loop with another number of steps has it another shape."""
    shape = noise_shape(spec)
    if noise is None or noise.shape == shape:
        return noise
    drawn = draw_noise(spec, np.random.default_rng(0))
    return np.concatenate([noise, drawn[len(noise) :]])[: shape[0]] if drawn is not None else None


def _error(policy: Policy, golden: Golden, predict_chunk: Callable[[int], Array]) -> float:
    found = compare_actions(
        np.stack([predict_chunk(row) for row in range(len(golden.observations))]),
        golden.actions,
        std=policy.processors.action_std(),
        n_action_steps=policy.spec.chunk.n_action_steps,
        gripper=None,
    )
    return found.executed.mean


def _measured(
    over: Literal["batch", "steps"],
    calls: Mapping[int, Callable[[int], Array]],
    samples: int,
    seconds: float,
    clock: Clock,
    errors: Mapping[int, float],
) -> Curve:
    """All points in turns, as often as their median needs at the least."""
    turns = interleave(
        {str(value): call for value, call in calls.items()},
        range(samples),
        rounds=ROUNDS,
        iterations_per_round=ITERATIONS,
        seconds=seconds,
        fewest_rounds=minimum_samples(0.5),
        clock=clock,
    )
    latencies = {value: percentile(np.round(turns.samples_ms[str(value)], 4), 0.5) for value in calls}
    return Curve(
        over=over,
        points=tuple(
            CurvePoint(value=value, latency_ms=latency, action_error_mean=errors.get(value))
            for value, latency in latencies.items()
        ),
    )
