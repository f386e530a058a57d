"""Recorded episodes played to a policy, step by step, as its robot would have shown them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlaopt.calibration.card import TASK
from vlaopt.calibration.making import Wish, names_of, whole_episodes
from vlaopt.calibration.recorder import Predictor
from vlaopt.calibration.sources import Source
from vlaopt.progress import Progress, track


def replay(
    source: Source,
    policy: Predictor,
    names: Sequence[str],
    rename: Mapping[str, str],
    episodes: int | None,
    progress: Progress,
) -> None:
    """Play `episodes` episodes, evenly chosen (all for None): `predict` at every step, `reset` before each.

    `names` are those that `policy` observes. Raises InputError when the source lacks one, and what the policy raises.
    """
    whole_episodes(source, "a replay")
    origins = names_of(source, Wish(rename=rename, keep=tuple(names)))
    first, last = (np.unique(bound) for bound in source.steps.bounds())
    count = min(episodes or len(first), len(first))
    chosen = np.linspace(0, len(first) - 1, count).round().astype(int).tolist()
    for number in track(progress, "replaying", chosen, count):
        policy.reset()
        for observation in _play(source, origins, range(int(first[number]), int(last[number]) + 1)):
            policy.predict(observation)


def _play(source: Source, origins: Mapping[str, str], rows: Sequence[int]) -> Iterator[dict[str, Any]]:
    """The observations at `rows`, one after another."""
    steps = source.steps
    streams = {name: source.column(origin, rows) for name, origin in origins.items() if name != TASK}
    for row in rows:
        observation: dict[str, Any] = {name: next(stream) for name, stream in streams.items()}
        if TASK in origins:
            observation[TASK] = steps.instructions[int(steps.task[row])]
        yield observation
