"""Finds a component's hidden widths: the channels that can go without any other layer noticing. Removes nothing itself.

A width is a set of channels that several layers share: those that make it (producers) and those that read it
(consumers). torch-pruning follows it through the autograd graph (DepGraph, Fang et al., CVPR 2023); this file decides
which of them are *hidden*: behind an activation, in no residual addition, no input and no output of the component.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from vlaopt.errors import StageError
from vlaopt.optional import require

_ACTIVATION = re.compile(r"(Relu|Hardswish|Hardtanh|Silu|Gelu|Elu|Mish|Softplus|Tanh|Sigmoid|Hardsigmoid)Backward")
_SUM = re.compile(r"(Add|Sub)Backward")
_PATH_OPERATORS = ("ELEMENTWISE", "RESHAPE", "CONCAT", "EXPAND")


@dataclass(frozen=True)
class Member:
    """A layer and the channels a width has in it: `channels[i]` of the layer is channel `roots[i]` of the width."""

    path: str
    layer: nn.Module
    channels: tuple[int, ...]
    roots: tuple[int, ...]


@dataclass(frozen=True)
class Width:
    """Channels shared by layers; `obstacle` says why they cannot go, or is None.

    `path` names the producer that the network lists first. Paths are those of the whole network.
    """

    path: str
    size: int
    producers: tuple[Member, ...]
    consumers: tuple[Member, ...]
    norms: tuple[Member, ...]
    obstacle: str | None


@dataclass(frozen=True)
class Removal:
    """Channels about to go: the consumers with the input channels they will lose."""

    consumers: tuple[Member, ...]
    _group: Any

    def apply(self) -> None:
        """Takes the channels out of every layer that shares them, in place."""
        self._group.prune(record_history=False)


@dataclass(frozen=True)
class WidthGraph:
    """The widths of one component, as traced on its example inputs, and the means to shrink them."""

    component: nn.Module
    _graph: Any
    _paths: Mapping[nn.Module, str]

    def widths(self) -> Iterator[Width]:
        """Every width that a convolution or linear layer makes, in order of tracing, each once."""
        for group in self._graph.get_all_groups(root_module_types=[_ConvNd, nn.Linear]):
            yield self._width(group)

    def removal(self, width: Width, channels: Sequence[int]) -> Removal:
        """What goes when `channels` of a width go, on the component as it is now. Nothing is removed yet."""
        producer = width.producers[0].layer
        pruner = self._graph.get_pruner_of_module(producer)
        group = self._graph.get_pruning_group(producer, pruner.prune_out_channels, list(channels))
        return Removal(self._members(group)[1], group)

    def _members(self, group: Any) -> tuple[tuple[Member, ...], tuple[Member, ...], tuple[Member, ...]]:
        """The producers, consumers and norms of a group of torch-pruning."""
        producers: list[Member] = []
        consumers: list[Member] = []
        norms: list[Member] = []
        for item in group:
            layer = item.dep.target.module
            if not isinstance(layer, (_ConvNd, nn.Linear, _BatchNorm)):
                continue
            member = Member(self._paths[layer], layer, tuple(item.idxs), tuple(item.root_idxs))
            if isinstance(layer, _BatchNorm):
                norms.append(member)
            elif self._graph.is_out_channel_pruning_fn(item.dep.handler):
                producers.append(member)
            else:
                consumers.append(member)
        return tuple(producers), tuple(consumers), tuple(norms)

    def _width(self, group: Any) -> Width:
        producers, consumers, norms = self._members(group)
        obstacle = self._obstacle([item.dep.target for item in group], consumers)
        order = list(self._paths.values())
        first = min((member.path for member in producers), key=order.index)
        return Width(first, len(producers[0].channels), producers, consumers, norms, obstacle)

    def _obstacle(self, nodes: Sequence[Any], consumers: Sequence[Member]) -> str | None:
        found = next((reason for node in nodes if (reason := self._node_obstacle(node))), None)
        if found:
            return found
        if not consumers:
            return "no layer reads it"
        if not any(_ACTIVATION.search(_operator(node)) for node in nodes):
            return "no activation behind it: it is a block's own width, not a hidden one"
        return None

    def _node_obstacle(self, node: Any) -> str | None:
        layer = node.module
        if node.type.name == "OUTPUT":
            return "it is an output of the component"
        if isinstance(layer, _Input):
            return "it is tied to an input of the component"
        if isinstance(layer, _ConvNd):
            depthwise = layer.groups == layer.in_channels == layer.out_channels
            plain = layer.groups == 1 and not layer.transposed
            return None if plain or depthwise else f"'{self._paths[layer]}' is a grouped or transposed convolution"
        if isinstance(layer, (nn.Linear, _BatchNorm)):
            return None
        if node.type.name not in _PATH_OPERATORS:
            return f"it passes {self._paths.get(layer) or node.type.name.lower()} ({type(layer).__name__.lstrip('_')})"
        if _SUM.search(_operator(node)) and len(node.inputs) > 1:
            return "it passes an addition of two streams: a residual width"
        return None


def trace_widths(component: nn.Module, inputs: Sequence[Tensor], prefix: str) -> WidthGraph:
    """Traces a component in eval mode on its example inputs; parameters are left requiring gradients.

    Raises EnvironmentProblem without torch-pruning, StageError where the component cannot be traced.
    """
    library = require("torch_pruning", "build")
    component.requires_grad_(True)
    bounded = _Bounded(component, inputs)
    try:
        with torch.enable_grad():
            graph = library.DependencyGraph().build_dependency(
                bounded, list(inputs), verbose=False, customized_pruners={_Input: _InputWidth()}
            )
    except Exception as error:
        name = prefix or type(component).__name__
        raise StageError(f"the layers of component '{name}' cannot be traced for pruning: {error}") from error
    paths = {layer: ".".join(part for part in (prefix, path) if part) for path, layer in component.named_modules()}
    return WidthGraph(component, graph, paths)


class _Input(nn.Module):  # type: ignore[misc]
    """Stands in the traced graph for one input of the component, of which autograd alone would show nothing."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.width = example.shape[-1 if example.dim() == 3 else 1] if example.dim() > 1 else None

    def forward(self, example: Tensor) -> Tensor:
        return example.detach().requires_grad_().clone() if example.is_floating_point() else example


