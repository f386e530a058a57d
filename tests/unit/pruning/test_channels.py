"""Channel pruning makes hidden widths smaller, proves that it removed what it says, and leaves every other width."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlaopt.errors import EnvironmentProblem, InputError, StageError
from vlaopt.policies.edge_vla.config import Camera, reference_config
from vlaopt.policies.edge_vla.model import EdgeVLA, config_of
from vlaopt.pruning import PruneReport, ScopeAmount, prune_channels
from vlaopt.pruning.channels import remaining_width


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeeze: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, squeeze, 1), nn.Conv2d(squeeze, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * nn.functional.hardsigmoid(self.expand(torch.relu(self.reduce(mean))))


class Block(nn.Module):
    """MobileNetV3's inverted residual; `expand` is its hidden width."""

    def __init__(self, inputs: int, expand: int, out: int, squeeze: int) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(inputs, expand, 1, bias=False), nn.BatchNorm2d(expand), nn.Hardswish())
        self.depthwise = nn.Sequential(
            nn.Conv2d(expand, expand, 3, padding=1, groups=expand, bias=False), nn.BatchNorm2d(expand), nn.Hardswish()
        )
        self.se = SqueezeExcite(expand, squeeze) if squeeze else nn.Identity()
        self.project = nn.Sequential(nn.Conv2d(expand, out, 1, bias=False), nn.BatchNorm2d(out))
        self.residual = inputs == out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


Sizes = Sequence[tuple[int, int, int]]
"""Expand, out and squeeze width of each block."""


