"""Real-time chunking: a new chunk drawn towards what is left of the one before, while it is integrated. Numpy only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlaopt.artifact.policy_spec import EulerLoop, PolicySpec
from vlaopt.errors import InputError
from vlaopt.runtime.loop import Steer
from vlaopt.tensors import Array, check

Schedule = Literal["zeros", "ones", "linear", "exp"]
_SCHEDULES = ("zeros", "ones", "linear", "exp")


@dataclass(frozen=True)
class Guidance:
    """What one prediction is guided by. What is None is as the policy's spec says.

    `left_over`, float32 [n, action_dim] in the robot's units, are the actions of the chunk before that were not
    executed when the observation was made, n up to the chunk's size; None, in an episode's first prediction, guides
    nothing. `inference_delay` is the number of them that will have been executed when the new chunk is there: they
    weigh fully. `execution_horizon` is the number of them that weigh at all, by `schedule`. `max_weight` bounds the
    strength.
    """

    left_over: Array | None
    inference_delay: int = 0
    execution_horizon: int | None = None
    max_weight: float | None = None
    schedule: Schedule | None = None


def check_guidance(spec: PolicySpec, guidance: Guidance) -> None:
    """Raises InputError unless the policy can be guided, and by this."""
    if not isinstance(spec.loop, EulerLoop):
        raise InputError(f"guidance needs a loop of kind euler, this policy's is {spec.loop.kind}")
    if spec.chunk.start != 0:
        raise InputError(f"guidance needs a chunk that starts at row 0, this policy's starts at {spec.chunk.start}")
    if guidance.left_over is not None:
        check("left_over", guidance.left_over, dtype="float32", shape=(-1, spec.action_dim))
        if len(guidance.left_over) > spec.chunk.size:
            raise InputError(f"left_over: {len(guidance.left_over)} actions, a chunk has {spec.chunk.size}")
    if guidance.inference_delay < 0:
        raise InputError(f"inference_delay: {guidance.inference_delay} is negative")
    if guidance.execution_horizon is not None and guidance.execution_horizon < 1:
        raise InputError(f"execution_horizon: {guidance.execution_horizon} is less than 1")
    if guidance.max_weight is not None and not 0 < guidance.max_weight < math.inf:
        raise InputError(f"max_weight: {guidance.max_weight} is not a positive number")
    if guidance.schedule is not None and guidance.schedule not in _SCHEDULES:
        raise InputError(f"schedule: {guidance.schedule!r} is none of {', '.join(_SCHEDULES)}")


def steer(spec: PolicySpec, guidance: Guidance, target: Array) -> Steer:
    """The change of every velocity that draws the chunk towards `target`: `left_over` in the policy's units.

    With tau = (t − start) / (end − start), the end of the flow as it looks from here is x1 = x + (end − t) · v, and
    v becomes v + c · weights · (target − x1) / (end − start), c = min(max_weight, (1 − tau) / tau · (tau² + (1 − tau)²)
    / (1 − tau)²): Black et al., 2025, with the gradient of x1 taken as the identity, as LeRobot does. Rows and columns
    that `target` lacks are 0, as LeRobot pads them; only its columns matter, for its rows alone weigh.
    """
    loop, defaults = spec.loop, spec.guidance
    assert isinstance(loop, EulerLoop)
    horizon = min(guidance.execution_horizon or defaults.execution_horizon, len(target))
    schedule = guidance.schedule or defaults.schedule
    most = guidance.max_weight or defaults.max_weight
    length = loop.end - loop.start

    def steered(state: Array, velocity: Array, time: float) -> Array:
        weights = prefix_weights(guidance.inference_delay, horizon, state.shape[1], schedule)
        padded = np.zeros_like(state)
        padded[0, : target.shape[0], : target.shape[1]] = target
        error: Array = (padded - (state + np.float32(loop.end - time) * velocity)) * weights[:, None]
        strength = np.float32(_strength((time - loop.start) / length, most) / length)
        return np.asarray(velocity + strength * error)

    return steered


def prefix_weights(delay: int, horizon: int, size: int, schedule: Schedule) -> Array:
    """How much each of `size` actions is drawn, float32 [size]: 1 before `delay`, 0 from `horizon` on.

    Between them: `zeros` nothing, `ones` 1, `linear` falling evenly, `exp` as w · (eʷ − 1) / (e − 1) of the linear w.
    """
    delay = min(delay, horizon)
    between = {
        "zeros": np.zeros(horizon - delay),
        "ones": np.ones(horizon - delay),
        "linear": (linear := np.linspace(1, 0, horizon - delay + 2)[1:-1]),
        "exp": linear * np.expm1(linear) / (math.e - 1),
    }[schedule]
    return np.concatenate([np.ones(delay), between, np.zeros(size - horizon)]).astype(np.float32)


def _strength(tau: float, most: float) -> float:
    if tau <= 0:
        return most
    return min(most, (1 - tau) / tau * (tau**2 + (1 - tau) ** 2) / (1 - tau) ** 2) if tau < 1 else 0.0
