"""What the documents show of making calibration sets runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import vlaopt
from vlaopt.calibration import CalibrationSet
from vlaopt.calibration.making import Wish, make, open_source
from vlaopt.calibration.writing import Facts

ROOT = Path(__file__).resolve().parents[3]


def block(document: str, words: str) -> str:
    """The Python block of a document that holds `words`."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return next(found for found in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if words in found)


def test_episodes_saved_as_shown_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    recordings = [
        SimpleNamespace(
            frames=rng.integers(0, 256, (9, 8, 6, 3), dtype=np.uint8),
            states=rng.normal(size=(9, 4)).astype(np.float32),
            actions=rng.normal(size=(9, 2)).astype(np.float32),
            instruction=task,
        )
        for task in ("open the drawer", "close it")
    ]
    monkeypatch.chdir(tmp_path)
    Path("episodes").mkdir()
    exec(block("calibration/README.md", "savez_compressed"), {"recordings": recordings})
    wish, facts = Wish(chunk=3), Facts("own", "", "a test", "MIT", "a test", 0)
    samples = make(open_source(Path("episodes")), Path("set"), wish, facts).samples
    assert (len(samples), samples.card.instructions) == (18, ("open the drawer", "close it"))
    np.testing.assert_array_equal(samples.observation(4)["observation.images.front"], recordings[0].frames[4])
    np.testing.assert_array_equal(samples.action(12), recordings[1].actions[3:6])


def test_recording_as_shown_writes_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def control_loop(policy: Any) -> None:
        for step in range(20):
            policy.predict({"observation.state": np.full(2, step, np.float32)})
        policy.reset()

    policy = SimpleNamespace(predict=lambda observation: np.zeros(2, np.float32), reset=lambda: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vlaopt, "open", lambda path: policy)
    exec(block("README.md", "Recorder"), {"vlaopt": vlaopt, "run_control_loop": control_loop})
    samples = CalibrationSet.open(Path("calibration/kitchen"))
    assert (len(samples), samples.card.licence) == (20, "CC-BY-4.0")
