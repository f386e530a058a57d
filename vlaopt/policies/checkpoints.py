"""What every adapter does with a checkpoint folder: open no pickle, read the config, fill a network with weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import nn

from vlaopt.errors import InputError
from vlaopt.files import read_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pkl")
_JSON_LIMIT = 16 << 20
_EXACT = (torch.float16, torch.bfloat16)


class OnHub(InputError):
    """What the config's field `field` names is on a hub, where nothing is fetched from: a local folder is needed."""

    def __init__(self, message: str, field: str, *, where: str, hint: str) -> None:
        super().__init__(message, where=where, hint=hint)
        self.field = field


def check_folder(path: Path) -> None:
    """Raises InputError unless `path` is a folder with a config or weights, and for a pickle, which is never opened."""
    pickled = None
    if path.is_file() and path.suffix in PICKLE_SUFFIXES:
        pickled = path
    elif path.is_dir() and not (path / WEIGHTS).exists():
        pickled = next((file for file in sorted(path.iterdir()) if file.suffix in PICKLE_SUFFIXES), None)
    if pickled is not None:
        raise InputError(
            f"{pickled.name} is a pickle, which can run code when opened",
            where=str(pickled),
            hint=f"convert it to {WEIGHTS}: safetensors.torch.save_file(torch.load(file, weights_only=True), ...)",
        )
    if not path.is_dir():
        raise InputError("no such checkpoint folder", where=str(path), hint=f"a folder with {CONFIG} and {WEIGHTS}")
    if not (path / CONFIG).exists() and not (path / WEIGHTS).exists():
        raise InputError("not a checkpoint folder", where=str(path), hint=f"a folder with {CONFIG} and {WEIGHTS}")


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises InputError when it is missing, unreadable or not JSON."""
    try:
        return json.loads(read_file(path, limit=_JSON_LIMIT))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}", where=str(path)) from error


def check_type(config: Any, needed: str, path: Path) -> None:
    """Raises InputError unless the value of a config file is a mapping whose `type` is `needed`."""
    kind = config.get("type") if isinstance(config, dict) else None
    if kind != needed:
        raise InputError(
            f"type is {kind!r}, needed is {needed!r}",
            where=f"{path}:type",
            hint=f"policy.type: {kind}" if isinstance(kind, str) else "name that policy's type",
        )


def tensor_names(path: Path) -> list[str]:
    """The tensors of a safetensors file. Raises InputError when it is missing or its header is not sound."""
    if not path.is_file():
        raise InputError("a directory, not a file" if path.is_dir() else "no such file", where=str(path))
    try:
        with safetensors.safe_open(path, "pt") as file:
            return list(file.keys())
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"damaged safetensors file: {error}", where=str(path), hint="copy or download it again"
        ) from error


def read_tensors(path: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors called `names`, one after the other. Raises InputError for one that is not finite."""
    for name in names:
        # Opened for each: what was read counts as this process's memory for as long as the file is open.
        with safetensors.safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise InputError(f"tensor {name} holds NaN or infinity", where=str(path), hint="the training diverged")
            yield name, tensor


def fill(module: nn.Module, path: Path, *, besides: Collection[str] = ()) -> None:
    """Put the tensors of the file `path` into `module`, all and no others, in float32 where it was stored shorter.

    `besides`: names in the file that are not of the network. Of tensors that share their memory one is enough: LeRobot
    and transformers leave the others out. Raises InputError naming the tensor.
    """
    names = set(tensor_names(path)) - set(besides)
    state = module.state_dict()
    stored = {value.data_ptr() for name, value in state.items() if name in names and value.numel()}
    missing = sorted(name for name in state.keys() - names if state[name].data_ptr() not in stored)
    extra = sorted(names - state.keys())
    if missing or extra:
        problem = (
            f"lacks tensor {missing[0]}" if missing else f"has tensor {extra[0]}, which the config has no place for"
        )
        raise InputError(problem, where=str(path), hint=f"{CONFIG} and {WEIGHTS} must come from the same checkpoint")
    for name, tensor in read_tensors(path, sorted(names)):
        want = state[name]
        exact = tensor.dtype == want.dtype or (tensor.dtype in _EXACT and want.dtype == torch.float32)
        if tensor.shape != want.shape or not exact:
            raise InputError(
                f"tensor {name} is {words(tensor)}, the config asks for {words(want)}",
                where=str(path),
                hint=f"{CONFIG} and {WEIGHTS} must come from the same checkpoint",
            )
        with torch.no_grad():
            want.copy_(tensor)


def words(tensor: torch.Tensor) -> str:
    """Dtype and shape for people."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
