"""Meta-World as a policy meets it: one camera, proprioception, an instruction. Also the expert that knows more.

Images are the same in training, calibration and evaluation: this is the only place that renders.
"""

from __future__ import annotations

import hashlib
import os
import sys
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vlaopt.errors import EnvironmentProblem
from vlaopt.optional import require
from vlaopt.sim.tasks import Task

Observation = dict[str, Any]
Split = Literal["evaluation", "demonstration", "calibration", "held-out"]

IMAGE_SIZE = 96
STATE_SIZE = 4
ACTION_SIZE = 4
CONTROL_HZ = 80.0
"""Steps per simulated second: frame skip 5 at MuJoCo's 2.5 ms, as all Meta-World environments have it."""
CAMERA = {"lookat": (0.0, 0.72, 0.12), "azimuth": 200.0, "elevation": -45.0, "distance": 1.05}
"""A fixed free camera opposite the robot, where the arm hides little of what it works on. Metres and degrees."""

_SPLITS: tuple[Split, ...] = ("evaluation", "demonstration", "calibration", "held-out")


def episode_seed(split: Split, seed: int, task: str, episode: int) -> int:
    """The environment seed of one episode: fixed by its arguments, and never shared between two splits.

    28 bits of SHA-256 over the arguments, times four, plus the split's number.
    """
    digest = hashlib.sha256(f"{split}/{seed}/{task}/{episode}".encode()).digest()
    return (int.from_bytes(digest[:4], "big") >> 4) * len(_SPLITS) + _SPLITS.index(split)


class Scene:
    """One Meta-World task, its camera and its scripted expert.

    The policy's side is `observe` (image, proprioception, instruction); goals and object positions are seen by
    `expert_action` and `expert_chunk` only. Raises EnvironmentProblem when Meta-World is not installed.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self._mujoco = _load_mujoco()
        environments = require("metaworld.env_dict", "sim").ALL_V3_ENVIRONMENTS
        experts = require("metaworld.policies", "sim").ENV_POLICY_MAP
        self._env: Any = environments[task.environment]()
        self._env.seeded_rand_vec = True
        self._env._freeze_rand_vec = False
        self._env._partially_observable = False
        self._env._set_task_called = True
        self._expert: Any = experts[task.environment]()
        self._renderer: Any = None
        self._privileged: NDArray[np.float64] = np.zeros(0)

    def reset(self, seed: int) -> None:
        """Start the episode of this seed."""
        self._env.seed(seed)
        self._privileged, _ = self._env.reset()

    def step(self, action: NDArray[np.floating[Any]]) -> bool:
        """Execute one action, shape [4], clipped to [-1, 1]; True when the task is done."""
        clipped = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        self._privileged, _, _, _, info = self._env.step(clipped)
        return bool(info["success"])

    def observe(self, instruction: str) -> Observation:
        """What a policy may know: uint8 [96, 96, 3] image, float32 [4] hand position (m) and gripper opening, text."""
        return {"observation.images.front": self._render(), "observation.state": self.state(), "task": instruction}

    def state(self) -> NDArray[np.float32]:
        """Hand x, y, z in metres and the gripper's opening in 0..1, float32 [4]."""
        return self._privileged[:STATE_SIZE].astype(np.float32)

    def expert_action(self) -> NDArray[np.float32]:
        """The scripted expert's action here, float32 [4] in [-1, 1]."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # it says that its commands get clipped, which we do
            action = self._expert.get_action(self._privileged)
        clipped: NDArray[np.float32] = np.clip(action, -1.0, 1.0).astype(np.float32)
        return clipped

    def expert_chunk(self, size: int) -> NDArray[np.float32]:
        """What the expert would do from here if left alone for `size` steps, float32 [size, 4]. The scene stays put."""
        saved = self._save()
        actions = np.zeros((size, ACTION_SIZE), dtype=np.float32)
        for index in range(size):
            actions[index] = self.expert_action()
            if index + 1 < size:
                self.step(actions[index])
        self._restore(saved)
        return actions

    def close(self) -> None:
        """Free the renderer and the environment."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None
        self._env.close()

    def __enter__(self) -> Scene:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _render(self) -> NDArray[np.uint8]:
        if self._renderer is None:
            self._renderer = self._open_renderer()
        self._renderer.update_scene(self._env.data, camera=self._camera, scene_option=self._options)
        image: NDArray[np.uint8] = self._renderer.render().copy()
        return image

    def _open_renderer(self) -> Any:
        mujoco = self._mujoco
        self._env.model.vis.quality.offsamples = 0
        try:
            renderer = mujoco.Renderer(self._env.model, IMAGE_SIZE, IMAGE_SIZE)
        except (ImportError, RuntimeError, mujoco.FatalError) as error:
            raise _cannot_render(error) from error
        flags = mujoco.mjtRndFlag
        for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX):
            renderer.scene.flags[flag] = 0
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FREE
        self._camera.lookat[:] = CAMERA["lookat"]
        for name in ("azimuth", "elevation", "distance"):
            setattr(self._camera, name, CAMERA[name])
        self._options = mujoco.MjvOption()
        self._options.sitegroup[:] = 0  # sites mark goals with coloured balls, which no robot sees
        return renderer

    def _save(self) -> tuple[NDArray[np.float64], int, NDArray[np.float64], Any, NDArray[np.float64]]:
        env, kind = self._env, self._mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.zeros(self._mujoco.mj_stateSize(env.model, kind))
        self._mujoco.mj_getState(env.model, env.data, state, kind)
        return state, env.curr_path_length, env._prev_obs, env._last_stable_obs, self._privileged

    def _restore(self, saved: tuple[NDArray[np.float64], int, NDArray[np.float64], Any, NDArray[np.float64]]) -> None:
        env, kind = self._env, self._mujoco.mjtState.mjSTATE_INTEGRATION
        state, env.curr_path_length, env._prev_obs, env._last_stable_obs, self._privileged = saved
        self._mujoco.mj_setState(env.model, env.data, state, kind)
        self._mujoco.mj_forward(env.model, env.data)
        self._mujoco.mj_setState(env.model, env.data, state, kind)  # forward warms the solver up; undo that


def _load_mujoco() -> Any:
    if sys.platform == "linux" and not os.environ.get("MUJOCO_GL") and not os.environ.get("DISPLAY"):
        if "mujoco" in sys.modules:  # it reads the variable once, as it is imported; rendering would now abort
            raise _cannot_render(RuntimeError("it was imported before MUJOCO_GL was set"))
        os.environ["MUJOCO_GL"] = "egl"
    try:
        return require("mujoco", "sim")
    except AttributeError as error:  # how PyOpenGL says that libEGL is not there
        raise _cannot_render(error) from error


def _cannot_render(error: Exception) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"MuJoCo cannot render off screen: {error}",
        where=f"MUJOCO_GL={os.environ.get('MUJOCO_GL', '')}",
        hint="set MUJOCO_GL=egl (needs libegl1) or MUJOCO_GL=osmesa (needs libosmesa6) before Python starts",
    )
