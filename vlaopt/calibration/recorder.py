"""Recording what a running policy sees: a bounded sample, spread over episodes, their phases and their instructions."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from vlaopt.calibration.card import TASK
from vlaopt.calibration.checks import MINIMUM_SAMPLES
from vlaopt.calibration.reading import CalibrationSet
from vlaopt.calibration.writing import Columns, Facts, Unwritten, check_new
from vlaopt.errors import InputError
from vlaopt.files import check_writable
from vlaopt.optional import installed_version, require
from vlaopt.tensors import Array

PHASES = 5
"""Equal parts of an episode: approach, grasp and retreat look different, and each is to have its share."""


class Predictor(Protocol):
    """A policy as a control loop drives it."""

    def predict(self, observation: Mapping[str, Any]) -> Array: ...
    def reset(self) -> None: ...


@dataclass(frozen=True)
class _Sample:
    observation: dict[str, Any]
    episode: int
    step: int
    group: tuple[str, int]
    """Its instruction and its phase, −1 while the episode runs."""


class Recorder:
    """Keeps a bounded sample of the observations that it is offered, and writes a calibration set at the end.

    The rule: of the episode that runs, evenly spaced ticks are kept, at twice the distance each time they are more than
    `capacity`. When it ends they are divided into `PHASES` equal parts. Instruction and phase make a group; once
    `capacity` is reached, a sample of a group that never was the largest takes the place of a random one of the largest
    group, and any other takes a random place in its own group with the chance that keeps all that were offered to it
    equally likely (class-balancing reservoir sampling: Chrysakis and Moens, 2020).

    `offer` copies one observation or does nothing; it waits for nothing and refuses without raising. Memory stays below
    `max_mib`, and fewer samples are kept where that is too little. Not for use by several threads at once.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        capacity: int = 256,
        max_mib: float = 2048,
        history: int = 1,
        seed: int = 0,
        name: str | None = None,
        source: str = "recorded from a running policy",
        licence: str = "unknown",
    ) -> None:
        """`path` is the new set's folder. With `history`, a sample holds that many ticks, the first one repeated.

        Raises InputError when `path` exists or a number is too small, EnvironmentProblem when it cannot be written
        or images cannot be encoded here: all that could fail at the end and be known now.
        """
        self.path = Path(path)
        check_new(self.path)
        check_writable(self.path.parent)
        require("PIL.Image", "data")
        for number, least, what in (
            (capacity, MINIMUM_SAMPLES, "capacity"),
            (max_mib, 1, "max_mib"),
            (history, 1, "history"),
        ):
            if number < least:
                raise InputError(f"{what} {number:g} is below {least}")
        self.ticks = 0
        self.refused: Counter[str] = Counter()
        """Offers that were no observation like the first one, by what was wrong with them."""
        self._capacity = capacity
        self._bytes = int(max_mib * 2**20)
        self.source = source
        """Where the observations are from, for the card."""
        self._name, self._licence, self._seed = name or self.path.resolve().name, licence, seed
        self._generator = np.random.default_rng(seed)
        self._recent: deque[dict[str, Any]] = deque(maxlen=history)
        self._kinds: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._groups: dict[tuple[str, int], list[_Sample]] = {}
        self._full: set[tuple[str, int]] = set()
        self._seen: Counter[tuple[str, int]] = Counter()
        self._written: CalibrationSet | None = None
        self._room = capacity
        self._episode = self._tick = 0
        self._stride = 1
        self._running: list[_Sample] = []

    def __len__(self) -> int:
        """The samples kept so far, those of the running episode among them."""
        return sum(map(len, self._groups.values())) + len(self._running)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or len(self):
            self.close()

    def offer(self, observation: Mapping[str, Any]) -> None:
        """One tick of the control loop: arrays by the policy's names, `task` a string. Empty where nobody looked."""
        self.ticks += 1
        tick, self._tick = self._tick, self._tick + 1
        wanted = tick % self._stride == 0
        if not observation or not (wanted or self._recent.maxlen != 1):
            return
        copied = self._copied(observation)
        if copied is None:
            return
        self._recent.append(copied)
        if wanted:
            task = str(observation.get(TASK, ""))
            self._running.append(_Sample(self._stacked(), self._episode, tick, (task, -1)))
            if len(self._running) > self._room:
                self._stride *= 2
                self._running = [sample for sample in self._running if sample.step % self._stride == 0]

    def episode(self) -> None:
        """The episode is over; the next offer begins another one."""
        length = self._tick
        for sample in self._running:
            self._keep(
                _Sample(
                    sample.observation, sample.episode, sample.step, (sample.group[0], sample.step * PHASES // length)
                )
            )
        self._episode += 1 if length else 0
        self._tick, self._stride, self._running = 0, 1, []
        self._recent.clear()

    def watch(self, policy: Predictor) -> WatchedPolicy:
        """The same policy, of which every observation is offered here and every `reset` ends the episode."""
        return WatchedPolicy(policy, self)

    def unwritten(self) -> Unwritten:
        """The set in memory, the running episode ended. Raises InputError when nothing was recorded."""
        self.episode()
        kept = [sample for group in self._groups.values() for sample in group]
        if not kept:
            raise InputError(self._why_nothing(), where=str(self.path))
        kept.sort(key=lambda sample: (sample.episode, sample.step))
        texts = [sample.group[0] for sample in kept]
        names = list(kept[0].observation)
        columns = Columns([s.episode for s in kept], [s.step for s in kept], texts)
        for name in names:
            if name == TASK:
                columns.add_task()
            else:
                columns.add(name, (sample.observation[name] for sample in kept))
        created_by = f"vlaopt {installed_version('vlaopt')} Recorder"
        facts = Facts(self._name, "", self.source, self._licence, created_by, self._seed)
        return columns.unwritten(self.path, facts)

    def close(self) -> CalibrationSet:
        """Write the set, whatever it is worth: `vlaopt calibration inspect` tells. A second call gives the same set."""
        if self._written is None:
            unwritten = self.unwritten()
            check_new(self.path)
            self._written = unwritten.write()
        return self._written

    def _copied(self, observation: Mapping[str, Any]) -> dict[str, Any] | None:
        """A copy that the caller's buffers cannot change; None, counted, for what does not fit the set."""
        for name, value in observation.items():
            if reason := _unfit(name, value):
                self.refused[reason] += 1
                return None
        kinds = {name: _kind(value) for name, value in observation.items()}
        if not self._kinds:
            self._kinds = kinds
            self._fit(sum(value.nbytes for value in observation.values() if isinstance(value, np.ndarray)))
        if kinds != self._kinds:
            self.refused["of other names, dtypes or shapes than the first"] += 1
            return None
        return {name: value if isinstance(value, str) else value.copy() for name, value in observation.items()}

    def _fit(self, size: int) -> None:
        """Half of the memory for the samples kept, half for the running episode's, less the latest ticks."""
        history = self._recent.maxlen or 1
        slots = self._bytes // max(size * history, 1) - history
        self._capacity = self._room = int(max(min(self._capacity, slots // 2), 0))

    def _stacked(self) -> dict[str, Any]:
        """The latest ticks as one sample; the first repeated where there are fewer."""
        history = self._recent.maxlen or 1
        if history == 1:
            return self._recent[-1]
        ticks = [self._recent[0]] * (history - len(self._recent)) + list(self._recent)
        return {
            name: value if isinstance(value, str) else np.stack([tick[name] for tick in ticks])
            for name, value in ticks[-1].items()
        }

    def _keep(self, sample: _Sample) -> None:
        group = self._groups.setdefault(sample.group, [])
        self._seen[sample.group] += 1
        if sum(map(len, self._groups.values())) < self._capacity:
            group.append(sample)
            return
        crowded = max(self._groups, key=lambda key: len(self._groups[key]))
        most = len(self._groups[crowded])
        self._full |= {key for key, members in self._groups.items() if len(members) == most}
        if sample.group not in self._full:
            self._groups[crowded].pop(int(self._generator.integers(most)))
            group.append(sample)
        elif group and self._generator.random() < len(group) / self._seen[sample.group]:
            group[int(self._generator.integers(len(group)))] = sample

    def _why_nothing(self) -> str:
        if self._capacity < 1:
            return f"max_mib {self._bytes / 2**20:g} leaves no room for a single sample"
        reasons = "; ".join(f"{count} {reason}" for reason, count in self.refused.most_common(3))
        return f"nothing was recorded in {self.ticks} ticks" + (f", refused: {reasons}" if reasons else "")


def _unfit(name: str, value: object) -> str | None:
    """Why a set cannot hold the value, or None."""
    if isinstance(value, str) and name == TASK:
        return None
    if not isinstance(value, np.ndarray) or name == TASK or value.dtype.kind not in "biuf":
        return f"with {name} of type {type(value).__name__}"
    return None if value.dtype.kind != "f" or np.isfinite(value).all() else f"with {name} not finite"


def _kind(value: Any) -> tuple[str, tuple[int, ...]]:
    return ("string", ()) if isinstance(value, str) else (str(value.dtype), value.shape)


class WatchedPolicy:
    """A policy whose observations a recorder is offered."""

    def __init__(self, policy: Predictor, recorder: Recorder) -> None:
        self._policy = policy
        self._recorder = recorder

    @property
    def needs_observation(self) -> bool:
        """Whether the next `predict` looks at its observation."""
        return bool(getattr(self._policy, "needs_observation", True))

    def predict(self, observation: Mapping[str, Any]) -> Array:
        """The policy's action; what the policy refuses is not recorded."""
        action = self._policy.predict(observation)
        self._recorder.offer(observation)
        return action

    def reset(self) -> None:
        """A new episode."""
        self._policy.reset()
        self._recorder.episode()
