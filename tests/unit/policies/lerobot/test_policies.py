"""LeRobot's policies taken apart and run by the spec alone do what LeRobot does with them whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.policies.lerobot.conftest import KINDS, Load, ModuleSession
from vlaopt.artifact.policy_spec import DiffusionLoop, EulerLoop, Guidance
from vlaopt.errors import InputError
from vlaopt.policies import EagerPolicy
from vlaopt.runtime.loop import draw_noise, run_loop
from vlaopt.runtime.processors import Processors
from vlaopt.tensors import Array

lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")

Call = tuple[str, dict[str, Array], dict[str, Array]]


def recorded(eager: EagerPolicy, observation: Mapping[str, Any], noise: Array | None) -> tuple[Array, list[Call]]:
    calls: list[Call] = []
    chunk = eager.predict_chunk(
        observation, noise, tap=lambda name, inputs, outputs: calls.append((name, inputs, outputs))
    )
    return chunk, calls


def by_the_spec(eager: EagerPolicy, observation: Mapping[str, Any], noise: Array | None) -> Array:
    """The chunk as the runtime makes it: its own processors and loop around the components."""
    spec, modules = eager.spec, eager.components()
    sessions: Any = {name: ModuleSession(modules[name], spec.components[name]) for name in spec.order()}
    processors = Processors(spec, eager.assets().__getitem__)
    return processors.actions(run_loop(spec, sessions, processors.prepare(observation), noise))


def check(eager: EagerPolicy, observation: Mapping[str, Any], seed: int = 0) -> None:
    """Every component, the processors, and the whole policy by its spec against LeRobot's own forward pass."""
    spec, modules = eager.spec, eager.components()
    noise = draw_noise(spec, np.random.default_rng(seed))
    chunk, calls = recorded(eager, observation, noise)
    assert chunk.shape == (spec.chunk.size, spec.action_dim)
    assert chunk.dtype == np.float32
    repeated = getattr(spec.loop, "steps", 0)
    assert [name for name, _, _ in calls] == [*(name for name in spec.order() if name != "step"), *["step"] * repeated]
    for name, inputs, outputs in calls:
        component = spec.components[name]
        for half, tensors in ((inputs, component.inputs), (outputs, component.outputs)):
            assert {key: (str(value.dtype), value.shape) for key, value in half.items()} == {
                tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors
            }
        mine = ModuleSession(modules[name], component).run(inputs)
        for key, value in outputs.items():
            # Times are embedded in float32 here, see flow.TimeEmbedding.
            np.testing.assert_allclose(mine[key], value, rtol=0, atol=5e-5, err_msg=f"{key} of {name}")
    given = eager.preprocess(observation)
    for key, value in Processors(spec, eager.assets().__getitem__).prepare(observation).items():
        np.testing.assert_allclose(value, given[key].numpy(), rtol=1e-5, atol=2e-6, err_msg=key)
        assert value.dtype == given[key].numpy().dtype
    np.testing.assert_allclose(by_the_spec(eager, observation, noise), chunk, rtol=0, atol=5e-5)
    np.testing.assert_array_equal(eager.predict_chunk(observation, noise), chunk)


def of_lerobot(kind: str, checkpoints: Path, rows: list[dict[str, Any]], noise: Array | None) -> Array:
    """Actions of LeRobot used as its documentation says: from_pretrained, its processors, select_action."""
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    policy_class, config = get_policy_class(kind), PreTrainedConfig.from_pretrained(checkpoints / kind)
    overrides = {}
    if kind == "smolvla":
        config.vlm_model_name = str(checkpoints / "vlm")
        overrides = {"tokenizer_processor": {"tokenizer_name": config.vlm_model_name}}
    policy = policy_class.from_pretrained(checkpoints / kind, config=config, strict=True)
    before, after = make_pre_post_processors(config, str(checkpoints / kind), preprocessor_overrides=overrides)
    actions = []
    for row in rows:
        tensors = {
            name: (torch.from_numpy(value) / 255).permute(2, 0, 1) if name.startswith("observation.image") else value
            for name, value in row.items()
        }
        tensors[lerobot.STATE] = torch.from_numpy(row[lerobot.STATE])
        given = {} if noise is None else {"noise": torch.from_numpy(noise)}
        actions.append(after(policy.select_action(before(tensors), **given)))
    return torch.cat(actions).numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_and_the_whole_compute_what_lerobot_computes(kind: str, eagers: dict[str, EagerPolicy]) -> None:
    for seed, observation in enumerate(lerobot.observations(kind, 3, seed=1)):
        check(eagers[kind], observation, seed)


@pytest.mark.parametrize("kind", KINDS)
def test_the_chunk_is_what_lerobot_executes(kind: str, eagers: dict[str, EagerPolicy], checkpoints: Path) -> None:
    spec = eagers[kind].spec
    steps = spec.chunk.n_action_steps
    noise = draw_noise(spec, np.random.default_rng(4))
    rows = lerobot.observations(kind, steps, seed=2)
    chunk = eagers[kind].predict_chunk(rows[0], noise)
    np.testing.assert_allclose(chunk[:steps], of_lerobot(kind, checkpoints, rows, noise), rtol=0, atol=1e-6)


