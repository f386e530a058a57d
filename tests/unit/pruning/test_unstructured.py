"""Unstructured pruning zeroes exactly the smallest weights it was asked for and changes nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlaopt.errors import InputError, StageError
from vlaopt.pruning import PruneReport, ScopeAmount, prune_weights


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        outputs, _ = self.lstm(self.embedding(tokens))
        return outputs.mean(dim=1)


class Policy(nn.Module):
    """Every kind of layer that can be pruned, in two components."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 7))
        self.language = Encoder()


EXAMPLES = {"vision": (torch.ones(1, 3, 4, 4),), "language": (torch.zeros(1, 3, dtype=torch.int64),)}
WEIGHTS = [
    "vision.0.weight",
    "vision.3.weight",
    "language.embedding.weight",
    "language.lstm.weight_ih_l0",
    "language.lstm.weight_hh_l0",
]


def policy() -> Policy:
    torch.manual_seed(0)
    return Policy()


def zeros(network: nn.Module, path: str) -> int:
    return int((network.get_parameter(path) == 0).sum())


def prune(network: nn.Module, amount: float, scope: str = "*") -> tuple[nn.Module, PruneReport]:
    return prune_weights(network, [ScopeAmount(scope, amount)], components=EXAMPLES)


@given(amount=st.floats(0.0, 0.9))
@settings(max_examples=15)
def test_every_tensor_has_the_fraction_of_zeros_asked_for_within_one_weight(amount: float) -> None:
    pruned, report = prune(policy(), amount)
    assert [layer.scope for layer in report.layers] == WEIGHTS
    for layer in report.layers:
        size = layer.parameters_before
        assert layer.zeros == zeros(pruned, layer.scope) == layer.parameters_after - layer.after
        assert abs(layer.zeros - amount * size) <= 1


@given(amount=st.floats(0.0, 0.5))
@settings(max_examples=15)
def test_global_ranking_zeroes_the_smallest_weights_of_all_tensors_together(amount: float) -> None:
    network = policy()
    pruned, report = prune_weights(network, [ScopeAmount("*", amount)], components=EXAMPLES, ranking="global")
    everything = torch.cat([network.get_parameter(path).flatten() for path in WEIGHTS]).abs()
    left = torch.cat([pruned.get_parameter(path).flatten() for path in WEIGHTS])
    gone = left == 0
    assert abs(int(gone.sum()) - amount * len(everything)) <= 1
    assert report.zero_fraction == pytest.approx(int(gone.sum()) / len(everything))
    if gone.any():
        assert everything[gone].max() <= everything[~gone].min()


def test_weights_that_stay_keep_their_values_and_the_caller_keeps_his_network() -> None:
    network = policy()
    before = copy.deepcopy(network.state_dict())
    pruned, _ = prune(network, 0.5)
    for path in WEIGHTS:
        weight = pruned.get_parameter(path)
        assert torch.equal(weight[weight != 0], before[path][weight != 0])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_biases_and_norms_are_never_touched_and_no_mask_is_left_behind() -> None:
    network = policy()
    pruned, _ = prune(network, 0.5)
    assert list(pruned.state_dict()) == list(network.state_dict())
    for key, value in pruned.state_dict().items():
        assert key in WEIGHTS or torch.equal(value, network.state_dict()[key])


def test_only_the_scope_is_pruned_and_only_it_is_reported() -> None:
    pruned, report = prune(policy(), 0.5, "language.lstm")
    assert [layer.scope for layer in report.layers] == WEIGHTS[3:]
    assert zeros(pruned, "vision.0.weight") == 0


def test_pruning_twice_gives_the_same_bytes_even_among_equal_magnitudes() -> None:
    network = policy()
    for path in WEIGHTS:
        nn.init.constant_(network.get_parameter(path), 0.5)
    first, second = prune(network, 0.3)[0].state_dict(), prune(network, 0.3)[0].state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_more_of_the_same_amount_removes_nothing_more() -> None:
    once, report = prune(policy(), 0.5)
    twice, again = prune(once, 0.5)
    assert again.zero_fraction == report.zero_fraction
    assert all(torch.equal(once.state_dict()[key], value) for key, value in twice.state_dict().items())


def test_costs_stay_because_zeros_are_multiplied_too() -> None:
    _, report = prune(policy(), 0.5)
    conv, linear = 4 * 27 * 4, 16 * 7
    lstm = 3 * (20 * 6 + 20 * 5)
    assert report.macs_before == report.macs_after == conv + linear + lstm
    assert report.parameters_before == report.parameters_after == sum(p.numel() for p in policy().parameters())


def test_layers_that_only_wrappers_call_are_counted_under_their_own_paths() -> None:
    """Components that are no modules of the network: both call its last layer, one of them twice."""

    class Twice(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.called = layer

        def forward(self, values: Tensor) -> Tensor:
            return self.called(values) + self.called(-values)

    network = policy().eval()
    wrappers = {"whole": nn.Sequential(network.vision), "again": Twice(network.vision[3])}
    examples = {"whole": EXAMPLES["vision"], "again": (torch.ones(1, 16),)}
    scopes = [ScopeAmount("vision.*", 0.5)]
    _, report = prune_weights(network, scopes, components=examples, wrappers=wrappers)
    conv, linear = 4 * 27 * 4, 16 * 7
    assert report.macs_before == report.macs_after == conv + 3 * linear
    assert {layer.scope: layer.macs_after for layer in report.layers} == {
        "vision.0.weight": conv,
        "vision.3.weight": 3 * linear,
    }


def test_a_layer_that_would_be_all_zeros_is_refused_by_name() -> None:
    network = policy()
    with torch.no_grad():
        network.vision[3].weight.mul_(1e-6)
    with pytest.raises(InputError, match=r"only zeros in 'vision\.3\.weight'"):
        prune_weights(network, [ScopeAmount("*", 0.6)], components=EXAMPLES, ranking="global")
    with pytest.raises(InputError, match=r"only zeros in 'vision\.0\.weight'"):
        prune(network, 0.999, "vision.0")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_cannot_be_ranked_is_refused_by_name(value: float) -> None:
    network = policy()
    with torch.no_grad():
        network.language.lstm.weight_hh_l0[0, 0] = value
    with pytest.raises(InputError, match=r"'language\.lstm\.weight_hh_l0' holds NaN or Inf"):
        prune(network, 0.5)


def test_a_tensor_shared_by_two_layers_is_pruned_once() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    network[1].weight = network[0].weight
    pruned, report = prune_weights(network, [ScopeAmount("*", 0.5)], components={"": (torch.ones(1, 4),)})
    assert [layer.scope for layer in report.layers] == ["0.weight"]
    assert pruned[0].weight is pruned[1].weight


def test_training_mode_and_frozen_parameters_come_back_as_they_were() -> None:
    network = policy().train()
    network.vision[1].eval()
    network.vision[0].weight.requires_grad_(False)
    pruned, _ = prune(network, 0.5)
    assert [m.training for m in pruned.modules()] == [m.training for m in network.modules()]
    assert not pruned.get_parameter("vision.0.weight").requires_grad


def test_an_unknown_component_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="no component 'visoin'") as caught:
        prune_weights(policy(), [ScopeAmount("*", 0.5)], components={"visoin": EXAMPLES["vision"]})
    assert caught.value.hint == "its components: vision, language"


def test_an_example_that_does_not_fit_names_its_component() -> None:
    with pytest.raises(StageError, match="component 'vision' cannot run its example inputs"):
        prune_weights(policy(), [ScopeAmount("*", 0.5)], components={"vision": (torch.ones(1, 5, 4, 4),)})
