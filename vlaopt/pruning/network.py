"""The network as every kind of pruning meets it: a copy to work on, its components, weights that can be ranked."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from vlaopt.errors import InputError

Network = TypeVar("Network", bound=nn.Module)

Examples = Mapping[str, Sequence[Tensor]]
"""Example inputs of each component by its module path; the key "" is the whole network as one component."""


def working_copy(network: Network) -> Network:
    """A deep copy in eval mode: what pruning changes, so that the caller's network stays as it is."""
    duplicate = copy.deepcopy(network)
    duplicate.eval()
    return duplicate


def restore_modes(pruned: nn.Module, original: nn.Module) -> None:
    """Gives modules and parameters of `pruned` the training mode and `requires_grad` they have in `original`."""
    modules = dict(original.named_modules())
    for path, module in pruned.named_modules():
        module.training = modules[path].training
    parameters = dict(original.named_parameters())
    for path, parameter in pruned.named_parameters():
        parameter.requires_grad_(parameters[path].requires_grad)


def component_at(network: nn.Module, path: str) -> nn.Module:
    """The submodule at a path. Raises InputError where the network has none there."""
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        names = ", ".join(name for name, _ in network.named_children()) or "none"
        raise InputError(f"the policy has no component '{path}'", hint=f"its components: {names}") from error


def refuse_non_finite(weights: Mapping[str, Tensor]) -> None:
    """Raises InputError naming the first weight with NaN or Inf: magnitudes cannot rank it."""
    for path, weight in weights.items():
        if not bool(torch.isfinite(weight).all()):
            raise InputError(f"weight '{path}' holds NaN or Inf", hint="the checkpoint is damaged: export it again")
