"""A LeRobot checkpoint comes back as it was saved; what does not fit is refused in one line, and nothing is fetched."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.unit.policies.lerobot.conftest import KINDS, Load
from vlaopt import policies
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.policies import EagerPolicy
from vlaopt.runtime.loop import draw_noise
from vlaopt.tensors import Array

lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")

Edit = Callable[[dict[str, Any]], None]


@pytest.fixture
def folder(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of the SmolVLA, to be damaged."""
    return Path(shutil.copytree(checkpoints / "smolvla", tmp_path / "smolvla"))


def edit(path: Path, change: Edit) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")


def chunk(eager: EagerPolicy, kind: str) -> Array:
    noise = draw_noise(eager.spec, np.random.default_rng(0))
    return eager.predict_chunk(lerobot.observations(kind, 1, seed=3)[0], noise)


@pytest.mark.parametrize("kind", KINDS)
def test_comes_back_as_it_was_saved(kind: str, eagers: dict[str, EagerPolicy], load: Load, tmp_path: Path) -> None:
    eagers[kind].save(tmp_path / "first")
    again = load(kind, tmp_path / "first")
    np.testing.assert_array_equal(chunk(again, kind), chunk(eagers[kind], kind))
    assert again.spec == eagers[kind].spec
    again.save(tmp_path / "second")
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("kind", KINDS)
def test_lerobot_loads_what_was_saved(
    kind: str, eagers: dict[str, EagerPolicy], checkpoints: Path, tmp_path: Path
) -> None:
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class

    eagers[kind].save(tmp_path / "saved")
    config = PreTrainedConfig.from_pretrained(tmp_path / "saved")
    if kind == "smolvla":
        assert config.vlm_model_name == "some-hub/SmolVLM"
        config.vlm_model_name = str(checkpoints / "vlm")
    theirs = get_policy_class(kind).from_pretrained(tmp_path / "saved", config=config, strict=True)
    for name, value in eagers[kind].module.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=0, atol=0)


def test_another_network_is_saved_with_its_weights(load: Load, tmp_path: Path) -> None:
    eager = load("smolvla")
    network = load("smolvla").module
    with torch.no_grad():
        network.model.action_out_proj.weight.zero_()
        network.model.action_out_proj.bias.fill_(0.5)
    other = eager.replace(network)
    assert np.abs(chunk(other, "smolvla") - chunk(eager, "smolvla")).max() > 0.1
    other.save(tmp_path / "other")
    np.testing.assert_array_equal(chunk(load("smolvla", tmp_path / "other"), "smolvla"), chunk(other, "smolvla"))


def test_widths_that_lerobot_has_no_words_for_are_not_saved(load: Load, tmp_path: Path) -> None:
    eager = load("smolvla")
    network = load("smolvla").module
    network.model.action_time_mlp_in = torch.nn.Linear(48, 20)
    with pytest.raises(InputError, match=r"action_time_mlp_in\.weight is now float32 \[20, 48\]"):
        eager.replace(network).save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("kind", ["act", "smolvla"])
def test_statistics_among_the_weights_of_older_checkpoints(
    kind: str, checkpoints: Path, eagers: dict[str, EagerPolicy], load: Load, tmp_path: Path
) -> None:
    old = tmp_path / kind
    shutil.copytree(checkpoints / kind, old)
    statistics = {}
    for end, prefix in (("preprocessor", "normalize_inputs"), ("postprocessor", "unnormalize_outputs")):
        for file in old.glob(f"policy_{end}*.safetensors"):
            for name, value in safetensors.torch.load_file(file).items():
                feature, _, key = name.rpartition(".")
                if key in ("mean", "std") and (feature == "action") == (end == "postprocessor"):
                    statistics[f"{prefix}.buffer_{feature.replace('.', '_')}.{key}"] = value
    edit_weights(old, lambda tensors: tensors.update(statistics))
    for file in old.glob("policy_*"):
        file.unlink()
    eager = load(kind, old)
    np.testing.assert_allclose(chunk(eager, kind), chunk(eagers[kind], kind), rtol=0, atol=1e-6)
    assert eager.spec == eagers[kind].spec
    eager.save(tmp_path / "saved")
    np.testing.assert_array_equal(chunk(load(kind, tmp_path / "saved"), kind), chunk(eager, kind))


def test_a_checkpoint_without_any_statistics(folder: Path, load: Load) -> None:
    for file in folder.glob("policy_*"):
        file.unlink()
    with pytest.raises(
        InputError, match=r"has no policy_preprocessor\.json, and no statistics among its weights"
    ) as caught:
        load("smolvla", folder)
    assert caught.value.hint is not None and "migrate_policy_normalization" in caught.value.hint


def test_fields_of_the_config_can_be_overridden(load: Load) -> None:
    spec = load("diffusion", noise_scheduler_type="DDPM", num_inference_steps=20, n_action_steps=3).spec
    assert (spec.loop.kind, getattr(spec.loop, "steps", None), spec.chunk.n_action_steps) == ("ddpm", 20, 3)


