"""L1 unstructured pruning: the smallest weights become plain zeros (Han et al., 2015, arXiv:1506.02626)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vlaopt.errors import InputError
from vlaopt.pruning.cost import Cost, measure_cost
from vlaopt.pruning.network import Examples, Network, refuse_non_finite, restore_modes, working_copy
from vlaopt.pruning.report import LayerReport, PruneReport
from vlaopt.pruning.scopes import ScopeAmount, select

Ranking = Literal["per-layer", "global"]


def prune_weights(
    network: Network,
    rules: Sequence[ScopeAmount],
    *,
    components: Examples,
    wrappers: Mapping[str, nn.Module] | None = None,
    exclude: Sequence[str] = (),
    ranking: Ranking = "per-layer",
) -> tuple[Network, PruneReport]:
    """A copy of the network in which `round(amount * n)` weights of smallest magnitude are zero.

    Scopes match the weight tensors of Linear, convolutions, LSTM and Embedding by full name
    (`language.lstm.weight_hh_l0`) or by a module above it; biases and norms are never touched. "per-layer" ranks every
    tensor by itself; "global" ranks together all tensors of which the same amount is asked. Of equal magnitudes the
    earlier weight goes first. Shapes, dtypes and the state dict's keys stay; a tensor shared by two layers is pruned
    once, under its first name. `components` and `wrappers` are for the costs: see `measure_cost`.

    Raises InputError for a scope that matches nothing, for a weight with NaN or Inf, and for a tensor that would become
    all zeros, each by name.
    """
    pruned = working_copy(network)
    weights = _prunable_weights(pruned)
    asked = select(list(weights), rules, exclude)
    chosen = {path: weights[path] for path in asked}
    refuse_non_finite(chosen)
    before = {path: int(weight.count_nonzero()) for path, weight in chosen.items()}

    masks = _masks(chosen, asked, ranking)
    _refuse_empty(masks)
    with torch.no_grad():
        for path, mask in masks.items():
            chosen[path].masked_fill_(~mask, 0.0)

    # Zeros cost what other weights cost, so the network that wrappers call may stand for its copy.
    cost = measure_cost(network if wrappers else pruned, components, wrappers)
    restore_modes(pruned, network)
    layers = tuple(_layer_report(path, asked[path], before[path], chosen[path], cost) for path in asked)
    total = sum(weight.numel() for weight in chosen.values())
    return pruned, PruneReport(
        method="l1-unstructured",
        unit="weights",
        amount=max(rule.amount for rule in rules),
        layers=layers,
        parameters_before=cost.parameters,
        parameters_after=cost.parameters,
        macs_before=cost.macs,
        macs_after=cost.macs,
        zero_fraction=sum(layer.zeros for layer in layers) / total,
    )


def _prunable_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weight matrices of every layer of a prunable kind, by full parameter name, shared tensors once."""
    weights: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path, module in network.named_modules():
        if not isinstance(module, (nn.Linear, _ConvNd, nn.Embedding, nn.LSTM)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("weight") and id(parameter) not in seen:
                seen.add(id(parameter))
                weights[f"{path}.{name}" if path else name] = parameter
    return weights


def _masks(weights: Mapping[str, Tensor], asked: Mapping[str, float], ranking: Ranking) -> dict[str, Tensor]:
    """True where a weight stays, for every tensor, in the tensor's shape."""
    masks: dict[str, Tensor] = {}
    for amount, paths in _pools(asked, ranking):
        magnitudes = torch.cat([weights[path].detach().abs().flatten().float() for path in paths])
        kept = torch.ones_like(magnitudes, dtype=torch.bool)
        # A stable sort, because topk breaks ties as it likes and the same recipe must give the same bytes.
        kept[torch.argsort(magnitudes, stable=True)[: round(amount * magnitudes.numel())]] = False
        parts = kept.split([weights[path].numel() for path in paths])
        masks.update({path: part.view_as(weights[path]) for path, part in zip(paths, parts, strict=True)})
    return masks


def _pools(asked: Mapping[str, float], ranking: Ranking) -> list[tuple[float, list[str]]]:
    """Which tensors are ranked together, with the amount asked of them."""
    if ranking == "per-layer":
        return [(amount, [path]) for path, amount in asked.items()]
    pools: dict[float, list[str]] = {}
    for path, amount in asked.items():
        pools.setdefault(amount, []).append(path)
    return list(pools.items())


def _refuse_empty(masks: Mapping[str, Tensor]) -> None:
    empty = [f"'{path}'" for path, mask in masks.items() if not bool(mask.any())]
    if empty:
        raise InputError(
            f"pruning would leave only zeros in {', '.join(empty)}", hint="lower the amount, or exclude it"
        )


def _layer_report(path: str, amount: float, before: int, weight: Tensor, cost: Cost) -> LayerReport:
    after = int(weight.count_nonzero())
    macs = cost.macs_of.get(path.rpartition(".")[0], 0)
    return LayerReport(
        scope=path,
        amount=amount,
        before=before,
        after=after,
        zeros=weight.numel() - after,
        parameters_before=weight.numel(),
        parameters_after=weight.numel(),
        macs_before=macs,
        macs_after=macs,
    )


@contextmanager
def zeros_held(network: nn.Module) -> Iterator[None]:
    """Within the block, training leaves the weights that are zero now at zero: their gradients are zeroed.

    True for optimisers whose step from a zero weight with a zero gradient is zero, as SGD's and Adam's is.
    """
    handles = []
    for parameter in network.parameters():
        kept = parameter.detach() != 0
        if not bool(kept.all()) and parameter.requires_grad:
            handles.append(parameter.register_hook(lambda gradient, kept=kept: gradient * kept))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
