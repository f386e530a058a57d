"""What a policy costs over the number of its loop's steps, and over the size of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.benchmark.actions import compare_actions
from vlaopt.benchmark.compare import Turns, interleave
from vlaopt.benchmark.record import Curve, CurvePoint
from vlaopt.benchmark.schedule import SYSTEM_CLOCK, Clock
from vlaopt.benchmark.statistics import Percentile, minimum_samples, percentile
from vlaopt.errors import InputError
from vlaopt.runtime.adjust import adjusted
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.loop import draw_noise, noise_shape
from vlaopt.runtime.policy import Policy
from vlaopt.tensors import Array

ROUNDS, ITERATIONS = 20, 5
FEWEST = minimum_samples(0.5)
SECONDS = 5.0
"""What measuring one point may cost; a fast one is called a hundred times."""


def cost_over_steps(
    policy: Policy, golden: Golden, steps: Sequence[int], *, seconds: float = SECONDS, clock: Clock = SYSTEM_CLOCK
) -> Curve:
    """Latency of a chunk and action error by the number of the loop's steps, on the sessions that `policy` has.

    The error is the mean over executed actions, in their standard deviations, against the golden actions of the
    observations that there was time for: all of them, or the first eight at the least. Golden actions are of the number
    of steps that the policy was exported with. A ddpm loop takes as many of the recorded draws as it has steps, and
    more by its law. Raises InputError where the loop has no such number or cannot take one of `steps`.
    """
    policies = {
        value: Policy(adjusted(policy.spec, steps=value), policy.processors, policy.sessions, backend=policy.backend)
        for value in _checked("steps", steps)
    }
    chunks: dict[int, dict[int, Array]] = {value: {} for value in policies}

    def predicting(value: int, noises: Sequence[Array | None]) -> Callable[[int], None]:
        def predict(row: int) -> None:
            chunks[value][row] = policies[value].predict_chunk(golden.observations[row], noises[row])

        return predict

    calls = {
        value: predicting(value, [_stretched(one.spec, noise) for _, noise in golden.samples])
        for value, one in policies.items()
    }
    turns = _in_turns(calls, golden, seconds, clock)
    rows = range(min(turns.count, len(golden.observations)))
    errors = {value: _error(policy, golden, [made[row] for row in rows]) for value, made in chunks.items()}
    points = [
        CurvePoint(value=value, latency_ms=_latency_ms(turns, value), action_error_mean=error)
        for value, error in errors.items()
    ]
    return Curve(over="steps", points=tuple(points))


def cost_over_batch(
    policy: Policy, golden: Golden, sizes: Sequence[int], *, seconds: float = SECONDS, clock: Clock = SYSTEM_CLOCK
) -> Curve:
    """Latency of a whole batch by its size: golden observations from each on, from the first again after the last.

    The policy runs its rows one after the other, all with the noise of the first. Raises InputError for no size and
    for one below 1.
    """
    count, noises = len(golden.observations), [noise for _, noise in golden.samples]

    def predicting(size: int) -> Callable[[int], Array]:
        rows = [[golden.observations[(first + k) % count] for k in range(size)] for first in range(count)]
        batches = [{name: [row[name] for row in batch] for name in batch[0]} for batch in rows]
        return lambda first: policy.predict_chunk(batches[first], noises[first])

    calls = {size: predicting(size) for size in _checked("batch", sizes)}
    turns = _in_turns(calls, golden, seconds, clock)
    return Curve(
        over="batch", points=tuple(CurvePoint(value=size, latency_ms=_latency_ms(turns, size)) for size in calls)
    )


def _checked(over: str, values: Sequence[int]) -> list[int]:
    """Each value once, ascending."""
    if not values:
        raise InputError(f"{over}: no value to measure at")
    if min(values) < 1:
        raise InputError(f"{over}: {min(values)} given, 1 is the least")
    return sorted(set(values))


def _stretched(spec: PolicySpec, noise: Array | None) -> Array | None:
    """Recorded noise as `spec` takes it: only of a ddpm loop with another number of steps has it another shape."""
    shape = noise_shape(spec)
    if noise is None or noise.shape == shape:
        return noise
    drawn = draw_noise(spec, np.random.default_rng(0))
    return np.concatenate([noise, drawn[len(noise) :]])[: shape[0]] if drawn is not None else None


def _in_turns(calls: Mapping[int, Callable[[int], object]], golden: Golden, seconds: float, clock: Clock) -> Turns:
    """All calls in turns, on the number of an observation each, as often as their median needs at the least."""
    return interleave(
        {str(value): call for value, call in calls.items()},
        range(len(golden.observations)),
        rounds=ROUNDS,
        iterations_per_round=ITERATIONS,
        seconds=seconds,
        fewest_rounds=FEWEST,
        clock=clock,
    )


def _latency_ms(turns: Turns, value: int) -> Percentile:
    return percentile(np.round(turns.samples_ms[str(value)], 4), 0.5)


def _error(policy: Policy, golden: Golden, chunks: Sequence[Array]) -> float:
    """The mean error of the chunks of the first observations."""
    found = compare_actions(
        np.stack(chunks),
        golden.actions[: len(chunks)],
        std=policy.processors.action_std(),
        n_action_steps=policy.spec.chunk.n_action_steps,
        gripper=None,
    )
    return found.executed.mean