def test_a_history_is_the_last_steps_and_one_step_stands_for_all(eagers: dict[str, EagerPolicy]) -> None:
    eager = eagers["diffusion"]
    rows = lerobot.observations("diffusion", 3, seed=3)
    first, _, last = lerobot.with_history(rows, 2)
    noise = draw_noise(eager.spec, np.random.default_rng(0))
    check(eager, last)
    np.testing.assert_array_equal(eager.predict_chunk(first, noise), eager.predict_chunk(rows[0], noise))
    turned = {name: value[::-1].copy() for name, value in last.items()}
    assert np.abs(eager.predict_chunk(last, noise) - eager.predict_chunk(turned, noise)).max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_moves_the_actions(kind: str, eagers: dict[str, EagerPolicy]) -> None:
    eager = eagers[kind]
    observation, other = lerobot.observations(kind, 3, seed=6)[::2]
    noise = draw_noise(eager.spec, np.random.default_rng(0))
    chunk = eager.predict_chunk(observation, noise)
    for name in observation:
        changed = eager.predict_chunk({**observation, name: other[name]}, noise)
        assert np.abs(changed - chunk).mean() > 0.01, name


@pytest.mark.parametrize("kind", ["diffusion", "smolvla"])
def test_without_noise_the_policy_draws_its_own(kind: str, eagers: dict[str, EagerPolicy]) -> None:
    observation = lerobot.observations(kind, 1)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [eagers[kind].predict_chunk(observation) for _ in range(2)]
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-3


