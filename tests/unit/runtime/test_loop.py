"""The promise: the euler loop integrates as written, in float32, and components are called by the names they take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.errors import InputError
from vlaopt.runtime.loop import check_noise, draw_noise, run_loop

OBSERVATION = {"joints": np.asarray([1, 2], np.float32)}
NOISE = np.asarray([[[1, -1], [0.5, 2]]], np.float32)


def test_a_constant_velocity_moves_by_the_whole_interval(flow: Any) -> None:
    policy, _ = flow(lambda x, t: np.full_like(x, 3), steps=10)
    assert policy.predict_chunk(OBSERVATION, NOISE) == pytest.approx(NOISE[0] + 3, abs=1e-6)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (0.25, 2.25)])
def test_growth_follows_its_closed_form_forward_and_backward(flow: Any, start: float, end: float) -> None:
    policy, _ = flow(lambda x, t: x, steps=8, start=start, end=end)
    expected = NOISE[0] * (1 + (end - start) / 8) ** 8
    assert policy.predict_chunk(OBSERVATION, NOISE) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("start", "end", "times"), [(0.0, 1.0, [0, 0.25, 0.5, 0.75]), (1.0, 0.0, [1, 0.75, 0.5, 0.25])]
)
def test_time_is_the_start_of_each_step(flow: Any, start: float, end: float, times: list[float]) -> None:
    policy, sessions = flow(lambda x, t: np.broadcast_to(t, x.shape).astype(np.float32), start=start, end=end)
    chunk = policy.predict_chunk(OBSERVATION, NOISE)
    seen = [call["t"] for call in sessions["aflow"].calls]
    assert [time.tolist() for time in seen] == [[time] for time in times]
    assert all((time.dtype, time.shape) == (np.float32, (1,)) for time in seen)
    assert chunk == pytest.approx(NOISE[0] + sum(times) * (end - start) / 4, abs=1e-6)


def test_time_is_rounded_once(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: x, steps=10)
    policy.predict_chunk(OBSERVATION, NOISE)
    assert [call["t"][0] for call in sessions["aflow"].calls] == [np.float32(k * 0.1) for k in range(10)]


def test_the_state_is_float32_whatever_the_step_computes_in(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: np.full(x.shape, 2**-10, np.float16), steps=64)
    chunk = policy.predict_chunk(OBSERVATION, np.full((1, 2, 2), 4, np.float32))
    # Steps of 2^-16 from 4: float16 would never leave it.
    assert chunk.tolist() == [[4 + 2**-10] * 2] * 2
    assert {call["x"].dtype for call in sessions["aflow"].calls} == {np.dtype(np.float32)}


def test_components_before_the_loop_run_once_and_meet_it_by_name(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: x)
    policy.predict_chunk(OBSERVATION, NOISE)
    assert len(sessions["eye"].calls) == 1
    assert len(sessions["aflow"].calls) == 4
    assert all(call["prefix"].tolist() == [[2, 4]] for call in sessions["aflow"].calls)
    assert sessions["eye"].calls[0].keys() == {"state"}


def test_the_tap_sees_every_call_in_order(flow: Any) -> None:
    policy, _ = flow(lambda x, t: x)
    seen: list[tuple[str, set[str], set[str]]] = []
    policy.predict_chunk(OBSERVATION, NOISE, tap=lambda name, i, o: seen.append((name, set(i), set(o))))
    assert seen == [("eye", {"state"}, {"prefix"})] + [("aflow", {"x", "t", "prefix"}, {"v"})] * 4


def test_given_tensors_and_noise_are_left_as_they_were(tiny_spec: PolicySpec, fake_session: Any, flow: Any) -> None:
    given = {"image": np.zeros((1, 3, 2, 2), np.float32), "state": np.zeros((1, 2), np.float32)}
    sessions = {
        "eye": fake_session(lambda image: {"feature": np.ones((1, 1), np.float32)}),
        "arm": fake_session(lambda state, feature: {"raw": state + feature}),
    }
    assert run_loop(tiny_spec, sessions, given, None).keys() == {"image", "state", "feature", "raw"}
    assert given.keys() == {"image", "state"}
    noise = NOISE.copy()
    flow(lambda x, t: x)[0].predict_chunk(OBSERVATION, noise)
    assert np.array_equal(noise, NOISE)


def test_an_euler_loop_without_noise_is_refused(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: x)
    with pytest.raises(InputError, match="starts from noise, and none was given"):
        run_loop(policy.spec, sessions, {"state": np.zeros((1, 2), np.float32)}, None)


def test_noise_follows_its_law(flow: Any) -> None:
    normal = flow(lambda x, t: x, shape=(200, 100))[0].spec
    drawn = draw_noise(normal, np.random.default_rng(0))
    assert drawn is not None
    assert (drawn.dtype, drawn.shape) == (np.float32, (200, 100))
    assert (drawn.mean(), drawn.std()) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.03))
    uniform = draw_noise(flow(lambda x, t: x, law="uniform", shape=(200, 100))[0].spec, np.random.default_rng(0))
    assert uniform is not None
    assert uniform.dtype == np.float32
    assert 0 <= uniform.min() < 0.001 < 0.999 < uniform.max() < 1


def test_a_policy_without_noise_draws_none_and_takes_none(tiny_spec: PolicySpec) -> None:
    assert draw_noise(tiny_spec, np.random.default_rng(0)) is None
    with pytest.raises(InputError, match="noise was given, and this policy takes none"):
        check_noise(tiny_spec, NOISE)


@pytest.mark.parametrize(
    ("noise", "reason"),
    [
        (NOISE.astype(np.float64), "noise: dtype float64 given, float32 needed"),
        (NOISE[0], r"noise: shape \[2, 2\] given, \[1, 2, 2\] needed"),
        (NOISE * np.float32(np.inf), "noise: not finite"),
        (NOISE.tolist(), "noise: list given"),
    ],
)
def test_noise_of_another_form_is_refused(flow: Any, noise: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        flow(lambda x, t: x)[0].predict_chunk(OBSERVATION, noise)
