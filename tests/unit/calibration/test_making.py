"""A set made from episodes holds what the episodes hold, evenly; what a calibrator could not use is never written."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.calibration import Expected
from vlaopt.calibration.making import Made, Wish, make, open_source
from vlaopt.calibration.sources.episodes import EpisodeFolder
from vlaopt.calibration.writing import Facts
from vlaopt.errors import InputError

FRONT, STATE = "observation.images.front", "observation.state"
FACTS = Facts("test", "", "a test", "MIT", "a test", 0)
LENGTHS = (30, 20, 10, 40)
TASKS = ("open", "open", "close", "close")
EXPECTED: Expected = {FRONT: ("uint8", (8, 6, 3)), STATE: ("float32", (4,)), "task": ("string", ())}


def frame(number: int, step: int) -> np.ndarray:
    return np.full((8, 6, 3), (number * 50, step * 5, 9), np.uint8)


def arrays(number: int) -> dict[str, Any]:
    steps = np.arange(LENGTHS[number])
    return {
        FRONT: np.stack([frame(number, int(step)) for step in steps]),
        STATE: np.stack([number + steps, steps, -steps, steps**2], axis=1).astype(np.float32),
        "action": np.stack([steps, number + 0 * steps], axis=1).astype(np.float32),
        "task": np.array(TASKS[number]),
    }


def save(folder: Path, **changes: Any) -> Path:
    """Four episodes; `changes` are columns' functions from what they would be."""
    folder.mkdir(exist_ok=True)
    for number in range(len(LENGTHS)):
        columns = arrays(number)
        for key, change in changes.items():
            name = {"front": FRONT, "state": STATE}.get(key, key)
            columns[name] = change(columns[name])
        np.savez(folder / f"{number}.npz", **columns)
    return folder


@pytest.fixture(scope="module")
def episodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("episodes"))


def made(folder: Path, path: Path, **wish: Any) -> Made:
    return make(open_source(folder), path, Wish(**wish), FACTS)


def refused(folder: Path, path: Path, words: str, **wish: Any) -> InputError:
    """Nothing is left at `path` or beside it."""
    before = set(path.parent.iterdir())
    with pytest.raises(InputError, match=words) as caught:
        made(folder, path, **wish)
    assert set(path.parent.iterdir()) == before
    return caught.value


def test_every_sample_is_the_step_it_says_it_is(episodes: Path, tmp_path: Path) -> None:
    samples = made(episodes, tmp_path / "set", samples=40).samples
    assert len(samples) == 40
    for index in range(40):
        number, step = samples.episode(index)
        row = samples.observation(index)
        np.testing.assert_array_equal(row[FRONT], frame(number, step))
        np.testing.assert_array_equal(row[STATE], arrays(number)[STATE][step])
        assert row["task"] == TASKS[number]
    samples.check(EXPECTED)


def test_samples_are_spread_over_tasks_episodes_and_time(episodes: Path, tmp_path: Path) -> None:
    samples = made(episodes, tmp_path / "set", samples=20).samples
    places = [samples.episode(index) for index in range(20)]
    assert Counter(number for number, _ in places) == {0: 6, 1: 4, 2: 2, 3: 8}
    for number in (0, 1, 3):
        steps = [step for episode, step in places if episode == number]
        assert max(np.diff(steps)) <= 6, "every fifth step, give or take one"


def test_all_steps_when_there_are_no_more(episodes: Path, tmp_path: Path) -> None:
    assert len(made(episodes, tmp_path / "set", samples=1000).samples) == sum(LENGTHS)


def test_the_same_wish_gives_the_same_set(episodes: Path, tmp_path: Path) -> None:
    first, second, other = (
        made(episodes, tmp_path / str(number), samples=20, seed=seed).samples for number, seed in enumerate((5, 5, 6))
    )
    assert first.digest == second.digest != other.digest


@pytest.mark.parametrize("history", [2, 3, 7])
def test_a_history_repeats_the_first_step_of_its_episode(episodes: Path, tmp_path: Path, history: int) -> None:
    samples = made(episodes, tmp_path / "set", samples=100, history=history).samples
    assert samples.card.observation[FRONT].shape == (history, 8, 6, 3)
    assert samples.card.observation[FRONT].encoding == "png"
    for index in range(100):
        number, step = samples.episode(index)
        steps = [max(step - back, 0) for back in range(history - 1, -1, -1)]
        row = samples.observation(index)
        np.testing.assert_array_equal(row[FRONT], np.stack([frame(number, each) for each in steps]))
        np.testing.assert_array_equal(row[STATE], arrays(number)[STATE][steps])


