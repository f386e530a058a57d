"""One step of denoising, in the order of operations of diffusers' schedulers, all in float32. Numpy only."""

from __future__ import annotations

import numpy as np

from vlaopt.artifact.policy_spec import DiffusionLoop
from vlaopt.tensors import Array

_ONE = np.float32(1)


def timesteps(loop: DiffusionLoop) -> list[int]:
    """The timesteps of the loop, from noise to none: (steps − 1) · r, …, r, 0 with r = T // steps."""
    apart = len(loop.alphas_cumprod) // loop.steps
    return [k * apart for k in reversed(range(loop.steps))]


def denoised(loop: DiffusionLoop, k: int, state: Array, prediction: Array, noise: Array) -> Array:
    """The state after step `k` (from 0), from the state before it and what the step component gave; all float32.

    `noise`, of the state's shape, is what a ddpm loop draws after the step; the last step and ddim take none.
    """
    times = timesteps(loop)
    last = k == loop.steps - 1
    now = np.float32(loop.alphas_cumprod[times[k]])
    after = _ONE if last else np.float32(loop.alphas_cumprod[times[k + 1]])
    clean, direction = _clean(loop, now, state, prediction)
    if loop.kind == "ddim":
        return np.asarray(np.sqrt(after) * clean + np.sqrt(_ONE - after) * direction)
    mean, deviation = _posterior(now, after, clean, state)
    return mean if last else mean + deviation * noise


def _clean(loop: DiffusionLoop, now: np.float32, state: Array, prediction: Array) -> tuple[Array, Array]:
    """The clean actions, bounded, and the noise that the step sees in `state` (Song et al., 2020, equation 12)."""
    if loop.prediction == "epsilon":
        clean, noise = (state - np.sqrt(_ONE - now) * prediction) / np.sqrt(now), prediction
    else:
        clean, noise = prediction, (state - np.sqrt(now) * prediction) / np.sqrt(_ONE - now)
    if loop.clip is not None:
        clean = np.clip(clean, np.float32(-loop.clip), np.float32(loop.clip))
    return clean, noise


def _posterior(now: np.float32, after: np.float32, clean: Array, state: Array) -> tuple[Array, np.float32]:
    """Mean and deviation of the state after the step (Ho et al., 2020, equation 7; variance "fixed_small")."""
    alpha = now / after
    beta = _ONE - alpha
    mean = np.sqrt(after) * beta / (_ONE - now) * clean + np.sqrt(alpha) * (_ONE - after) / (_ONE - now) * state
    variance = max((_ONE - after) / (_ONE - now) * beta, np.float32(1e-20))
    return mean, np.sqrt(variance)
