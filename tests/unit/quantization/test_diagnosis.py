"""Parts are cut so that nothing is lost, rules cover the guilty alone, and causes come from what was seen."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from vlaopt.artifact.graph import Graph
from vlaopt.graph.scopes import covers_node, node_path
from vlaopt.graph.topology import node_name
from vlaopt.progress import SilentTask
from vlaopt.quantization.diagnosis import FAN_OUT, NAMED, Guilty, _locate, rules, split
from vlaopt.quantization.evidence import Seen, causes

PATHS = st.lists(st.sampled_from(["a", "b", "blocks", "0", "1"]), min_size=0, max_size=4)
OPERATORS = st.sampled_from(["Gemm", "Conv", "MatMul_2"])
NODES = st.lists(
    st.builds(lambda path, operator: node_name(".".join(path), operator), PATHS, OPERATORS),
    min_size=1,
    max_size=30,
    unique=True,
)


@given(nodes=NODES)
def test_cutting_loses_no_node_and_ends_at_single_ones(nodes):
    parts = split(nodes)
    assert [node for part in parts for node in part] == nodes
    assert all(parts)
    assert len(parts) == 1 if len(nodes) == 1 else 2 <= len(parts) <= FAN_OUT


def test_parts_are_modules_where_there_are_few_and_halves_where_there_are_many():
    layers = [f"blocks.{block}.{name}/Gemm" for block in range(3) for name in ("wide", "narrow")]
    assert [len(part) for part in split(layers)] == [2, 2, 2]
    assert split(layers[:2]) == [("blocks.0.wide/Gemm",), ("blocks.0.narrow/Gemm",)]
    assert [len(part) for part in split([f"blocks.{block}/Conv" for block in range(20)])] == [10, 10]


@given(component=st.sampled_from(["vision", "step"]), nodes=NODES, data=st.data())
def test_rules_cover_every_guilty_node_and_no_other(component, nodes, data):
    chosen = tuple(data.draw(st.lists(st.sampled_from(nodes), min_size=1, unique=True)))
    every = {component: tuple(nodes), "other": ("a/Gemm",)}
    found = rules(every, [Guilty(component, (node,), node_path(component, node), 1.0, 0.0, ()) for node in chosen])
    known = [(name, node) for name, nodes in every.items() for node in nodes]
    covered = [place for place in known if any(covers_node(glob, *place) for glob in found)]
    assert covered == [(component, node) for node in nodes if node in chosen]


@dataclass
class Additive:
    """Trials of a policy in which every node loses something of its own."""

    losses: Mapping[str, float]
    asked: int = 0

    def error(self, chosen: Mapping[str, Sequence[str]]) -> Any:
        self.asked += 1
        mean = sum(self.losses[node] for nodes in chosen.values() for node in nodes)
        return SimpleNamespace(executed=SimpleNamespace(mean=mean))


@given(nodes=NODES, data=st.data())
def test_the_guiltiest_nodes_are_found_in_order(nodes, data):
    losses = {node: data.draw(st.sampled_from([0.0, 1.0, 2.0, 50.0, 1000.0])) for node in nodes}
    trials = Additive(losses)
    found, count = _locate(trials, {"a": tuple(nodes)}, sum(losses.values()), 10_000, SilentTask())
    named = [(alone, *part) for alone, _, part in found]
    assert named == [(losses[node], node) for _, node in named], "a part that is not one node was named"
    least = 0.05 * sum(losses.values())
    expected = sorted((loss for loss in losses.values() if loss > least), reverse=True)[:NAMED]
    assert [alone for alone, _ in named][: len(expected)] == expected
    assert count == trials.asked


@given(evaluations=st.integers(4, 40))
def test_no_more_trials_are_made_than_allowed_and_what_is_not_told_apart_is_named_together(evaluations):
    losses = {f"blocks.{block}.{name}/Gemm": 1.0 + block for block in range(8) for name in ("wide", "narrow")}
    found, count = _locate(Additive(losses), {"a": tuple(losses)}, sum(losses.values()), evaluations, SilentTask())
    assert count <= evaluations
    assert found and all(alone == sum(losses[node] for node in nodes) for alone, _, nodes in found)
    together = any(len(nodes) > 1 for _, _, nodes in found)
    assert together if evaluations <= 11 else not together if evaluations >= 23 else True


def seen(value: np.ndarray, planned: tuple[float, float]) -> Seen:
    found = Seen()
    found.add(value.astype(np.float32), planned, -1)
    return found


def product(weight: np.ndarray) -> Graph:
    """`x` [4, n] times `weight`."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="project/MatMul")
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, weight.shape[0]])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, weight.shape[1]])
    made = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(weight.astype(np.float32), "w")])
    return Graph(helper.make_model(made).SerializeToString())


EVEN = np.tile(np.linspace(-1.0, 1.0, 64), (4, 1))


def with_channel(channel: int, factor: float) -> np.ndarray:
    values = np.tile(np.linspace(-1.0, 1.0, 4)[:, None], (1, 64))
    values[:, channel] *= factor
    return values


def grown(channel: object) -> np.ndarray:
    weight = np.ones((64, 8))
    weight[channel] = 90.0
    return weight


@pytest.mark.parametrize(
    ("values", "planned", "weight", "kind", "told"),
    [
        (EVEN, (-1.0, 1.0), np.ones((64, 8)), "rounding", "8 bits are too coarse"),
        (EVEN, (-1.0, 0.3), np.ones((64, 8)), "other data", r"3\d% of x lie beyond .* by up to 54% of its width"),
        (EVEN, (-9.0, 9.0), np.ones((64, 8)), "other data", "x uses 11% of the range"),
        (with_channel(5, 100), (-100.0, 100.0), np.ones((64, 8)), "outlier channel", "channel 5 of x reaches 100, 100"),
        (EVEN, (-1.0, 1.0), grown(np.s_[:, 7]), "rounding", "8 bits"),
        (EVEN, (-1.0, 1.0), grown(np.s_[7]), "outlier channel", "input channel 7 of weight w reaches 90, 90 times"),
    ],
)
def test_the_cause_is_what_was_seen(values, planned, weight, kind, told):
    graph = product(weight)
    found = causes(graph, ["project/MatMul"], {"x": planned}, {"x": seen(values, planned)})
    assert found[0].kind == kind
    assert re.search(told, found[0].told)


def test_a_few_values_far_beyond_a_range_are_saturation():
    values = np.tile(np.linspace(-1.0, 1.0, 64), (40, 1))
    values[0, 3] = 4.0
    found = causes(product(np.ones((64, 8))), ["project/MatMul"], {"x": (-1.0, 1.0)}, {"x": seen(values, (-1.0, 1.0))})
    assert [cause.kind for cause in found] == ["saturation"]
    assert "150% of its range's width" in found[0].told


def test_what_was_seen_does_not_depend_on_how_calls_were_cut():
    values = np.random.default_rng(0).standard_normal((6, 16)).astype(np.float32)
    whole, cut = seen(values, (-1.0, 1.0)), Seen()
    for row in values:
        cut.add(row[None], (-1.0, 1.0), -1)
    assert (whole.low, whole.high, whole.values, whole.beyond) == (cut.low, cut.high, cut.values, cut.beyond)
    assert np.array_equal(whole.channels, cut.channels)