def test_a_set_with_a_history_is_checked_as_the_policy_takes_it(episodes: Path, tmp_path: Path) -> None:
    samples = made(episodes, tmp_path / "set", history=2).samples
    samples.check({FRONT: ("uint8", (2, 8, 6, 3)), STATE: ("float32", (2, 4))})
    with pytest.raises(InputError, match=r"uint8 \[2, 8, 6, 3\], the policy needs uint8 \[8, 6, 3\]") as caught:
        samples.check(EXPECTED)
    assert caught.value.hint == "the policy looks back another number of steps: vlaopt calibration make --history"


@pytest.mark.parametrize("chunk", [1, 5, 50])
def test_actions_repeat_the_last_one_of_their_episode(episodes: Path, tmp_path: Path, chunk: int) -> None:
    samples = made(episodes, tmp_path / "set", samples=30, chunk=chunk).samples
    assert samples.card.action is not None and samples.card.action.shape == (chunk, 2)
    for index in range(30):
        number, step = samples.episode(index)
        steps = [min(step + ahead, LENGTHS[number] - 1) for ahead in range(chunk)]
        np.testing.assert_array_equal(samples.action(index), [[each, number] for each in steps])


def test_actions_are_left_out_unless_asked_for(episodes: Path, tmp_path: Path) -> None:
    assert made(episodes, tmp_path / "set").samples.card.action is None


def test_actions_that_are_not_there(tmp_path: Path) -> None:
    folder = tmp_path / "episodes"
    folder.mkdir()
    np.savez(folder / "0.npz", **{STATE: np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)})
    assert refused(folder, tmp_path / "set", "holds no actions", chunk=3).hint == "leave --actions out"


def test_names_become_the_policys(episodes: Path, tmp_path: Path) -> None:
    samples = made(episodes, tmp_path / "set", rename={FRONT: "camera", STATE: "joints"}).samples
    assert set(samples.card.observation) == {"camera", "joints", "task"}


def test_only_what_is_to_be_kept(episodes: Path, tmp_path: Path) -> None:
    assert set(made(episodes, tmp_path / "set", keep=(STATE,)).samples.card.observation) == {STATE}


def test_only_what_the_policy_takes(episodes: Path, tmp_path: Path) -> None:
    expected = {"joints": ("float32", (4,))}
    samples = made(episodes, tmp_path / "set", rename={STATE: "joints"}, expected=expected).samples
    assert set(samples.card.observation) == {"joints"}


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (
            {"expected": {**EXPECTED, "wrist": ("uint8", (8, 6, 3))}},
            r"has no 'wrist', which the policy takes; it has obs",
        ),
        ({"expected": {STATE: ("float32", (5,))}}, r"state is float32 \[4\], the policy needs float32 \[5\]"),
        (
            {"expected": {FRONT: ("uint8", (9, 6, 3))}},
            r"front is uint8 \[8, 6, 3\], the policy needs uint8 \[9, 6, 3\]",
        ),
        ({"keep": ("wrist",)}, "has no 'wrist', which is to be kept"),
        ({"keep": ("task",)}, "no observations"),
        ({"rename": {"wrist": "camera"}}, "has no 'wrist' to rename"),
        ({"rename": {STATE: FRONT}}, "two names become one"),
    ],
    ids=["camera", "shape", "frame size", "keep", "task alone", "rename", "twice"],
)
def test_what_is_not_there(episodes: Path, tmp_path: Path, wish: dict[str, Any], words: str) -> None:
    refused(episodes, tmp_path / "set", words, **wish)


