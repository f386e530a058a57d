"""The promise: guided chunks are those of LeRobot's real-time chunking, and hold on to what is left of the last one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.errors import InputError
from vlaopt.runtime.guidance import Guidance, check_guidance, prefix_weights, steer

OBSERVATION = {"joints": np.asarray([1, 2], np.float32)}
NOISE = np.asarray([[[1, -1], [0.5, 2]]], np.float32)
SCHEDULES = ["zeros", "ones", "linear", "exp"]
SIZE, WIDTH, ACTIONS = 12, 5, 3


@pytest.fixture(scope="module")
def theirs() -> Any:
    """LeRobot's processor: `theirs(schedule, horizon, max_weight)`."""
    pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
    from lerobot.configs.types import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig
    from lerobot.policies.rtc.modeling_rtc import RTCProcessor

    def make(schedule: str, horizon: int, max_weight: float) -> Any:
        return RTCProcessor(
            RTCConfig(
                enabled=True,
                prefix_attention_schedule=RTCAttentionSchedule[schedule.upper()],
                execution_horizon=horizon,
                max_guidance_weight=max_weight,
            )
        )

    return make


def denoiser(seed: int) -> Any:
    """A random network: velocity of state [1, SIZE, WIDTH] and time, which both depend on."""
    mix = np.random.default_rng(seed).standard_normal((WIDTH, WIDTH), dtype=np.float32) / 2
    return lambda state, time: np.tanh(state @ mix + np.float32(time)).astype(np.float32)


def sized(spec: PolicySpec) -> PolicySpec:
    """`spec` with a chunk of SIZE and a state of WIDTH columns, the last of which are padding."""
    chunk = spec.chunk.model_copy(update={"size": SIZE})
    noise = spec.noise.model_copy(update={"shape": (1, SIZE, WIDTH)})
    return spec.model_copy(update={"chunk": chunk, "noise": noise, "action_dim": ACTIONS})


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("left", "delay", "horizon", "most"),
    [(12, 3, 8, 10.0), (12, 0, 12, 10.0), (7, 2, 10, 5.0), (4, 6, 10, 10.0), (1, 0, 1, 0.5), (12, 12, 20, 100.0)],
)
def test_a_guided_integration_is_lerobots(
    theirs: Any, flow: Any, schedule: str, left: int, delay: int, horizon: int, most: float
) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    spec = sized(flow(lambda x, t: x, steps=10, start=1.0, end=0.0)[0].spec)
    processor, network = theirs(schedule, horizon, most), denoiser(left)
    rng = np.random.default_rng(delay)
    target = rng.standard_normal((left, ACTIONS), dtype=np.float32)
    guidance = Guidance(target, inference_delay=delay, execution_horizon=horizon, max_weight=most, schedule=schedule)
    ours = steer(spec, guidance, target)

    def reference(state: np.ndarray, time: float) -> np.ndarray:
        return processor.denoise_step(
            x_t=torch.from_numpy(state),
            prev_chunk_left_over=torch.from_numpy(target),
            inference_delay=delay,
            time=time,
            original_denoise_step_partial=lambda x: torch.from_numpy(network(x.numpy(), time)),
            execution_horizon=horizon,
        ).numpy()

    mine = their_own = rng.standard_normal((1, SIZE, WIDTH), dtype=np.float32)
    for time in (1 - k / 10 for k in range(10)):
        velocity = ours(mine, network(mine, time), time)
        assert np.abs(velocity - reference(mine, time)).max() <= 1e-6 * max(1, np.abs(velocity).max())
        mine = mine - np.float32(0.1) * velocity
        their_own = their_own - np.float32(0.1) * reference(their_own, time)
    # Two integrations that round apart by a bit are drawn apart by up to the guidance's weight.
    assert np.abs(mine - their_own).max() <= 1e-6 * max(1, most)


def test_nothing_left_over_changes_nothing(theirs: Any, flow: Any) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    policy, _ = flow(lambda x, t: np.tanh(x), start=1.0, end=0.0)
    plain = policy.predict_chunk(OBSERVATION, NOISE)
    assert np.array_equal(policy.predict_chunk(OBSERVATION, NOISE, guidance=Guidance(None, 3)), plain)
    empty = Guidance(np.zeros((0, 2), np.float32))
    assert np.array_equal(policy.predict_chunk(OBSERVATION, NOISE, guidance=empty), plain)
    state = torch.from_numpy(NOISE)
    same = theirs("linear", 10, 10.0).denoise_step(state, None, 3, 0.5, torch.tanh)
    assert np.array_equal(same.numpy(), torch.tanh(state).numpy())


@settings(max_examples=80)
@given(st.integers(0, 20), st.integers(0, 15), st.integers(0, 10), st.sampled_from(SCHEDULES))
def test_weights_are_one_then_fall_then_are_zero(delay: int, horizon: int, more: int, schedule: Any) -> None:
    weights = prefix_weights(delay, horizon, horizon + more, schedule)
    assert (weights.shape, weights.dtype) == ((horizon + more,), np.float32)
    assert (weights[: min(delay, horizon)] == 1).all()
    assert (weights[horizon:] == 0).all()
    assert (np.diff(weights) <= 0).all()


