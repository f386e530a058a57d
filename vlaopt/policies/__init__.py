"""Policies: adapters that say how a checkpoint splits into components. The one interface a third party implements.

An adapter is found by the recipe's `policy.type`; a third party adds one by the entry point group `vlaopt.policies`,
whose value is an object that keeps to `PolicyAdapter`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.errors import InputError

BUILT_IN = {"edge-vla": "vlaopt.policies.edge_vla.adapter"}


class EagerPolicy(Protocol):
    """A policy in eager PyTorch: the reference, and what the components are cut from."""

    @property
    def spec(self) -> PolicySpec:
        """The policy as data, with the sizes its layers have now."""
        ...

    @property
    def module(self) -> nn.Module:
        """The whole network; scopes of recipes are paths of its modules."""
        ...

    def components(self) -> Mapping[str, nn.Module]:
        """The modules behind the spec's components. Each takes and gives tensors in the order its component lists."""
        ...

    def preprocess(self, observation: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The components' input tensors for one observation, by the policy's own processing."""
        ...

    def predict_chunk(self, observation: Mapping[str, Any], noise: np.ndarray | None = None) -> np.ndarray:
        """The chunk, float32 [chunk_size, action_dim], by the policy's own forward pass in the robot's units."""
        ...

    def assets(self) -> dict[str, bytes]:
        """The files the processors need, by name: statistics, tokenizer."""
        ...

    def checkpoint(self) -> dict[str, bytes]:
        """The files of a checkpoint that the adapter's `load` reads back, with the sizes the layers have now."""
        ...

    def replace(self, module: nn.Module) -> EagerPolicy:
        """The same policy around another network, for instance a pruned one."""
        ...


class Queue:
    """An eager policy as a robot drives it: one action at a time, a new chunk every `n_action_steps`."""

    def __init__(self, eager: EagerPolicy) -> None:
        self._eager = eager
        self.reset()

    @property
    def needs_observation(self) -> bool:
        """Whether the next `predict` looks at its observation."""
        return not self._actions

    def reset(self) -> None:
        """A new episode: forget the rest of the chunk."""
        self._actions: deque[np.ndarray] = deque()

    def predict(self, observation: Mapping[str, Any]) -> np.ndarray:
        """The next action, float32 [action_dim], in the robot's units."""
        if not self._actions:
            self._actions.extend(self._eager.predict_chunk(observation)[: self._eager.spec.chunk.n_action_steps])
        return self._actions.popleft()


class PolicyAdapter(Protocol):
    """Loads the checkpoints of one type of policy."""

    def load(self, checkpoint: Path, hub_overrides: Mapping[str, str]) -> EagerPolicy:
        """The policy in `checkpoint`. Raises InputError naming the file and what is wrong with it."""
        ...


def names() -> list[str]:
    """The policy types known here."""
    return sorted({*BUILT_IN, *(entry.name for entry in importlib.metadata.entry_points(group="vlaopt.policies"))})


def get(type_name: str) -> PolicyAdapter:
    """The adapter for a policy type. Raises InputError for an unknown one, naming the nearest."""
    if type_name in BUILT_IN:
        adapter: PolicyAdapter = importlib.import_module(BUILT_IN[type_name]).ADAPTER
        return adapter
    for entry in importlib.metadata.entry_points(group="vlaopt.policies"):
        if entry.name == type_name:
            plugged: PolicyAdapter = entry.load()
            return plugged
    near = difflib.get_close_matches(type_name, names(), 1)
    known = f"known types: {', '.join(names())}"
    raise InputError(f"unknown policy type {type_name!r}", hint=f"did you mean {near[0]!r}? {known}" if near else known)
