"""Evaluations of choices: counted, measured beside two anchors, kept in a journal that outlives a killed process."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlaopt.benchmark.actions import ActionError
from vlaopt.errors import StageError
from vlaopt.hashing import canonical_json, digest_json
from vlaopt.progress import Task
from vlaopt.quantization.trials import FP32, Choice, Chosen

UNIFORM = "uniform"
"""With FP32 the anchors: nothing quantized, and everything that pays. Evaluations are measured in turns with them."""


class Runs(Protocol):
    """What is evaluated; `Trials` is one."""

    def normal(self, chosen: Choice) -> Chosen: ...

    def error(self, chosen: Choice) -> ActionError: ...

    def times_ms(self, choices: Mapping[str, Choice]) -> dict[str, dict[str, float]]: ...

    def size(self, chosen: Choice) -> int: ...


@dataclass(frozen=True)
class Evaluation:
    """What one choice is like: its action error, its components' milliseconds of a chunk, its graphs' bytes.

    `anchors_ms` are the milliseconds of the anchors in the same turns; `noise_ms` is by how much those of components
    that are alike, and so ran in the same session, differed. `error` is None and there are no times where the backend
    refused the choice, for the reason in `refused`.
    """

    error: ActionError | None
    times_ms: Mapping[str, float]
    anchors_ms: Mapping[str, Mapping[str, float]]
    size: int
    noise_ms: float = 0.0
    refused: str | None = None

    def beside(self, anchor: str) -> float:
        """Milliseconds of a chunk more than the anchor took in the same turns; components alike count nothing.

        More than FP32 took, where the backend refuses the anchor.
        """
        theirs = self.anchors_ms.get(anchor, self.anchors_ms[FP32])
        return sum(ms - theirs[name] for name, ms in self.times_ms.items())

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "error": self.error.to_json() if self.error else None}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Evaluation:
        """What `to_json` gave."""
        return cls(**{**value, "error": ActionError.from_json(value["error"]) if value["error"] else None})


class Evaluations:
    """At most `budget` evaluations, those of earlier processes in `journal` among them.

    Equal choices count once, unless they are measured again on purpose.
    """

    def __init__(
        self, runs: Runs, *, budget: int, task: Task, uniform: Choice | None = None, journal: Path | None = None
    ) -> None:
        self._runs, self._task = runs, task
        self._anchors: dict[str, Choice] = {FP32: {}} | ({} if uniform is None else {UNIFORM: uniform})
        self._journal = journal
        self._known = read_journal(journal) if journal else {}
        self._asked: set[str] = set()
        self._checked = False
        self.budget, self.resumed = budget, len(self._known)
        task.advance(min(self.resumed, budget))

    @property
    def spent(self) -> int:
        """How many were made."""
        return len(self._known)

    @property
    def left(self) -> int:
        """How many more may be asked for: the same number when a search that was killed is gone through again."""
        return max(0, self.budget - len(self._asked))

    def of(self, choice: Choice, repeat: int = 0) -> Evaluation | None:
        """The evaluation of a choice; None when it was not made yet and none may be made any more.

        With another `repeat` its times are measured once more, which counts as an evaluation too.
        """
        chosen = self._runs.normal(choice)
        key = digest_json([repeat, *((name, sorted(nodes)) for name, nodes in chosen)])
        if key not in self._known:
            if not self.left or self.spent >= self.budget:
                return None
            self._known[key] = self._made(choice, chosen)
            if self._journal:
                append(self._journal, {"choice": key, **self._known[key].to_json()})
            self._task.advance()
        self._asked.add(key)
        return self._known[key]

    def _made(self, choice: Choice, chosen: Chosen) -> Evaluation:
        try:
            error = self._runs.error(choice)
        except StageError as problem:
            return Evaluation(None, {}, {}, 0, refused=problem.message)
        if not self._checked:
            self._drop_refused()
        times = self._runs.times_ms({**self._anchors, "this": choice})
        mine, noise_ms = dict(chosen), 0.0
        for label, anchor in self._anchors.items():
            alike = [name for name, nodes in self._runs.normal(anchor) if mine[name] == nodes]
            noise_ms = max(noise_ms, abs(sum(times[label][name] - times["this"][name] for name in alike)))
            times[label] |= {name: times["this"][name] for name in alike}
        anchors = {label: times[label] for label in self._anchors}
        return Evaluation(error, times["this"], anchors, self._runs.size(choice), noise_ms)

    def _drop_refused(self) -> None:
        """Keep only anchors that the backend takes."""
        self._checked = True
        if UNIFORM in self._anchors:
            try:
                self._runs.error(self._anchors[UNIFORM])
            except StageError:
                del self._anchors[UNIFORM]


def read_journal(path: Path) -> dict[str, Evaluation]:
    """The evaluations in a journal by the key of their choice; none when there is no file.

    A line that a killed process left unfinished is passed over: its evaluation is made again.
    """
    found = {}
    for line in journal_lines(path):
        try:
            key = line.pop("choice")
            found[key] = Evaluation.from_json(line)
        except (KeyError, TypeError):
            continue
    return found


def journal_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none when there is no file."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def append(path: Path, value: Mapping[str, Any]) -> None:
    """Add a line to a journal, on the disk before this returns. A torn line before it does not spoil it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        # In one write, so that two builders of the same thing do not mix their lines.
        os.write(file.fileno(), b"\n" + canonical_json(value) + b"\n")
        os.fsync(file.fileno())
