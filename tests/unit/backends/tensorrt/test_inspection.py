"""What the engine inspector tells, read from both forms of its JSON.

Layers are written as TensorRT writes them: of Myelin in github.com/NVIDIA/TensorRT/issues/4397 (10.x), of convolutions
and reformats in issue 4020 (10.1), the tensors of 11 in NVIDIA's guide "Migrating IEngineInspector Usage from TensorRT
10.x to 11.x".
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from vlaopt.artifact.graph import Graph
from vlaopt.backends.audit import UNKNOWN
from vlaopt.backends.tensorrt.inspection import inspect, names, precision, read, read_log
from vlaopt.errors import StageError

GEMM_FP16 = "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64_stage6_warpsize2x2x1_tensor16x8x16"
GEMM_INT8 = "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize64x64x64_stage3_warpsize2x2x1_tensor16x8x32"
GEMM_TF32 = "sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize32x32x64_stage3_warpsize2x2x1_tensor16x8x8"
CONV_INT8 = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_tilesize64x64x64"


def tensor(name, kind):
    return {"Name": name, "Location": "Device", "Dimensions": [1, 16, 8, 8], "Format/Datatype": kind}


def layer(name, kind="gemm", takes="Half", gives="Half", **more):
    fields = {"Name": name, "LayerType": kind, "Inputs": [tensor("x", takes)], "Outputs": [tensor("y", gives)]}
    return {**fields, "StreamId": 0, "Metadata": "", **more}


def told(*layers, **more):
    return json.dumps({"Layers": list(layers), "Bindings": ["image", "features"], **more})


@pytest.fixture
def graph(graphs):
    """Nodes stem/conv, head/fc and the Q/DQ of both."""
    return Graph(graphs["int8"])


CONV = layer(
    "k + k/q + stem/conv + stem/relu",
    "CaskConvolution",
    takes="Thirty-two wide channel vectorized row major Int8 format",
    gives="Row major linear FP32",
    TacticName=CONV_INT8,
    Weights={"Type": "Int8", "Count": 432},
    Bias={"Type": "Float", "Count": 16},
)
PRODUCT = layer(
    "head_fc_myl0_4", takes="Int8", TacticName=GEMM_INT8, Metadata="[ONNX Layer: w/q]\x1e[ONNX Layer: head/fc]"
)
REFORMAT = layer(
    "Reformatting CopyNode for Input Tensor 0 to k + k/q + stem/conv + stem/relu",
    "Reformat",
    takes="Row major linear FP32",
    gives="Row major Int8 format",
    Origin="REFORMAT",
)


def test_precisions_are_those_of_nodes_and_reformats_are_counted(graph):
    found = read(told(REFORMAT, CONV, PRODUCT), graph)
    assert found.layers == {"stem/conv": "int8", "head/fc": "int8"}
    assert found.precisions == {"int8": 2}
    assert found.facts == {"layers": 3, "reformats": 1, "fusions_lost": [], "weights_bytes": 432 + 64}


def test_the_form_of_version_11_reads_the_same(graph):
    typed = {"Name": "x", "Dimensions": [1, 16], "Format": "LINEAR", "DataType": "Int8"}
    product = {**PRODUCT, "TacticName": "", "Inputs": [typed]}
    io = [{"Name": "image", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 3, 8, 8], "Location": "Device"}]
    text = json.dumps({"Layers": [product], "I/O Tensors": io, "ProfilingVerbosity": "DETAILED"})
    assert read(text, graph).layers == {"head/fc": "int8"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (layer("a", TacticName=GEMM_FP16), "fp16"),
        (layer("a", takes="Float", TacticName=GEMM_TF32), "fp32"),
        (layer("a", takes="Int8", TacticName=GEMM_TF32), "fp32"),
        (layer("a", takes="Half", TacticName=GEMM_INT8), "int8"),
        (layer("a", takes="FP8", TacticName="sm89_xmma_gemm_e4m3e4m3_e4m3f32_f32_tn_n"), "fp8"),
        (layer("a", takes="Int8", Weights={"Type": "Float", "Count": 9}), "fp32"),
        (layer("a", takes="Channel major FP16 format where channel % 8 == 0"), "fp16"),
        (layer("a", takes="BFloat16"), "bf16"),
        (layer("a", takes="Row major linear FP32"), "fp32"),
        (layer("a", takes="Int32", gives="Float"), "fp32"),
        (layer("a", takes="Int32", Constants=[tensor("rows", "Half")], gives="Float"), "fp16"),
        (layer("a", takes="Float", Constants=[tensor("weight", "Half")], gives="Half"), "fp16"),
        (layer("a", takes="Float", Constants=[tensor("weight", "Float"), tensor("b", "Half")], gives="Half"), "fp32"),
        (layer("a", takes="Half", Constants=[tensor("weight", "Int8")], gives="Half"), "fp16"),
        (layer("a", takes="Bool", gives="Bool"), UNKNOWN),
    ],
)
def test_a_product_computes_in_what_its_kernel_says_else_its_weights_else_its_narrowest_input(record, expected):
    assert precision(record) == expected


def test_an_engine_that_ignored_the_plan_is_seen(graph):
    single = {"TacticName": GEMM_TF32}
    found = read(told(layer("stem/conv + stem/relu", "CaskConvolution", "Float", **single), PRODUCT), graph)
    assert found.layers == {"stem/conv": "fp32", "head/fc": "int8"}


def test_a_kernel_that_only_moves_data_of_a_product_does_not_speak_for_it(graph):
    moves = layer(
        "__myl_Move_myl0_3", "kgen", takes="Int8", TacticName="__myl_Move_0x1f", Metadata="[ONNX Layer: head/fc]"
    )
    product = layer("head_fc_myl0_4", takes="Half", TacticName=GEMM_FP16, Metadata="[ONNX Layer: head/fc]")
    assert read(told(moves, product), graph).precisions == {"fp16": 1}
    assert read(told(moves), graph).layers == {"head/fc": "int8"}


def test_a_product_that_tells_no_node_is_counted_all_the_same(graph):
    found = read(told(layer("__myl_Fc_myl0_9", "fusion", TacticName=GEMM_INT8 + "_by_fusion_tactic")), graph)
    assert found.layers == {}
    assert found.precisions == {"int8": 1}


LOGGED = """Layers:
Name: __myl_MulCast_myl0_0, LayerType: kgen, Inputs: [ { Name: image, Dimensions: [1,3,8,8], \
Strides: [192,64,8,1], StrideOrder: [3,2,1,0], Datatype: Float, Format: (Linear) Row major linear format }], \
Constants: [], Outputs: [ { Name: r.1_2_myl0, Dimensions: [1,4,8,8], Strides: [256,1,32,4], StrideOrder: [3,0,2,1], \
Datatype: Int8, Format: (NHWC) Channel major format }], TacticName: __myl_MulCast_0xa0, StreamId: 0, Metadata: \
[ONNX Layer: image/q][ONNX Layer: stem/conv]
Name: stem/conv_myl0_1, LayerType: correlation, Inputs: [ { Name: r.1_2_myl0, Dimensions: [1,4,8,8], \
Strides: [256,1,32,4], StrideOrder: [3,0,2,1], Datatype: Int8, Format: (NHWC) Channel major format }], \
Constants: [ { Name: __mye607_dconst_myl0, Dimensions: [16,4,3,3], Strides: [36,1,12,4], StrideOrder: [3,0,2,1], \
Datatype: Int8, Format: (NHWC) Channel major format }], Outputs: [ { Name: features, Dimensions: [1,16,8,8], \
Strides: [1024,1,128,16], StrideOrder: [3,0,2,1], Datatype: Float, Format: (NHWC) Channel major format }], \
TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: [ONNX Layer: stem/conv][ONNX Layer: k/dq]
"""


def test_lines_that_rtx_logs_read_as_the_inspectors_json_does(graph):
    """Two lines of TensorRT for RTX 1.7's log of a build of this very graph."""
    found = read_log(LOGGED, graph)
    assert found.layers == {"stem/conv": "int8"}
    assert found.facts == {"layers": 2, "reformats": 0, "fusions_lost": []}
    assert read_log("", graph).layers == {}


