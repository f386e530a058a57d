"""Policies: adapters that say how a checkpoint splits into components. The one interface a third party implements.

An adapter is found by the recipe's `policy.type`; a third party adds one by the entry point group `vlaopt.policies`,
whose value is an object that keeps to `PolicyAdapter`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from vlaopt.artifact.policy_spec import PolicySpec, TensorSpec
from vlaopt.errors import InputError
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.loop import Tap

BUILT_IN = {
    "act": "vlaopt.policies.lerobot.act",
    "diffusion": "vlaopt.policies.lerobot.diffusion",
    "edge-vla": "vlaopt.policies.edge_vla.adapter",
    "smolvla": "vlaopt.policies.lerobot.smolvla",
}


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
        """The modules behind the spec's components. Each takes and gives tensors in the order its component lists.

        One that only wraps parts of `module` shares their parameters.
        """
        ...

    def preprocess(self, observation: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The tensors that the spec's processors give for one observation, by the policy's own processing."""
        ...

    def predict_chunk(
        self, observation: Mapping[str, Any], noise: np.ndarray | None = None, *, tap: Tap | None = None
    ) -> np.ndarray:
        """The chunk, float32 [chunk_size, action_dim], by the policy's own forward pass in the robot's units.

        `noise` as the runtime takes it; without one the policy draws its own. `tap(component, inputs, outputs)` sees
        what the policy's own forward pass computes at the place of each component's call, as arrays of its own: every
        call, in order, the loop's step once per step. It must not see what `components()` compute: the comparison of
        the two is what finds a wrong cut. (Where a component is a module of the network, `hooked` does it.)
        """
        ...

    def assets(self) -> dict[str, bytes]:
        """The files the processors need, by name: statistics, tokenizer."""
        ...

    def save(self, folder: Path) -> None:
        """Write a checkpoint that the adapter's `load` reads back, with the sizes the layers have now."""
        ...

    def replace(self, module: nn.Module) -> EagerPolicy:
        """The same policy around another network, for instance a pruned one."""
        ...


@contextmanager
def hooked(spec: PolicySpec, modules: Mapping[str, nn.Module], tap: Tap | None) -> Iterator[None]:
    """Within, `tap` sees every call of `modules`, the spec's components by name; nothing happens without one."""
    handles = []

    def hook(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...], Any], None]:
        def seen(_: nn.Module, given: tuple[torch.Tensor, ...], result: Any) -> None:
            assert tap is not None
            results = result if isinstance(result, tuple) else (result,)
            component = spec.components[name]
            tap(
                name,
                _named(component.inputs, given, f"component {name} takes"),
                _named(component.outputs, results, f"component {name} gives"),
            )

        return seen

    if tap is not None:
        handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _named(tensors: Sequence[TensorSpec], values: Sequence[torch.Tensor], what: str) -> dict[str, np.ndarray]:
    if len(tensors) != len(values):
        hint = "list them in the order of its forward pass, which is called without keywords"
        raise InputError(f"{what} {len(values)} tensors, its spec lists {len(tensors)}", hint=hint)
    return {tensor.name: value.detach().numpy().copy() for tensor, value in zip(tensors, values, strict=True)}


class PolicyAdapter(Protocol):
    """Loads the checkpoints of one type of policy."""

    def load(
        self, checkpoint: Path, hub_overrides: Mapping[str, Path], config_overrides: Mapping[str, Any]
    ) -> EagerPolicy:
        """The policy in `checkpoint`, on the CPU, in evaluation mode.

        `hub_overrides`: local folders in place of what the policy would fetch from a hub, by the field of its config;
        `config_overrides`: other values for fields of its config. Raises InputError naming the file or field and what
        is wrong with it, EnvironmentProblem when a library it needs is not installed.
        """
        ...


def load(recipe: Recipe, checkpoint: Path | None = None) -> EagerPolicy:
    """The policy that `recipe` names, from its own checkpoint or another one of the same policy."""
    wanted = recipe.policy
    hub = {field: recipe.locate(path) for field, path in wanted.hub_overrides.items()}
    return get(wanted.type).load(checkpoint or recipe.locate(wanted.checkpoint), hub, wanted.config_overrides)


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
