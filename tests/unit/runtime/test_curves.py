"""The promise: a curve says what each number of steps, and each size of a batch, costs in time and in actions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.benchmark.conftest import FakeClock
from tests.unit.runtime.conftest import WorkingSession
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.policy_spec import DiffusionLoop
from vlaopt.errors import InputError
from vlaopt.runtime.curves import cost_over_batch, cost_over_steps
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import Policy, open_artifact
from vlaopt.tensors import Array


def growing(flow: Any, clock: FakeClock, **fields: Any) -> Policy:
    """x grows by itself: ẋ = x from 0 to 1, 3 ms a step, after an eye of 10 ms."""
    policy: Policy = flow(lambda x, t: x, **fields)[0]
    sessions: dict[str, Any] = {
        "eye": WorkingSession(clock, 10, lambda state: {"prefix": state}),
        "aflow": WorkingSession(clock, 3, lambda x, t, prefix: {"v": x}),
    }
    return Policy(policy.spec, policy.processors, sessions, backend="fake")


def golden(policy: Policy, count: int = 3) -> Golden:
    """What the policy itself does on `count` observations."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((count, 1, 2, 2)).astype(np.float32)
    observations = tuple({"joints": np.full(2, k, np.float32)} for k in range(count))
    actions = [policy.predict_chunk(*sample) for sample in zip(observations, noise, strict=True)]
    return Golden(observations, np.stack(actions), noise)


def test_a_step_more_costs_its_time_and_the_recorded_number_gives_the_golden_actions(flow: Any) -> None:
    clock = FakeClock()
    policy = growing(flow, clock, steps=4)
    recorded = golden(policy)
    curve = cost_over_steps(policy, recorded, [8, 1, 4, 8, 2], clock=clock)
    assert curve.over == "steps"
    assert [(point.value, point.latency_ms.value) for point in curve.points] == [(1, 13), (2, 16), (4, 22), (8, 34)]
    assert recorded.noise is not None
    size = float(np.abs(recorded.noise).mean())
    wanted = [abs((1 + 1 / steps) ** steps - (1 + 1 / 4) ** 4) * size for steps in (1, 2, 4, 8)]
    assert [point.action_error_mean for point in curve.points] == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    assert policy.spec.loop.steps == 4  # type: ignore[union-attr]


def test_a_slow_policy_is_judged_on_the_observations_that_there_was_time_for(flow: Any) -> None:
    clock = FakeClock()
    policy = growing(flow, clock, steps=4)
    recorded = golden(policy, 20)
    recorded.actions[8:] += 1  # were they looked at, the error would show it
    [slow] = cost_over_steps(policy, recorded, [4], seconds=0.001, clock=clock).points
    assert (slow.action_error_mean, slow.latency_ms.value) == (0, 22)
    [all_of_them] = cost_over_steps(policy, recorded, [4], seconds=10, clock=clock).points
    assert all_of_them.action_error_mean == pytest.approx(12 / 20)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([], "steps: no value to measure at"),
        ([4, 0], "steps: 0 given, 1 is the least"),
        ([-2], "steps: -2 given, 1 is the least"),
    ],
)
def test_numbers_of_steps_that_cannot_be_are_refused(flow: Any, steps: list[int], reason: str) -> None:
    clock = FakeClock()
    policy = growing(flow, clock)
    with pytest.raises(InputError, match=reason):
        cost_over_steps(policy, golden(policy), steps, clock=clock)
    with pytest.raises(InputError, match=reason.replace("steps", "batch")):
        cost_over_batch(policy, golden(policy), steps, clock=clock)


def test_a_policy_without_a_loop_has_no_number_of_steps(tiny_artifact: Artifact) -> None:
    policy = open_artifact(tiny_artifact, backend="onnxruntime")
    with pytest.raises(InputError, match="steps: a loop of kind single has no number of steps"):
        cost_over_steps(policy, Golden((), np.zeros((0, 2, 2), np.float32), None), [4])