@pytest.mark.parametrize(
    ("config", "message", "hint"),
    [
        ({"num_step": 5}, r"policy\.config_overrides\.num_step: smolvla has no such field", "did you mean num_steps"),
        ({"num_steps": "5"}, "'5' is not of the sort of 10, the default", ""),
        ({"num_steps": True}, "True is not of the sort of 10, the default", ""),
        ({"num_steps": 2.5}, "`num_steps`: Couldn't parse '2.5' into an int", ""),
        ({"num_steps": 0}, "greater than or equal to 1", ""),
        ({"device": "cuda"}, "device is always 'cpu' here", "leave the line out"),
        ({"n_action_steps": 13}, "upper bound for the number of action steps", ""),
        ({"adapt_to_pi_aloha": True}, "conversion to and from Aloha's joints is not carried", "trained without it"),
        ({"use_cache": False}, "cannot denoise without a cache", ""),
        ({"num_vlm_layers": 2}, r"has tensor .*layers\.2.*, which the config has no place for", "same checkpoint"),
        ({"chunk_size": None}, "`chunk_size`: Couldn't parse", ""),
    ],
    ids=str,
)
def test_an_override_that_does_not_fit(config: dict[str, Any], message: str, hint: str, load: Load) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load("smolvla", **config)
    assert hint in (caught.value.hint or "")


def test_more_steps_to_execute_than_a_chunk_has(load: Load) -> None:
    with pytest.raises(InputError, match="n_action_steps 16 is more than the chunk's 15"):
        load("diffusion", n_action_steps=16)


def test_the_vlm_must_lie_here(checkpoints: Path) -> None:
    with pytest.raises(InputError, match="'some-hub/SmolVLM' is on a hub, and nothing is fetched") as caught:
        policies.get("smolvla").load(checkpoints / "smolvla", {}, {})
    assert caught.value.where is not None and caught.value.where.endswith("config.json:vlm_model_name")
    assert caught.value.hint is not None and "hub_overrides: {vlm_model_name: FOLDER}" in caught.value.hint
    with pytest.raises(InputError, match=r"policy\.hub_overrides\.vlm_model_name: no such folder"):
        policies.get("smolvla").load(checkpoints / "smolvla", {"vlm_model_name": checkpoints / "none"}, {})


def test_a_vlm_that_the_checkpoint_itself_names(
    folder: Path, checkpoints: Path, eagers: dict[str, EagerPolicy]
) -> None:
    edit(folder / "config.json", lambda value: value.update(vlm_model_name=str(checkpoints / "vlm")))
    eager = policies.get("smolvla").load(folder, {}, {})
    np.testing.assert_array_equal(chunk(eager, "smolvla"), chunk(eagers["smolvla"], "smolvla"))


def test_a_hub_override_of_a_field_that_is_not_fetched(checkpoints: Path) -> None:
    with pytest.raises(InputError, match="unknown field 'vlm_model'") as caught:
        policies.get("smolvla").load(checkpoints / "smolvla", {"vlm_model": checkpoints / "vlm"}, {})
    assert caught.value.hint == "did you mean vlm_model_name?"
    with pytest.raises(InputError, match="unknown field 'vlm_model_name'") as caught:
        policies.get("act").load(checkpoints / "act", {"vlm_model_name": checkpoints / "vlm"}, {})
    assert caught.value.hint == "act needs no hub: leave the line out"


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", lambda value: value.update(model_type="llama"), "model_type is 'llama', needed is 'smolvlm'"),
        ("tokenizer_config.json", lambda value: value.update(auto_map={"AutoTokenizer": "x.Y"}), "auto_map names code"),
    ],
)
def test_a_vlm_of_another_sort(file: str, change: Edit, message: str, checkpoints: Path, tmp_path: Path) -> None:
    vlm = Path(shutil.copytree(checkpoints / "vlm", tmp_path / "vlm"))
    edit(vlm / file, change)
    with pytest.raises(InputError, match=message):
        policies.get("smolvla").load(checkpoints / "smolvla", {"vlm_model_name": vlm}, {})


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_vlm_that_lacks_a_file(file: str, checkpoints: Path, tmp_path: Path) -> None:
    vlm = Path(shutil.copytree(checkpoints / "vlm", tmp_path / "vlm"))
    (vlm / file).unlink()
    with pytest.raises(InputError, match=r"no such file|LeRobot cannot make"):
        policies.get("smolvla").load(checkpoints / "smolvla", {"vlm_model_name": vlm}, {})


def test_a_vlm_whose_config_asks_for_bfloat16_is_loaded_in_full(
    checkpoints: Path, eagers: dict[str, EagerPolicy], tmp_path: Path
) -> None:
    vlm = Path(shutil.copytree(checkpoints / "vlm", tmp_path / "vlm"))
    edit(vlm / "config.json", lambda value: value["text_config"].update(dtype="bfloat16", torch_dtype="bfloat16"))
    eager = policies.get("smolvla").load(checkpoints / "smolvla", {"vlm_model_name": vlm}, {})
    assert {parameter.dtype for parameter in eager.module.parameters()} == {torch.float32}
    np.testing.assert_array_equal(chunk(eager, "smolvla"), chunk(eagers["smolvla"], "smolvla"))