class _InputWidth:
    """What torch-pruning asks about a kind of layer, answered for inputs: a width that never changes."""

    pruning_dim = 1

    def prune_out_channels(self, layer: _Input, channels: Sequence[int]) -> _Input:
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: _Input) -> int | None:
        return layer.width

    get_in_channels = get_out_channels

    def get_out_channel_groups(self, layer: _Input) -> int:
        return 1

    get_in_channel_groups = get_out_channel_groups


class _Bounded(nn.Module):  # type: ignore[misc]
    """A component between marked inputs and outputs, so that tracing knows where it begins and ends."""

    def __init__(self, component: nn.Module, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.component = component
        self.inputs = nn.ModuleList(_Input(example) for example in inputs)

    def forward(self, *examples: Tensor) -> list[Tensor]:
        output = self.component(*(mark(example) for mark, example in zip(self.inputs, examples, strict=True)))
        return [tensor.clone() for tensor in output_tensors(output) if tensor.grad_fn is not None]


def output_tensors(output: object) -> list[Tensor]:
    """The tensors of a component's output: one, or those of a tuple, list or dict, in order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = tuple(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for part in output for tensor in output_tensors(part)]
    raise StageError(f"a component gave {type(output).__name__} where tensors were expected")


def _operator(node: Any) -> str:
    """The autograd name of the operator a node stands for, such as `ReluBackward0`."""
    return str(node.grad_fn.name())