class Vision(nn.Module):
    def __init__(self, sizes: Sizes, hidden: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        outs = [16, *(out for _, out, _ in sizes)]
        self.blocks = nn.Sequential(*(Block(i, e, o, s) for i, (e, o, s) in zip(outs, sizes, strict=False)))
        self.mlp = nn.Sequential(nn.Linear(outs[-1], hidden), nn.GELU(), nn.Linear(hidden, 5))

    def forward(self, images: Tensor) -> Tensor:
        return self.mlp(self.blocks(self.stem(images)).mean((2, 3)))


SIZES: Sizes = ((32, 16, 8), (64, 24, 0), (96, 24, 24))
IMAGES = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def trained(network: nn.Module) -> nn.Module:
    """Random weights and random statistics: a norm left at its start would hide a channel that is mixed up."""
    generator = torch.Generator().manual_seed(7)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    return network.eval()


def vision(sizes: Sizes = SIZES) -> nn.Module:
    torch.manual_seed(3)
    return trained(Vision(sizes))


def prune(
    network: nn.Module, amount: float, scope: str = "*", **options: Sequence[str]
) -> tuple[nn.Module, PruneReport]:
    return prune_channels(network, [ScopeAmount(scope, amount)], components={"": (IMAGES,)}, **options)


def widths(report: PruneReport) -> dict[str, tuple[int, int]]:
    return {layer.scope: (layer.before, layer.after) for layer in report.layers if layer.before != layer.after}


def rows_kept(before: Tensor, after: Tensor) -> list[int]:
    return [index for index, row in enumerate(before) if any(torch.equal(row, other) for other in after)]


def test_the_hidden_width_of_an_inverted_residual_shrinks_in_all_its_layers() -> None:
    pruned, report = prune(vision(), 0.25, "blocks.2", exclude=["*.se.reduce"])
    assert widths(report) == {
        "blocks.2.expand.0": (96, 72),
        "blocks.2.depthwise.0": (96, 72),
        "blocks.2.se.expand": (96, 72),
    }
    depthwise = pruned.blocks[2].depthwise[0]
    assert depthwise.groups == depthwise.in_channels == depthwise.out_channels == 72
    assert pruned.blocks[2].se.reduce.in_channels == pruned.blocks[2].project[0].in_channels == 72
    assert pruned.blocks[2].expand[1].num_features == len(pruned.blocks[2].expand[1].running_var) == 72


def test_the_pruned_network_is_the_original_with_the_removed_channels_unread() -> None:
    network = vision()
    pruned, report = prune(network, 0.5)
    assert len(widths(report)) >= 8
    masked = copy.deepcopy(network)
    for before, after in zip(masked.blocks, pruned.blocks, strict=True):
        kept = rows_kept(before.expand[0].weight, after.expand[0].weight)
        assert len(kept) == after.expand[0].out_channels < before.expand[0].out_channels
        unread = [channel for channel in range(before.expand[0].out_channels) if channel not in kept]
        before.project[0].weight.data[:, unread] = 0.0
        if isinstance(before.se, SqueezeExcite):
            before.se.reduce.weight.data[:, unread] = 0.0
            squeezed = len(rows_kept(before.se.reduce.bias[:, None], after.se.reduce.bias[:, None]))
            assert squeezed == after.se.reduce.out_channels
            gone = [
                index
                for index in range(before.se.reduce.out_channels)
                if not bool((before.se.reduce.bias[index] == after.se.reduce.bias).any())
            ]
            before.se.expand.weight.data[:, gone] = 0.0
    kept = rows_kept(masked.mlp[0].weight, pruned.mlp[0].weight)
    masked.mlp[2].weight.data[:, [i for i in range(32) if i not in kept]] = 0.0
    torch.testing.assert_close(pruned(IMAGES), masked(IMAGES), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pruned(IMAGES), network(IMAGES), atol=1e-5)


def test_residual_widths_inputs_and_outputs_are_left_alone_and_the_report_says_why() -> None:
    pruned, report = prune(vision(), 0.5)
    assert [block.project[0].out_channels for block in pruned.blocks] == [16, 24, 24]
    assert (pruned.stem.out_channels, pruned.mlp[2].out_features) == (16, 5)
    reasons = {kept.scope: kept.reason for kept in report.kept}
    assert "residual" in reasons["stem"]
    assert "residual" in reasons["blocks.1.project.0"]
    assert "an output of the component" in reasons["mlp.2"]


def test_a_width_between_two_blocks_without_a_residual_is_not_a_hidden_one() -> None:
    _, report = prune(vision(((32, 24, 0), (64, 32, 0))), 0.5)
    assert "no activation" in {kept.scope: kept.reason for kept in report.kept}["blocks.0.project.0"]


def test_parameters_and_macs_are_counted_before_and_after() -> None:
    network = vision()
    pruned, report = prune(network, 0.5, "mlp")
    assert report.parameters_before == sum(p.numel() for p in network.parameters())
    assert report.parameters_after == sum(p.numel() for p in pruned.parameters())
    assert report.macs_before - report.macs_after == len(IMAGES) * 16 * (24 + 5)
    first, last = report.layers
    assert (first.scope, first.before, first.after, first.macs_before, first.macs_after) == ("mlp.0", 32, 16, 1536, 768)
    assert (last.scope, last.before, last.after, last.parameters_after) == ("mlp.2", 5, 5, 16 * 5 + 5)


def test_the_channels_of_smallest_norm_go() -> None:
    network = vision()
    with torch.no_grad():
        network.mlp[0].weight[3:19].mul_(1e-4)
        network.mlp[2].weight[:, 3:19].mul_(1e-4)
    pruned, _ = prune(network, 0.5, "mlp")
    assert rows_kept(network.mlp[0].weight, pruned.mlp[0].weight) == [0, 1, 2, *range(19, 32)]


def test_behind_a_norm_a_channel_counts_by_the_norms_scale_not_by_its_filter() -> None:
    network = vision()
    block = network.blocks[1]
    with torch.no_grad():
        block.expand[0].weight[:32].mul_(1e-4)
        block.expand[1].running_var[:32].mul_(1e-8)
        for norm in (block.expand[1], block.depthwise[1]):
            norm.weight[32:].mul_(1e-2)
    pruned, _ = prune(network, 0.5, "blocks.1")
    assert rows_kept(block.expand[0].weight, pruned.blocks[1].expand[0].weight) == list(range(32))


def test_each_scope_has_its_own_amount() -> None:
    rules = [ScopeAmount("*", 0.0), ScopeAmount("mlp", 0.5), ScopeAmount("blocks.1", 0.25)]
    _, report = prune_channels(vision(), rules, components={"": (IMAGES,)})
    assert widths(report) == {"blocks.1.expand.0": (64, 48), "blocks.1.depthwise.0": (64, 48), "mlp.0": (32, 16)}
    assert report.amount == 0.5


def test_an_excluded_layer_protects_the_width_it_shares() -> None:
    with pytest.raises(InputError, match="no width in scope can shrink") as caught:
        prune(vision(), 0.5, "blocks.2", exclude=["blocks.2.expand", "*.se.reduce"])
    assert "shared with 'blocks.2.expand.0', which is out of scope" in str(caught.value.hint)


def test_nothing_is_asked_and_nothing_changes() -> None:
    network = vision()
    pruned, report = prune(network, 0.0)
    assert report.layers == () and report.zero_fraction == 0.0
    assert torch.equal(pruned(IMAGES), network(IMAGES))


def test_an_amount_that_rounds_to_nothing_everywhere_is_refused() -> None:
    with pytest.raises(InputError, match="no width in scope can shrink") as caught:
        prune(vision(), 0.01, "mlp")
    assert "32 channels less 0.01" in str(caught.value.hint)


@pytest.mark.parametrize("round_to", [0, -8])
def test_a_multiple_below_one_is_refused(round_to: int) -> None:
    with pytest.raises(InputError, match="round_to"):
        prune_channels(vision(), [ScopeAmount("*", 0.5)], components={"": (IMAGES,)}, round_to=round_to)


def test_weights_with_nan_are_refused_by_name() -> None:
    network = vision()
    network.blocks[1].expand[0].weight.data[0] = float("nan")
    with pytest.raises(InputError, match=r"'blocks\.1\.expand\.0\.weight' holds NaN"):
        prune(network, 0.5)


def test_the_callers_network_mode_and_frozen_parameters_stay() -> None:
    network = vision().train()
    network.mlp.eval()
    network.mlp[0].weight.requires_grad_(False)
    before = copy.deepcopy(network.state_dict())
    pruned, _ = prune(network, 0.5)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [m.training for m in pruned.modules()] == [m.training for m in network.modules()]
    assert {k: p.requires_grad for k, p in pruned.named_parameters()} == {
        k: p.requires_grad for k, p in network.named_parameters()
    }


@given(size=st.integers(1, 1024), amount=st.floats(0.0, 0.999), round_to=st.integers(1, 32))
def test_a_remaining_width_is_a_multiple_near_what_was_asked(size: int, amount: float, round_to: int) -> None:
    remaining = remaining_width(size, amount, round_to)
    assert 1 <= remaining <= size
    assert remaining == size or remaining % round_to == 0
    assert remaining in (size, round_to) or abs(remaining - size * (1 - amount)) <= round_to / 2 + 1e-9


@given(
    sizes=st.lists(
        st.tuples(st.sampled_from([16, 24, 40]), st.sampled_from([16, 24]), st.sampled_from([0, 8, 16])),
        min_size=1,
        max_size=3,
    ),
    amount=st.sampled_from([0.4, 0.5, 0.7]),
    round_to=st.sampled_from([1, 4, 8]),
)
@settings(max_examples=12)
def test_any_such_network_keeps_its_outputs_shape_and_loads_where_its_sizes_are_built(
    sizes: Sizes, amount: float, round_to: int
) -> None:
    network = vision(sizes)
    rules, components = [ScopeAmount("*", amount)], {"": (IMAGES,)}
    pruned, report = prune_channels(network, rules, components=components, round_to=round_to)
    again, same = prune_channels(network, rules, components=components, round_to=round_to)
    assert report == same
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in pruned.state_dict().items())

    rebuilt = Vision(
        [
            (
                block.expand[0].out_channels,
                block.project[0].out_channels,
                block.se.reduce.out_channels if isinstance(block.se, SqueezeExcite) else 0,
            )
            for block in pruned.blocks
        ],
        pruned.mlp[0].out_features,
    ).eval()
    rebuilt.load_state_dict(pruned.state_dict())
    assert rebuilt(IMAGES).shape == network(IMAGES).shape
    assert torch.equal(rebuilt(IMAGES), pruned(IMAGES))
    assert report.macs_after < report.macs_before and report.parameters_after < report.parameters_before


