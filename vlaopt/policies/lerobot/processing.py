"""A checkpoint's pre- and post-processors: checked, run as LeRobot runs them, and told as processors of the spec."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from vlaopt.artifact.policy_spec import ImageProcessor, Mode, NormaliseProcessor, TokeniseProcessor, Unnormalise
from vlaopt.errors import InputError
from vlaopt.policies.checkpoints import read_json, read_tensors, tensor_names
from vlaopt.policies.lerobot.checkpoint import Checkpoint, first_line, lerobot, quiet
from vlaopt.tensors import pack

BEFORE, AFTER = "policy_preprocessor.json", "policy_postprocessor.json"
STATISTICS, TOKENIZER = "statistics.safetensors", "tokenizer.json"
TASK = "task"

RENAME, BATCH, DEVICE = "rename_observations_processor", "to_batch_processor", "device_processor"
NORMALISE, UNNORMALISE = "normalizer_processor", "unnormalizer_processor"
NEW_LINE, TOKENISE = "smolvla_new_line_processor", "tokenizer_processor"
VECTORS = (RENAME, BATCH, NORMALISE)
"""The steps before a policy without language, in their order; a device step may stand anywhere."""
LANGUAGE = (RENAME, BATCH, NEW_LINE, TOKENISE, NORMALISE)
"""The steps before SmolVLA."""

_MODES: Mapping[str, Mode] = {
    "IDENTITY": "identity",
    "MEAN_STD": "mean-std",
    "MIN_MAX": "min-max",
    "QUANTILES": "quantiles",
    "QUANTILE10": "quantiles-10",
}
_NEEDED: Mapping[Mode, tuple[str, ...]] = {
    "identity": (),
    "mean-std": ("mean", "std"),
    "min-max": ("min", "max"),
    "quantiles": ("q01", "q99"),
    "quantiles-10": ("q10", "q90"),
}
_KINDS = ("mean", "std", "min", "max", "q01", "q10", "q50", "q90", "q99")


@dataclass(frozen=True)
class Processing:
    """LeRobot's two pipelines of one checkpoint, and what they mean."""

    config: Any
    before: Any
    after: Any
    tokenizer: bytes | None
    path: Path

    def batch(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """What LeRobot's policy takes, with a batch dimension, for one time step of numpy values and sentences."""
        batch = self.before({name: _tensor(value) for name, value in observation.items()})
        return {name: value for name, value in batch.items() if name.startswith("observation.")}

    def actions(self, chunk: torch.Tensor) -> np.ndarray:
        """The policy's chunk [1, rows, action] in the robot's units, float32 [rows, action]."""
        result: np.ndarray = self.after(chunk)[0].to(torch.float32).numpy().copy()
        return result

    def image(self, feature: str, output: str) -> ImageProcessor:
        """How the frames of a camera are processed."""
        _, height, width = self.config.input_features[feature].shape
        mode, eps = self._law(_step(self.before, NORMALISE), feature, "VISUAL")
        return ImageProcessor(
            input=self._named(feature),
            output=output,
            height=height,
            width=width,
            mode=mode,
            eps=eps,
            statistics=feature,
        )

    def vector(self, feature: str, output: str) -> NormaliseProcessor:
        """How a state is processed."""
        given = self.config.input_features[feature]
        mode, eps = self._law(_step(self.before, NORMALISE), feature, given.type.value)
        size = given.shape[0]
        return NormaliseProcessor(
            input=self._named(feature), output=output, size=size, mode=mode, eps=eps, statistics=feature
        )

    def sentence(self, output: str, mask: str) -> TokeniseProcessor:
        """How the task is tokenised."""
        suffix = "\n" if _step(self.before, NEW_LINE) is not None else ""
        length = _step(self.before, TOKENISE).max_length
        return TokeniseProcessor(
            input=TASK, output=output, mask=mask, max_length=length, asset=TOKENIZER, suffix=suffix
        )

    def unnormalise(self, output: str) -> Unnormalise:
        """How the component's or loop's `output` becomes actions."""
        mode, eps = self._law(_step(self.after, UNNORMALISE), "action", "ACTION")
        return Unnormalise(input=output, statistics="action", mode=mode, eps=eps)

    def assets(self) -> dict[str, bytes]:
        """The statistics as float32 [size] by feature and kind, and the tokenizer.

        The deviation of the actions is the unit of errors. Where the checkpoint has none it is that of a uniform law
        between the extremes, (max − min) / √12, or else 1.
        """
        tensors = self._statistics(_step(self.before, NORMALISE), self.config.input_features)
        tensors |= self._statistics(_step(self.after, UNNORMALISE), self.config.output_features)
        if "action.std" not in tensors:
            low, high = tensors.get("action.min"), tensors.get("action.max")
            size = self.config.action_feature.shape[0]
            spread = np.ones(size, np.float32) if low is None or high is None else (high - low) / np.sqrt(12)
            tensors["action.std"] = spread.astype(np.float32)
        return {STATISTICS: pack(tensors), **({} if self.tokenizer is None else {TOKENIZER: self.tokenizer})}

    def _law(self, step: Any, feature: str, kind: str) -> tuple[Mode, float]:
        """Mode and eps that a step normalises a feature with; as in LeRobot, one without statistics is left alone.

        Raises InputError when it has statistics, and not those of its mode.
        """
        if step is None or feature not in step.features:
            return "identity", 0.0
        only = step.normalize_observation_keys
        if only is not None and kind != "ACTION" and feature not in only:
            return "identity", 0.0
        modes = {key.value: value.value for key, value in step.norm_map.items()}
        has = {name.rpartition(".")[2] for name in step.state_dict() if name.rpartition(".")[0] == feature}
        mode = _MODES[modes.get(kind, "IDENTITY")] if has else "identity"
        for needed in _NEEDED[mode]:
            if needed not in has:
                raise InputError(
                    f"{feature} is normalised by {mode}, and has no statistic {needed!r}", where=str(self.path)
                )
        return mode, 0.0 if mode == "identity" else step.eps

    def _named(self, feature: str) -> str:
        """What the robot calls a feature of the policy."""
        rename = _step(self.before, RENAME)
        old = [old for old, new in rename.rename_map.items() if new == feature] if rename is not None else []
        if len(old) > 1:
            raise InputError(f"renames both {old[0]} and {old[1]} to {feature}", where=str(self.path / BEFORE))
        return cast(str, old[0]) if old else feature

    def _statistics(self, step: Any, features: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """The tensors of a step by `feature.kind`, flat: LeRobot keeps those of images as [3, 1, 1]."""
        found: dict[str, np.ndarray] = {}
        for name, tensor in ({} if step is None else step.state_dict()).items():
            feature, _, kind = name.rpartition(".")
            if feature not in features or kind not in _KINDS:
                continue
            size = features[feature].shape[0]
            if tensor.numel() != size:
                raise InputError(
                    f"statistics {name} have shape {list(tensor.shape)}, needed are {size} values", where=str(self.path)
                )
            found[name] = tensor.reshape(-1).to(torch.float32).numpy().copy()
        return found


def open_processing(checkpoint: Checkpoint, steps: tuple[str, ...], tokenizer: Path | None = None) -> Processing:
    """The processors of `checkpoint`: those of its files, else made by LeRobot around the statistics in its weights.

    `steps`: what may stand before the policy, in this order. `tokenizer`: the folder of its tokenizer. Raises
    InputError for a step that is not carried, a damaged file, and where there are no statistics at all.
    """
    factory = lerobot("policies.factory")
    config, path = checkpoint.config, checkpoint.path
    if (path / BEFORE).exists() or (path / AFTER).exists():
        names = _check(path, BEFORE, steps)
        _check(path, AFTER, (UNNORMALISE,))
        overrides: dict[str, dict[str, Any]] = {DEVICE: {"device": "cpu"}} if DEVICE in names else {}
        if TOKENISE in names:
            overrides[TOKENISE] = {"tokenizer_name": str(tokenizer), "padding": "max_length"}
        given = {"pretrained_path": str(path), "preprocessor_overrides": overrides}
    elif checkpoint.buffers:
        given = {"dataset_stats": checkpoint.statistics()}
    else:
        raise InputError(f"has no {BEFORE}, and no statistics among its weights", where=str(path), hint=_MIGRATE)
    with quiet():
        try:
            before, after = factory.make_pre_post_processors(config, **given)
        except Exception as error:  # LeRobot wraps whatever its steps raise
            raise InputError(f"LeRobot cannot make the processors: {first_line(error)}", where=str(path)) from error
    step = _step(before, TOKENISE)
    if step is None and TOKENISE in steps:
        raise InputError(f"has no step {TOKENISE!r}", where=str(path / BEFORE))
    return Processing(config, before, after, None if step is None else tokenizer_file(step, path), path)


def tokenizer_file(step: Any, path: Path) -> bytes:
    """The tokenizer of a LeRobot step as the JSON of `tokenizers`, which pads and cuts as the step does."""
    tokenizer = step.input_tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise InputError("its tokenizer is not of the library tokenizers", where=str(path), hint="add a tokenizer.json")
    if tokenizer.pad_token_id is None:
        raise InputError("its tokenizer has no padding token", where=str(path))
    from tokenizers import Tokenizer

    own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.enable_padding(
        direction=step.padding_side,
        pad_id=tokenizer.pad_token_id,
        pad_token=tokenizer.pad_token,
        length=step.max_length,
    )
    own.enable_truncation(step.max_length, direction=tokenizer.truncation_side)
    return cast(bytes, own.to_str().encode())


_MIGRATE = "LeRobot writes it: python -m lerobot.processor.migrate_policy_normalization --pretrained-path FOLDER"


def _check(path: Path, name: str, steps: tuple[str, ...]) -> set[str]:
    """The names of the steps in the file `name`. Raises InputError for any that is not carried, or could run code."""
    where = path / name
    value = read_json(where)
    entries = value.get("steps") if isinstance(value, dict) else None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError("not a processor of LeRobot: it has no list of steps", where=str(where))
    names = [_carried(entry, (*steps, DEVICE), where) for entry in entries]
    order = [steps.index(step) for step in names if step != DEVICE]
    if order != sorted(set(order)):
        raise InputError(f"steps {', '.join(names)} are not in the order {', '.join(steps)}", where=str(where))
    for entry in entries:
        _check_settings(entry, where)
        if "state_file" in entry:
            _check_state(path, entry["state_file"], where)
    return set(names)


def _carried(entry: Mapping[str, Any], steps: Collection[str], where: Path) -> str:
    name = entry.get("registry_name")
    if "class" in entry or not isinstance(name, str):
        raise InputError(
            f"step of class {entry.get('class')!r}, which could run any code", where=str(where), hint=_hint(steps)
        )
    if name not in steps:
        raise InputError(f"step {name!r} is not carried here", where=str(where), hint=_hint(steps))
    return name


def _check_settings(entry: Mapping[str, Any], where: Path) -> None:
    """Raises InputError for a setting that a fixed graph of float32 cannot follow."""
    settings = entry.get("config", {})
    if not isinstance(settings, dict):
        raise InputError(f"the config of step {entry['registry_name']!r} is no mapping", where=str(where))
    needed = {"float_dtype": (None, "float32"), "truncation": (True,), "task_key": (TASK,)}
    for key, values in needed.items():
        if settings.get(key, values[0]) not in values:
            raise InputError(f"{key} is {settings[key]!r}, needed is {values[-1]!r}", where=str(where))


def _check_state(path: Path, file: Any, where: Path) -> None:
    if not isinstance(file, str) or Path(file).name != file:
        raise InputError(f"state file {file!r} is not beside it", where=str(where))
    # Read for its checks: whole, sound and finite.
    for _ in read_tensors(path / file, tensor_names(path / file)):
        pass


def _step(pipeline: Any, name: str) -> Any:
    """The step of a pipeline by its registered name, None without it."""
    return next((step for step in pipeline.steps if getattr(type(step), "_registry_name", None) == name), None)


def _tensor(value: Any) -> Any:
    """As LeRobot's control loop makes tensors: frames float32 [3, H, W] in 0–1; a batch dimension in front."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == np.uint8:
        return (torch.from_numpy(value.copy()).to(torch.float32) / 255).permute(2, 0, 1).contiguous()[None]
    return torch.from_numpy(value.copy())[None]


def _hint(steps: Collection[str]) -> str:
    return f"carried are {', '.join(sorted(steps))}"
