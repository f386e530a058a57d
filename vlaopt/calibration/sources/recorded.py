"""A calibration set as a source for another one: fewer samples, other names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from vlaopt.calibration.card import TASK
from vlaopt.calibration.reading import CalibrationSet
from vlaopt.calibration.sources import ACTION, Kind, Steps
from vlaopt.tensors import Array


class RecordedSet:
    """Keeps to `Source`, but for what lies between its samples: that was never kept."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._set = CalibrationSet.open(path)
        card = self._set.card
        observed = {name: (feature.dtype, feature.shape) for name, feature in card.observation.items() if name != TASK}
        action = {ACTION: ("float32", card.action.shape)} if card.action is not None else {}
        self.observed = tuple(observed)
        self.columns: Mapping[str, Kind] = {**observed, **action}
        places = np.array([self._set.episode(index) for index in range(len(self._set))], dtype=np.int64).reshape(-1, 2)
        self._order = np.lexsort((places[:, 1], places[:, 0]))
        told = TASK in card.observation
        tasks = np.array([self._set.task_index(index) for index in self._order.tolist()], dtype=np.int64)
        self.steps = Steps(
            task=tasks if told else np.zeros_like(tasks),
            episode=places[self._order, 0],
            step=places[self._order, 1],
            instructions=card.instructions if told else (),
        )
        self.origin = f"{card.name} ({card.source}), set {self._set.digest[:12]}"

    def column(self, name: str, rows: Sequence[int]) -> Iterator[Array]:
        for row in rows:
            index = int(self._order[row])
            yield self._set.action(index) if name == ACTION else self._set.value(name, index)

    def check_unchanged(self) -> None:
        self._set.check_unchanged()