def spoil(value: float) -> Any:
    def change(states: np.ndarray) -> np.ndarray:
        states[len(states) // 2, 1] = value
        return states

    return change


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.nan, "observation.state holds NaN at sample"),
        (np.inf, "observation.state holds infinity at sample"),
        (1e30, r"observation\.state reaches 1e\+30 at sample"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_values_that_ruin_a_scale(tmp_path: Path, value: float, words: str, dtype: str) -> None:
    folder = save(tmp_path / "episodes", state=lambda states: spoil(value)(states.astype(dtype)))
    refused(folder, tmp_path / "set", words)


def test_a_state_that_never_changes(tmp_path: Path) -> None:
    folder = save(tmp_path / "episodes", state=np.ones_like)
    refused(folder, tmp_path / "set", "observation.state is the same in all 100 samples")


def test_a_camera_that_never_changes(tmp_path: Path) -> None:
    folder = save(tmp_path / "episodes", front=np.zeros_like)
    refused(folder, tmp_path / "set", "observation.images.front is the same in all 100 samples")


def test_float_images_that_go_to_255(tmp_path: Path) -> None:
    folder = save(tmp_path / "episodes", front=lambda images: np.moveaxis(images, 3, 1).astype(np.float32))
    refused(folder, tmp_path / "set", "float images are 0 to 1", expected=EXPECTED)


def test_float_images_of_0_to_1_are_taken(tmp_path: Path) -> None:
    folder = save(tmp_path / "episodes", front=lambda images: np.moveaxis(images, 3, 1).astype(np.float32) / 255)
    samples = made(folder, tmp_path / "set", expected=EXPECTED).samples
    assert samples.card.observation[FRONT].shape == (3, 8, 6)


def test_a_single_sample(tmp_path: Path) -> None:
    folder = tmp_path / "episodes"
    folder.mkdir()
    np.savez(folder / "0.npz", **{STATE: np.ones((1, 4), np.float32)})
    refused(folder, tmp_path / "set", "1 samples, at least 8 are needed")


def test_float64_is_rounded_and_said(tmp_path: Path) -> None:
    folder = save(tmp_path / "episodes", state=lambda states: states.astype(np.float64) / 3)
    done = made(folder, tmp_path / "set")
    assert done.samples.card.observation[STATE].dtype == "float32"
    assert len(done.notes) == 1
    assert done.notes[0].startswith("observation.state: float64 rounded to float32, by ")


@pytest.mark.parametrize("offset", [1.7e9, 1e39])
def test_float64_that_float32_cannot_tell(tmp_path: Path, offset: float) -> None:
    folder = save(tmp_path / "episodes", state=lambda states: states.astype(np.float64) * 1e-3 + offset)
    refused(folder, tmp_path / "set", "is float64 and loses up to")


@settings(max_examples=30)
@given(scale=st.floats(1e-6, 1e3), offset=st.floats(-1e3, 1e3))
def test_rounding_never_moves_a_value_by_more_than_it_says(
    tmp_path_factory: pytest.TempPathFactory, scale: float, offset: float
) -> None:
    folder = tmp_path_factory.mktemp("episodes")
    states = np.random.default_rng(0).normal(size=(20, 4)) * scale + offset
    np.savez(folder / "0.npz", **{STATE: states})
    try:
        samples = made(folder, folder / "set").samples
    except InputError as error:
        assert "loses up to" in str(error)
        return
    moved = np.abs(samples.column(STATE) - states).max()
    assert moved <= max(1e-6, 1e-4 * (states.max() - states.min()))


def test_never_writes_over_a_set(episodes: Path, tmp_path: Path) -> None:
    made(episodes, tmp_path / "set")
    refused(episodes, tmp_path / "set", "already exists")


def test_recordings_that_change_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path / "episodes")
    whole = EpisodeFolder.column

    def column(self: EpisodeFolder, name: str, rows: Any) -> Any:
        yield from whole(self, name, rows)
        if name == STATE:
            np.savez(folder / "0.npz", **arrays(1))

    monkeypatch.setattr(EpisodeFolder, "column", column)
    refused(folder, tmp_path / "set", "changed while it was read")


def test_a_set_from_a_set(episodes: Path, tmp_path: Path) -> None:
    first = made(episodes, tmp_path / "first", samples=60, chunk=5).samples
    second = made(first.path, tmp_path / "second", samples=12, rename={STATE: "joints"}, chunk=3).samples
    assert len(second) == 12
    for index in range(12):
        number, step = second.episode(index)
        np.testing.assert_array_equal(second.observation(index)["joints"], arrays(number)[STATE][step])
        np.testing.assert_array_equal(second.observation(index)[FRONT], frame(number, step))
        assert second.observation(index)["task"] == TASKS[number]
        assert second.action(index).shape == (3, 2)
        assert second.action(index)[0].tolist() == [step, number]
    assert open_source(first.path).origin == f"test (a test), set {first.digest[:12]}"


def test_a_set_with_a_history_from_a_set_keeps_it(episodes: Path, tmp_path: Path) -> None:
    first = made(episodes, tmp_path / "first", samples=60, history=2).samples
    second = made(first.path, tmp_path / "second", samples=12).samples
    assert second.card.observation[FRONT].shape == (2, 8, 6, 3)


def test_a_set_with_the_policys_history_needs_no_steps_between(episodes: Path, tmp_path: Path) -> None:
    first = made(episodes, tmp_path / "first", samples=60, history=2).samples
    expected = {STATE: ("float32", (2, 4))}
    second = made(first.path, tmp_path / "second", samples=12, history=2, expected=expected).samples
    assert second.layout() == expected


@pytest.mark.parametrize("wish", [{"history": 2}, {"chunk": 9}], ids=["history", "chunk"])
def test_a_set_has_no_steps_between_its_samples(episodes: Path, tmp_path: Path, wish: dict[str, int]) -> None:
    first = made(episodes, tmp_path / "first", samples=60, chunk=5).samples
    error = refused(first.path, tmp_path / "second", "needs whole episodes", **wish)
    assert error.hint == "make the set again from the recordings it was made from"