class Wired(nn.Module):
    """Two linear layers of hidden width 32 with any wiring between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], read: int = 32, add: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(read, 32)
        self.between, self.add = between, add

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.between(self.first(x))
        return self.second(x + hidden if self.add else hidden)


def _prune_wired(network: nn.Module) -> tuple[nn.Module, PruneReport]:
    return prune_channels(network, [ScopeAmount("first", 0.5)], components={"": (torch.randn(2, 32),)})


def test_a_width_added_to_the_components_input_is_left_alone() -> None:
    with pytest.raises(InputError, match="no width in scope can shrink") as caught:
        _prune_wired(Wired(torch.relu, add=True))
    assert "first: it" in str(caught.value.hint)


def test_a_width_that_is_split_is_left_alone() -> None:
    def gated(x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=1)
        return value * torch.sigmoid(gate)

    with pytest.raises(InputError, match="no width in scope can shrink") as caught:
        _prune_wired(Wired(gated, read=16))
    assert "it passes split" in str(caught.value.hint)


def test_wiring_that_tracing_does_not_follow_is_found_out_and_named() -> None:
    def shuffled(x: Tensor) -> Tensor:
        return torch.relu(x).reshape(len(x), 2, -1).transpose(1, 2).flatten(1)

    with pytest.raises(StageError, match="the channels of 'first' cannot be removed: outputs differ") as caught:
        _prune_wired(Wired(shuffled))
    assert "add 'first' to exclude" in str(caught.value.hint)


class Branches(nn.Module):
    """Two branches and the input itself side by side, read by one layer; then a map flattened for another."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 24, 1)
        self.join = nn.Conv2d(43, 16, 1)
        self.out = nn.Linear(16 * 9, 4)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([torch.relu(self.left(x)), x, torch.relu(self.right(x))], dim=1)
        return self.out(torch.relu(self.join(joined)).flatten(1))


