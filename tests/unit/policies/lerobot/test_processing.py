"""A checkpoint's processors: only steps that are known run, and the spec's mean what LeRobot's do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.unit.policies.lerobot.conftest import Load
from vlaopt.errors import InputError
from vlaopt.policies import EagerPolicy
from vlaopt.runtime.processors import Processors
from vlaopt.tensors import unpack

lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")

BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
NORMALISER = "policy_preprocessor_step_5_normalizer_processor.safetensors"
UNNORMALISER = "policy_postprocessor_step_0_unnormalizer_processor.safetensors"


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the SmolVLA, to be changed."""
    return Path(shutil.copytree(checkpoints / "smolvla", tmp_path / "smolvla"))


def edit(path: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (
            BEFORE,
            lambda v: v["steps"].insert(0, {"class": "os.path.join"}),
            "step of class 'os.path.join', which could run",
        ),
        (BEFORE, lambda v: v["steps"][0].update({"class": "a.B"}), "step of class 'a.B', which could run any code"),
        (BEFORE, lambda v: v["steps"].insert(0, {}), "step of class None"),
        (
            BEFORE,
            lambda v: v["steps"].append(step("image_crop_resize_processor")),
            "'image_crop_resize_processor' is not",
        ),
        (
            AFTER,
            lambda v: v["steps"].append(step("rename_observations_processor")),
            "'rename_observations_processor' is",
        ),
        (BEFORE, lambda v: v["steps"].append(v["steps"][0]), "are not in the order"),
        (BEFORE, lambda v: v["steps"].reverse(), "are not in the order"),
        (BEFORE, lambda v: v["steps"].pop(3), "has no step 'tokenizer_processor'"),
        (
            BEFORE,
            lambda v: v["steps"][4]["config"].update(float_dtype="float16"),
            "float_dtype is 'float16', needed is",
        ),
        (BEFORE, lambda v: v["steps"][3]["config"].update(truncation=False), "truncation is False, needed is True"),
        (BEFORE, lambda v: v["steps"][3]["config"].update(task_key="goal"), "task_key is 'goal', needed is 'task'"),
        (
            BEFORE,
            lambda v: v["steps"][3]["config"].update(colour="red"),
            "LeRobot cannot make the processors: .*colour",
        ),
        (BEFORE, lambda v: v["steps"][5].update(state_file="../x.safetensors"), "state file '../x.safetensors' is not"),
        (BEFORE, lambda v: v["steps"][5].update(state_file="x.safetensors"), r"x\.safetensors: no such file"),
        (BEFORE, lambda v: v["steps"][5].update(config=[]), "the config of step 'normalizer_processor' is no mapping"),
        (BEFORE, lambda v: v.pop("steps"), "it has no list of steps"),
    ],
)
def test_steps_that_are_not_carried(
    file: str, change: Callable[[Any], object], message: str, folder: Path, load: Load
) -> None:
    edit(folder / file, change)
    with pytest.raises(InputError, match=message):
        load("smolvla", folder)


def test_language_before_a_policy_without_it(checkpoints: Path, tmp_path: Path, load: Load) -> None:
    act = Path(shutil.copytree(checkpoints / "act", tmp_path / "act"))
    edit(act / BEFORE, lambda value: value["steps"].insert(2, step("tokenizer_processor", tokenizer_name="x")))
    with pytest.raises(InputError, match="step 'tokenizer_processor' is not carried here") as caught:
        load("act", act)
    assert caught.value.hint is not None and "normalizer_processor" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (NORMALISER, lambda t: t["observation.state.std"].fill_(float("nan")), r"observation\.state\.std holds NaN"),
        (
            NORMALISER,
            lambda t: t.pop("observation.state.std"),
            r"observation\.state is normalised by mean-std, and has no",
        ),
        (UNNORMALISER, lambda t: t.pop("action.mean"), "action is normalised by mean-std, and has no statistic 'mean'"),
        (NORMALISER, lambda t: t.update({"observation.state.mean": torch.zeros(4)}), r"have shape \[4\], needed are 6"),
    ],
)
def test_statistics_that_do_not_fit(
    file: str, change: Callable[..., object], message: str, folder: Path, load: Load
) -> None:
    edit_tensors(folder / file, change)
    with pytest.raises(InputError, match=message):
        load("smolvla", folder).assets()


def test_a_file_that_is_no_json(folder: Path, load: Load) -> None:
    (folder / BEFORE).write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        load("smolvla", folder)


def test_one_file_of_two(folder: Path, load: Load) -> None:
    (folder / AFTER).unlink()
    with pytest.raises(InputError, match=r"policy_postprocessor\.json: no such file"):
        load("smolvla", folder)


