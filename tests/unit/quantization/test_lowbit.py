"""FP8, INT4 and NVFP4: as near as their bits allow, in every float type the same, and taken by NVIDIA's builder."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.unit.quantization.conftest import COMPONENT, Feed, Run
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, get
from vlaopt.backends.tensorrt.rtx import check
from vlaopt.errors import EnvironmentProblem, InputError, StageError
from vlaopt.graph import external
from vlaopt.graph.external import decode, encode
from vlaopt.graph.topology import opset_of
from vlaopt.quantization.halves import probed_tensors, settled_halves, wanted_halves
from vlaopt.quantization.lowbit import int4_blocks, nvfp4_blocks, shared_scale, write_lowbit
from vlaopt.quantization.plan import ComponentPlan, NodeScheme, calibrated_tensors, component_plan, plan_nodes
from vlaopt.quantization.rounding import dequantized, rounded
from vlaopt.quantization.structure import structural_check
from vlaopt.quantization.writing import write
from vlaopt.recipe.load import load_recipe
from vlaopt.target import load_target

ROOT = Path(__file__).parents[3]
LOW: tuple[NodeScheme, ...] = ("fp8", "int4-weights", "nvfp4")
ERROR = {"fp8": 0.08, "int4-weights": 0.1, "nvfp4": 0.15}
"""Mean |error| of the small network over the mean size of its outputs: FP8 has 4 binary digits, the others about 3."""
SM = {"fp8": "8.9", "int4-weights": "8.6", "nvfp4": "12.0"}
CODES = {
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int4-weights": TensorProto.INT4,
    "nvfp4": TensorProto.FLOAT4E2M1,
}
matrices = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).normal(size=(64, 6)) * 10.0 ** np.random.default_rng(seed).integers(-6, 4)
)


@pytest.fixture(scope="module")
def products() -> ModelProto:
    """Gemm (transposed weights), Relu, MatMul, both with 48 inputs. [2, 48] to [2, 8]."""
    generator = np.random.default_rng(3)
    values = {
        "first.weight": generator.normal(size=(48, 48)) / 7,
        "first.bias": generator.normal(size=48) / 7,
        "second.weight": generator.normal(size=(48, 8)) / 7,
    }
    nodes = [
        helper.make_node("Gemm", ["x", "first.weight", "first.bias"], ["a"], name="first/Gemm", transB=1),
        helper.make_node("Relu", ["a"], ["r"], name="first/Relu"),
        helper.make_node("MatMul", ["r", "second.weight"], ["y"], name="second/MatMul"),
    ]
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (2, 48))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (2, 8))],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def feed() -> Feed:
    return {"x": np.random.default_rng(4).uniform(-1, 1, (2, 48)).astype(np.float32)}


def planned(model: ModelProto, scheme: NodeScheme, floats: NodeScheme = "fp32") -> ComponentPlan:
    """Every layer in `scheme`, the rest in `floats`; activations within [-4, 4]."""
    rules: list[tuple[str, NodeScheme]] = [(COMPONENT, scheme)]
    nodes = plan_nodes({COMPONENT: model}, scheme=floats, rules=rules)[COMPONENT]
    wanted = wanted_halves(COMPONENT, model, floats, rules)
    settled = settled_halves(model, wanted, dict.fromkeys(probed_tensors(model, wanted), 4.0))
    plan = component_plan(Graph(model.SerializeToString()), nodes, {}, settled)
    return plan.model_copy(update={"ranges": dict.fromkeys(calibrated_tensors(model, nodes), (-4.0, 4.0))})


def written(model: ModelProto, plan: ComponentPlan) -> Graph:
    return write(COMPONENT, Graph(model.SerializeToString()), plan, load_target("x86-rtx"), "per-channel", "tensorrt")


def on_cpu(graph: Graph) -> ModelProto:
    return decode(rounded(graph, COMPONENT))


@pytest.mark.parametrize("floats", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("scheme", LOW)
def test_the_numbers_are_those_of_fp32_within_the_schemes_bits(
    products: ModelProto, feed: Feed, run_onnxruntime: Run, scheme: NodeScheme, floats: NodeScheme
) -> None:
    graph = written(products, planned(products, scheme, floats))
    exact, found = run_onnxruntime(products, feed), run_onnxruntime(on_cpu(graph), feed)
    assert 0 < np.abs(found - exact).mean() < ERROR[scheme] * np.abs(exact).mean()
    assert CODES[scheme] in {tensor.data_type for tensor in decode(graph).graph.initializer}


@pytest.mark.parametrize("floats", ["fp32", "fp16"])
def test_onnx_runtime_computes_int4_as_the_rounded_graph_does(
    products: ModelProto, feed: Feed, run_onnxruntime: Run, floats: NodeScheme
) -> None:
    graph = written(products, planned(products, "int4-weights", floats))
    assert np.allclose(run_onnxruntime(decode(graph), feed), run_onnxruntime(on_cpu(graph), feed), atol=0.01)


def test_onnx_runtime_computes_fp8_as_the_rounded_graph_does(
    products: ModelProto, feed: Feed, run_onnxruntime: Run
) -> None:
    graph = written(products, planned(products, "fp8", "fp16"))
    assert np.allclose(run_onnxruntime(decode(graph), feed), run_onnxruntime(on_cpu(graph), feed), atol=0.02)


def test_the_reference_evaluator_computes_nvfp4_as_the_rounded_graph_does(
    products: ModelProto, feed: Feed, run_onnxruntime: Run
) -> None:
    graph = written(products, planned(products, "nvfp4"))
    reference = onnx.reference.ReferenceEvaluator(decode(graph)).run(None, dict(feed))[0]
    assert np.allclose(reference, run_onnxruntime(on_cpu(graph), feed), atol=1e-5)


@pytest.mark.parametrize("floats", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("scheme", LOW)
def test_nvidias_builder_takes_it_where_the_gpu_has_it(
    products: ModelProto, scheme: NodeScheme, floats: NodeScheme
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    graph = written(products, planned(products, scheme, floats))
    assert get("tensorrt-rtx").build(graph, EngineOptions(compute_capabilities=(SM[scheme],))).files


@pytest.mark.parametrize(("scheme", "least"), [("fp8", "8.9"), ("nvfp4", "10.0")])
def test_what_a_gpu_lacks_is_refused_before_the_build_for_the_reason_that_nvidias_builder_has(
    products: ModelProto, scheme: NodeScheme, least: str
) -> None:
    message = rf"{scheme} needs compute capability {least.replace('.', '[.]')} or above; x86-rtx is SM 8\.6"
    with pytest.raises(EnvironmentProblem, match=message):
        load_recipe(ROOT / "recipes/edge-vla/x86-rtx.yaml", overrides=[f"quantize.scheme={scheme}"])
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    [refusal] = check(written(products, planned(products, scheme)), "8.6")
    assert "Cannot compile for target(s) sm86, because the model contains HW-specific datatypes" in refusal.reason


def filters(size: int) -> ModelProto:
    """One convolution, 16 to 16 channels, with square filters of `size`. [1, 16, 16, 16] to the same."""
    weight = np.random.default_rng(5).normal(size=(16, 16, size, size)).astype(np.float32)
    body = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight"], ["y"], name="a/Conv", pads=[size // 2] * 4)],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 16, 16, 16))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 16, 16, 16))],
        [numpy_helper.from_array(weight, "weight")],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_filters_that_nvidias_builder_does_not_convolve_in_fp8_are_not_planned_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    [small], [large] = (plan_nodes({"c": filters(size)}, scheme="fp8")["c"].values() for size in (5, 7))
    assert (small.scheme, large.scheme) == ("fp8", "fp32")
    assert large.reason == "TensorRT has FP8 kernels for filters of up to 32 taps, and this one has 49"
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    monkeypatch.setattr("vlaopt.quantization.plan.FP8_TAPS", 49)
    for size, found in ((5, "fp8"), (7, "fp32")):
        graph = written(filters(size), planned(filters(size), "fp8"))
        assert get("tensorrt-rtx").build(graph, EngineOptions(compute_capabilities=("8.9",))).layers == {
            "a/Conv": found
        }


def test_fp8_of_convolutions_is_built_too(network: ModelProto) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    graph = written(network, planned(network, "fp8", "fp16"))
    assert get("tensorrt-rtx").build(graph, EngineOptions(compute_capabilities=("8.9",))).files


@settings(max_examples=30)
@given(values=matrices)
def test_int4_is_off_by_half_a_step_and_what_its_clipping_saves(values: np.ndarray) -> None:
    codes, scale = int4_blocks(values, 0, 32)
    assert codes.dtype == ml_dtypes.int4
    assert np.abs(codes.astype(int)).max() <= 7
    assert scale.shape == (2, 6)
    found = dequantized(codes, scale, 0, 32)
    plain = shared_scale(np.abs(values.reshape(2, 32, 6)).max(axis=1) / 7)
    steps = np.clip(np.rint(values / np.repeat(plain, 32, axis=0)), -7, 7) * np.repeat(plain, 32, axis=0)
    assert np.square(found - values).sum() <= np.square(steps - values).sum() * (1 + 1e-6)


@settings(max_examples=30)
@given(values=matrices)
def test_nvfp4_is_off_by_a_quarter_of_what_it_stands_for_at_most(values: np.ndarray) -> None:
    codes, scale, over_all = nvfp4_blocks(values, 0)
    assert (codes.dtype, scale.dtype) == (ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn)
    assert scale.shape == (4, 6)
    assert np.log2(over_all) == np.rint(np.log2(over_all))
    found = dequantized(codes, scale.astype(np.float32) * over_all, 0, 16)
    step = np.repeat(scale.astype(np.float64) * float(over_all), 16, axis=0)
    # Between 4 and 6 the next number is 1 away; the block's scale has 4 binary digits.
    assert (np.abs(found - values) <= step * 1.0 + np.abs(values) / 8).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_lie_along_the_inputs(axis: int) -> None:
    values = np.ones((64, 64))
    values[:16] = 100.0
    turned = values if axis == 0 else values.T
    codes, scale = int4_blocks(turned, axis, 16)
    assert np.allclose(dequantized(codes, scale, axis, 16), turned, rtol=0.01)
    fp4, fp8, over_all = nvfp4_blocks(turned, axis)
    assert np.allclose(dequantized(fp4, fp8.astype(np.float32) * over_all, axis, 16), turned, rtol=0.07)


@given(scale=st.floats(0, 60000))
def test_a_shared_scale_is_one_number_in_every_float_type(scale: float) -> None:
    found = shared_scale(np.array([scale]))
    assert found[0] >= scale
    assert found[0] <= max(scale * (1 + 2.0**-7), scale + 2.0**-24)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        assert found.astype(dtype).astype(np.float32) == found


def test_a_weight_of_zeros_has_a_scale() -> None:
    for codes, scale in (int4_blocks(np.zeros((16, 2)), 0, 16), nvfp4_blocks(np.zeros((16, 2)), 0)[:2]):
        assert not codes.astype(float).any()
        assert (scale.astype(float) > 0).all()


def test_a_shared_weight_is_stored_once(products: ModelProto) -> None:
    model = ModelProto()
    model.CopyFrom(products)
    model.graph.node[2].input[1] = "first.weight"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 48
    result = decode(written(model, planned(model, "fp8")))
    # One layer has its outputs along the weight's first axis, the other along the second: two sets of scales.
    assert (
        sum(
            tensor.data_type == TensorProto.FLOAT8E4M3FN and len(tensor.dims) == 2
            for tensor in result.graph.initializer
        )
        == 2
    )
    twice = ModelProto()
    twice.CopyFrom(products)
    twice.graph.node.extend(
        [
            helper.make_node("Gemm", ["x", "first.weight", "first.bias"], ["b"], name="again/Gemm", transB=1),
            helper.make_node("ReduceSum", ["b"], ["s"], name="again/ReduceSum", keepdims=0),
        ]
    )
    twice.graph.output.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, ()))
    result = decode(written(twice, planned(twice, "int4-weights")))
    assert sum(tensor.data_type == TensorProto.INT4 for tensor in result.graph.initializer) == 2


def test_weights_outside_the_graph_are_written_as_those_inside(
    products: ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "LIMIT", 0)
    monkeypatch.setattr(external, "SMALLEST", 64)
    outside = encode(products, COMPONENT)
    model = decode(outside)
    monkeypatch.undo()
    for scheme in LOW:
        plan = planned(products, scheme)
        found = decode(encode(write_lowbit(model, plan, outside.data), COMPONENT, outside.data))
        wanted = write_lowbit(products, plan)
        assert found.graph.node == wanted.graph.node
        for one, other in zip(found.graph.initializer, wanted.graph.initializer, strict=True):
            assert (one.name, one.data_type, one.raw_data) == (other.name, other.data_type, other.raw_data)


@pytest.mark.parametrize(("scheme", "opset"), [("fp8", 20), ("int4-weights", 21), ("nvfp4", 23)])
def test_the_opset_is_the_first_that_has_the_types(products: ModelProto, scheme: NodeScheme, opset: int) -> None:
    assert opset_of(decode(written(products, planned(products, scheme)))) == opset


def test_a_layer_whose_inputs_no_block_divides_stays_as_it_is(network: ModelProto) -> None:
    nodes = plan_nodes({COMPONENT: network}, scheme="int4-weights")[COMPONENT]
    assert {name: node.scheme for name, node in nodes.items()} == {
        "stem/Conv": "fp32",
        "block.depthwise/Conv": "fp32",
        "project/Gemm": "fp32",
        "output/MatMul": "int4-weights",
    }
    assert nodes["project/Gemm"].reason == "only products with a multiple of 16 inputs have int4-weights"
    with pytest.raises(InputError, match=r"nothing that scope 'vision\.stem' matches can be nvfp4"):
        plan_nodes({COMPONENT: network}, scheme="fp16", rules=[("vision.stem", "nvfp4")])


def test_what_the_plan_lacks_is_an_error(products: ModelProto, network: ModelProto) -> None:
    plan = planned(products, "fp8")
    with pytest.raises(StageError, match="the plan has no range of 'x'"):
        write_lowbit(products, plan.model_copy(update={"ranges": {}}))
    nodes = {"stem/Conv": next(iter(planned(products, "int4-weights").nodes.values()))}
    with pytest.raises(StageError, match="wants int4-weights of 'stem/Conv', which has no such form"):
        write_lowbit(network, plan.model_copy(update={"nodes": nodes}))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("first.weight_scale", np.zeros((48, 3), np.float32), "has a scale that is not a positive number"),
        ("first.weight_scale", np.ones((48, 2), np.float32), "has scales of shape .48, 2. for blocks of shape .48, 3."),
    ],
)
def test_broken_blocks_are_refused(products: ModelProto, name: str, value: np.ndarray, message: str) -> None:
    model = decode(written(products, planned(products, "int4-weights")))
    tensor = next(entry for entry in model.graph.initializer if entry.name == name)
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    with pytest.raises(StageError, match=message):
        structural_check(model, "tensorrt")


def test_fp8_and_nvfp4_are_refused_for_a_cpu(products: ModelProto) -> None:
    for scheme in ("fp8", "nvfp4"):
        model = decode(written(products, planned(products, scheme)))
        with pytest.raises(StageError, match=r"is float(8e4m3fn|4e2m1) where .* is needed"):
            structural_check(model, "onnxruntime")