def test_widths_joined_side_by_side_or_flattened_lose_the_right_inputs() -> None:
    torch.manual_seed(5)
    network = Branches()
    pruned, report = prune_channels(network, [ScopeAmount("*", 0.5)], components={"": (torch.randn(2, 3, 3, 3),)})
    assert widths(report) == {"left": (16, 8), "right": (24, 16), "join": (16, 8)}
    assert (pruned.join.in_channels, pruned.out.in_features) == (8 + 3 + 16, 8 * 9)


def test_each_component_keeps_its_own_inputs_and_outputs() -> None:
    policy = nn.ModuleDict(
        {
            "vision": nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU()),
            "head": nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)),
        }
    )
    examples = {"vision": (torch.randn(1, 6),), "head": (torch.randn(1, 16),)}
    pruned, report = prune_channels(policy, [ScopeAmount("*", 0.5)], components=examples)
    assert widths(report) == {"vision.0": (32, 16), "head.0": (32, 16)}
    assert pruned["head"](pruned["vision"](torch.randn(1, 6))).shape == (1, 4)


def test_a_pruned_edge_vla_is_just_another_config() -> None:
    torch.manual_seed(0)
    camera = Camera(lookat=(0.0, 0.0, 0.0), azimuth=0.0, elevation=0.0, distance=1.0)
    config = reference_config(vocabulary=20, camera=camera, tasks=("reach",), control_hz=20.0)
    policy = trained(EdgeVLA(config))
    images, state = torch.rand(1, 3, config.image_size, config.image_size), torch.zeros(1, config.state_size)
    tokens = torch.ones(1, config.max_length, dtype=torch.int64)
    examples = {
        "vision": (images,),
        "language": (tokens,),
        "head": (torch.rand(1, config.vision.features), torch.rand(1, config.language.hidden), state),
    }
    pruned, report = prune_channels(policy, [ScopeAmount("*", 0.25)], components=examples)
    rebuilt = EdgeVLA(config_of(pruned)).eval()
    rebuilt.load_state_dict(pruned.state_dict())
    assert torch.equal(rebuilt(images, state, tokens), pruned(images, state, tokens))
    assert report.macs_after < 0.95 * report.macs_before


def test_without_torch_pruning_the_extra_that_brings_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(EnvironmentProblem, match="torch_pruning cannot be imported") as caught:
        prune(vision(), 0.5)
    assert caught.value.hint == "pip install 'vlaopt[build]'"
