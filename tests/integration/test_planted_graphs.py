"""Faults planted in a small policy's final graphs: stage onnx of a TensorRT target catches each and names the place."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from tests import toy_flow
from vlaopt import backends, policies, stages
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import cache_path, plain_path
from vlaopt.artifact.store import Store
from vlaopt.backends.tensorrt import rtx
from vlaopt.backends.tensorrt.calibration_cache import decode as decode_cache
from vlaopt.chain import run_stages
from vlaopt.errors import StageError
from vlaopt.graph.external import decode
from vlaopt.progress import Silent
from vlaopt.quantization import graph_check
from vlaopt.quantization.plan import QuantizationPlan
from vlaopt.quantization.structure import QDQ
from vlaopt.recipe.load import load_recipe
from vlaopt.stages import ORDER
from vlaopt.stages import onnx as stage

Plant = Callable[[ModelProto], object]

with_builder = pytest.mark.skipif(
    backends.get("tensorrt-rtx").missing() is not None, reason="TensorRT for RTX is not installed here"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    made = tmp_path_factory.mktemp("toy")
    toy_flow.make(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.BUILT_IN, "toy-flow", "tests.toy_flow")
        yield made


def until(folder: Path, last: str, target: str) -> Artifact:
    recipe = load_recipe(folder / "recipe.yaml", overrides=["quantize.scheme=int8"], target=target)
    names = ORDER[: ORDER.index(last) + 1]
    return run_stages(recipe, None, names, store=Store(folder / "store"), progress=Silent())[-1].artifact


@pytest.fixture
def planted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Plant], StageError]:
    """What stage onnx says of a policy for an x86 GPU into whose vision a fault is planted when it is written."""
    until(folder, "quantize", "x86-gpu")
    write = stage.write

    def run(plant: Plant) -> StageError:
        def written(name: str, *arguments: Any) -> Graph:
            graph = write(name, *arguments)
            if name != "vision":
                return graph
            model = decode(graph)
            plant(model)
            return Graph(model.SerializeToString())

        monkeypatch.setattr(stage, "write", written)
        stored = sorted((folder / "store/stages/onnx").glob("*"))
        with pytest.raises(StageError) as caught:
            until(folder, "onnx", "x86-gpu")
        assert sorted((folder / "store/stages/onnx").glob("*")) == stored
        return caught.value

    return run


def node(model: ModelProto, name: str) -> NodeProto:
    return next(entry for entry in model.graph.node if entry.name == name)


def constant(model: ModelProto, name: str, value: Any) -> str:
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    return name


def insert(model: ModelProto, *nodes: NodeProto, before: str) -> None:
    """Put nodes in front of one of this name."""
    at = next(index for index, entry in enumerate(model.graph.node) if entry.name == before)
    for offset, entry in enumerate(nodes):
        model.graph.node.insert(at + offset, entry)


def quantized_bias(model: ModelProto) -> None:
    bias, stem = node(model, "stem/Conv").input[2], node(model, "stem/Conv")
    scale, zero = constant(model, "bias_scale", np.float32(0.01)), constant(model, "bias_zero", np.int8(0))
    insert(
        model,
        helper.make_node("QuantizeLinear", [bias, scale, zero], ["bias_codes"], name="bias/QuantizeLinear"),
        helper.make_node("DequantizeLinear", ["bias_codes", scale, zero], ["bias"], name="bias/DequantizeLinear"),
        before="stem/Conv",
    )
    stem.input[2] = "bias"


def asymmetric(model: ModelProto) -> None:
    quantizer = next(entry for entry in model.graph.node if entry.op_type == "QuantizeLinear")
    for entry in model.graph.node:
        if entry.op_type in QDQ and entry.input[2] == quantizer.input[2] and entry is not quantizer:
            entry.input[2] = "moved"
    quantizer.input[2] = constant(model, "moved", np.int8(3))


def unsigned(model: ModelProto) -> None:
    zero = next(entry for entry in model.graph.node if entry.op_type == "QuantizeLinear").input[2]
    tensor = next(entry for entry in model.graph.initializer if entry.name == zero)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(np.uint8(128)), zero))


def mixed(model: ModelProto) -> None:
    half = constant(model, "half", np.zeros((1, 1, 1, 1), np.float16))
    relu = node(model, "Relu")
    insert(model, helper.make_node("Add", [relu.input[0], half], ["sum"], name="stem/Add"), before="Relu")
    relu.input[0] = "sum"


def unknown_to_tensorrt(model: ModelProto) -> None:
    insert(model, helper.make_node("Det", ["image"], ["determinant"], name="stem.pool/Det"), before="stem/Conv")
    model.graph.output.append(helper.make_tensor_value_info("determinant", TensorProto.FLOAT, (1, 3)))


def norm(kind: int) -> Plant:
    """LayerNorm in single operators over the image, in FP16 or BF16 behind a cast."""

    def plant(model: ModelProto) -> None:
        axes = constant(model, "axes", np.array([1], np.int64))
        numbers = {
            name: helper.make_node("Constant", [], [name], value=helper.make_tensor(name, kind, (), [value]))
            for name, value in (("two", 2.0), ("epsilon", 1e-3))
        }
        steps = [
            ("Cast", ["image"], "half"),
            ("ReduceMean", ["half", axes], "mean"),
            ("Sub", ["half", "mean"], "centred"),
            ("Pow", ["centred", "two"], "square"),
            ("ReduceMean", ["square", axes], "variance"),
            ("Add", ["variance", "epsilon"], "shifted"),
            ("Sqrt", ["shifted"], "deviation"),
            ("Div", ["centred", "deviation"], "normed"),
            ("Cast", ["normed"], "image_normed"),
        ]
        nodes = [helper.make_node(kind, takes, [gives], name=f"norm.{gives}/{kind}") for kind, takes, gives in steps]
        for entry, wanted in ((nodes[0], kind), (nodes[-1], TensorProto.FLOAT)):
            entry.attribute.append(helper.make_attribute("to", wanted))
        insert(model, *numbers.values(), *nodes, before=model.graph.node[0].name)
        for entry in list(model.graph.node)[len(nodes) + 2 :]:
            entry.input[:] = ["image_normed" if name == "image" else name for name in entry.input]

    return plant


def refused_by_the_builder(model: ModelProto) -> None:
    insert(model, helper.make_node("NonZero", ["image"], ["places"], name="stem.mask/NonZero"), before="stem/Conv")
    model.graph.output.append(helper.make_tensor_value_info("places", TensorProto.INT64, (4, None)))


@pytest.mark.parametrize(
    ("plant", "said", "hint"),
    [
        (
            quantized_bias,
            "DequantizeLinear 'bias/DequantizeLinear' makes the bias of 'stem/Conv' in low precision "
            "(module vision.stem)",
            'TensorRT takes biases in float; keep the place in FP32, quantize.rules: [{scope: "vision.stem", '
            "scheme: fp32}]",
        ),
        (asymmetric, "has a zero point other than 0 in int8 (module vision.stem)", '{scope: "vision.stem", '),
        (unsigned, "is uint8 where int8 or float8e4m3fn is needed (module vision.stem)", '{scope: "vision.stem", '),
        (mixed, "Add 'stem/Add' mixes fp32 ('stem/Conv') and fp16 ('half')", '{scope: "vision.stem", scheme: fp32}'),
        (
            unknown_to_tensorrt,
            "Det 'stem.pool/Det' is an operator that TensorRT lacks (module vision.stem.pool)",
            "write the module with other operators, or export with another export.opset",
        ),
        (
            norm(TensorProto.FLOAT16),
            "Pow 'norm.square/Pow' belongs to a LayerNorm in single operators that computes in fp16, where squares end "
            "at 65504 (module vision.norm.square)",
            '{scope: "vision.norm.square", scheme: fp32}',
        ),
        (norm(TensorProto.BFLOAT16), "computes in bf16, where a sum keeps 8 binary digits", "scheme: fp32"),
        pytest.param(
            refused_by_the_builder, "NonZero 'stem.mask/NonZero' is refused: ", "vision.stem.mask", marks=with_builder
        ),
    ],
)
def test_a_planted_fault_is_caught_and_named(
    planted: Callable[[Plant], StageError], plant: Plant, said: str, hint: str
) -> None:
    error = planted(plant)
    assert said in error.message
    assert error.message.startswith("vision ")
    assert error.where == "onnx/vision.onnx"
    assert hint in str(error.hint)


def kills_itself(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


@with_builder
def test_a_builder_that_crashes_is_an_error_of_the_stage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_check, "refusals_of", kills_itself)
    with pytest.raises(StageError, match=r"the check of vision by NVIDIA's builder crashed \(SIGSEGV\)"):
        until(folder, "onnx", "jetson-orin-nano")


@with_builder
@pytest.mark.parametrize(
    ("target", "tried"),
    [
        ("jetson-orin", "compute capability 8.6, which has the precisions of 8.7"),
        ("jetson-thor", "compute capability 12.0, which has the precisions of 11.0"),
        ("x86-rtx", "left to stage engine: tensorrt-rtx builds the engine itself"),
    ],
)
def test_what_was_checked_is_recorded(folder: Path, target: str, tried: str) -> None:
    written = until(folder, "onnx", target)
    assert written.manifest.metrics["onnx"]["graph_check"].endswith(tried)


def test_a_check_that_was_not_done_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(folder / "recipe.yaml", target="jetson-orin")
    monkeypatch.setattr(rtx.RtxBackend, "missing", lambda self: "it is not installed: pip install it")
    assert graph_check.check_builds({}, recipe.target, {}, Silent()) == "not done: it is not installed: pip install it"
    monkeypatch.undo()
    maxwell = recipe.target.model_copy(update={"compute_capabilities": ("5.3",)})
    assert graph_check.check_builds({}, maxwell, {}, Silent()).endswith("no GPU like compute capability 5.3")


def test_the_check_is_done_again_with_another_builder(folder: Path) -> None:
    tools = [
        stages.get("onnx").key_parts(load_recipe(folder / "recipe.yaml", target=target), None)["tools"]
        for target in ("jetson-orin", "cpu-x86")
    ]
    assert ["tensorrt-rtx-cu13-libs" in known for known in tools] == [
        backends.get("tensorrt-rtx").missing() is None,
        False,
    ]


def test_targets_without_tensorrt_are_not_checked(folder: Path) -> None:
    assert "graph_check" not in until(folder, "onnx", "cpu-x86").manifest.metrics["onnx"]


def test_the_ranges_are_there_for_older_tools(folder: Path) -> None:
    """As `trtexec --onnx=onnx/plain/… --calib=…` takes them: tensors of the plain graph with the scales of the Q/DQ."""
    written = until(folder, "onnx", "jetson-orin")
    plan = QuantizationPlan.from_json(written.read("policy/quantization.json"), where="plan")
    for name, component in plan.components.items():
        scales = decode_cache(written.read(cache_path(name)))
        assert set(scales) == set(component.ranges) != set()
        plain = decode(written.graph(plain_path(name)))
        assert set(scales) <= {value.name for value in plain.graph.input} | {
            output for entry in plain.graph.node for output in entry.output
        }
        quantized = decode(written.graph(f"onnx/{name}.onnx"))
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
        written_scales = {
            entry.input[0]: constants[entry.input[1]]
            for entry in quantized.graph.node
            if entry.op_type == "QuantizeLinear"
        }
        assert written_scales
        for tensor, scale in written_scales.items():
            assert scales[tensor] == pytest.approx(float(scale), rel=1e-6)