def test_dequantizing_layers_of_their_own_in_front_of_products_are_fusions_lost(graph):
    alone = layer(
        "__myl_Mul_myl0_2", "kgen", takes="Int8", gives="Float", Metadata="[ONNX Layer: f/q][ONNX Layer: f/dq]"
    )
    quantizes = layer("r/q", "Quantize", takes="Float", gives="Int8", Metadata="[ONNX Layer: r/q]")
    pools = layer("r/dq", "Dequantize", takes="Int8", gives="Float", Metadata="[ONNX Layer: r/dq]")
    facts = read(told(alone, quantizes, pools, PRODUCT), graph).facts
    assert facts["fusions_lost"] == ["f/dq"]


def test_an_engine_built_to_tell_only_names_tells_no_precision(graph):
    found = read(told("Reformatting CopyNode for Input Tensor 0 to stem/conv", "stem/conv + stem/relu"), graph)
    assert found.precisions == {}
    assert found.facts == {"layers": 2, "reformats": 1, "fusions_lost": []}


def test_names_may_hold_brackets_and_separators_differ():
    metadata = "[ONNX Layer: a[0]/MatMul]\x1f[ONNX Layer: b/Add][ONNX Layer: b/Add]"
    assert names({"Name": "fused", "Metadata": metadata}) == ("a[0]/MatMul", "b/Add")
    assert names({"Name": "fused", "Metadata": "[ONNX Layer: proj/Conv]__gemm_from_conv1x1"}) == ("proj/Conv",)
    assert names({"Name": "a/MatMul+b/Add", "Metadata": ""}) == ("a/MatMul", "b/Add")
    assert names({"Name": "q/MatMul || k/MatMul"}) == ("q/MatMul", "k/MatMul")


@pytest.mark.parametrize("text", ["", "nonsense", "{}", '{"Layers": 3}', "[]"])
def test_an_inspector_without_layers_is_an_error(text, graph):
    with pytest.raises(StageError, match="gives no list of layers"):
        read(text, graph)


def test_memory_is_asked_of_the_engine(graph):
    inspector = SimpleNamespace(get_engine_information=lambda form: told(REFORMAT, CONV, PRODUCT))
    engine = SimpleNamespace(create_engine_inspector=lambda: inspector, num_layers=3, device_memory_size_v2=4096)
    trt = SimpleNamespace(
        LayerInformationFormat=SimpleNamespace(JSON=1), EngineStat=SimpleNamespace(TOTAL_WEIGHTS_SIZE=0)
    )
    assert inspect(trt, engine, graph).facts["activation_bytes"] == 4096
    assert inspect(trt, engine, graph).facts["weights_bytes"] == 496
    engine.get_engine_stat = lambda stat: 700
    assert inspect(trt, engine, graph).facts["weights_bytes"] == 700