def test_robots_names_of_cameras_are_kept(folder: Path, load: Load, eagers: dict[str, EagerPolicy]) -> None:
    names = {"observation.images.left": "observation.images.front"}
    edit(folder / BEFORE, lambda value: value["steps"][0]["config"].update(rename_map=names))
    eager = load("smolvla", folder)
    assert eager.spec.observation_names()[0] == "observation.images.left"
    row = lerobot.observations("smolvla", 1)[0]
    renamed = {name.replace("front", "left"): value for name, value in row.items()}
    noise = np.zeros((1, 12, 7), np.float32)
    mine = eager.predict_chunk(renamed, noise)
    np.testing.assert_array_equal(mine, eagers["smolvla"].predict_chunk(row, noise))
    prepared = Processors(eager.spec, eager.assets().__getitem__).prepare(renamed)
    assert "image_front" in prepared


def test_two_names_for_one_camera(folder: Path, load: Load) -> None:
    names = {"observation.images.a": "observation.images.front", "observation.images.b": "observation.images.front"}
    edit(folder / BEFORE, lambda value: value["steps"][0]["config"].update(rename_map=names))
    with pytest.raises(InputError, match=r"renames both observation\.images\.a and observation\.images\.b"):
        load("smolvla", folder)


def test_a_feature_without_statistics_is_left_alone(folder: Path, load: Load) -> None:
    edit_tensors(
        folder / NORMALISER, lambda t: [t.pop(name) for name in list(t) if name.startswith("observation.state")]
    )
    eager = load("smolvla", folder)
    modes = {step.input: getattr(step, "mode", None) for step in eager.spec.preprocess}
    assert modes["observation.state"] == "identity"
    row = lerobot.observations("smolvla", 1)[0]
    np.testing.assert_array_equal(eager.preprocess(row)["state"][0].numpy(), row["observation.state"])


@pytest.mark.parametrize(("kept", "std"), [(("min", "max"), "spread"), ((), "one")])
def test_the_unit_of_errors_where_there_is_no_deviation(
    kept: tuple[str, ...], std: str, folder: Path, load: Load
) -> None:
    edit(folder / AFTER, lambda value: value["steps"][0]["config"]["norm_map"].update(ACTION="IDENTITY"))
    edit_tensors(
        folder / UNNORMALISER,
        lambda t: [t.pop(name) for name in list(t) if name.startswith("action") and name[7:] not in kept],
    )
    tensors = unpack(load("smolvla", folder).assets()["statistics.safetensors"], where="")
    wanted = (tensors["action.max"] - tensors["action.min"]) / np.sqrt(12) if std == "spread" else np.ones(5)
    np.testing.assert_allclose(tensors["action.std"], wanted, rtol=1e-6)
    assert tensors["action.std"].dtype == np.float32


def test_statistics_of_images_are_one_per_channel(eagers: dict[str, EagerPolicy]) -> None:
    tensors = unpack(eagers["act"].assets()["statistics.safetensors"], where="")
    assert tensors["observation.images.front.mean"].shape == (3,)
    assert tensors["action.std"].shape == (5,)


@given(sentence=st.text(max_size=120))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_sentence_becomes_the_same_tokens(sentence: str, eagers: dict[str, EagerPolicy]) -> None:
    eager = eagers["smolvla"]
    observation = {**lerobot.observations("smolvla", 1)[0], "task": sentence}
    theirs = eager.preprocess(observation)
    mine = _processors(eager).prepare(observation)
    np.testing.assert_array_equal(mine["tokens"], theirs["tokens"].numpy())
    np.testing.assert_array_equal(mine["token_mask"], theirs["token_mask"].numpy())
    assert theirs["token_mask"].dtype == torch.bool


@given(state=arrays.arrays(np.float32, 6, elements=st.floats(-1e6, 1e6, width=32)))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_state_becomes_the_same_numbers(state: np.ndarray, eagers: dict[str, EagerPolicy]) -> None:
    for kind in ("act", "diffusion"):
        observation = {**lerobot.observations(kind, 1)[0], "observation.state": state}
        theirs = eagers[kind].preprocess(observation)["state"].numpy()
        np.testing.assert_allclose(
            _processors(eagers[kind]).prepare(observation)["state"], theirs, rtol=1e-6, atol=1e-6
        )


_MADE: dict[int, Processors] = {}


def _processors(eager: EagerPolicy) -> Processors:
    if id(eager) not in _MADE:
        _MADE[id(eager)] = Processors(eager.spec, eager.assets().__getitem__)
    return _MADE[id(eager)]
