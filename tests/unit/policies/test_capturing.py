"""While the eager policy is captured, all that the runtime does around the components is held against it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import toy_flow
from vlaopt.calibration import CalibrationSet
from vlaopt.policies.capturing import FAR, Captured, capture, difference, draw_noises
from vlaopt.progress import Silent
from vlaopt.runtime.capture import Capture, CaptureIndex


def captured(
    folder: Path, mistake: str | None = None, rows: tuple[int, ...] = (0, 5, 9)
) -> tuple[Captured, dict[str, bytes]]:
    toy_flow.make(folder, mistake)
    eager = toy_flow.ADAPTER.load(folder / "checkpoint", {}, {})
    observations, files = CalibrationSet.open(folder / "set"), dict[str, bytes]()
    index = CaptureIndex(digest=observations.digest, rows=rows, golden=(0, 2))
    return capture(eager, observations, index, files.__setitem__, Silent()), files


def test_a_capture_is_one_file_per_observation_and_an_index(tmp_path: Path) -> None:
    found, files = captured(tmp_path)
    assert sorted(files) == [f"capture/{row:05d}.safetensors" for row in range(3)] + ["capture/index.json"]
    assert max(found.differences.values()) < 1e-6


def test_golden_actions_are_the_eager_policys_with_the_noise_of_the_capture(tmp_path: Path) -> None:
    found, files = captured(tmp_path)
    eager = toy_flow.ADAPTER.load(tmp_path / "checkpoint", {}, {})
    again = found.golden.run(eager.predict_chunk)
    assert np.array_equal(again, found.golden.actions)
    opened = Capture.read(eager.spec, files.__getitem__)
    assert found.golden.noise is not None
    assert np.array_equal(opened.noise(2), found.golden.noise[1])
    assert np.array_equal(found.golden.observations[1]["observation.state"], toy_flow.observation(9)[toy_flow.STATE])


def test_the_noise_of_a_capture_depends_on_the_number_of_rows_alone() -> None:
    spec = toy_flow.spec()
    first, longer = draw_noises(spec, 3), draw_noises(spec, 5)
    assert all(np.array_equal(left, right) for left, right in zip(first, longer, strict=False))
    assert not np.array_equal(longer[0], longer[1])


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ("backward in time", {"input time of step", "input state_of_loop of step"}),
        ("too few steps", {"input time of step", "input state_of_loop of step", "number of calls of step"}),
        ("state not normalised", {"input state of prefix"}),
        ("image not normalised", {"input image of vision"}),
        ("wrong statistics", {"input state of prefix"}),
        (
            "values under the names of keys",
            {f"input {name} of step" for name in toy_flow.cache_names()},
        ),
    ],
)
def test_each_mistake_shows_where_it_was_made_and_nowhere_else(mistake: str, found: set[str], tmp_path: Path) -> None:
    differences = captured(tmp_path, mistake)[0].differences
    assert {name for name, value in differences.items() if value > 1e-4} == found


def test_own_processing_that_differs_from_what_the_network_gets_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Golden inputs are what `preprocess` gives: an adapter's `preprocess` that is not its policy's is a wrong one."""
    original = toy_flow.EagerToyFlow.predict_chunk

    def predict(self, observation, noise=None, *, tap=None):  # type: ignore[no-untyped-def]
        halved = {**observation, toy_flow.STATE: observation[toy_flow.STATE] / 2}
        return original(self, halved, noise, tap=tap)

    monkeypatch.setattr(toy_flow.EagerToyFlow, "predict_chunk", predict)
    assert captured(tmp_path)[0].differences["input state of prefix"] > 0.01


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8), st.floats(0, 1e3, width=32))
def test_a_difference_is_relative_to_the_largest_of_the_reference_or_to_one(values: list[float], by: float) -> None:
    reference = np.asarray(values, np.float32)
    moved = reference.astype(np.float64) + by
    expected = by / max(1.0, float(np.abs(reference).max()))
    assert difference(moved, reference) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_equal_infinities_are_equal_and_everything_else_that_is_no_number_is_far_away() -> None:
    mask = np.asarray([0.0, -np.inf], np.float32)
    assert difference(mask, mask) == 0.0
    assert difference(np.zeros(2, np.float32), mask) == FAR
    assert difference(np.asarray([np.nan, 0.0], np.float32), np.zeros(2, np.float32)) == FAR
    assert difference(np.zeros((2, 1), np.float32), np.zeros(2, np.float32)) == FAR


def test_whole_numbers_are_equal_or_not() -> None:
    """Of fifty thousand words, two neighbours must not count as nearly the same."""
    words = np.asarray([[49_000, 7]])
    assert difference(words, words.copy()) == 0.0
    assert difference(words + 1, words) == 1.0
    assert difference(np.asarray([True]), np.asarray([False])) == 1.0
