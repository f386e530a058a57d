"""The promise: the action error is the one worked out by hand, and what is not a number never passes a gate."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlaopt.benchmark.actions import ActionError, ErrorStatistics, Limit, compare_actions, executed_errors
from vlaopt.errors import InputError

REFERENCE = np.zeros((2, 5, 2), np.float32)
STD = np.asarray([0.5, 2.0], np.float32)


def compare(actions: Any, reference: Any = REFERENCE, *, gripper: int | None = 1) -> ActionError:
    return compare_actions(actions, reference, std=STD, n_action_steps=2, gripper=gripper)


def test_errors_are_in_standard_deviations_executed_steps_apart() -> None:
    actions = REFERENCE.copy()
    actions[0, 0, 0] = 1.0  # two standard deviations, executed
    actions[1, 1, 1] = -1.0  # half of one, executed
    actions[1, 4, 0] = 4.0  # eight, never executed
    error = compare(actions)
    assert error.samples == 2
    assert error.executed == ErrorStatistics(mean=2.5 / 8, p95=2.0, max=2.0)
    assert error.chunk == ErrorStatistics(mean=10.5 / 20, p95=2.0, max=8.0)
    assert error.per_action == (ErrorStatistics(0.5, 2.0, 2.0), ErrorStatistics(0.125, 0.5, 0.5))
    assert error.max_abs == 4.0


def test_the_95th_percentile_is_the_nearest_rank() -> None:
    actions = np.arange(1, 101, dtype=np.float32).reshape(100, 1, 1)
    error = compare_actions(actions, np.zeros_like(actions), std=np.ones(1, np.float32), n_action_steps=1, gripper=None)
    assert (error.executed.p95, error.executed.max, error.executed.mean) == (95.0, 100.0, 50.5)


def test_the_error_of_each_sample_looks_at_executed_steps_only() -> None:
    actions = REFERENCE.copy()
    actions[0, 0, 0] = 1.0  # two standard deviations, executed
    actions[1, 4, 0] = 4.0  # eight, never executed
    assert executed_errors(actions, REFERENCE, std=STD, n_action_steps=2).tolist() == [0.5, 0.0]


def test_gripper_flips_and_bias_look_at_executed_steps_only() -> None:
    reference = REFERENCE.copy()
    reference[..., 1] = 1.0
    actions = reference.copy()
    actions[0, 0, 1] = -1.0  # a flip: one standard deviation down
    actions[1, 1, 1] = 3.0  # no flip: one up
    actions[:, 3, 1] = -1.0  # flips that are never executed
    error = compare(actions, reference)
    assert error.gripper_flips == 0.25
    assert error.gripper_bias == 0.0
    assert compare(actions, reference, gripper=None).gripper_flips is None
    assert compare(actions, reference, gripper=None).gripper_bias is None


def test_jerk_is_the_relative_change_of_the_mean_third_difference() -> None:
    reference = np.zeros((1, 5, 2), np.float32)
    reference[0, :, 0] = [0, 0, 0, 1, 0]  # third differences 1 and -4, in units of 0.5: 2 and -8, over two actions
    actions = reference * np.float32(1.25)
    assert compare(actions, reference).jerk == pytest.approx(0.25)
    assert compare(reference * np.float32(0.5), reference).jerk == pytest.approx(-0.5)


def test_jerk_shows_where_the_reference_stands_still() -> None:
    shaking = REFERENCE.copy()
    shaking[:, ::2] = 0.01
    assert compare(shaking).jerk > 100
    assert np.isfinite(compare(shaking).jerk)
    assert compare(REFERENCE + np.float32(0.5)).jerk == 0.0


def test_chunks_too_short_for_jerk_have_none() -> None:
    short = REFERENCE[:, :3]
    assert compare(short + 1, short).jerk == 0.0


@given(hnp.arrays(np.float32, (2, 5, 2), elements=st.floats(-100, 100, width=32)))
def test_actions_equal_to_the_reference_have_no_error(actions: np.ndarray) -> None:
    error = compare(actions, actions.copy())
    assert (error.chunk.max, error.max_abs, error.jerk, error.gripper_flips) == (0, 0, 0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_action_that_is_not_finite_is_refused_even_one_among_many(bad: float) -> None:
    actions = REFERENCE.copy()
    actions[1, 4, 1] = bad
    with pytest.raises(InputError, match=r"actions: not finite at \[1, 4, 1\]"):
        compare(actions)
    with pytest.raises(InputError, match=r"reference actions: not finite at \[1, 4, 1\]"):
        compare(REFERENCE, actions)


def test_actions_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(InputError, match=r"actions have shape \[2, 3, 2\], their reference \[2, 5, 2\]"):
        compare(REFERENCE[:, :3])
    with pytest.raises(InputError, match="no actions to compare"):
        compare(REFERENCE[:0], REFERENCE[:0])


def test_an_action_error_is_plain_json() -> None:
    value = json.loads(json.dumps(compare(REFERENCE).to_json(), allow_nan=False))
    assert value["executed"] == {"mean": 0.0, "p95": 0.0, "max": 0.0}
    assert value["per_action"][1]["max"] == 0.0


@pytest.mark.parametrize(
    ("value", "held"), [(0.05, True), (0.0, True), (-1.0, True), (0.051, False), (np.inf, False), (np.nan, False)]
)
def test_a_limit_is_held_by_numbers_up_to_it(value: float, held: bool) -> None:
    assert Limit("mean action error", value, 0.05).held is held


def test_a_limit_that_is_not_a_number_holds_nothing() -> None:
    assert not Limit("mean", 0.0, float("nan")).held


def test_a_limit_says_its_value_and_its_number() -> None:
    assert str(Limit("gripper flips", 0.123456, 0.01)) == "gripper flips 0.1235 (limit 0.01)"