@settings(max_examples=40)
@given(start=st.floats(-2, 2), length=st.floats(0.2, 3), forward=st.booleans(), most=st.floats(0.5, 20))
def test_the_direction_and_scale_of_time_make_no_difference(
    flow: Any, start: float, length: float, forward: bool, most: float
) -> None:
    """The same flow, written for other times, is guided to the same chunk."""
    end = start + length if forward else start - length
    left = np.asarray([[3, -2], [0.5, 1]], np.float32)
    guidance = Guidance(left, inference_delay=1, max_weight=most, schedule="linear")
    chunks = [
        flow(lambda x, t, span=b - a: np.tanh(x) / np.float32(span), start=a, end=b, steps=5)[0].predict_chunk(
            OBSERVATION, NOISE, guidance=guidance
        )
        for a, b in ((1.0, 0.0), (start, end))
    ]
    # The last guidance weight grows with the distance of two times that float32 rounds.
    assert chunks[0] == pytest.approx(chunks[1], rel=1e-3, abs=1e-3)


def test_actions_that_will_have_been_executed_are_kept(flow: Any) -> None:
    left = np.asarray([[3, -2], [0.5, 1]], np.float32)
    policy, _ = flow(lambda x, t: np.tanh(x), start=1.0, end=0.0, steps=20)
    plain = policy.predict_chunk(OBSERVATION, NOISE)
    guided = policy.predict_chunk(OBSERVATION, NOISE, guidance=Guidance(left, inference_delay=1, schedule="zeros"))
    assert np.abs(guided[0] - left[0]).max() < 0.1 < np.abs(plain[0] - left[0]).max()
    assert guided[1] == pytest.approx(plain[1])


def test_what_the_call_does_not_say_is_as_the_spec_says(flow: Any) -> None:
    policy, _ = flow(lambda x, t: np.tanh(x), start=1.0, end=0.0)
    left = np.asarray([[3, -2], [0.5, 1]], np.float32)
    said = Guidance(left, execution_horizon=10, max_weight=10.0, schedule="linear")
    unsaid = policy.predict_chunk(OBSERVATION, NOISE, guidance=Guidance(left))
    assert np.array_equal(unsaid, policy.predict_chunk(OBSERVATION, NOISE, guidance=said))
    for other in ({"execution_horizon": 1}, {"max_weight": 1.0}, {"schedule": "exp"}):
        changed = SimpleNamespace(**{**vars(said), **other})
        assert not np.array_equal(unsaid, policy.predict_chunk(OBSERVATION, NOISE, guidance=changed)), other


LEFT = np.zeros((2, 2), np.float32)


@pytest.mark.parametrize(
    ("guidance", "reason"),
    [
        (Guidance(np.zeros((3, 2), np.float32)), "left_over: 3 actions, a chunk has 2"),
        (Guidance(np.zeros((2, 3), np.float32)), r"left_over: shape \[2, 3\] given, \[-1, 2\] needed"),
        (Guidance(np.zeros((2, 2))), "left_over: dtype float64 given"),
        (Guidance(np.full((2, 2), np.nan, np.float32)), "left_over: not finite"),
        (Guidance(LEFT, inference_delay=-1), "inference_delay: -1 is negative"),
        (Guidance(LEFT, execution_horizon=0), "execution_horizon: 0 is less than 1"),
        (Guidance(LEFT, max_weight=0.0), r"max_weight: 0\.0 is not a positive number"),
        (Guidance(LEFT, max_weight=float("nan")), "max_weight: nan is not a positive number"),
        (Guidance(LEFT, schedule="cosine"), "schedule: 'cosine' is none of zeros, ones, linear, exp"),  # type: ignore[arg-type]
    ],
)
def test_guidance_of_another_form_is_refused(flow: Any, guidance: Guidance, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        flow(lambda x, t: x)[0].predict_chunk(OBSERVATION, NOISE, guidance=guidance)


def test_a_policy_that_cannot_be_guided_says_so(tiny_spec: PolicySpec, flow: Any) -> None:
    with pytest.raises(InputError, match="guidance needs a loop of kind euler, this policy's is single"):
        check_guidance(tiny_spec, Guidance(None))
    policy, _ = flow(lambda x, t: x)
    late = policy.spec.model_copy(update={"chunk": policy.spec.chunk.model_copy(update={"start": 1})})
    with pytest.raises(InputError, match="starts at row 0, this policy's starts at 1"):
        check_guidance(late, Guidance(None))
    with pytest.raises(InputError, match="guidance is for one observation, and a batch was given"):
        policy.predict_chunk({"joints": np.zeros((2, 2), np.float32)}, guidance=Guidance(LEFT))
