"""Recording a scripted expert: where a shaky robot ends up, and what the expert would do from there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class DemonstrationScene(Protocol):
    """A simulated task with an expert, as `record_episode` drives it."""

    def reset(self, seed: int) -> None: ...
    def step(self, action: NDArray[np.floating[Any]]) -> bool: ...
    def observe(self, instruction: str) -> dict[str, Any]: ...
    def expert_action(self) -> NDArray[np.float32]: ...
    def expert_chunk(self, size: int) -> NDArray[np.float32]: ...


class Driver(Protocol):
    """A policy that drives while the expert only labels."""

    @property
    def needs_observation(self) -> bool: ...
    def predict(self, observation: dict[str, Any]) -> NDArray[np.float32]: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class Shaking:
    """How the executed action departs from the expert's, so that the recorded states cover its mistakes.

    Noise in the executed action with the expert's clean action as the label is DART (Laskey et al., 2017).
    """

    sigma_max: float = 0.5
    """Each episode draws the standard deviation of its white noise from 0..sigma_max (action units)."""
    push_probability: float = 0.03
    """Chance per step of a push: a constant random action for `push_steps` steps."""
    push_steps: tuple[int, int] = (4, 14)
    wander_probability: float = 0.35
    """Chance that an episode starts with a random push instead of the expert."""


STEADY = Shaking(sigma_max=0.0, push_probability=0.0, wander_probability=0.0)


@dataclass(frozen=True)
class Sample:
    """One recorded moment: the observation, the expert's chunk from there (float32 [chunk, action]), its place."""

    observation: dict[str, Any]
    action: NDArray[np.float32]
    episode: int
    step: int


def record_episode(
    scene: DemonstrationScene,
    *,
    seed: int,
    episode: int,
    instructions: Sequence[str],
    chunk_size: int,
    max_steps: int,
    every: int,
    shaking: Shaking = STEADY,
    driver: Driver | None = None,
) -> list[Sample] | None:
    """One episode, sampled every `every` steps; None when the task was not done within `max_steps`.

    The expert drives, shaken by `shaking`; with a `driver` that policy drives and the expert only labels (DAgger,
    Ross et al., 2011), and failures are kept, because they are what the labels are for.
    """
    rng = np.random.default_rng(seed)
    scene.reset(seed)
    instruction = instructions[int(rng.integers(len(instructions)))]
    hand = driver or _Shaker(scene, shaking, rng)
    hand.reset()
    samples: list[Sample] = []
    offset = int(rng.integers(every))
    for step in range(max_steps):
        recorded = step % every == offset
        observation = scene.observe(instruction) if recorded or hand.needs_observation else {}
        if recorded:
            samples.append(Sample(observation, scene.expert_chunk(chunk_size), episode, step))
        if scene.step(hand.predict(observation)):
            return samples
    return samples if driver is not None else None


class _Shaker:
    """Draws executed actions: the expert's plus noise, or a push that lasts some steps."""

    def __init__(self, scene: DemonstrationScene, shaking: Shaking, rng: np.random.Generator) -> None:
        self._scene, self._shaking, self._rng = scene, shaking, rng
        self._sigma = float(rng.uniform(0.0, shaking.sigma_max))
        self._push: NDArray[np.float32] | None = None
        self._left = 0
        if rng.random() < shaking.wander_probability:
            self._start_push()
            self._left *= 2

    @property
    def needs_observation(self) -> bool:
        return False

    def reset(self) -> None:
        """Nothing is queued."""

    def predict(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        if self._left == 0 and self._rng.random() < self._shaking.push_probability:
            self._start_push()
        if self._left > 0 and self._push is not None:
            self._left -= 1
            return self._push
        noise = self._rng.normal(0.0, self._sigma, 4)
        return (self._scene.expert_action() + noise).astype(np.float32)

    def _start_push(self) -> None:
        low, high = self._shaking.push_steps
        self._left = int(self._rng.integers(low, high + 1))
        self._push = self._rng.uniform(-1.0, 1.0, 4).astype(np.float32)
