"""What a network costs: parameters and multiply-accumulates, whole and by layer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vlaopt.errors import StageError
from vlaopt.pruning.network import Examples, component_at


@dataclass(frozen=True)
class Cost:
    """Parameters, and MACs of one call of every component, as totals and by module path."""

    parameters: int
    macs: int
    parameters_of: Mapping[str, int]
    macs_of: Mapping[str, int]


def measure_cost(module: nn.Module, components: Examples, wrappers: Mapping[str, nn.Module] | None = None) -> Cost:
    """Counts what `components` cost on their examples; `module` is in eval mode.

    A component that is no module of the network but wraps parts of it is among the `wrappers`, by its name in
    `components`; its layers count under their paths in `module`, over all components that call them.

    MACs are half the FLOPs of `torch.utils.flop_counter`: convolutions and matrix products, an LSTM by its gates;
    activations, norms and pooling count nothing. Raises StageError where a component cannot run its example.
    """
    macs_of: dict[str, int] = {}
    total = 0
    paths = {id(child): path for path, child in module.named_modules()}
    for path, inputs in components.items():
        wrapper = (wrappers or {}).get(path)
        component = wrapper or component_at(module, path)
        counts = _component_macs(component, inputs, path)
        total += counts.pop("Global", 0)
        for name, macs in counts.items():
            inside = name.partition(".")[2]  # the counter starts every name with the root's class
            place = ".".join(part for part in (path, inside) if part)
            if wrapper is not None:
                place = paths.get(id(wrapper.get_submodule(inside)), place)
            macs_of[place] = macs_of.get(place, 0) + macs
    parameters_of = {path: sum(p.numel() for p in child.parameters()) for path, child in module.named_modules()}
    return Cost(parameters_of[""], total, parameters_of, macs_of)


def _component_macs(component: nn.Module, inputs: Sequence[Tensor], path: str) -> dict[str, int]:
    with warnings.catch_warnings():
        # torch's own switch for oneDNN warns about Intel GPUs whenever it is used.
        warnings.filterwarnings("ignore", message="TF32 acceleration")
        # oneDNN runs a whole LSTM as one operator, which the counter does not know.
        with torch.backends.mkldnn.flags(enabled=False), torch.no_grad(), FlopCounterMode(display=False) as counter:
            try:
                component(*inputs)
            except Exception as error:
                name = path or type(component).__name__
                raise StageError(f"component '{name}' cannot run its example inputs: {error}") from error
    return {name: sum(counts.values()) // 2 for name, counts in counter.get_flop_counts().items()}
