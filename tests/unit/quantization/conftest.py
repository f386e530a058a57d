"""A small network with every kind of layer that is quantized, made of plain ONNX nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.unit.quantization import reaching as policies
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.graph import Graph
from vlaopt.progress import Silent
from vlaopt.quantization.calibrators import MinMax, Range
from vlaopt.quantization.collect import collect_ranges
from vlaopt.quantization.plan import ComponentPlan, NodePlan, calibrated_tensors, component_plan, plan_nodes

Feed = Mapping[str, np.ndarray]
Run = Callable[[ModelProto, Feed], np.ndarray]

COMPONENT = "vision"


@pytest.fixture(scope="session")
def network() -> ModelProto:
    """Two convolutions (one depthwise), HardSwish, Relu, Add, mean, Gemm, Relu, MatMul. [1, 3, 8, 8] to [1, 5]."""
    generator = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return (generator.normal(size=shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    values = {
        "stem.weight": normal(8, 3, 3, 3),
        "stem.bias": normal(8),
        "depthwise.weight": normal(8, 1, 3, 3),
        "depthwise.bias": normal(8),
        "axes": np.array([2, 3], np.int64),
        "project.weight": normal(16, 8),
        "project.bias": normal(16),
        "output.weight": normal(16, 5),
    }
    pads = {"pads": [1, 1, 1, 1], "kernel_shape": [3, 3]}
    nodes = [
        helper.make_node("Conv", ["image in", "stem.weight", "stem.bias"], ["c"], name="stem/Conv", **pads),
        helper.make_node("HardSwish", ["c"], ["h"], name="stem/HardSwish"),
        helper.make_node(
            "Conv", ["h", "depthwise.weight", "depthwise.bias"], ["d"], name="block.depthwise/Conv", group=8, **pads
        ),
        helper.make_node("Relu", ["d"], ["r/🤖"], name="block/Relu"),
        helper.make_node("Add", ["r/🤖", "h"], ["a"], name="block/Add"),
        helper.make_node("ReduceMean", ["a", "axes"], ["m"], name="pool/ReduceMean", keepdims=0),
        helper.make_node("Gemm", ["m", "project.weight", "project.bias"], ["p"], name="project/Gemm", transB=1),
        helper.make_node("Relu", ["p"], ["q"], name="project/Relu"),
        helper.make_node("MatMul", ["q", "output.weight"], ["y"], name="output/MatMul"),
    ]
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image in", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 5))],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="session")
def recurrent() -> ModelProto:
    """Embedding and LSTM: tokens [1, 6] to [6, 1, 1, 4]."""
    generator = np.random.default_rng(1)
    values = {
        "embedding": generator.normal(size=(10, 4)).astype(np.float32),
        "w": generator.normal(size=(1, 16, 4)).astype(np.float32),
        "r": generator.normal(size=(1, 16, 4)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Gather", ["embedding", "tokens"], ["e"], name="embedding/Gather"),
        helper.make_node("Transpose", ["e"], ["t"], name="lstm/Transpose", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["t", "w", "r"], ["y"], name="lstm/LSTM", hidden_size=4),
    ]
    body = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, (1, 6))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (6, 1, 1, 4))],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="session")
def feeds() -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(2)
    return [{"image in": generator.uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)} for _ in range(12)]


def labelled(feeds: list[dict[str, np.ndarray]]) -> list[tuple[str, dict[str, np.ndarray]]]:
    """Feeds as `collect_ranges` takes them: each with the number of its sample."""
    return [(str(number), feed) for number, feed in enumerate(feeds)]


@pytest.fixture(scope="session")
def everything(network: ModelProto) -> dict[str, NodePlan]:
    """All layers of `network` in int8."""
    return plan_nodes({COMPONENT: network}, scheme="int8", rules=[(COMPONENT, "int8")])[COMPONENT]


@pytest.fixture(scope="session")
def ranges(
    network: ModelProto, feeds: list[dict[str, np.ndarray]], everything: dict[str, NodePlan]
) -> dict[str, Range]:
    tensors = calibrated_tensors(network, everything)
    return collect_ranges(Graph(network.SerializeToString()), lambda: labelled(feeds), tensors, MinMax(), Silent())


@pytest.fixture(scope="session")
def plan(network: ModelProto, everything: dict[str, NodePlan], ranges: dict[str, Range]) -> ComponentPlan:
    return component_plan(Graph(network.SerializeToString()), everything, ranges)


@pytest.fixture(scope="session")
def run_onnxruntime() -> Run:
    """The output `y` by ONNX Runtime."""

    def run(model: ModelProto, feed: Feed) -> np.ndarray:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        result: np.ndarray = session.run(["y"], dict(feed))[0]
        return result

    return run


@pytest.fixture(scope="session")
def run_openvino() -> Run:
    """The output `y` by OpenVINO in float32."""
    openvino = pytest.importorskip("openvino")

    def run(model: ModelProto, feed: Feed) -> np.ndarray:
        core = openvino.Core()
        compiled = core.compile_model(
            core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        result: np.ndarray = compiled(dict(feed))["y"].copy()
        return result

    return run


@pytest.fixture(scope="session")
def reaching(tmp_path_factory: pytest.TempPathFactory, publish: Callable[..., Artifact]) -> policies.Reaching:
    """A small whole policy with a plan, one node of which has a wrong range. Shared: not to be changed."""
    return policies.make(tmp_path_factory.mktemp("reaching"), publish)
