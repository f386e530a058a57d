"""Slices that are concatenated again become one, or the tensor itself, and what is computed stays equal bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, helper

from vlaopt.graph.slices import join_slices

LENGTH = 6


def sliced(build: Any, pieces: list[tuple[int, int]], *, axis: int = 1) -> ModelProto:
    """`y`: these pieces of `x` along its second dimension, one behind the other."""
    values = {f"at{at}": np.array([at], np.int64) for piece in pieces for at in piece}
    values["axis"] = np.array([axis], np.int64)
    names = [f"p{number}" for number in range(len(pieces))]
    nodes = [
        helper.make_node("Slice", ["x", f"at{start}", f"at{end}", "axis"], [name], name=f"m/{name}")
        for name, (start, end) in zip(names, pieces, strict=True)
    ]
    model: ModelProto = build(
        [*nodes, helper.make_node("Concat", names, ["y"], name="m/Concat", axis=1)], values, shape=(2, LENGTH)
    )
    total = sum(end - start for start, end in pieces)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = total
    return model


def kinds(model: ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pieces=st.lists(
        st.integers(0, LENGTH - 1).flatmap(lambda at: st.tuples(st.just(at), st.integers(at + 1, LENGTH))),
        min_size=1,
        max_size=6,
    )
)
def test_any_pieces_in_any_order_stay_what_they_are(build: Any, run: Any, pieces: list[tuple[int, int]]) -> None:
    x = np.arange(2 * LENGTH, dtype=np.float32).reshape(2, LENGTH)
    expected = run(sliced(build, pieces), {"x": x})["y"]
    np.testing.assert_array_equal(run(join_slices(sliced(build, pieces)), {"x": x})["y"], expected)


def test_a_tensor_taken_apart_entry_by_entry_is_taken_whole(build: Any) -> None:
    joined = join_slices(sliced(build, [(at, at + 1) for at in range(LENGTH)]))
    assert kinds(joined) == ["Concat"]
    assert list(joined.graph.node[0].input) == ["x"]


def test_pieces_that_go_on_become_one_slice_and_others_stay(build: Any) -> None:
    assert kinds(join_slices(sliced(build, [(0, 1), (1, 3), (4, 5)]))) == ["Slice", "Slice", "Concat"]
    assert kinds(join_slices(sliced(build, [(2, 3), (1, 2)]))) == ["Slice", "Slice", "Concat"]


def test_slices_along_another_axis_are_left_alone(build: Any) -> None:
    model = sliced(build, [(0, 1), (1, 2)], axis=0)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    assert kinds(join_slices(model)) == ["Slice", "Slice", "Concat"]


def test_a_slice_that_something_else_takes_stays(build: Any, run: Any) -> None:
    model = sliced(build, [(at, at + 1) for at in range(LENGTH)])
    model.graph.node[-1].output[0] = "c"
    model.graph.node.append(helper.make_node("Add", ["c", "p2"], ["y"], name="m/Add"))
    x = np.arange(2 * LENGTH, dtype=np.float32).reshape(2, LENGTH)
    expected = run(model, {"x": x})["y"]
    joined = join_slices(model)
    assert sorted(kinds(joined)) == ["Add", "Concat", "Slice"]
    np.testing.assert_array_equal(run(joined, {"x": x})["y"], expected)
