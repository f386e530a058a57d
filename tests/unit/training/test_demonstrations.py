"""A recorded episode covers a shaky robot's states with the expert's clean actions."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlaopt.training.demonstrations import STEADY, Sample, Shaking, record_episode


class Line:
    """A robot on a line that is done near 1; the expert always pushes forward."""

    def __init__(self, stride: float = 0.1) -> None:
        self.stride = stride
        self.position = 0.0
        self.executed: list[np.ndarray] = []

    def reset(self, seed: int) -> None:
        self.position = 0.0

    def step(self, action: np.ndarray) -> bool:
        self.executed.append(np.asarray(action))
        self.position += self.stride * float(np.clip(action[0], -1, 1))
        return self.position >= 0.95

    def observe(self, instruction: str) -> dict[str, Any]:
        return {"task": instruction, "position": self.position}

    def expert_action(self) -> np.ndarray:
        return np.array([1, 0, 0, 0], np.float32)

    def expert_chunk(self, size: int) -> np.ndarray:
        return np.tile(self.expert_action(), (size, 1))


class Backwards:
    """A policy that goes the wrong way and looks at every other step."""

    def __init__(self) -> None:
        self.calls = 0
        self.resets = 0

    @property
    def needs_observation(self) -> bool:
        return self.calls % 2 == 0

    def predict(self, observation: dict[str, Any]) -> np.ndarray:
        assert self.calls % 2 == 1 or observation
        self.calls += 1
        return np.array([-1, 0, 0, 0], np.float32)

    def reset(self) -> None:
        self.resets += 1


def record(scene: Line, shaking: Shaking = STEADY, driver: Backwards | None = None) -> list[Sample] | None:
    return record_episode(
        scene,
        seed=3,
        episode=5,
        instructions=["go", "move"],
        chunk_size=4,
        max_steps=40,
        every=2,
        shaking=shaking,
        driver=driver,
    )


def test_a_steady_expert_is_recorded_every_other_step() -> None:
    scene = Line()
    samples = record(scene)
    assert samples is not None and len(samples) == 5
    assert np.diff([sample.step for sample in samples]).tolist() == [2, 2, 2, 2]
    assert {sample.episode for sample in samples} == {5}
    assert len({sample.observation["task"] for sample in samples}) == 1


def test_labels_stay_clean_however_the_hand_shakes() -> None:
    scene = Line()
    samples = record(scene, Shaking(sigma_max=1.0, push_probability=0.05, wander_probability=0.0))
    assert samples is not None
    assert any(abs(float(action[1])) > 0.01 for action in scene.executed)
    for sample in samples:
        np.testing.assert_array_equal(sample.action, scene.expert_chunk(4))


def test_an_episode_that_is_not_done_in_time_is_dropped() -> None:
    assert record(Line(stride=0.001)) is None


def test_a_driving_policys_failures_are_kept_with_the_experts_labels() -> None:
    scene, driver = Line(), Backwards()
    samples = record(scene, driver=driver)
    assert samples is not None and len(samples) == 20
    assert driver.resets == 1 and driver.calls == 40
    assert scene.position < 0
    np.testing.assert_array_equal(samples[-1].action, scene.expert_chunk(4))


def test_the_same_seed_records_the_same_episode() -> None:
    shaking = Shaking()
    first, second = Line(), Line()
    record(first, shaking)
    record(second, shaking)
    np.testing.assert_array_equal(first.executed, second.executed)
