"""Channel pruning: hidden widths really shrink (filters of smallest L1 norm go; Li et al., 2017, arXiv:1608.08710)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vlaopt.errors import InputError, StageError
from vlaopt.pruning.cost import Cost, measure_cost
from vlaopt.pruning.network import (
    Examples,
    Network,
    component_at,
    refuse_non_finite,
    restore_modes,
    working_copy,
)
from vlaopt.pruning.report import KeptWidth, LayerReport, PruneReport
from vlaopt.pruning.scopes import ScopeAmount, select
from vlaopt.pruning.widths import Width, WidthGraph, output_tensors, trace_widths

_TOLERANCE = 1e-4
"""Largest difference, relative to the largest output, that reordered FP32 sums may make."""


@dataclass(frozen=True)
class _Ask:
    """What is asked of a component: the amount by layer path, and the multiple that widths keep."""

    amounts: Mapping[str, float]
    round_to: int


def prune_channels(
    network: Network,
    rules: Sequence[ScopeAmount],
    *,
    components: Examples,
    exclude: Sequence[str] = (),
    round_to: int = 8,
) -> tuple[Network, PruneReport]:
    """A copy of the network whose hidden widths in scope are narrower by the amount asked, and what was removed.

    Hidden widths are those of inverted residuals (expand, depthwise, squeeze-excite), of squeeze-excite itself, of
    MLPs, of convolutions behind an activation. Residual widths, inputs and outputs of every component stay: each entry
    of `components` is traced and shrunk by itself. A scope means the layers that make a width; a width made by several
    layers shrinks when all of them are in scope, by the smallest amount asked of them. What remains is rounded to the
    nearest multiple of `round_to` channels, and is at least `round_to`. The channels that go have the smallest L1 norm
    over the layers that make and read them.

    Every width is checked as it shrinks: the outputs must be those of the wider network with the consumers' weights for
    the removed channels at zero. Raises InputError for a scope that matches nothing or in which nothing can shrink and
    for weights with NaN or Inf; StageError where a component cannot be traced or the check fails.
    """
    if round_to < 1:
        raise InputError(f"round_to {round_to} is not a positive number of channels")
    pruned = working_copy(network)
    layers = _layers(pruned, components)
    asked = select(list(layers), rules, exclude)
    refuse_non_finite({f"{path}.weight": layer.weight for path, layer in layers.items()})
    before = measure_cost(pruned, components)
    widths_before = {path: _outputs(layer) for path, layer in layers.items()}

    shrunk, kept = 0, []
    for path, inputs in components.items():
        count, left_alone = _prune_component(component_at(pruned, path), inputs, path, _Ask(asked, round_to))
        shrunk += count
        kept += left_alone
    order = list(layers)
    kept.sort(key=lambda width: order.index(width.scope))
    if not shrunk and any(asked.values()):
        raise InputError(
            "no width in scope can shrink by the amount asked",
            hint="; ".join(f"{width.scope}: {width.reason}" for width in kept[:3]) or "no hidden width is in scope",
        )
    after = measure_cost(pruned, components)
    restore_modes(pruned, network)
    reports = tuple(_layer_reports(layers, widths_before, asked, before, after))
    return pruned, _report(rules, reports, kept, before, after)


def _layers(network: nn.Module, components: Examples) -> dict[str, nn.Linear | _ConvNd]:
    """The convolutions and linear layers of all components, by path in the network."""
    layers: dict[str, nn.Linear | _ConvNd] = {}
    for prefix in components:
        for inside, module in component_at(network, prefix).named_modules():
            if isinstance(module, (nn.Linear, _ConvNd)):
                layers[".".join(part for part in (prefix, inside) if part)] = module
    return layers


def _prune_component(
    component: nn.Module, inputs: Sequence[Tensor], prefix: str, ask: _Ask
) -> tuple[int, list[KeptWidth]]:
    """Shrinks the component's widths in place: how many shrank, and those in scope that were left alone, and why."""
    if not any(prefix == "" or path == prefix or path.startswith(f"{prefix}.") for path in ask.amounts):
        return 0, []
    graph = trace_widths(component, inputs, prefix)
    # Everything is decided on the network as it came; shrinking changes the layers that widths are found and ranked by.
    wanted = [width for width in graph.widths() if any(member.path in ask.amounts for member in width.producers)]
    decisions = [(width, _channels_to_remove(width, ask)) for width in wanted]
    kept = [KeptWidth(scope=width.path, reason=why) for width, why in decisions if isinstance(why, str)]
    for width, removed in decisions:
        if not isinstance(removed, str):
            _shrink_checked(graph, width, removed, inputs)
    return len(decisions) - len(kept), kept


