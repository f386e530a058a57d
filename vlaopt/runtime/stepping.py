"""One action at a time: the queue of a chunk, the history of observations, temporal ensembling."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.runtime.observations import Observation, check_time_step, stacked
from vlaopt.tensors import Array


class Stepper:
    """A policy as a robot drives it, eager or from an artifact: `predict_chunk` gives a chunk [size, action_dim]."""

    def __init__(self, spec: PolicySpec, predict_chunk: Callable[[Observation], Array]) -> None:
        self._spec = spec
        self._predict_chunk = predict_chunk
        self.reset()

    @property
    def needs_observation(self) -> bool:
        """Whether the next `predict` looks at its observation; between, it steps through the chunk it has."""
        return not self._queue or self._spec.history > 1

    def reset(self) -> None:
        """A new episode: forget the rest of the chunk, the observations and the ensemble."""
        self._queue: deque[Array] = deque()
        self._seen: deque[Observation] = deque(maxlen=self._spec.history)
        weight = self._spec.chunk.ensemble
        self._ensemble = None if weight is None else Ensemble(weight, self._spec.chunk.size)

    def predict(self, observation: Observation) -> Array:
        """The next action, float32 [action_dim], in the robot's units, for an observation of one time step.

        A history is filled with the first observation of an episode. Raises InputError for a wrong observation, which
        is then not remembered.
        """
        if self._spec.history > 1:
            check_time_step(self._spec, observation)
            self._seen.extend([observation] * (1 if self._seen else self._spec.history))
        if self._queue:
            return self._queue.popleft()
        chunk = self._predict_chunk(stacked(self._spec, self._seen) if self._seen else observation)
        if self._ensemble:
            return self._ensemble.update(chunk)
        self._queue.extend(chunk[: self._spec.chunk.n_action_steps])
        return self._queue.popleft()


class Ensemble:
    """The mean of all actions predicted for a step, the oldest first, weighted by exp(−`weight` · i).

    Zhao et al., 2023, algorithm 2, with the mean kept up to date instead of the actions; float32.
    """

    def __init__(self, weight: float, size: int) -> None:
        self._weights = np.exp(np.float32(-weight) * np.arange(size, dtype=np.float32))[:, None]
        self._sums = np.cumsum(self._weights, axis=0, dtype=np.float32)
        self._mean: Array | None = None

    def update(self, chunk: Array) -> Array:
        """The action for now, [action_dim], once `chunk`, [size, action_dim], is predicted for now and later."""
        if self._mean is None:
            self._mean, self._count = chunk.copy(), np.ones(len(chunk), dtype=np.int64)
        else:
            count = self._count
            mean = self._mean * self._sums[count - 1] + chunk[:-1] * self._weights[count]
            self._mean = np.concatenate([mean / self._sums[count], chunk[-1:]])
            self._count = np.append(count + 1, 1)
        action: Array = self._mean[0]
        self._mean, self._count = self._mean[1:], self._count[1:]
        return action
