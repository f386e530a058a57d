"""FP16 and BF16: what does not fit stays FP32 and says why, and a CPU computes what a GPU would."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.unit.quantization.conftest import COMPONENT, Feed, Run, labelled
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, get
from vlaopt.errors import InputError, StageError
from vlaopt.graph import external
from vlaopt.graph.external import decode, encode
from vlaopt.graph.topology import opset_of
from vlaopt.progress import Silent
from vlaopt.quantization.casts import rounded_scale, write_casts
from vlaopt.quantization.halves import (
    FP16_LARGEST,
    HEADROOM,
    element_types,
    probed_tensors,
    settled_halves,
    wanted_halves,
    with_halves,
)
from vlaopt.quantization.plan import ComponentPlan, NodePlan, NodeScheme, component_plan, plan_nodes
from vlaopt.quantization.probe import largest_values
from vlaopt.quantization.rounding import rounded
from vlaopt.quantization.writing import write
from vlaopt.target import load_target

ADA = EngineOptions(compute_capabilities=("8.9",))
FLOATS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}


def small(*nodes: tuple[str, list[str]], opset: int = 20, **values: float | np.ndarray) -> ModelProto:
    """A chain of nodes named after their operators, from `x` [4] to `y`, with constants."""
    names = [f"t{number}" for number in range(len(nodes) - 1)] + ["y"]
    made = [
        helper.make_node(operator, inputs, [name], name=operator)
        for (operator, inputs), name in zip(nodes, names, strict=True)
    ]
    constants = [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in values.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (4,)) for name in "xy"]
    body = helper.make_graph(made, "test", ends[:1], ends[1:], constants)
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def settled(
    model: ModelProto, scheme: NodeScheme, largest: float = 1.0, rules: list[tuple[str, NodeScheme]] | None = None
):
    wanted = wanted_halves(COMPONENT, model, scheme, rules or [])
    return settled_halves(model, wanted, dict.fromkeys(probed_tensors(model, wanted), largest))


def halved(model: ModelProto, scheme: NodeScheme) -> ModelProto:
    return write_casts(model, settled(model, scheme))


def cpu(model: ModelProto) -> ModelProto:
    return decode(rounded(Graph(model.SerializeToString()), COMPONENT))


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_every_node_computes_in_its_planned_type_between_fp32_ends(network: ModelProto, scheme: NodeScheme) -> None:
    plan = settled(network, scheme)
    model = write_casts(network, plan)
    kinds = element_types(model)
    for name, node in plan.items():
        written = next(entry for entry in model.graph.node if entry.name == name)
        assert kinds[written.output[0]] == FLOATS[node.scheme], name
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {1}
    assert plan["pool/ReduceMean"].reason == "ReduceMean stays FP32 unless a rule names the operator"
    assert plan["stem/Conv"].scheme == scheme


@pytest.mark.parametrize(("scheme", "digits"), [("fp16", 11), ("bf16", 8)])
def test_it_computes_what_fp32_does_but_for_its_digits(
    network: ModelProto, feeds: list[Feed], run_onnxruntime: Run, scheme: NodeScheme, digits: int
) -> None:
    model = cpu(halved(network, scheme))
    errors = [np.abs(run_onnxruntime(model, feed) - run_onnxruntime(network, feed)).max() for feed in feeds]
    sizes = [np.abs(run_onnxruntime(network, feed)).max() for feed in feeds]
    assert 0 < max(errors) < 8 * 2.0**-digits * max(sizes)


def test_onnx_runtimes_own_fp16_is_what_the_rounded_graph_is_but_for_its_rounding(
    network: ModelProto, feeds: list[Feed], run_onnxruntime: Run
) -> None:
    model = halved(network, "fp16")
    assert np.allclose(run_onnxruntime(cpu(model), feeds[0]), run_onnxruntime(model, feeds[0]), atol=5e-3)


def test_an_overflow_shows_on_a_cpu_and_the_probe_keeps_it_out(run_onnxruntime: Run) -> None:
    model = small(("Mul", ["x", "big"]), ("Div", ["t0", "big"]), big=1000.0)
    feed = {"x": np.array([1, 2, 100, -70], np.float32)}
    blind = halved(model, "fp16")
    assert np.isfinite(run_onnxruntime(blind, feed)).all()  # computed in FP32: nothing to be seen
    assert run_onnxruntime(cpu(blind), feed).tolist() == [1.0, 2.0, np.inf, -np.inf]

    wanted = wanted_halves(COMPONENT, model, "fp16", [])
    tensors = probed_tensors(model, wanted)
    seen = largest_values(Graph(model.SerializeToString()), lambda: [("0", feed)], tensors, Silent())
    assert seen == {"x": 100.0, "t0": 100_000.0, "y": 100.0}
    plan = settled_halves(model, wanted, seen)
    assert {node.scheme for node in plan.values()} == {"fp32"}
    assert plan["Mul"].reason == "max |x| of 't0' is 1e+05: fp16 ends at 65504"


@given(seen=st.floats(0, 1e6, width=32))
def test_a_node_is_half_only_with_headroom(seen: float) -> None:
    plan = settled(small(("Relu", ["x"])), "fp16", seen)
    assert (plan["Relu"].scheme == "fp16") == (seen * HEADROOM <= FP16_LARGEST)


def test_bf16_needs_no_probe() -> None:
    model = small(("Relu", ["x"]))
    wanted = wanted_halves(COMPONENT, model, "bf16", [])
    assert probed_tensors(model, wanted) == []
    assert settled_halves(model, wanted, {})["Relu"].scheme == "bf16"


def test_a_tensor_that_was_not_probed_is_an_error() -> None:
    model = small(("Relu", ["x"]))
    with pytest.raises(StageError, match="the largest value of 'x' is not known"):
        settled_halves(model, wanted_halves(COMPONENT, model, "fp16", []), {})


@pytest.mark.parametrize(
    ("value", "reason"),
    [(1e-12, "'c' is 1e-12: fp16 is exact from 6.1e-05"), (70000.0, "max |x| of 'c' is 70000: fp16 ends at 65504")],
)
def test_a_constant_that_fp16_cannot_hold_keeps_its_node(value: float, reason: str) -> None:
    assert settled(small(("Add", ["x", "c"]), c=value), "fp16")["Add"].reason == reason


def test_infinite_masks_do_not_count(run_onnxruntime: Run) -> None:
    model = small(("Add", ["x", "mask"]), ("Relu", ["t0"]), mask=np.array([0, 0, 0, -np.inf]))
    wanted = wanted_halves(COMPONENT, model, "fp16", [])
    feed = {"x": np.array([1, -2, 3, 4], np.float32)}
    graph = Graph(model.SerializeToString())
    seen = largest_values(graph, lambda: [("0", feed)], probed_tensors(model, wanted), Silent())
    assert seen["t0"] == 3.0
    assert settled_halves(model, wanted, seen)["Add"].scheme == "fp16"


def test_the_probe_is_the_largest_over_all_samples(network: ModelProto, feeds: list[Feed]) -> None:
    graph = Graph(network.SerializeToString())
    one_by_one = [largest_values(graph, lambda f=f: [("0", f)], ["image in", "h"], Silent()) for f in feeds]
    together = largest_values(graph, lambda: labelled(feeds), ["image in", "h"], Silent())
    assert together == {name: max(found[name] for found in one_by_one) for name in together}
    assert together["image in"] == max(float(np.abs(feed["image in"]).max()) for feed in feeds)
    with pytest.raises(InputError, match="no calibration samples"):
        largest_values(graph, list, ["h"], Silent())


def test_a_rule_that_names_the_operator_makes_it_half_and_the_last_float_rule_decides() -> None:
    model = small(("Softmax", ["x"]), ("Relu", ["t0"]))
    schemes = lambda rules: {name: node.scheme for name, node in settled(model, "fp16", rules=rules).items()}  # noqa: E731
    assert schemes([]) == {"Softmax": "fp32", "Relu": "fp16"}
    assert schemes([("vision", "bf16")]) == {"Softmax": "fp32", "Relu": "bf16"}
    assert schemes([("vision", "fp32"), ("vision", "int8")]) == {}
    with_slash = small(("Softmax", ["x"]), ("Relu", ["t0"]))
    with_slash.graph.node[0].name = "attention/Softmax"
    assert settled(with_slash, "fp16", rules=[("*/Softmax", "fp16")])["attention/Softmax"].scheme == "fp16"


def test_rules_for_floats_may_cover_nodes_without_weights_where_something_is_half(network: ModelProto) -> None:
    models = {COMPONENT: network}
    names: tuple[NodeScheme, ...] = ("fp16", "bf16", "fp32")
    for said in names:
        assert plan_nodes(models, scheme="fp16", rules=[("vision.*/ReduceMean", said)])
    for scheme, rules in (("int8", [("vision.*/Relu", "fp32")]), ("fp16", [("vision.*/Mystery", "fp32")])):
        with pytest.raises(InputError, match="matches no layer with weights"):
            plan_nodes(models, scheme=scheme, rules=rules)
    assert plan_nodes(models, scheme="int8", rules=[("vision.*/Relu", "fp32")], floats="bf16")


def test_a_layer_that_a_rule_would_quantize_in_vain_is_half() -> None:
    reason = "rule vision says int8, but its weights have 3 dimensions"
    nodes = {"MatMul": NodePlan(operator="MatMul", scheme="fp32", reason=reason)}
    floats = {"MatMul": NodePlan(operator="MatMul", scheme="fp16", reason="scheme fp16")}
    assert with_halves(nodes, floats)["MatMul"] == NodePlan(operator="MatMul", scheme="fp16", reason=reason)


def test_an_operator_without_the_type_stays_fp32() -> None:
    model = small(("HardSwish", ["x"]), ("Relu", ["t0"]))
    assert settled(model, "bf16")["HardSwish"].reason == "HardSwish has no bf16 form"
    assert settled(model, "fp16")["HardSwish"].scheme == "fp16"
    assert opset_of(halved(model, "bf16")) == 22


def test_a_mask_of_fp32s_lowest_number_stays_finite_in_bf16(run_onnxruntime: Run) -> None:
    lowest = float(np.finfo(np.float32).min)
    model = small(("Add", ["x", "mask"]), ("Softmax", ["t0"]), mask=np.full(4, lowest))
    masked = halved(model, "bf16")
    assert {node.op_type for node in masked.graph.node} >= {"Add", "Softmax"}
    feed = {"x": np.zeros(4, np.float32)}
    assert run_onnxruntime(cpu(masked), feed).tolist() == [0.25] * 4
    kept = small(("Add", ["x", "mask"]), ("Relu", ["t0"]), mask=np.array([0, 0, 0, -np.inf]))
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in halved(kept, "bf16").graph.initializer}
    assert np.isneginf(stored["mask_bf16"].astype(np.float32)).tolist() == [False, False, False, True]


def test_a_subgraph_finds_what_it_takes_in_fp32(run_onnxruntime: Run) -> None:
    model = small(("Mul", ["x", "two"]), ("Relu", ["t0"]), two=2.0)
    branch = helper.make_graph(
        [helper.make_node("Neg", ["t0"], ["inner"], name="Neg")],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", 1, (4,))],
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node[1].CopyFrom(
        helper.make_node("If", ["yes"], ["y"], name="If", then_branch=branch, else_branch=branch)
    )
    result = halved(model, "fp16")
    assert [node.op_type for node in result.graph.node] == ["Cast", "Mul", "Cast", "If"]
    feed = {"x": np.array([1, 2, 3, 4], np.float32)}
    assert run_onnxruntime(cpu(result), feed).tolist() == [-2.0, -4.0, -6.0, -8.0]


@pytest.fixture
def mixed(network: ModelProto, plan: ComponentPlan) -> ComponentPlan:
    """Every layer in int8, everything else in FP16."""
    floats = settled(network, "fp16")
    return component_plan(Graph(network.SerializeToString()), plan.nodes, {}, floats).model_copy(
        update={"ranges": plan.ranges}
    )


def test_int8_between_fp16_has_fp16_scales(
    network: ModelProto, feeds: list[Feed], mixed: ComponentPlan, plan: ComponentPlan, run_onnxruntime: Run
) -> None:
    target, graph = load_target("x86-rtx"), Graph(network.SerializeToString())
    model = decode(write(COMPONENT, graph, mixed, target, "per-channel", "tensorrt"))
    plain = decode(write(COMPONENT, graph, plan, target, "per-channel", "tensorrt"))
    kinds = element_types(model)
    scales = {node.input[1] for node in model.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    assert len(scales) >= 8
    assert sum(kinds[name] == TensorProto.FLOAT16 for name in scales) > len(scales) / 2
    for feed in feeds[:4]:
        assert np.allclose(run_onnxruntime(cpu(model), feed), run_onnxruntime(plain, feed), atol=0.1)


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_nvidias_strongly_typed_builder_takes_them(
    network: ModelProto, recurrent: ModelProto, scheme: NodeScheme
) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    for model in (network, recurrent):
        engine = get("tensorrt-rtx").build(encode(halved(model, scheme), COMPONENT), ADA)
        assert engine.files


def test_nvidias_builder_takes_int8_between_fp16(network: ModelProto, mixed: ComponentPlan) -> None:
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    graph = write(
        COMPONENT, Graph(network.SerializeToString()), mixed, load_target("x86-rtx"), "per-channel", "tensorrt"
    )
    assert get("tensorrt-rtx").build(graph, ADA).files


@given(scale=st.floats(2.0**-40, 1e4), kind=st.sampled_from([TensorProto.FLOAT16, TensorProto.BFLOAT16]))
def test_a_scale_is_never_zero_and_never_covers_less_where_digits_are_few(scale: float, kind: int) -> None:
    found = float(rounded_scale(np.float64(scale), kind))
    assert found > 0
    if kind == TensorProto.FLOAT16 and scale < 2.0**-14:
        assert scale <= found <= scale + 2.0**-24
    else:
        assert abs(found - scale) <= scale * 2.0**-8


def test_int8_weights_are_coded_anew_where_fp16_cuts_their_scale_short() -> None:
    codes, scale = np.array([[127, -127], [64, 3]], np.int8), np.array([1.4 * 2.0**-24, 0.01], np.float32)
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], name="DequantizeLinear", axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"], name="MatMul"),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 2)) for name in "xy"]
    constants = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scale, "scale")]
    body = helper.make_graph(nodes, "test", ends[:1], ends[1:], constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    written = write_casts(model, {"MatMul": NodePlan(operator="MatMul", scheme="fp16", reason="")})
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    assert stored["scale_fp16"].tolist() == [2.0**-23, np.float16(0.01)]
    assert stored["codes_fp16"].tolist() == [[89, -127], [45, 3]]


@pytest.mark.parametrize("scheme", ["fp16", "bf16"])
def test_weights_outside_the_graph_are_halved_as_those_inside(
    network: ModelProto, monkeypatch: pytest.MonkeyPatch, scheme: NodeScheme
) -> None:
    monkeypatch.setattr(external, "LIMIT", 0)
    monkeypatch.setattr(external, "SMALLEST", 64)
    outside = encode(network, COMPONENT)
    assert outside.data
    model = decode(outside)
    monkeypatch.undo()
    plan = settled(network, scheme)
    written = encode(write_casts(model, plan, outside.data), COMPONENT, outside.data)
    assert written == encode(write_casts(network, plan), COMPONENT)


def test_nothing_is_written_where_nothing_is_half(network: ModelProto) -> None:
    floats: Mapping[str, NodePlan] = {"stem/Conv": NodePlan(operator="Conv", scheme="fp32", reason="")}
    assert write_casts(network, floats) is network
    graph = Graph(network.SerializeToString())
    assert rounded(graph, COMPONENT) is graph
    assert onnx.checker.check_model(network) is None