def _channels_to_remove(width: Width, ask: _Ask) -> list[int] | str:
    """The channels of smallest norm, as many as asked, or why there are none."""
    if width.obstacle:
        return width.obstacle
    outside = [member.path for member in width.producers if member.path not in ask.amounts]
    if outside:
        return f"shared with '{outside[0]}', which is out of scope"
    amount = min(ask.amounts[member.path] for member in width.producers)
    remaining = remaining_width(width.size, amount, ask.round_to)
    if remaining == width.size:
        return f"{width.size} channels less {amount:.3g} of them round to {width.size} in multiples of {ask.round_to}"
    order = torch.argsort(_norms(width), stable=True)
    return sorted(int(index) for index in order[: width.size - remaining])


def remaining_width(size: int, amount: float, round_to: int) -> int:
    """`size * (1 - amount)` to the nearest multiple of `round_to` (halves up), within `round_to` and `size`."""
    nearest = math.floor(size * (1.0 - amount) / round_to + 0.5) * round_to
    return min(size, max(nearest, round_to))


def _norms(width: Width) -> Tensor:
    """L1 norm of each channel, float64 [size]: the mean over layers, each scaled to mean 1 so that all weigh alike.

    A channel counts by the filters that make it and by the weights that read it. Behind a batch norm the norm's scale
    stands for the filters: their own size says nothing there, as the norm divides it out (Liu et al., 2017,
    arXiv:1708.06519).
    """
    scaled = [member for member in width.norms if member.layer.weight is not None]
    members = [(member, _filters(member.layer)) for member in scaled or width.producers]
    members += [(member, _readers(member.layer)) for member in width.consumers]
    total = torch.zeros(width.size, dtype=torch.float64)
    for member, norms in members:
        scores = torch.zeros(width.size, dtype=torch.float64)
        scores.index_add_(0, torch.tensor(member.roots), norms[list(member.channels)])
        total += scores / scores.mean().clamp(min=torch.finfo(torch.float64).tiny)
    return total / len(members)


def _filters(layer: nn.Module) -> Tensor:
    """L1 norm by output channel, float64."""
    weight: Tensor = layer.weight.detach().double().abs()
    return weight.reshape(len(weight), -1).sum(1)


def _readers(layer: nn.Module) -> Tensor:
    """L1 norm by input channel, float64."""
    weight: Tensor = layer.weight.detach().double().abs()
    return weight.transpose(0, 1).flatten(1).sum(1)


def _shrink_checked(graph: WidthGraph, width: Width, removed: Sequence[int], inputs: Sequence[Tensor]) -> None:
    """Shrinks a width and proves it: same outputs as with the consumers' weights for those channels at zero."""
    removal = graph.removal(width, removed)
    with torch.no_grad():
        for member in removal.consumers:
            member.layer.weight[:, list(member.channels)] = 0.0
        expected = output_tensors(graph.component(*inputs))
        try:
            removal.apply()
            got = output_tensors(graph.component(*inputs))
        except Exception as error:
            raise _wrong(width, str(error)) from error
    for want, have in zip(expected, got, strict=True):
        if want.shape != have.shape:
            raise _wrong(width, f"an output went from {list(want.shape)} to {list(have.shape)}")
        if want.is_floating_point() and want.numel():
            difference = float((want - have).abs().max())
            if not difference <= _TOLERANCE * max(float(want.abs().max()), 1e-3):  # `not <=` refuses NaN too
                raise _wrong(width, f"outputs differ by {difference:.3g} from the network with those channels at zero")


def _wrong(width: Width, what: str) -> StageError:
    return StageError(
        f"the channels of '{width.path}' cannot be removed: {what}",
        hint=f"its layers are wired in a way that tracing does not follow; add '{width.path}' to exclude",
    )


def _outputs(layer: nn.Linear | _ConvNd) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _layer_reports(
    layers: Mapping[str, nn.Linear | _ConvNd],
    widths_before: Mapping[str, int],
    asked: Mapping[str, float],
    before: Cost,
    after: Cost,
) -> Iterator[LayerReport]:
    """One report for every layer that lost parameters, in the network's order."""
    for path, layer in layers.items():
        if before.parameters_of[path] == after.parameters_of[path]:
            continue
        yield LayerReport(
            scope=path,
            amount=asked.get(path, 0.0),
            before=widths_before[path],
            after=_outputs(layer),
            zeros=layer.weight.numel() - int(layer.weight.count_nonzero()),
            parameters_before=before.parameters_of[path],
            parameters_after=after.parameters_of[path],
            macs_before=before.macs_of.get(path, 0),
            macs_after=after.macs_of.get(path, 0),
        )


def _report(
    rules: Sequence[ScopeAmount],
    layers: tuple[LayerReport, ...],
    kept: Sequence[KeptWidth],
    before: Cost,
    after: Cost,
) -> PruneReport:
    parameters = sum(layer.parameters_after for layer in layers)
    return PruneReport(
        method="channels",
        unit="channels",
        amount=max(rule.amount for rule in rules),
        layers=layers,
        kept=tuple(kept),
        parameters_before=before.parameters,
        parameters_after=after.parameters,
        macs_before=before.macs,
        macs_after=after.macs,
        zero_fraction=sum(layer.zeros for layer in layers) / parameters if parameters else 0.0,
    )
