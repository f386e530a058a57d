"""A recorder keeps a bounded sample of what a policy sees, spread over episodes, phases and instructions."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.calibration import CalibrationSet, Recorder
from vlaopt.calibration.recorder import PHASES
from vlaopt.errors import EnvironmentProblem, InputError

FRONT, STATE = "observation.images.front", "observation.state"


def seen(episode: int, step: int, task: str = "open") -> dict[str, Any]:
    image = np.full((8, 6, 3), (episode % 256, step % 256, step // 256), np.uint8)
    return {FRONT: image, STATE: np.array([episode, step], np.float32), "task": task}


def record(recorder: Recorder, lengths: Mapping[int, int], task: str = "open") -> Recorder:
    for episode, length in lengths.items():
        for step in range(length):
            recorder.offer(seen(episode, step, task))
        recorder.episode()
    return recorder


def places(samples: CalibrationSet) -> list[tuple[int, int]]:
    return [samples.episode(index) for index in range(len(samples))]


def test_everything_is_kept_while_there_is_room(tmp_path: Path) -> None:
    samples = record(Recorder(tmp_path / "set", capacity=64), {0: 20, 1: 30}).close()
    assert places(samples) == [(0, step) for step in range(20)] + [(1, step) for step in range(30)]
    for index, (episode, step) in enumerate(places(samples)):
        row = samples.observation(index)
        np.testing.assert_array_equal(row[FRONT], seen(episode, step)[FRONT])
        assert row[STATE].tolist() == [episode, step]
        assert row["task"] == "open"
    assert samples.card.source == "recorded from a running policy"


def test_one_long_episode_is_thinned_evenly(tmp_path: Path) -> None:
    samples = record(Recorder(tmp_path / "set", capacity=32), {0: 1000}).close()
    steps = [step for _, step in places(samples)]
    assert 16 <= len(steps) <= 32
    assert set(np.diff(steps)) == {32} or set(np.diff(steps)) == {64}


def test_every_phase_and_instruction_has_its_share(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "set", capacity=100, seed=1)
    for episode in range(30):
        task = "often" if episode % 10 else "seldom"
        for step in range(150):
            recorder.offer(seen(episode, step, task))
        recorder.episode()
    samples = recorder.close()
    groups = Counter(
        (samples.observation(index)["task"], step * PHASES // 150) for index, (_, step) in enumerate(places(samples))
    )
    assert len(samples) == 100
    assert set(groups.values()) == {10}, groups


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 200), min_size=1, max_size=20),
    capacity=st.integers(8, 60),
    seed=st.integers(0, 99),
)
def test_never_more_than_its_capacity(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], capacity: int, seed: int
) -> None:
    recorder = Recorder(tmp_path_factory.mktemp("recorder") / "set", capacity=capacity, seed=seed)
    for episode, length in enumerate(lengths):
        for step in range(length):
            recorder.offer(seen(episode, step))
            assert len(recorder) <= 2 * capacity
        recorder.episode()
    assert recorder.ticks == sum(lengths)
    if sum(lengths):
        kept = places(recorder.close())
        assert len(set(kept)) == len(kept)
        assert min(capacity, sum(lengths)) / 2 <= len(kept) <= capacity


def test_early_and_late_episodes_are_kept_alike(tmp_path: Path) -> None:
    kept: Counter[int] = Counter()
    for seed in range(60):
        recorder = record(Recorder(tmp_path / str(seed), capacity=20, seed=seed), dict.fromkeys(range(20), 40))
        samples = recorder.unwritten().samples
        kept.update(episode // 5 for episode, _ in places(samples))
    # 1200 samples over four quarters: 300 each, with a deviation of 15.
    assert all(225 < kept[quarter] < 375 for quarter in range(4)), kept


def test_the_same_seed_keeps_the_same(tmp_path: Path) -> None:
    lengths = dict.fromkeys(range(12), 50)
    first, second = (record(Recorder(tmp_path / name, capacity=24, seed=3), lengths) for name in "ab")
    assert places(first.close()) == places(second.close())


def test_memory_is_bounded(tmp_path: Path) -> None:
    big = {FRONT: np.zeros((256, 256, 3), np.uint8), STATE: np.zeros(2, np.float32)}
    recorder = Recorder(tmp_path / "set", capacity=1000, max_mib=8)
    for step in range(2000):
        recorder.offer({**big, STATE: np.full(2, step, np.float32)})
        if step % 90 == 89:
            recorder.episode()
    assert 8 <= len(recorder) * 256 * 256 * 3 / 2**20 * 2 <= 16
    assert len(recorder) * 256 * 256 * 3 <= 8 << 20


def test_too_little_memory_for_one_sample(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "set", max_mib=1)
    recorder.offer({FRONT: np.zeros((1024, 1024, 3), np.uint8)})
    with pytest.raises(InputError, match="max_mib 1 leaves no room for a single sample"):
        recorder.close()


def test_the_callers_buffers_may_be_used_again(tmp_path: Path) -> None:
    recorder, buffer = Recorder(tmp_path / "set"), np.zeros(2, np.float32)
    for step in range(10):
        buffer[:] = step
        recorder.offer({STATE: buffer})
    samples = recorder.close()
    assert samples.column(STATE)[:, 0].tolist() == list(range(10))


def test_a_history_repeats_the_first_tick(tmp_path: Path) -> None:
    recorder = record(Recorder(tmp_path / "set", history=3), {0: 5, 1: 4})
    samples = recorder.close()
    assert samples.card.observation[FRONT].shape == (3, 8, 6, 3)
    for index, (episode, step) in enumerate(places(samples)):
        steps = [max(step - back, 0) for back in (2, 1, 0)]
        assert samples.observation(index)[STATE].tolist() == [[episode, each] for each in steps]


def test_offers_that_do_not_fit_are_counted_and_not_kept(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "set")
    recorder.offer({})
    for step in range(10):
        recorder.offer(seen(0, step))
    recorder.offer({STATE: np.zeros(2, np.float32)})
    recorder.offer({**seen(0, 1), STATE: np.array([0, np.nan], np.float32)})
    recorder.offer({**seen(0, 1), STATE: np.array([object(), 1], dtype=object)})
    recorder.offer({**seen(0, 1), STATE: [0.0, 1.0]})
    assert recorder.refused == {
        "of other names, dtypes or shapes than the first": 1,
        "with observation.state not finite": 1,
        "with observation.state of type ndarray": 1,
        "with observation.state of type list": 1,
    }
    assert len(recorder.close()) == 10


def test_nothing_recorded_says_why(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "set")
    recorder.offer({STATE: np.array([np.inf], np.float32)})
    with pytest.raises(InputError, match=r"nothing was recorded in 1 ticks, refused: 1 with observation.state not fin"):
        recorder.close()


def test_an_interrupted_control_loop_keeps_what_it_recorded(tmp_path: Path) -> None:
    def drive() -> None:
        with Recorder(tmp_path / "set") as recorder:
            record(recorder, {0: 9})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        drive()
    assert len(CalibrationSet.open(tmp_path / "set")) == 9


def test_an_error_before_the_first_tick_is_told_as_it_is(tmp_path: Path) -> None:
    def drive() -> None:
        with Recorder(tmp_path / "set"):
            raise ValueError("no camera")

    with pytest.raises(ValueError, match="no camera"):
        drive()


def test_closing_twice_gives_the_same_set(tmp_path: Path) -> None:
    recorder = record(Recorder(tmp_path / "set"), {0: 9})
    assert recorder.close() is recorder.close()


def test_what_would_fail_at_the_end_fails_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InputError, match="already exists"):
        Recorder(tmp_path / "there")
    with pytest.raises(InputError, match="capacity 7 is below 8"):
        Recorder(tmp_path / "set", capacity=7)
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        Recorder("/dev/null/set")
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(EnvironmentProblem, match=r"PIL\.Image cannot be imported") as caught:
        Recorder(tmp_path / "set")
    assert caught.value.hint == "pip install 'vlaopt[data]'"


class Counting:
    """A policy that looks at every third tick."""

    def __init__(self) -> None:
        self.ticks = self.resets = 0

    @property
    def needs_observation(self) -> bool:
        return self.ticks % 3 == 0

    def predict(self, observation: Mapping[str, Any]) -> np.ndarray:
        if observation and not np.isfinite(observation[STATE]).all():
            raise InputError("not finite")
        self.ticks += 1
        return np.zeros(2, np.float32)

    def reset(self) -> None:
        self.resets += 1


def test_a_watched_policy_records_what_it_sees(tmp_path: Path) -> None:
    policy, recorder = Counting(), Recorder(tmp_path / "set")
    watched = recorder.watch(policy)
    for episode in range(2):
        watched.reset()
        for step in range(15):
            watched.predict(seen(episode, step) if watched.needs_observation else {})
    with pytest.raises(InputError, match="not finite"):
        watched.predict({**seen(1, 1), STATE: np.array([np.nan, 0], np.float32)})
    assert (policy.ticks, policy.resets, recorder.ticks) == (30, 2, 30)
    assert places(recorder.close()) == [(episode, step) for episode in (0, 1) for step in (0, 3, 6, 9, 12)]


def test_offers_cost_little_once_it_is_full(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "set", capacity=64)
    observation = {FRONT: np.zeros((480, 640, 3), np.uint8), STATE: np.zeros(2, np.float32)}
    for _ in range(20_000):
        recorder.offer(observation)
    started = time.perf_counter()
    for _ in range(20_000):
        recorder.offer(observation)
    assert (time.perf_counter() - started) / 20_000 < 1e-3, "a control loop of 100 Hz must not notice"
