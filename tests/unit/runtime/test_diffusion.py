"""The promise: denoising gives what diffusers' schedulers give, for every form of prediction and number of steps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.artifact.policy_spec import DiffusionLoop
from vlaopt.runtime.diffusion import denoised, timesteps

SHAPE = (1, 6, 3)


def loop_of(kind: str, *, steps: int, alphas: Any, prediction: str, clip: float | None) -> DiffusionLoop:
    return DiffusionLoop(
        kind=kind,
        steps=steps,
        step="unet",
        state_input="x",
        time_input="t",
        prediction_output="e",
        prediction=prediction,
        alphas_cumprod=tuple(float(alpha) for alpha in alphas),
        clip=clip,
    )


def predicted(state: np.ndarray, time: int) -> np.ndarray:
    """What a network could say: bounded, of the state and the time."""
    return np.tanh(state * np.float32(0.7) + np.float32(np.sin(time))).astype(np.float32)


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("clip", [1.0, 0.4, None])
@pytest.mark.parametrize("schedule", ["squaredcos_cap_v2", "linear"])
@pytest.mark.parametrize("steps", [1, 7, 10, 33, 100])
def test_a_whole_loop_gives_what_diffusers_gives(
    kind: str, prediction: str, clip: float | None, schedule: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers, which LeRobot brings")
    torch = pytest.importorskip("torch", reason="needs torch")
    settings = {
        "num_train_timesteps": 100,
        "beta_schedule": schedule,
        "prediction_type": prediction,
        "clip_sample": clip is not None,
        "clip_sample_range": clip or 1.0,
    }
    if kind == "ddim":
        theirs = diffusers.DDIMScheduler(**settings, set_alpha_to_one=True)
    else:
        theirs = diffusers.DDPMScheduler(**settings, variance_type="fixed_small")
    theirs.set_timesteps(steps)
    loop = loop_of(kind, steps=steps, alphas=theirs.alphas_cumprod, prediction=prediction, clip=clip)
    assert timesteps(loop) == theirs.timesteps.tolist()

    draws = np.random.default_rng(steps).standard_normal((steps, *SHAPE[1:]), dtype=np.float32)
    later = iter(draws[1:, None])
    module = f"diffusers.schedulers.scheduling_{kind}"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: torch.from_numpy(next(later)))
    mine = draws[:1]
    reference = torch.from_numpy(draws[:1])
    for k, time in enumerate(timesteps(loop)):
        mine = denoised(loop, k, mine, predicted(mine, time), draws[k + 1 : k + 2])
        output = torch.from_numpy(predicted(reference.numpy(), time))
        reference = theirs.step(output, theirs.timesteps[k], reference).prev_sample
        # Without a clip the first step of squaredcos divides by 0.00005: errors are relative to what comes of it.
        assert np.abs(mine - reference.numpy()).max() <= 1e-5 * max(1, np.abs(mine).max())
    assert mine.dtype == np.float32
    assert next(later, None) is None or kind == "ddim"


@settings(max_examples=60)
@given(total=st.integers(1, 300), data=st.data())
def test_timesteps_fall_evenly_to_zero_and_lie_in_the_training(total: int, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, total))
    times = timesteps(loop_of("ddim", steps=steps, alphas=[0.5] * total, prediction="epsilon", clip=None))
    assert len(times) == steps
    assert times[-1] == 0
    assert times[0] < total
    assert len({a - b for a, b in itertools.pairwise(times)}) <= 1


@settings(max_examples=60)
@given(
    alphas=st.lists(st.floats(1e-4, 0.9999), min_size=3, max_size=12).map(lambda values: sorted(values, reverse=True)),
    seed=st.integers(0, 99),
)
def test_ddim_finds_the_clean_actions_when_the_network_knows_the_noise(alphas: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    clean, noise = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2))
    loop = loop_of("ddim", steps=len(alphas), alphas=alphas, prediction="epsilon", clip=None)
    state = np.float32(alphas[-1] ** 0.5) * clean + np.float32((1 - alphas[-1]) ** 0.5) * noise
    for k in range(loop.steps):
        state = denoised(loop, k, state, noise, noise[:0])
    assert state == pytest.approx(clean, abs=2e-3)


def test_the_last_ddpm_step_adds_no_noise() -> None:
    loop = loop_of("ddpm", steps=2, alphas=[0.9, 0.5], prediction="sample", clip=None)
    state, loud = np.ones(SHAPE, np.float32), np.full(SHAPE, 9, np.float32)
    assert not np.array_equal(denoised(loop, 0, state, state, loud), denoised(loop, 0, state, state, -loud))
    assert np.array_equal(denoised(loop, 1, state, state, loud), denoised(loop, 1, state, state, -loud))
