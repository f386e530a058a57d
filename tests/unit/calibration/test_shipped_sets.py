"""What ships is what its README says, fits the reference policy, and keeps judging apart from calibrating."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vlaopt.calibration import CalibrationSet
from vlaopt.sim import TASKS, Phrasings

ROOT = Path(__file__).parents[3]
SETS: dict[str, Phrasings] = {"metaworld": "training", "metaworld-held-out": "held-out"}


@pytest.fixture(params=SETS)
def shipped(request: pytest.FixtureRequest) -> CalibrationSet:
    return CalibrationSet.open(ROOT / "calibration" / request.param)


def test_fits_the_reference_policy(shipped: CalibrationSet) -> None:
    shipped.check(
        {
            "observation.images.front": ("uint8", (96, 96, 3)),
            "observation.state": ("float32", (4,)),
            "task": ("string", ()),
        },
        minimum_samples=128,
    )
    actions = shipped.column("action")
    assert actions.shape == (len(shipped), 10, 4) and np.abs(actions).max() <= 1.0


def test_its_readme_tells_its_digest_and_counts(shipped: CalibrationSet) -> None:
    text = (shipped.path / "README.md").read_text(encoding="utf-8")
    assert f"`{shipped.digest}`" in text
    assert f"| {len(shipped)}, {shipped.card.episodes} |" in text


def test_is_small_enough_to_live_in_git(shipped: CalibrationSet) -> None:
    assert sum(file.stat().st_size for file in shipped.path.iterdir()) < 10e6


def test_says_where_it_is_from_and_under_what_licence(shipped: CalibrationSet) -> None:
    assert shipped.card.licence == "Apache-2.0"
    assert "Meta-World" in shipped.card.source


def test_speaks_only_the_phrasings_it_should(shipped: CalibrationSet) -> None:
    allowed = {text for task in TASKS for text in task.phrasings(SETS[shipped.card.name])}
    assert set(shipped.card.instructions) <= allowed


def test_no_frame_is_in_both() -> None:
    calibration, held_out = (CalibrationSet.open(ROOT / "calibration" / name) for name in SETS)
    seen = {row["observation.images.front"].tobytes() for row in calibration}
    assert not any(row["observation.images.front"].tobytes() in seen for row in held_out)
