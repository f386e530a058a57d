"""Closed-loop success of a policy: the same episodes for every policy, counted with an interval."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from vlaopt.errors import InputError
from vlaopt.progress import Progress, Silent, track
from vlaopt.sim.metaworld import Observation, Scene, Split, episode_seed
from vlaopt.sim.tasks import Phrasings, Task, tasks_named


class Predictor(Protocol):
    """A policy as the simulator drives it.

    A policy that also has a property `needs_observation` is given an image only when it is true: it then promises to
    take the next action from its queue without looking.
    """

    def predict(self, observation: Observation) -> NDArray[np.float32]: ...
    def reset(self) -> None: ...


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskResult(_Frozen):
    """Successes of one task, the seeds of its episodes, and how long the successful ones took on average."""

    task: str
    successes: int = Field(ge=0)
    episodes: int = Field(ge=1)
    interval: tuple[float, float]
    seeds: tuple[int, ...]
    succeeded: tuple[bool, ...]
    mean_steps: float | None


class EvaluationRecord(_Frozen):
    """One evaluation: per task and in total, with Wilson 95 % intervals as fractions."""

    seed: int
    phrasings: Phrasings
    max_steps: int
    tasks: tuple[TaskResult, ...]
    successes: int
    episodes: int
    interval: tuple[float, float]
    mean_policy_ms: float
    """Mean duration of the `predict` calls that looked at an observation, in milliseconds."""

    @property
    def success_rate(self) -> float:
        return self.successes / self.episodes


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The Wilson score interval of a success rate, as fractions; 95 % by default (Wilson, 1927).

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    rate = successes / n
    scale = 1.0 + z * z / n
    centre = (rate + z * z / (2 * n)) / scale
    reach = z / scale * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    # The ends are exact by the formula; only rounding keeps them from 0 and 1.
    return (0.0 if successes == 0 else centre - reach), (1.0 if successes == n else centre + reach)


def evaluate(
    policy: Predictor,
    *,
    tasks: Sequence[str] | None = None,
    episodes: int = 25,
    seed: int = 0,
    phrasings: Phrasings = "held-out",
    split: Split = "evaluation",
    max_steps: int | None = None,
    progress: Progress | None = None,
) -> EvaluationRecord:
    """Run `episodes` episodes of every task (all for None) and count successes.

    Episode i of a task has the same start and instruction for every policy; in the split `evaluation`, none that
    training has seen.
    Success is Meta-World's own, at any step within `max_steps` (the task's own limit for None).
    Raises InputError for an unknown task or fewer than one episode, EnvironmentProblem without Meta-World.
    """
    if episodes < 1:
        raise InputError(f"{episodes} episodes asked for, at least 1 is needed")
    chosen = tasks_named(tasks)
    timer = _Timer(policy)
    results = []
    for task in chosen:
        with Scene(task) as scene:
            limit = max_steps or task.max_steps
            rounds = track(progress or Silent(), f"evaluate {task.name}", range(episodes), episodes)
            seeds = [episode_seed(split, seed, task.name, index) for index in range(episodes)]
            texts = task.phrasings(phrasings)
            runs = [_episode(timer, scene, seeds[index], texts[index % len(texts)], limit) for index in rounds]
        results.append(_result(task, seeds, runs))
    successes, total = sum(result.successes for result in results), episodes * len(results)
    return EvaluationRecord(
        seed=seed,
        phrasings=phrasings,
        max_steps=max_steps or max(task.max_steps for task in chosen),
        tasks=tuple(results),
        successes=successes,
        episodes=total,
        interval=wilson_interval(successes, total),
        mean_policy_ms=timer.mean_ms,
    )


def _episode(timer: _Timer, scene: Scene, seed: int, instruction: str, max_steps: int) -> int | None:
    """Steps to success, or None."""
    scene.reset(seed)
    timer.policy.reset()
    for step in range(1, max_steps + 1):
        if scene.step(timer.predict(scene, instruction)):
            return step
    return None


def _result(task: Task, seeds: Sequence[int], runs: Sequence[int | None]) -> TaskResult:
    steps = [run for run in runs if run is not None]
    return TaskResult(
        task=task.name,
        successes=len(steps),
        episodes=len(runs),
        interval=wilson_interval(len(steps), len(runs)),
        seeds=tuple(seeds),
        succeeded=tuple(run is not None for run in runs),
        mean_steps=sum(steps) / len(steps) if steps else None,
    )


class _Timer:
    """Calls the policy, renders only for calls that look, and keeps the time of those."""

    def __init__(self, policy: Predictor) -> None:
        self.policy = policy
        self._seconds = 0.0
        self._calls = 0

    def predict(self, scene: Scene, instruction: str) -> NDArray[np.float32]:
        if not getattr(self.policy, "needs_observation", True):
            return self.policy.predict({})
        observation = scene.observe(instruction)
        start = time.perf_counter()
        action = self.policy.predict(observation)
        self._seconds += time.perf_counter() - start
        self._calls += 1
        return action

    @property
    def mean_ms(self) -> float:
        return 1000.0 * self._seconds / self._calls if self._calls else 0.0