def test_weights_stored_in_half_are_taken_as_they_are(folder: Path, load: Load) -> None:
    edit_weights(folder, lambda tensors: tensors.update({k: v.to(torch.bfloat16) for k, v in tensors.items()}))
    eager = load("smolvla", folder)
    weight = eager.module.state_dict()["model.action_out_proj.weight"]
    assert weight.dtype == torch.float32
    assert torch.equal(weight, weight.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.update(type="act"), "type is 'act', needed is 'smolvla'"),
        (lambda value: value.update(type="gpt"), "type is 'gpt', needed is 'smolvla'"),
        (lambda value: value.update(new_field=1), r"config\.json:new_field: LeRobot's config has no such field"),
        (lambda value: value.update(num_steps="many"), "Couldn't parse 'many' into an int"),
        (lambda value: value.update(input_features={}), r"has no observation\.state"),
        (lambda value: value.update(input_features=None), r"has no observation\.state"),
        (lambda value: value.update(output_features={}), "has no action of one dimension"),
        (
            lambda value: value["input_features"].update(pixels={"type": "VISUAL", "shape": [3, 4, 4]}),
            r"config\.json:pixels: LeRobot drops inputs",
        ),
        (
            lambda value: value["input_features"]["observation.images.front"].update(shape=[48, 72, 3]),
            r"shape \[48, 72, 3\], needed is \[3, height, width\]",
        ),
        (
            lambda value: value["input_features"].update({"observation.other": {"type": "ENV", "shape": [2]}}),
            r"observation\.other: LeRobot reads observation\.environment_state only",
        ),
        (
            lambda value: value.update(input_features={"observation.state": {"type": "STATE", "shape": [6]}}),
            "has no camera",
        ),
        (lambda value: value.update(use_delta_joint_actions_aloha=True), "not ported yet in LeRobot"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_config_that_does_not_fit(change: Edit, message: str, folder: Path, load: Load) -> None:
    edit(folder / "config.json", change)
    with pytest.raises(InputError, match=message) as caught:
        load("smolvla", folder)
    assert caught.value.where is not None and str(folder / "config.json") in caught.value.where


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.state_proj.bias"), r"lacks tensor model\.state_proj\.bias"),
        (lambda t: t.update(extra=torch.zeros(1)), "has tensor extra, which the config has no place for"),
        (
            lambda t: t.update({"model.state_proj.bias": torch.zeros(3)}),
            r"model\.state_proj\.bias is float32 \[3\], the config asks for float32 \[32\]",
        ),
        (
            lambda t: t.update({"model.state_proj.bias": torch.zeros(32, dtype=torch.float64)}),
            r"model\.state_proj\.bias is float64 \[32\], the config asks for float32 \[32\]",
        ),
        (
            lambda t: t["model.state_proj.bias"].fill_(float("nan")),
            r"tensor model\.state_proj\.bias holds NaN or infinity",
        ),
    ],
)
def test_weights_that_do_not_fit(change: Callable[..., object], message: str, folder: Path, load: Load) -> None:
    edit_weights(folder, change)
    with pytest.raises(InputError, match=message):
        load("smolvla", folder)


@pytest.mark.parametrize("percent", [0, 1, 50, 99])
def test_weights_cut_short(percent: int, folder: Path, load: Load) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) * percent // 100])
    with pytest.raises(InputError, match="damaged safetensors"):
        load("smolvla", folder)


def test_a_pickle_is_never_opened(folder: Path, load: Load) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle"):
        load("smolvla", folder)


@pytest.mark.parametrize("kind", KINDS)
def test_no_checkpoint_at_all(kind: str, load: Load, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such checkpoint folder"):
        load(kind, tmp_path / "none")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "error", [ModuleNotFoundError("No module named 'lerobot'"), RuntimeError("operator nms\nmore")]
)
def test_without_lerobot_one_line_says_what_to_install(
    kind: str, error: Exception, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name.startswith("lerobot."):
            raise error
        return real(name, package)

    adapter = policies.get(kind)
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(EnvironmentProblem, match=r"LeRobot cannot be imported: (No module|operator nms$)") as caught:
        adapter.load(checkpoints / kind, {}, {})
    assert caught.value.hint == "pip install 'vlaopt[lerobot]'"


def test_loading_prints_nothing(load: Load, capfd: pytest.CaptureFixture[str]) -> None:
    load("smolvla")
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("training", "rate"),
    [({"env": {"fps": 20}}, 20.0), ({"env": None}, None), ({"env": {"fps": "fast"}}, None), ([], None)],
)
def test_the_control_rate_of_the_training(training: Any, rate: float | None, folder: Path, load: Load) -> None:
    (folder / "train_config.json").write_text(json.dumps(training))
    assert load("smolvla", folder).spec.control_hz == rate
