"""An edge-vla checkpoint folder: config.json, model.safetensors, statistics.safetensors, tokenizer.json."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from tokenizers import Tokenizer

from vlaopt.errors import InputError
from vlaopt.files import STAGING_PREFIX, read_file, write_file
from vlaopt.policies.checkpoints import CONFIG, WEIGHTS, check_folder, check_type, fill, read_json, words
from vlaopt.policies.edge_vla.config import EdgeVLAConfig, Provenance
from vlaopt.policies.edge_vla.model import EdgeVLA, config_of
from vlaopt.policies.edge_vla.policy import EdgeVLAPolicy, Statistics

STATISTICS, TOKENIZER = "statistics.safetensors", "tokenizer.json"
_LIMIT = 1 << 30


def load_checkpoint(path: Path) -> EdgeVLAPolicy:
    """Open a checkpoint folder. Links are followed, pickles never opened, every byte read once.

    Raises InputError for a missing, damaged or ill-fitting file, naming the file and the tensor.
    """
    check_folder(path)
    config = _read_config(path / CONFIG)
    module = EdgeVLA(config)
    fill(module, path / WEIGHTS)
    statistics = _read_statistics(path / STATISTICS, config)
    return EdgeVLAPolicy(module, statistics, _read_tokenizer(path / TOKENIZER, config))


def save_checkpoint(policy: EdgeVLAPolicy, path: Path, *, provenance: Provenance | None = None) -> None:
    """Write `policy` to `path`, replacing what is there. The config says the widths the layers have now."""
    config = config_of(policy.module)
    if provenance is not None:
        config = config.model_copy(update={"provenance": provenance})
    weights = {name: value.detach().contiguous() for name, value in policy.module.state_dict().items()}
    statistics = {
        "observation.state.mean": policy.statistics.state_mean,
        "observation.state.std": policy.statistics.state_std,
        "action.mean": policy.statistics.action_mean,
        "action.std": policy.statistics.action_std,
    }
    content = {
        CONFIG: (json.dumps(config.model_dump(mode="json"), indent=2) + "\n").encode(),
        WEIGHTS: safetensors.torch.save(weights, {"format": "pt"}),
        STATISTICS: safetensors.numpy.save(statistics),
        TOKENIZER: (policy.tokenizer.to_str(pretty=True) + "\n").encode(),
    }
    _replace_folder(path, content)


def _replace_folder(path: Path, content: Mapping[str, bytes]) -> None:
    """Write a folder of files beside `path` and swap it in; a reader finds the old folder or the new one."""
    token = f"{os.getpid()}-{uuid.uuid4().hex}"
    staging, old = (path.parent / f"{STAGING_PREFIX}{token}{end}" for end in ("", "-old"))
    try:
        for name, data in content.items():
            write_file(staging / name, data)
        if path.exists():
            path.rename(old)
        staging.rename(path)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _read_config(path: Path) -> EdgeVLAConfig:
    value = read_json(path)
    check_type(value, "edge-vla", path)
    try:
        return EdgeVLAConfig.model_validate_json(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(first["msg"], where=f"{path}:{key}") from error


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = safetensors.torch.load(read_file(path, limit=_LIMIT))
    except (SafetensorError, ValueError, KeyError) as error:
        raise InputError(
            f"damaged safetensors file: {error}", where=str(path), hint="copy or download it again"
        ) from error
    return tensors


def _read_statistics(path: Path, config: EdgeVLAConfig) -> Statistics:
    tensors = _read_tensors(path)
    arrays: dict[str, np.ndarray] = {}
    for feature, size in (("observation.state", config.state_size), ("action", config.action_size)):
        for kind in ("mean", "std"):
            name = f"{feature}.{kind}"
            if name not in tensors:
                raise InputError(f"lacks tensor {name}", where=str(path))
            arrays[name] = _statistic(name, tensors[name], size, path)
    return Statistics(
        state_mean=arrays["observation.state.mean"],
        state_std=arrays["observation.state.std"],
        action_mean=arrays["action.mean"],
        action_std=arrays["action.std"],
    )


def _statistic(name: str, tensor: torch.Tensor, size: int, path: Path) -> np.ndarray:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (size,):
        raise InputError(f"tensor {name} is {words(tensor)}, needed is float32 [{size}]", where=str(path))
    if not torch.isfinite(tensor).all():
        raise InputError(f"tensor {name} holds NaN or infinity", where=str(path))
    if name.endswith(".std") and bool((tensor <= 0).any()):
        raise InputError(f"tensor {name} holds a deviation of zero or less", where=str(path))
    values: np.ndarray = tensor.numpy()
    return values


def _read_tokenizer(path: Path, config: EdgeVLAConfig) -> Tokenizer:
    data = read_file(path, limit=1 << 26)
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises a bare Exception for every damaged file
        raise InputError(f"damaged tokenizer: {error}", where=str(path)) from error
    if tokenizer.get_vocab_size() != config.vocabulary:
        raise InputError(
            f"{tokenizer.get_vocab_size()} words, the config's vocabulary is {config.vocabulary}", where=str(path)
        )
    return tokenizer
