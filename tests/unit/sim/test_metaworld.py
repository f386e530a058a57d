"""A scene shows a policy only what a robot would see, and asking the expert leaves no trace."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import pytest

from vlaopt.errors import EnvironmentProblem
from vlaopt.sim import Scene, metaworld, tasks_named

# Not importorskip: importing it here would be before MUJOCO_GL is set.
pytestmark = pytest.mark.skipif(find_spec("metaworld") is None, reason="needs vlaopt[sim]")


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with Scene(tasks_named(["drawer-open"])[0]) as opened:
        yield opened


def test_an_observation_is_an_image_proprioception_and_words(scene: Scene) -> None:
    scene.reset(1)
    observation = scene.observe("open the drawer")
    assert set(observation) == {"observation.images.front", "observation.state", "task"}
    image, state = observation["observation.images.front"], observation["observation.state"]
    assert image.dtype == np.uint8 and image.shape == (96, 96, 3) and image.std() > 10
    assert state.dtype == np.float32 and state.shape == (4,)


def test_the_state_says_nothing_of_where_the_drawer_is(scene: Scene) -> None:
    states, images = [], []
    for seed in (1, 2):
        scene.reset(seed)
        states.append(scene.state())
        images.append(scene.observe("open the drawer")["observation.images.front"])
    np.testing.assert_allclose(states[0], states[1], atol=1e-6)
    assert (images[0] != images[1]).any()


def test_the_same_seed_is_the_same_episode_whatever_came_before(scene: Scene) -> None:
    ends = []
    for disturbance in (0, 15):
        scene.reset(99)
        for _ in range(disturbance):
            scene.step(np.ones(4, np.float32))
        scene.reset(7)
        for _ in range(20):
            scene.step(scene.expert_action())
        ends.append(scene.observe("x")["observation.images.front"])
    np.testing.assert_array_equal(ends[0], ends[1])


def test_asking_for_the_experts_chunk_changes_nothing(scene: Scene) -> None:
    ends = []
    for asks in (False, True):
        scene.reset(7)
        for _ in range(30):
            if asks:
                scene.expert_chunk(10)
            scene.step(scene.expert_action())
        ends.append(scene.state())
    np.testing.assert_array_equal(ends[0], ends[1])


def test_the_experts_chunk_is_what_it_then_does(scene: Scene) -> None:
    scene.reset(7)
    chunk = scene.expert_chunk(5)
    for action in chunk:
        np.testing.assert_array_equal(action, scene.expert_action())
        scene.step(action)


def test_the_expert_opens_the_drawer(scene: Scene) -> None:
    scene.reset(3)
    assert any(scene.step(scene.expert_action()) for _ in range(150))


def test_actions_beyond_the_range_are_clipped(scene: Scene) -> None:
    ends = []
    for scale in (1.0, 50.0):
        scene.reset(5)
        for _ in range(5):
            scene.step(np.full(4, scale, np.float32))
        ends.append(scene.state())
    np.testing.assert_array_equal(ends[0], ends[1])


def test_says_so_when_it_is_too_late_to_choose_how_to_render(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setitem(sys.modules, "mujoco", pytest)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)
    with pytest.raises(EnvironmentProblem, match="imported before MUJOCO_GL was set"):
        metaworld._load_mujoco()
