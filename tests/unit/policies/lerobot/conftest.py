"""Tiny checkpoints of LeRobot's three policies, made once; and no network, whatever is loaded."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vlaopt import policies
from vlaopt.artifact.policy_spec import Component
from vlaopt.policies import EagerPolicy

KINDS = ("act", "diffusion", "smolvla")
Load = Callable[..., EagerPolicy]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reaches for a hub fails the test."""

    def refuse(*arguments: object, **named: object) -> None:
        raise AssertionError(f"reaches for the network: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints `act`, `diffusion` and `smolvla`, and `vlm`. Shared: not to be changed."""
    lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
    folder = tmp_path_factory.mktemp("lerobot")
    for kind in KINDS:
        lerobot.make(kind, folder / kind)
    return folder


@pytest.fixture(scope="session")
def load(checkpoints: Path) -> Load:
    """Loads a checkpoint, by default the shared one of its kind, with the shared VLM where it needs one."""

    def loaded(kind: str, path: Path | None = None, **config: Any) -> EagerPolicy:
        hub = {"vlm_model_name": checkpoints / "vlm"} if kind == "smolvla" else {}
        return policies.get(kind).load(path or checkpoints / kind, hub, config)

    return loaded


@pytest.fixture(scope="session")
def eagers(load: Load) -> dict[str, EagerPolicy]:
    """The three policies, loaded."""
    return {kind: load(kind) for kind in KINDS}


class ModuleSession:
    """A component in PyTorch as the runtime runs one: no export, no backend."""

    def __init__(self, module: torch.nn.Module, component: Component) -> None:
        self._module = module
        self._component = component

    def run(self, feeds: Mapping[str, np.ndarray], resident: object = ()) -> dict[str, np.ndarray]:
        with torch.no_grad():
            given = self._module(*(torch.from_numpy(feeds[tensor.name].copy()) for tensor in self._component.inputs))
        results = given if isinstance(given, tuple) else (given,)
        names = [tensor.name for tensor in self._component.outputs]
        return {name: value.numpy() for name, value in zip(names, results, strict=True)}
