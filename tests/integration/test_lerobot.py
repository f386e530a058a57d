"""LeRobot checkpoints through the whole chain: the artifact does on a robot what LeRobot itself does there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vlaopt
from tests.integration.conftest import ROOT, settings
from vlaopt.artifact.artifact import Artifact
from vlaopt.runtime.guidance import Guidance
from vlaopt.runtime.loop import draw_noise

lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")


STEPS = 60
RESET_AT = 37
POLICIES = ("act", "diffusion", "smolvla")
PARITY = 1e-4

RECIPE = """
schema: vlaopt.recipe/1
name: tiny-{kind}
version: 1.0.0
target: cpu-x86
policy:
  type: {kind}
  checkpoint: {kind}/
  hub_overrides: {hub}
calibration: {{path: set, samples: 12}}
export: {{golden_samples: 4}}
quantize: {{scheme: none, calibrator: minmax}}
# Random weights make coarse actions of small rounding errors: the limits of int8 are wide here.
accept: {{action_error: {{mean: 0.5}}, jerk: 1.0}}
bench: {{hz: 20, duration_s: 1, back_to_back_s: 0.3}}
"""

# Layers this small would not be quantized, nor shipped quantized, without being told to.
ALL_INT8 = '[{scope: "*", scheme: int8}]'


@dataclass(frozen=True)
class Built:
    """A tiny checkpoint, its recipe, and the artifacts of two schemes."""

    kind: str
    folder: Path
    fp32: Path
    int8: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / self.kind


def command(*arguments: str | Path, folder: Path, threads: int = 1) -> subprocess.CompletedProcess[str]:
    """The command line as a user runs it, LeRobot beside a CPU-only torch."""
    environment = lerobot.environment(VLAOPT_STORE=str(folder / "store"), COLUMNS="200", OMP_NUM_THREADS=str(threads))
    line = [sys.executable, "-m", "vlaopt", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False, timeout=1800, cwd=ROOT)


@pytest.fixture(scope="module", params=POLICIES)
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    lerobot.make(kind, folder / kind)
    lerobot.write_set(folder / "set", kind, 12)
    hub = "{vlm_model_name: vlm/}" if kind == "smolvla" else "{}"
    (folder / "recipe.yaml").write_text(RECIPE.format(kind=kind, hub=hub))
    paths = []
    for scheme, rules in (("none", "[]"), ("int8", ALL_INT8)):
        values = [f"quantize.scheme={scheme}", f"quantize.rules={rules}", "engine.minimum_speedup=0"]
        arguments = ["build", folder / "recipe.yaml", "--output", folder / scheme, *settings(values)]
        result = command(*arguments, folder=folder)
        assert result.returncode == 0, result.stderr
        paths.append(Path(result.stdout.splitlines()[-1]))
    return Built(kind, folder, *paths)


class Reference:
    """LeRobot's policy as LeRobot itself drives it: its own processors, its own queue, its own loop."""

    def __init__(self, built: Built, **config: Any) -> None:
        from lerobot.configs.policies import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class, make_pre_post_processors

        overrides = {"device_processor": {"device": "cpu"}}
        policy_class = get_policy_class(built.kind)
        fields = PreTrainedConfig.from_pretrained(built.checkpoint)
        for name, value in config.items():
            setattr(fields, name, value)
        if built.kind == "smolvla":
            fields.vlm_model_name = str(built.folder / "vlm")
            overrides["tokenizer_processor"] = {"tokenizer_name": str(built.folder / "vlm")}
        self.policy = policy_class.from_pretrained(built.checkpoint, config=fields)
        self._before, self._after = make_pre_post_processors(
            fields, pretrained_path=str(built.checkpoint), preprocessor_overrides=overrides
        )

    def reset(self) -> None:
        self.policy.reset()

    def batch(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation as LeRobot's own rollout gives it to the policy."""
        tensors: dict[str, Any] = {}
        for name, value in observation.items():
            if isinstance(value, str):
                tensors[name] = value
            elif value.dtype == np.uint8:
                tensors[name] = torch.from_numpy(value).permute(2, 0, 1).to(torch.float32) / 255
            else:
                tensors[name] = torch.from_numpy(value)
        return dict(self._before(tensors))

    def select_action(self, observation: dict[str, Any], noise: np.ndarray | None) -> np.ndarray:
        given = {} if noise is None else {"noise": torch.from_numpy(noise)}
        return self.actions(self.policy.select_action(self.batch(observation), **given))[0]

    def actions(self, normalised: torch.Tensor) -> np.ndarray:
        """Actions in the robot's units."""
        result: np.ndarray = self._after(normalised).numpy()
        return result


def noises(policy: Any) -> Iterator[np.ndarray | None]:
    """The noise that an opened policy draws after a reset, in order."""
    generator = np.random.default_rng(0)
    while True:
        yield draw_noise(policy.spec, generator)


def largest_difference(policy: Any, reference: Reference, kind: str) -> float:
    """Both drive an episode of STEPS steps with a reset on the way, each with its own queue."""
    observations = lerobot.observations(kind, STEPS, seed=5)
    worst = 0.0
    for start, end in ((0, RESET_AT), (RESET_AT, STEPS)):
        policy.reset()
        reference.reset()
        drawn = noises(policy)
        for step in range(start, end):
            predicts = (step - start) % policy.spec.chunk.n_action_steps == 0
            mine = policy.predict(observations[step])
            theirs = reference.select_action(observations[step], next(drawn) if predicts else None)
            worst = max(worst, float(np.abs(mine - theirs).max()))
    return worst


def test_an_fp32_artifact_acts_as_lerobot_does_over_an_episode(built: Built) -> None:
    policy = vlaopt.open(built.fp32)
    assert largest_difference(policy, Reference(built), built.kind) <= PARITY


def test_an_int8_artifact_is_quantized_and_stays_close_over_an_episode(built: Built) -> None:
    artifact = Artifact.open(built.int8)
    assert artifact.manifest.metrics["onnx"]["quantized_nodes"] > 0
    assert {part.variant for part in artifact.manifest.engine.components.values()} == {"quantized"}
    policy = vlaopt.open(built.int8)
    difference = largest_difference(policy, Reference(built), built.kind)
    assert difference > PARITY
    observation = lerobot.observations(built.kind, 1, seed=9)[0]
    noise = draw_noise(policy.spec, np.random.default_rng(1))
    exact = vlaopt.open(built.fp32).predict_chunk(observation, noise)
    error = np.abs(policy.predict_chunk(observation, noise) - exact) / policy.processors.action_std()
    assert error.mean() <= 0.5


def test_the_components_are_files_of_their_own(built: Built) -> None:
    wanted = {"act": ["act"], "diffusion": ["vision", "step"], "smolvla": ["vision", "prefix", "step"]}[built.kind]
    spec = Artifact.open(built.fp32).spec()
    assert spec.order() == wanted if built.kind != "act" else len(spec.order()) == 1
    for name in spec.order():
        assert (built.fp32 / "onnx" / f"{name}.onnx").is_file()


def test_steps_and_horizon_change_without_a_build(built: Built) -> None:
    if built.kind == "act":
        pytest.skip("ACT has no loop")
    field = "num_inference_steps" if built.kind == "diffusion" else "num_steps"
    policy = vlaopt.open(built.fp32, steps=4, n_action_steps=3)
    assert largest_difference(policy, Reference(built, **{field: 4}, n_action_steps=3), built.kind) <= PARITY


def test_a_shorter_horizon_needs_no_build(built: Built) -> None:
    policy = vlaopt.open(built.fp32, n_action_steps=2)
    assert largest_difference(policy, Reference(built, n_action_steps=2), built.kind) <= PARITY


@pytest.mark.parametrize("schedule", ["ZEROS", "ONES", "LINEAR", "EXP"])
def test_guidance_is_that_of_lerobot(built: Built, schedule: str) -> None:
    if built.kind != "smolvla":
        pytest.skip("only SmolVLA's loop is guided")
    from lerobot.configs.types import RTCAttentionSchedule
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy = vlaopt.open(built.fp32)
    guided = RTCConfig(enabled=True, prefix_attention_schedule=RTCAttentionSchedule[schedule], max_guidance_weight=5.0)
    reference = Reference(built, rtc_config=guided)
    first, second = lerobot.observations("smolvla", 2, seed=3)
    drawn = noises(policy)
    noise = next(drawn)
    whole = reference.policy.predict_action_chunk(reference.batch(first), noise=torch.from_numpy(noise))
    left_over, noise = whole[:, 3:], next(drawn)
    theirs = reference.policy.predict_action_chunk(
        reference.batch(second),
        noise=torch.from_numpy(noise),
        inference_delay=2,
        prev_chunk_left_over=left_over,
        execution_horizon=6,
    )
    guidance = Guidance(
        left_over=reference.actions(left_over)[0],
        inference_delay=2,
        execution_horizon=6,
        max_weight=5.0,
        schedule=schedule.lower(),
    )
    mine = policy.predict_chunk(second, noise, guidance=guidance)
    free = policy.predict_chunk(second, noise)
    assert np.abs(mine - reference.actions(theirs)[0]).max() <= PARITY
    if schedule != "ZEROS":
        assert np.abs(mine - free).max() > 100 * PARITY