def diffusing(flow: Any, clock: FakeClock, kind: str) -> Policy:
    """Three steps of a denoising loop whose network says that everything is noise."""
    policy = growing(flow, clock)
    names = {"step": "aflow", "state_input": "x", "time_input": "t", "prediction_output": "v"}
    alphas = (0.95, 0.8, 0.6, 0.4, 0.2, 0.1)
    loop = DiffusionLoop(kind=kind, steps=3, prediction="epsilon", alphas_cumprod=alphas, **names)  # type: ignore[arg-type]
    spec = policy.spec.model_copy(update={"loop": loop})
    return Policy(spec, policy.processors, policy.sessions, backend="fake")


def test_more_steps_than_the_training_had_are_refused(flow: Any) -> None:
    clock = FakeClock()
    policy = diffusing(flow, clock, "ddim")
    with pytest.raises(InputError, match="7 steps are more than the 6 of the training"):
        cost_over_steps(policy, golden(policy), [3, 7], clock=clock)


def test_a_ddpm_loop_takes_the_recorded_draws_and_more_by_its_law(flow: Any) -> None:
    clock = FakeClock()
    policy = diffusing(flow, clock, "ddpm")
    noise = np.random.default_rng(0).standard_normal((2, 3, 2, 2)).astype(np.float32)
    observations = tuple({"joints": np.full(2, k, np.float32)} for k in range(2))
    actions = [policy.predict_chunk(*sample) for sample in zip(observations, noise, strict=True)]
    step: Any = policy.sessions["aflow"]
    for count in (2, 3, 6):
        step.calls.clear()
        [point] = cost_over_steps(policy, Golden(observations, np.stack(actions), noise), [count], clock=clock).points
        assert np.array_equal(step.calls[0]["x"], noise[0, :1])
        assert point.latency_ms.value == 10 + 3 * count
        assert point.action_error_mean is not None
        assert (point.action_error_mean == 0) == (count == 3)


def test_a_batch_costs_what_its_rows_cost_and_is_of_distinct_observations(flow: Any) -> None:
    clock = FakeClock()
    policy = growing(flow, clock, steps=4)
    curve = cost_over_batch(policy, golden(policy), [1, 2, 2, 5], clock=clock)
    assert curve.over == "batch"
    assert [(point.value, point.latency_ms.value) for point in curve.points] == [(1, 22), (2, 44), (5, 110)]
    assert {point.action_error_mean for point in curve.points} == {None}


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), count=st.integers(1, 4))
def test_a_batch_is_golden_observations_one_after_the_other_whatever_its_size(
    flow: Any, sizes: Sequence[int], count: int
) -> None:
    clock = FakeClock()
    policy = growing(flow, clock, steps=1)
    recorded, eye = golden(policy, count), policy.sessions["eye"]
    assert isinstance(eye, WorkingSession)
    eye.calls.clear()
    curve = cost_over_batch(policy, recorded, sizes, seconds=0.001, clock=clock)
    assert [point.value for point in curve.points] == sorted(set(sizes))
    rows = [int(feeds["state"][0, 0]) for feeds in eye.calls]
    # The smallest size warms up first, twice: from the first observation on, then from the second.
    least = min(sizes)
    assert rows[: 2 * least] == [(first + k) % count for first in (0, 1) for k in range(least)]


def test_a_batch_leaves_the_policys_own_noise_alone(flow: Any) -> None:
    clock = FakeClock()
    policy = growing(flow, clock)
    recorded, before = golden(policy), policy._generator.bit_generator.state
    cost_over_batch(policy, recorded, [2], clock=clock)
    cost_over_steps(policy, recorded, [2], clock=clock)
    assert policy._generator.bit_generator.state == before


def test_a_batch_of_a_real_policy_takes_longer_than_one_row(
    tiny_artifact: Artifact, tiny_observation: dict[str, Any], tiny_chunk: Array
) -> None:
    policy = open_artifact(tiny_artifact, backend="onnxruntime")
    recorded = Golden((tiny_observation,), tiny_chunk[None], None)
    one, many = (point.latency_ms.value for point in cost_over_batch(policy, recorded, [1, 16], seconds=0.2).points)
    assert one is not None
    assert many is not None
    assert 4 * one < many
