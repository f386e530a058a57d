"""Success is counted the same way for every policy, on episodes that depend on nothing but their seed."""

from __future__ import annotations

import itertools
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.calibration import Recorder
from vlaopt.errors import InputError
from vlaopt.sim import TASKS, episode_seed, evaluate, tasks_named, wilson_interval

needs_simulator = pytest.mark.skipif(find_spec("metaworld") is None, reason="needs vlaopt[sim]")


class Idle:
    """Never moves; counts what it was asked."""

    def __init__(self, look_every: int | None = None) -> None:
        self.seen: list[Any] = []
        self.resets = 0
        self._look_every = look_every

    @property
    def needs_observation(self) -> bool:
        return self._look_every is None or len(self.seen) % self._look_every == 0

    def predict(self, observation: dict[str, Any]) -> np.ndarray:
        self.seen.append(observation)
        return np.zeros(4, np.float32)

    def reset(self) -> None:
        self.resets += 1


@given(n=st.integers(1, 500), data=st.data())
def test_the_interval_holds_the_rate_and_stays_in_0_to_1(n: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson_interval(successes, n)
    assert 0 <= low <= successes / n + 1e-12 and successes / n - 1e-12 <= high <= 1


@given(n=st.integers(1, 500))
def test_the_interval_of_all_or_none_ends_exactly_at_1_or_0(n: int) -> None:
    assert wilson_interval(n, n)[1] == 1.0 and wilson_interval(0, n)[0] == 0.0


def test_the_interval_matches_published_values() -> None:
    low, high = wilson_interval(81, 263)  # Newcombe, 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = wilson_interval(0, 20)
    assert (round(low, 4), round(high, 4)) == (0.0, 0.1611)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_an_impossible_count_has_no_interval(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="successes of"):
        wilson_interval(successes, n)


def test_no_seed_is_shared_between_training_calibration_and_evaluation() -> None:
    splits = ("evaluation", "demonstration", "calibration", "held-out")
    seeds = {
        split: {episode_seed(split, 0, task.name, episode) for task in TASKS for episode in range(200)}
        for split in splits
    }
    for first, second in itertools.combinations(splits, 2):
        assert not seeds[first] & seeds[second]
    assert all(0 <= seed < 2**31 for group in seeds.values() for seed in group)


def test_every_task_has_phrasings_to_train_on_and_others_to_be_tested_on() -> None:
    assert len(TASKS) >= 8
    training = [text for task in TASKS for text in task.training]
    held_out = [text for task in TASKS for text in task.held_out]
    assert all(len(task.training) >= 5 and len(task.held_out) >= 2 for task in TASKS)
    assert len(set(training + held_out)) == len(training) + len(held_out)


def test_held_out_phrasings_say_which_task_in_words_seen_in_training() -> None:
    for task in TASKS:
        words = {word for text in task.training for word in text.split()}
        for text in task.held_out:
            assert len(words & set(text.split())) >= 2


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(InputError, match="no task named 'fly'"):
        tasks_named(["fly"])


def test_at_least_one_episode() -> None:
    with pytest.raises(InputError, match="at least 1 is needed"):
        evaluate(Idle(), episodes=0)


@needs_simulator
def test_a_policy_that_does_nothing_fails_the_same_episodes_every_time() -> None:
    first, second = Idle(), Idle()
    records = [evaluate(policy, tasks=["drawer-open"], episodes=2, max_steps=3) for policy in (first, second)]
    assert records[0].tasks == records[1].tasks
    assert records[0].successes == 0 and records[0].episodes == 2 and records[0].success_rate == 0.0
    assert first.resets == 2 and len(first.seen) == 6
    for one, other in zip(first.seen, second.seen, strict=True):
        np.testing.assert_array_equal(one["observation.images.front"], other["observation.images.front"])
        np.testing.assert_array_equal(one["observation.state"], other["observation.state"])
        assert one["task"] == other["task"]


@needs_simulator
def test_a_policy_with_a_queue_is_shown_only_what_it_looks_at() -> None:
    policy = Idle(look_every=2)
    evaluate(policy, tasks=["drawer-open"], episodes=1, max_steps=4)
    assert [bool(observation) for observation in policy.seen] == [True, False, True, False]


@needs_simulator
def test_what_is_recorded_for_calibration_is_never_what_a_policy_is_judged_on(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "set", capacity=16)
    watched = recorder.watch(Idle())
    record = evaluate(
        watched, tasks=["drawer-open"], episodes=2, max_steps=8, split="calibration", phrasings="training"
    )
    assert record.tasks[0].seeds == tuple(episode_seed("calibration", 0, "drawer-open", index) for index in range(2))
    samples = recorder.close()
    assert 8 <= len(samples) <= 16 and samples.card.episodes == 2
    (task,) = tasks_named(["drawer-open"])
    assert set(samples.card.instructions) <= set(task.training)
