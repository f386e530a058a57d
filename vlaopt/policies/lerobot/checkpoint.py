"""A LeRobot checkpoint folder: read and checked before LeRobot sees it, and nothing is ever fetched from a hub."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.files import read_file
from vlaopt.policies.checkpoints import CONFIG, WEIGHTS, OnHub, check_folder, check_type, fill, read_json, read_tensors
from vlaopt.policies.checkpoints import tensor_names as names_in

TRAINING = "train_config.json"
FIXED: Mapping[str, Any] = {
    "device": "cpu",
    "use_amp": False,
    "compile_model": False,
    "pretrained_backbone_weights": None,
    "load_vlm_weights": False,
}
"""Fields of a config that are the same for every policy here: float32 on the CPU, all weights from the checkpoint."""

_STATISTIC = re.compile(r"(?:normalize_inputs|normalize_targets|unnormalize_outputs)\.buffer_(.+)\.(\w+)")
_SMALL = 16 << 20


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its weights: LeRobot's config of it, and the files that are kept when it is saved again.

    `buffers` are the statistics that older checkpoints hold among their weights, by their names there.
    """

    path: Path
    config: Any
    files: Mapping[str, bytes]
    buffers: Mapping[str, torch.Tensor]
    control_hz: float | None

    def statistics(self) -> dict[str, dict[str, torch.Tensor]]:
        """`buffers` by feature and kind, as LeRobot takes them."""
        features = {**self.config.input_features, **self.config.output_features}
        known = {name.replace(".", "_"): name for name in features}
        found: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.buffers.items():
            match = _STATISTIC.fullmatch(name)
            if match and match[1] in known:
                found.setdefault(known[match[1]], {})[match[2]] = tensor.to(torch.float32)
        return found


def lerobot(module: str) -> Any:
    """A module of LeRobot. Raises EnvironmentProblem when LeRobot, or a library that it needs, cannot be imported."""
    try:
        return importlib.import_module(f"lerobot.{module}")
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: a torchvision made for another torch
        reason = str(error).splitlines()[0]
        raise EnvironmentProblem(
            f"LeRobot cannot be imported: {reason}", hint="pip install 'vlaopt[lerobot]'"
        ) from error


def open_checkpoint(
    path: Path, config_class: Any, overrides: Mapping[str, Any], fixed: Mapping[str, Any]
) -> Checkpoint:
    """The checkpoint in the folder `path`, its config with other values for the fields in `overrides` and `fixed`.

    Raises InputError for what is no checkpoint of `config_class`, a damaged file, and a field or value that the config
    does not have.
    """
    check_folder(path)
    value = read_json(path / CONFIG)
    kind = config_class.get_choice_name(config_class)
    check_type(value, kind, path / CONFIG)
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    fixed = {name: given for name, given in {**FIXED, **fixed}.items() if name in fields}
    for name, given in overrides.items():
        _check_override(name, given, fields, fixed, kind)
    config = _decode(config_class, {**value, **overrides, **fixed}, path / CONFIG)
    _check_features(config, path / CONFIG)
    buffers = [name for name in names_in(path / WEIGHTS) if _STATISTIC.fullmatch(name)]
    return Checkpoint(
        path=path,
        config=config,
        files=_small_files(path),
        buffers={name: tensor.clone() for name, tensor in read_tensors(path / WEIGHTS, buffers)},
        control_hz=_control_hz(path / TRAINING),
    )


def build_policy(policy_class: Callable[[Any], Any], checkpoint: Checkpoint) -> Any:
    """LeRobot's policy with the weights of `checkpoint`, float32, in evaluation mode.

    Raises InputError when config and weights do not fit.
    """
    with quiet():
        try:
            policy = policy_class(checkpoint.config)
        except Exception as error:  # LeRobot, torch and transformers all check in their own way
            raise InputError(
                f"LeRobot cannot make this policy: {first_line(error)}", where=str(checkpoint.path / CONFIG)
            ) from error
    # Before the weights come: a config of transformers may ask for bfloat16, and would round them.
    policy.float()
    fill(policy, checkpoint.path / WEIGHTS, besides=checkpoint.buffers)
    return policy.eval()


def local_folder(field: str, config: Mapping[str, Any], overrides: Mapping[str, Path], where: Path) -> Path:
    """The folder that stands for what `field` of a config names on a hub. Raises InputError when there is none."""
    if field in overrides:
        if not overrides[field].is_dir():
            raise InputError(f"no such folder: {overrides[field]}", where=f"policy.hub_overrides.{field}")
        return overrides[field]
    named = config.get(field)
    if isinstance(named, str) and Path(named).is_dir():
        return Path(named)
    raise OnHub(
        f"{named!r} is on a hub, and nothing is fetched from there",
        field,
        where=f"{where}:{field}",
        hint=f"copy it to a folder and write  policy: {{hub_overrides: {{{field}: FOLDER}}}}",
    )