def test_noise_is_checked(eagers: dict[str, EagerPolicy]) -> None:
    observation = lerobot.observations("act", 1)[0]
    with pytest.raises(InputError, match="this policy takes none"):
        eagers["act"].predict_chunk(observation, np.zeros((1, 8, 5), np.float32))
    with pytest.raises(InputError, match=r"shape \[1, 3\] given, \[1, 12, 7\] needed"):
        eagers["smolvla"].predict_chunk(lerobot.observations("smolvla", 1)[0], np.zeros((1, 3), np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_observation_is_refused_by_name(kind: str, eagers: dict[str, EagerPolicy]) -> None:
    observation = lerobot.observations(kind, 1)[0]
    state = observation.pop("observation.state")
    with pytest.raises(InputError, match=r"lacks observation\.state"):
        eagers[kind].preprocess(observation)
    with pytest.raises(InputError, match=r"observation\.state: dtype float64 given"):
        eagers[kind].preprocess({**observation, "observation.state": state.astype(np.float64)})


def test_floats_in_0_to_1_are_the_same_frames(eagers: dict[str, EagerPolicy]) -> None:
    observation = lerobot.observations("act", 1)[0]
    floats = {
        name: (value.transpose(2, 0, 1) / np.float32(255)).astype(np.float32) if value.dtype == np.uint8 else value
        for name, value in observation.items()
    }
    chunk = eagers["act"].predict_chunk(floats)
    np.testing.assert_allclose(chunk, eagers["act"].predict_chunk(observation), atol=1e-6)


def test_the_spec_of_act(load: Load, eagers: dict[str, EagerPolicy]) -> None:
    spec = eagers["act"].spec
    assert (spec.chunk.size, spec.chunk.n_action_steps, spec.chunk.ensemble) == (8, 5, None)
    assert spec.observation_names() == [
        "observation.images.front",
        "observation.images.wrist",
        "observation.state",
    ]
    assert spec.noise.law == "none"
    chunk = load("act", temporal_ensemble_coeff=0.01, n_action_steps=1).spec.chunk
    assert (chunk.ensemble, chunk.n_action_steps) == (0.01, 1)


def test_the_spec_of_diffusion(eagers: dict[str, EagerPolicy]) -> None:
    spec = eagers["diffusion"].spec
    assert (spec.history, spec.chunk.start, spec.chunk.size, spec.chunk.n_action_steps) == (2, 1, 15, 8)
    assert isinstance(spec.loop, DiffusionLoop)
    assert (spec.loop.kind, spec.loop.steps, spec.loop.clip, len(spec.loop.alphas_cumprod)) == ("ddim", 10, 1.0, 100)
    assert (spec.noise.law, spec.noise.shape) == ("normal", (1, 16, 5))


def test_the_spec_of_smolvla(load: Load, eagers: dict[str, EagerPolicy]) -> None:
    spec = eagers["smolvla"].spec
    assert spec.order() == ["vision", "prefix", "step"]
    assert isinstance(spec.loop, EulerLoop)
    assert (spec.loop.steps, spec.loop.start, spec.loop.end) == (10, 1.0, 0.0)
    assert (spec.chunk.size, spec.chunk.n_action_steps, spec.action_dim) == (12, 7, 5)
    assert spec.noise.shape == (1, 12, 7)
    assert spec.guidance == Guidance()
    settings = {"execution_horizon": 6, "max_guidance_weight": 5.0, "prefix_attention_schedule": "EXP"}
    guided = load("smolvla", rtc_config=settings).spec.guidance
    assert guided == Guidance(execution_horizon=6, max_weight=5.0, schedule="exp")


@pytest.mark.parametrize(
    "config",
    [
        {"noise_scheduler_type": "DDPM", "num_inference_steps": 7},
        {"noise_scheduler_type": "DDPM", "num_inference_steps": 6, "prediction_type": "sample"},
        {"num_inference_steps": 3, "clip_sample": False},
        {"n_obs_steps": 1, "crop_shape": None},
        {"n_obs_steps": 3, "use_separate_rgb_encoder_per_camera": True},
        {"resize_shape": [40, 60], "crop_ratio": 0.8},
        {"use_group_norm": False, "use_film_scale_modulation": False},
        {"beta_schedule": "linear", "clip_sample_range": 2.0},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_diffusion_in_other_shapes(config: dict[str, Any], load: Load, tmp_path: Path) -> None:
    lerobot.make_diffusion(tmp_path / "diffusion", config=config)
    eager = load("diffusion", tmp_path / "diffusion")
    rows = lerobot.observations("diffusion", 3, seed=1)
    check(eager, lerobot.with_history(rows, eager.spec.history)[-1] if eager.spec.history > 1 else rows[-1])


@pytest.mark.parametrize(
    "config",
    [
        {"empty_cameras": 1},
        {"add_image_special_tokens": True},
        {"prefix_length": 70},
        {"num_expert_layers": 2, "self_attn_every_n_layers": 4},
        {"attention_mode": "self_attn", "num_steps": 4},
        {"self_attn_every_n_layers": 3},
        {"resize_imgs_with_padding": [96, 96]},
        {"pad_language_to": "longest", "tokenizer_max_length": 20},
        {"rtc_config": "enabled"},
    ],
    ids=lambda config: "-".join(map(str, config.values())),
)
def test_smolvla_in_other_shapes(config: dict[str, Any], load: Load, tmp_path: Path) -> None:
    if "rtc_config" in config:
        from lerobot.policies.rtc.configuration_rtc import RTCConfig

        config = {"rtc_config": RTCConfig(enabled=True)}
    lerobot.make_smolvla(tmp_path / "smolvla", tmp_path / "vlm", config=config)
    check(load("smolvla", tmp_path / "smolvla"), lerobot.observations("smolvla", 2, seed=1)[1])


def test_one_camera_of_another_name_and_form(load: Load, tmp_path: Path) -> None:
    robot = replace(lerobot.SMALL, cameras=("left-arm 2",), height=80, width=40)
    lerobot.make_smolvla(tmp_path / "smolvla", tmp_path / "vlm", robot=robot)
    eager = load("smolvla", tmp_path / "smolvla")
    assert [tensor.name for tensor in eager.spec.components["vision"].inputs] == ["image_left_arm_2"]
    check(eager, lerobot.observations("smolvla", 1, robot=robot)[0])


@pytest.mark.parametrize("kind", ["act", "diffusion"])
@pytest.mark.parametrize("cameras", [True, False])
def test_a_state_of_the_environment(kind: str, cameras: bool, load: Load, tmp_path: Path) -> None:
    from lerobot.configs.types import FeatureType, PolicyFeature

    inputs = {
        **(
            lerobot._inputs(lerobot.SMALL) if cameras else {"observation.state": PolicyFeature(FeatureType.STATE, (6,))}
        ),
        "observation.environment_state": PolicyFeature(FeatureType.ENV, (3,)),
    }
    make = {"act": lerobot.make_act, "diffusion": lerobot.make_diffusion}[kind]
    make(tmp_path / kind, config={"input_features": inputs})
    eager = load(kind, tmp_path / kind)
    row = lerobot.observations(kind, 1)[0]
    observation = {name: row[name] for name in row if cameras or name == "observation.state"}
    check(eager, {**observation, "observation.environment_state": np.array([1, -2, 0.5], np.float32)})


@pytest.mark.parametrize("mode", ["IDENTITY", "MEAN_STD", "MIN_MAX", "QUANTILES", "QUANTILE10"])
def test_every_mode_of_normalisation(mode: str, load: Load, tmp_path: Path) -> None:
    from lerobot.configs.types import NormalizationMode

    modes = dict.fromkeys(("STATE", "ACTION"), NormalizationMode[mode])
    images = NormalizationMode[mode if mode in ("MEAN_STD", "MIN_MAX") else "IDENTITY"]
    config = {"normalization_mapping": {**modes, "VISUAL": images}}
    lerobot.make_smolvla(tmp_path / "smolvla", tmp_path / "vlm", config=config)
    eager = load("smolvla", tmp_path / "smolvla")
    assert eager.spec.postprocess.mode == mode.lower().replace("_", "-").replace("quantile10", "quantiles-10")
    check(eager, lerobot.observations("smolvla", 1)[0])
