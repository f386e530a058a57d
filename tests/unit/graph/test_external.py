"""Weights in a file beside the graph are the same weights, and only that one file is ever read for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vlaopt import backends
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions
from vlaopt.errors import InputError, StageError
from vlaopt.graph import external
from vlaopt.graph.check import check, load
from vlaopt.graph.external import decode, encode, light, structure
from vlaopt.graph.simplify import simplify

ONE_THREAD = EngineOptions(threads=1)
WEIGHTS = {
    "w": np.random.default_rng(0).normal(size=(64, 64), scale=0.1).astype(np.float32),
    "v": np.random.default_rng(1).normal(size=(64, 64), scale=0.1).astype(np.float32),
    "b": np.linspace(-1, 1, 64, dtype=np.float32),
}
X = {"x": np.linspace(-1, 1, 64, dtype=np.float32)[None]}


@pytest.fixture
def low(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that the network here is above."""
    monkeypatch.setattr(external, "SMALLEST", 1024)
    monkeypatch.setattr(external, "LIMIT", 1024)


@pytest.fixture
def network(build: Any) -> ModelProto:
    """y = relu(x @ w + b) @ v, with an identity that simplification drops."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="in/MatMul"),
        helper.make_node("Add", ["m", "b"], ["a"], name="in/Add"),
        helper.make_node("Identity", ["a"], ["i"], name="Identity"),
        helper.make_node("Relu", ["i"], ["r"], name="Relu"),
        helper.make_node("MatMul", ["r", "v"], ["y"], name="out/MatMul"),
    ]
    made: ModelProto = build(nodes, WEIGHTS, shape=(1, 64))
    return made


def expected() -> np.ndarray:
    inner = np.maximum(X["x"] @ WEIGHTS["w"] + WEIGHTS["b"], 0)
    return inner @ WEIGHTS["v"]


def values(model: ModelProto, data: bytes) -> dict[str, np.ndarray]:
    return {tensor.name: external.array(tensor, data) for tensor in model.graph.initializer}


def test_below_the_limit_a_graph_is_one_file(network: ModelProto) -> None:
    graph = encode(network, "policy")
    assert (graph.data, graph.data_name) == (b"", "")
    assert graph.model == network.SerializeToString(deterministic=True)


@pytest.mark.usefixtures("low")
def test_above_the_limit_large_weights_lie_beside_it_and_small_ones_within(network: ModelProto) -> None:
    graph = encode(network, "policy")
    assert graph.data_name == "policy.onnx.data"
    assert len(graph.model) < 2000
    assert len(graph.data) == 2 * 64 * 64 * 4
    model = load(graph)
    assert [external.is_outside(tensor) for tensor in model.graph.initializer] == [True, True, False]
    for name, array in values(model, graph.data).items():
        np.testing.assert_array_equal(array, WEIGHTS[name])
    assert encode(model, "policy", graph.data) == graph
    assert encode(network, "policy") == graph


def test_weights_that_shrink_below_the_limit_go_back_in(network: ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = encode(network, "policy")
    with monkeypatch.context() as patch:
        patch.setattr(external, "SMALLEST", 1024)
        patch.setattr(external, "LIMIT", 1024)
        outside = encode(network, "policy")
    assert encode(decode(outside), "policy", outside.data) == plain


TENSORS = st.sampled_from([np.float32, np.float16, np.float64, np.int64, np.int8, np.uint8, np.bool_]).flatmap(
    lambda dtype: arrays.arrays(dtype, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
)


@given(found=st.dictionaries(st.text(min_size=1, max_size=5), TENSORS, max_size=5), smallest=st.integers(0, 64))
@settings(max_examples=60)
def test_any_tensors_come_back_as_they_were(found: Mapping[str, np.ndarray], smallest: int) -> None:
    kept = [numpy_helper.from_array(array, name) for name, array in found.items()]
    model = helper.make_model(helper.make_graph([], "any", [], [], kept))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(external, "LIMIT", -1)
        patch.setattr(external, "SMALLEST", smallest)
        graph = encode(model, "any")
        back = encode(decode(graph), "any", graph.data)
    assert back == graph
    for name, array in values(decode(graph), graph.data).items():
        assert array.dtype == found[name].dtype
        np.testing.assert_array_equal(array, found[name])


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "reference"])
def test_every_backend_that_runs_here_reads_both_kinds(name: str, network: ModelProto) -> None:
    backend = backends.get(name)
    if backend.missing():
        pytest.skip(str(backend.missing()))
    graph = encode(network, "policy")
    files = backend.build(graph, ONE_THREAD).files
    session = backend.open(files, ONE_THREAD)
    np.testing.assert_allclose(session.run(X)["y"], expected(), atol=1e-5)


@pytest.mark.usefixtures("low")
def test_tensorrt_for_rtx_builds_the_same_engine_of_both_kinds(
    network: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backends.get("tensorrt-rtx")
    if backend.missing():
        pytest.skip(str(backend.missing()))
    ada = EngineOptions(compute_capabilities=("8.9",))
    outside = backend.build(encode(network, "policy"), ada).files
    monkeypatch.undo()
    within = backend.build(encode(network, "policy"), ada).files
    assert {name: len(data) for name, data in outside.items()} == {name: len(data) for name, data in within.items()}


@pytest.mark.usefixtures("low")
def test_a_plain_onnx_runtime_opens_the_files_as_they_lie(network: ModelProto, tmp_path: Path) -> None:
    for name, data in encode(network, "policy").files("policy.onnx").items():
        (tmp_path / name).write_bytes(data)
    onnx.checker.check_model(str(tmp_path / "policy.onnx"), full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "policy.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, X)[0], expected(), atol=1e-5)


@pytest.mark.usefixtures("low")
def test_simplification_leaves_weights_where_they_are(network: ModelProto) -> None:
    graph = encode(network, "policy")
    before = graph.model
    simplified = simplify(load(graph), graph.data)
    assert [node.name for node in simplified.graph.node if node.op_type == "Identity"] == []
    assert [value.name for value in simplified.graph.input] == ["x"]
    assert {tensor.name for tensor in simplified.graph.initializer if external.is_outside(tensor)} == {"w", "v"}
    assert graph.model == before
    again = encode(simplified, "policy", graph.data)
    session = backends.get("onnxruntime").open(again.files("model.onnx"), ONE_THREAD)
    np.testing.assert_allclose(session.run(X)["y"], expected(), atol=1e-5)


@pytest.mark.usefixtures("low")
def test_a_nan_is_found_in_the_data_too(network: ModelProto) -> None:
    graph = encode(network, "policy")
    spoilt = bytearray(graph.data)
    spoilt[4:8] = np.float32(np.nan).tobytes()
    with pytest.raises(InputError, match="initializer 'w' has 1 of 4096 values that are NaN or infinite"):
        load(replace(graph, data=bytes(spoilt)))


def _pointing(graph: Graph, **entries: str) -> Graph:
    model = ModelProto.FromString(graph.model)
    tensor = model.graph.initializer[0]
    for entry in tensor.external_data:
        entry.value = entries.get(entry.key, entry.value)
    return replace(graph, model=model.SerializeToString())


BAD: list[tuple[Callable[[Graph], Graph], str]] = [
    (lambda graph: _pointing(graph, location="../policy.onnx.data"), r"in '\.\./policy\.onnx\.data', and only"),
    (lambda graph: _pointing(graph, location="/etc/passwd"), r"in '/etc/passwd', and only 'policy\.onnx\.data'"),
    (lambda graph: _pointing(graph, location="other.data"), "in 'other.data', and only"),
    (lambda graph: _pointing(graph, offset="-1"), "it does not say where"),
    (lambda graph: _pointing(graph, length="1e9"), "it does not say where"),
    (lambda graph: _pointing(graph, length="9" * 30), "it does not say where"),
    (lambda graph: _pointing(graph, length="16"), "16 bytes of it, its shape takes 16384"),
    (lambda graph: _pointing(graph, offset="20000"), "its bytes end at 36384, policy.onnx.data has 32768"),
    (lambda graph: replace(graph, data=graph.data[:100]), "its bytes end at 16384, policy.onnx.data has 100"),
    (lambda graph: Graph(graph.model), "in 'policy.onnx.data', which is not there"),
]


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize(("damage", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_data_elsewhere_missing_or_short_are_refused(
    network: ModelProto, damage: Callable[[Graph], Graph], reason: str
) -> None:
    bad = damage(encode(network, "policy"))
    with pytest.raises(InputError, match=f"policy.onnx: initializer 'w' is stored outside the graph: {reason}"):
        load(bad, where="policy.onnx")


@pytest.mark.usefixtures("low")
@pytest.mark.parametrize("damage", [damage for damage, _ in BAD], ids=[reason for _, reason in BAD])
@pytest.mark.parametrize("name", ["onnxruntime", "openvino", "reference", "tensorrt-rtx"])
def test_a_backend_that_is_given_such_data_reads_no_other_file(
    network: ModelProto, damage: Callable[[Graph], Graph], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = backends.get(name)
    if backend.missing():
        pytest.skip(str(backend.missing()))
    monkeypatch.chdir(tmp_path)
    for beside in ("other.data", "policy.onnx.data"):
        (tmp_path / beside).write_bytes(b"\0" * 65536)
    bad = damage(encode(network, "policy"))
    with pytest.raises(StageError):
        backend.build(bad, EngineOptions(threads=1, compute_capabilities=("8.9",)))


@pytest.mark.usefixtures("low")
def test_only_weights_may_lie_outside(network: ModelProto) -> None:
    graph = encode(network, "policy")
    model = decode(graph)
    node = helper.make_node("Constant", [], ["c"], name="c", value=numpy_helper.from_array(np.ones(4, np.float32)))
    node.attribute[0].t.CopyFrom(model.graph.initializer[0])
    model.graph.node.append(node)
    with pytest.raises(InputError, match=r"'value' of node 'c' \(Constant\) is stored outside .*: only initializers"):
        load(replace(graph, model=model.SerializeToString()))


@given(found=st.dictionaries(st.text(min_size=1, max_size=5), TENSORS, max_size=5), smallest=st.integers(0, 64))
@settings(max_examples=60)
def test_a_file_is_what_protobuf_writes_wherever_the_weights_were(
    found: Mapping[str, np.ndarray], smallest: int
) -> None:
    nodes = [helper.make_node("Identity", [name], [f"{name}_y"], name=name) for name in found]
    outputs = [helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, None) for name in found]
    kept = [numpy_helper.from_array(array, name) for name, array in found.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "any", [], outputs, kept, doc_string="told", value_info=outputs),
        producer_name="somebody",
        functions=[helper.make_function("own", "F", ["x"], ["y"], nodes[:0], [helper.make_opsetid("", 20)])],
    )
    helper.set_model_props(model, {"key": "value"})
    aside = external.without_initializers(model)
    for index, (name, array) in enumerate(found.items()):
        tensor = aside.graph.initializer.add()
        if array.nbytes < smallest:
            tensor.CopyFrom(kept[index])
        else:
            external.point(tensor, name, kept[index].data_type, array.shape, "aside", (index, array.nbytes))
    written = external.encode_from(aside, "any", lambda tensor: found[tensor.name].tobytes())
    assert written.model == model.SerializeToString(deterministic=True)


def test_a_light_copy_has_the_shapes_and_no_weights(network: ModelProto) -> None:
    check(network)
    thin = light(network, least=1024)
    assert thin.ByteSize() < 2000
    assert [tensor.name for tensor in thin.graph.initializer] == ["b"]
    shapes = onnx.shape_inference.infer_shapes(thin, strict_mode=True).graph.value_info
    assert {value.name for value in shapes} == {"m", "a", "i", "r"}
    assert [tuple(tensor.dims) for tensor in structure(network).graph.initializer] == [(64, 64), (64, 64), (64,)]
    assert len(network.graph.initializer[0].raw_data) == 16384


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT4, TensorProto.BOOL])
def test_the_size_of_a_tensor_is_that_of_its_bytes(dtype: int) -> None:
    tensor = helper.make_tensor("t", dtype, (3, 5), np.zeros(15, np.int8))
    assert external.size(tensor) == len(numpy_helper.from_array(numpy_helper.to_array(tensor)).raw_data)


@pytest.mark.slow
def test_a_component_above_2_gb_is_exported_checked_simplified_and_run() -> None:
    import torch

    from vlaopt.graph.torch_export import export_component

    class Wide(torch.nn.Module):
        """Five products of 8192 × 13312 weights: 2.2 GB."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weights = torch.nn.ParameterList(torch.empty(8192, 13312).uniform_(-1, 1) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for weight in self.weights:
                x = torch.tanh((x @ weight)[:, :8192] / 64)
            return x

    wide, x = Wide(), torch.linspace(-1, 1, 8192)[None]
    expected = wide(x).detach().numpy()
    graph = export_component(wide, {"x": x}, ["y"], opset=20, name="wide")
    del wide
    above = len(graph.data) > 2**31 > 1000 * len(graph.model)
    assert above
    model = simplify(load(graph), graph.data)
    assert [node.op_type for node in model.graph.node].count("MatMul") == 5
    files = encode(model, "wide", graph.data).files("model.onnx")
    del graph
    session = backends.get("onnxruntime").open(files, ONE_THREAD)
    np.testing.assert_allclose(session.run({"x": x.numpy()})["y"], expected, atol=1e-4)