def check_hub_fields(overrides: Mapping[str, Path], fields: tuple[str, ...], kind: str) -> None:
    """Raises InputError for a hub override of a field that the policy does not fetch."""
    for name in overrides:
        if name not in fields:
            known = f"fields of {kind}: {', '.join(fields)}" if fields else f"{kind} needs no hub: leave the line out"
            raise InputError(f"unknown field {name!r}", where="policy.hub_overrides", hint=_near(name, fields, known))


@contextlib.contextmanager
def quiet() -> Any:
    """Without LeRobot's prints: standard output is for results."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def first_line(error: BaseException) -> str:
    """What an exception of another library says, in a line: its cause's where it has one."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return lines[0] if lines else type(cause).__name__


def _check_override(name: str, given: Any, fields: Mapping[str, Any], fixed: Mapping[str, Any], kind: str) -> None:
    where = f"policy.config_overrides.{name}"
    if name in fixed:
        raise InputError(f"{name} is always {fixed[name]!r} here", where=where, hint="leave the line out")
    if name not in fields:
        raise InputError(
            f"{kind} has no such field", where=where, hint=_near(name, list(fields), "see its config.json")
        )
    default = fields[name].default
    if given is None or default is None or default is dataclasses.MISSING:
        return
    if _sort(given) != _sort(default):
        raise InputError(f"{given!r} is not of the sort of {default!r}, the default", where=where)


def _sort(value: Any) -> str:
    """The sort of a JSON value; LeRobot's own parser takes `true` and `"1"` for numbers."""
    sorts: dict[type, str] = {bool: "truth", int: "number", float: "number", str: "text", list: "list", tuple: "list"}
    return sorts.get(type(value), "mapping")


def _decode(config_class: Any, value: Mapping[str, Any], path: Path) -> Any:
    draccus = importlib.import_module("draccus")
    unknown = [name for name in value if name != "type" and name not in config_class.__dataclass_fields__]
    if unknown:
        raise InputError(
            "LeRobot's config has no such field",
            where=f"{path}:{unknown[0]}",
            hint="the checkpoint is of another version of LeRobot",
        )
    try:
        config = draccus.decode(config_class, {name: given for name, given in value.items() if name != "type"})
        config.validate_features()
    except draccus.utils.DecodingError as error:  # names the field, which its cause does not
        raise InputError(str(error).splitlines()[0], where=str(path)) from error
    except Exception as error:  # the configs' own checks raise all kinds
        raise InputError(first_line(error), where=str(path)) from error
    return config


def _check_features(config: Any, path: Path) -> None:
    """Raises InputError for features that LeRobot cannot work with at inference, and for frames that are not RGB."""
    inputs = config.input_features or {}
    for name, feature in inputs.items():
        if not name.startswith("observation."):
            raise InputError("LeRobot drops inputs that are not called observation.…", where=f"{path}:{name}")
        if feature.type.value == "VISUAL" and (len(feature.shape) != 3 or feature.shape[0] != 3):
            raise InputError(f"shape {list(feature.shape)}, needed is [3, height, width]", where=f"{path}:{name}")
        if feature.type.value == "ENV" and name != "observation.environment_state":
            raise InputError("LeRobot reads observation.environment_state only", where=f"{path}:{name}")
    if config.robot_state_feature is None:
        raise InputError("has no observation.state, which LeRobot reads at inference", where=f"{path}:input_features")
    if config.action_feature is None or len(config.action_feature.shape) != 1:
        raise InputError("has no action of one dimension", where=f"{path}:output_features")


def _small_files(path: Path) -> dict[str, bytes]:
    """What LeRobot writes beside the weights: the configs, and the processors with their statistics."""
    wanted = [path / CONFIG, *path.glob(TRAINING), *path.glob("policy_*.json"), *path.glob("policy_*.safetensors")]
    return {file.name: read_file(file, limit=_SMALL) for file in sorted(wanted)}


def _control_hz(path: Path) -> float | None:
    """The rate of the environment that the policy was trained for, where the training's config names one."""
    if not path.exists():
        return None
    value = read_json(path)
    environment = value.get("env") if isinstance(value, dict) else None
    rate = environment.get("fps") if isinstance(environment, dict) else None
    return float(rate) if isinstance(rate, int | float) and not isinstance(rate, bool) and rate > 0 else None


def _near(name: str, known: Any, otherwise: str) -> str:
    near = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {near[0]}?" if near else otherwise
