"""The promise: a tensor that stays in its backend's memory is as good as its copy, and is not copied on the way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from vlaopt import backends
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, Port, Resident, check_feeds
from vlaopt.errors import InputError

ONE_THREAD = EngineOptions(threads=1)
RUNNERS = ["onnxruntime", "openvino", "reference"]
STAYING = ["onnxruntime", "openvino"]


def graph(nodes: list[Any], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]]) -> bytes:
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ports.items()]
        for ports in (inputs, outputs)
    ]
    model = helper.make_model(
        helper.make_graph(nodes, "component", *values),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    return bytes(model.SerializeToString())


def opened(name: str, data: bytes) -> backends.Session:
    backend = backends.get(name)
    return backend.open(backend.build(Graph(data), ONE_THREAD).files, ONE_THREAD)


def prefix(name: str, rows: int | str = 2) -> backends.Session:
    """x → key = x + x, value = x · x"""
    nodes = [helper.make_node("Add", ["x", "x"], ["key"]), helper.make_node("Mul", ["x", "x"], ["value"])]
    return opened(name, graph(nodes, {"x": [rows, 3]}, {"key": [rows, 3], "value": [rows, 3]}))


def step(name: str, rows: int | str = 2) -> backends.Session:
    """key, value, state → y = state · key + value, next = state + value"""
    nodes = [
        helper.make_node("Mul", ["state", "key"], ["scaled"]),
        helper.make_node("Add", ["scaled", "value"], ["y"]),
        helper.make_node("Add", ["state", "value"], ["next"]),
    ]
    ports = {"key": [rows, 3], "value": [rows, 3], "state": [rows, 3]}
    return opened(name, graph(nodes, ports, {"y": [rows, 3], "next": [rows, 3]}))


X = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.mark.parametrize("name", RUNNERS)
@pytest.mark.parametrize("rows", [2, "rows"])
def test_a_step_repeated_over_a_resident_prefix_gives_what_arrays_give(name: str, rows: int | str) -> None:
    first, second = prefix(name, rows), step(name, rows)
    for scale in (1, 3):  # a second prediction must not see the first one's prefix
        x = X * np.float32(scale)
        kept = first.run({"x": x}, resident=("key", "value"))
        for k in range(4):
            state = np.full((2, 3), k, np.float32)
            y = second.run({**kept, "state": state})["y"]
            assert y.tolist() == (state * (x + x) + x * x).tolist()


@pytest.mark.parametrize("name", RUNNERS)
def test_a_session_takes_its_own_output_of_the_run_before(name: str) -> None:
    session, state, expected = step(name), X, X
    for _ in range(5):
        outputs = session.run({"key": X, "value": X, "state": state}, resident=("next",))
        state, expected = outputs["next"], expected + X
        assert outputs["y"].tolist() == ((expected - X) * X + X).tolist()
    assert session.run({"key": X, "value": X, "state": state})["next"].tolist() == (expected + X).tolist()


@pytest.mark.parametrize("name", RUNNERS)
def test_arrays_and_residents_take_turns_at_one_input(name: str) -> None:
    first, second = prefix(name), step(name)
    kept = first.run({"x": X}, resident=("key", "value"))
    ones = np.ones((2, 3), np.float32)
    from_arrays, from_residents = (ones + ones).tolist(), (X + X + X * X).tolist()
    for _ in range(3):
        assert second.run({**kept, "state": ones})["y"].tolist() == from_residents
        assert second.run({"key": ones, "value": ones, "state": ones})["y"].tolist() == from_arrays
        assert second.run({"key": kept["key"], "value": ones, "state": ones})["y"].tolist() == (X + X + ones).tolist()


@pytest.mark.parametrize("name", STAYING)
def test_only_what_is_asked_for_stays(name: str) -> None:
    outputs = prefix(name).run({"x": X}, resident=("key",))
    assert isinstance(outputs["key"], Resident)
    assert (outputs["key"].dtype, outputs["key"].shape) == ("float32", (2, 3))
    assert isinstance(outputs["value"], np.ndarray)
    assert not any(isinstance(value, Resident) for value in prefix(name).run({"x": X}).values())


@pytest.mark.parametrize("name", STAYING)
def test_outputs_of_a_run_with_residents_are_not_overwritten_by_the_next(name: str) -> None:
    first, second = prefix(name), step(name)
    kept = first.run({"x": X}, resident=("key", "value"))
    early = second.run({**kept, "state": X})["y"]
    copy = early.copy()
    second.run({**kept, "state": X * 9})
    assert np.array_equal(early, copy)


def test_openvino_gives_a_resident_as_a_view_of_its_own_memory() -> None:
    session = prefix("openvino")
    one, two = (session.run({"x": X}, resident=("key",))["key"].value for _ in range(2))
    assert one.ctypes.data == two.ctypes.data


def test_onnxruntime_gives_a_resident_without_a_copy_of_its_memory() -> None:
    assert not prefix("onnxruntime").run({"x": X}, resident=("key",))["key"].value.flags.owndata


@pytest.mark.parametrize("name", RUNNERS)
def test_a_tensor_of_another_backend_is_refused_by_name(name: str) -> None:
    stranger = Resident("tpu", "float32", (2, 3), object())
    with pytest.raises(InputError, match="input 'key' stays in the memory of tpu, which is not read here"):
        step(name).run({"key": stranger, "value": X, "state": X})


@pytest.mark.parametrize(
    ("dtype", "shape", "reason"),
    [
        ("float16", (2, 3), "'key' has dtype float16, not float32"),
        ("float32", (3, 2), r"'key' has shape \(3, 2\), not"),
    ],
)
def test_a_resident_of_another_form_is_refused(dtype: str, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check_feeds([Port("key", "float32", (2, 3))], {"key": Resident("cpu", dtype, shape, None)}, "cpu")
