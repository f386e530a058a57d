"""Inspecting a set counts, measures, and lists everything that would be refused of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlaopt.calibration import CalibrationSet, write_calibration_set
from vlaopt.calibration.inspection import inspect

FRONT, STATE = "observation.images.front", "observation.state"


def recorded(path: Path, rows: list[dict[str, Any]]) -> CalibrationSet:
    places = [divmod(index, 5) for index in range(len(rows))]
    episodes, steps = zip(*places, strict=True)
    facts = {"name": "test", "description": "", "source": "", "licence": "MIT", "created_by": "", "seed": 0}
    return write_calibration_set(path / "set", rows, episodes=episodes, steps=steps, **facts)  # type: ignore[arg-type]


def rows(count: int = 12) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            FRONT: rng.integers(0, 256, (8, 6, 3), dtype=np.uint8),
            STATE: rng.normal(size=4).astype(np.float32),
            "task": ("open", "close")[index % 3 == 0],
        }
        for index in range(count)
    ]


def test_it_counts_and_measures(tmp_path: Path) -> None:
    samples = rows()
    found = inspect(recorded(tmp_path, samples))
    assert found.tasks == {"close": 4, "open": 8}
    assert found.episodes == {0: 5, 1: 5, 2: 2}
    assert found.problems == ()
    for name in (FRONT, STATE):
        whole = np.stack([row[name] for row in samples]).astype(np.float64)
        had = found.features[name]
        assert [had.minimum, had.maximum, had.mean, had.std] == pytest.approx(
            [whole.min(), whole.max(), whole.mean(), whole.std()], rel=1e-6
        )


def test_it_lists_every_problem(tmp_path: Path) -> None:
    samples = rows(7)
    for row in samples:
        row[FRONT] = samples[0][FRONT]
    samples[3][STATE] = np.array([0, np.nan, 0, 0], np.float32)
    found = inspect(recorded(tmp_path, samples))
    messages = [message for message, _ in found.problems]
    assert messages == [
        "7 samples, at least 8 are needed",
        "observation.images.front is the same in all 7 samples",
        "observation.state holds NaN at sample 3",
    ]
    assert found.features[STATE].mean is None


def test_it_holds_the_set_against_a_policy(tmp_path: Path) -> None:
    expected = {STATE: ("float32", (5,)), "wrist": ("uint8", (8, 6, 3))}
    found = inspect(recorded(tmp_path, rows()), expected)
    assert [message.split(",")[0] for message, _ in found.problems] == [
        "observation.state is float32 [4]",
        "has no 'wrist'",
    ]


def test_damaged_images_are_a_problem_and_the_others_are_measured(tmp_path: Path) -> None:
    opened = recorded(tmp_path, rows())
    opened._tensors[f"{FRONT}.png"][:8] = 0  # type: ignore[index]
    found = inspect(opened)
    assert [
        "front at sample 0: not a sound PNG" in message or "not a sound PNG" in message for message, _ in found.problems
    ] == [True]
    assert found.features[FRONT].maximum is not None
