"""TensorRT for RTX: real engines without a GPU, reasons that name the node, refusals instead of guesses."""

from __future__ import annotations

import pickle
import platform
import re
from dataclasses import replace

import onnx
import pytest
from onnx import TensorProto

from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, get
from vlaopt.backends.tensorrt import cuda
from vlaopt.backends.tensorrt.building import Refused
from vlaopt.backends.tensorrt.library import RTX
from vlaopt.backends.tensorrt.log import collector, meaning, total_bytes
from vlaopt.backends.tensorrt.rtx import BACKEND, FILE, _deserialized, _RuntimeCache, check
from vlaopt.errors import EnvironmentProblem, InputError, StageError

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)

ADA = EngineOptions(compute_capabilities=("8.9",))
without_driver = pytest.mark.skipif(cuda.problem() is None, reason="this machine has an NVIDIA driver")


def test_an_engine_is_built_for_a_gpu_that_is_not_here(graphs):
    for graph in graphs.values():
        engine = BACKEND.build(Graph(graph), ADA)
        assert len(engine.files[FILE]) > 10_000
        assert engine.needs == {"tensorrt-rtx": BACKEND.version(), "sm": "8.9", "os": f"linux-{platform.machine()}"}
        assert engine.facts["typing"] == "strong"
        assert engine.facts["weights_bytes"] > 0
        assert engine.notes == ()


def test_layers_are_audited_by_what_the_real_builder_logs_though_no_gpu_is_here(graphs, quantized_graph):
    assert BACKEND.build(Graph(graphs["conv"]), ADA).layers == dict.fromkeys(
        ("stem/conv", "block/conv", "head/fc"), "fp32"
    )
    assert BACKEND.build(Graph(graphs["lstm"]), ADA).layers == {"memory/lstm": "fp32"}
    for kind, precision in ((TensorProto.INT8, "int8"), (TensorProto.FLOAT8E4M3FN, "fp8")):
        engine = BACKEND.build(Graph(quantized_graph(kind)), ADA)
        assert engine.layers == {"stem/conv": precision, "head/fc": precision}
        assert engine.precisions == {precision: 2}
        assert engine.facts["fusions_lost"] == []


def test_a_product_whose_weights_are_not_quantized_does_not_compute_in_int8(graphs):
    model = onnx.load_from_string(graphs["int8"])
    product = next(node for node in model.graph.node if node.name == "head/fc")
    product.input[1] = "w"
    engine = BACKEND.build(Graph(model.SerializeToString()), ADA)
    assert engine.layers == {"stem/conv": "int8", "head/fc": "fp32"}


def test_a_builder_that_logs_no_layers_leaves_precisions_open_and_says_so(graphs, monkeypatch):
    monkeypatch.setattr("vlaopt.backends.tensorrt.building.Draft.build", lambda draft: b"engine")
    engine = BACKEND.build(Graph(graphs["conv"]), ADA)
    assert (engine.precisions, engine.layers) == ({}, {})
    assert "not audited" in engine.notes[0]


def test_equal_graphs_give_equal_engines(graphs):
    assert BACKEND.build(Graph(graphs["lstm"]), ADA) == BACKEND.build(Graph(graphs["lstm"]), ADA)


def test_one_engine_serves_two_generations_of_gpu(graphs):
    both = EngineOptions(compute_capabilities=("8.6", "12.0"), settings={"workspace_mib": 64})
    assert (
        BACKEND.build(Graph(graphs["conv"]), both).files[FILE] != BACKEND.build(Graph(graphs["conv"]), ADA).files[FILE]
    )


def test_fp8_is_built_where_the_gpu_has_it_and_refused_with_the_reason_where_not(quantized_graph):
    fp8 = quantized_graph(TensorProto.FLOAT8E4M3FN)
    assert BACKEND.build(Graph(fp8), ADA).files[FILE]
    with pytest.raises(StageError, match=r"sm86, because the model contains HW-specific datatypes: fp8_e4m3"):
        BACKEND.build(Graph(fp8), EngineOptions(compute_capabilities=("8.6",)))


def test_uint8_quantization_is_refused_instead_of_read_as_int8(quantized_graph):
    with pytest.raises(StageError, match="uint8 quantization as int8"):
        BACKEND.build(Graph(quantized_graph(TensorProto.UINT8)), ADA)


def test_the_parser_names_the_node(one_node):
    with pytest.raises(StageError, match=r"node 'my/node 1' \(Mystery\): .*Plugin not found"):
        BACKEND.build(Graph(one_node("Mystery", domain="maker.example")), ADA)


def test_a_check_says_nothing_of_what_can_be_built_and_names_the_node_of_what_cannot(graphs, one_node, quantized_graph):
    assert check(Graph(graphs["int8"]), "8.9") == ()
    (refusal,) = check(Graph(one_node("Mystery", domain="maker.example")), "8.9")
    assert (refusal.node, refusal.operator) == ("my/node 1", "Mystery")
    assert "Plugin not found" in refusal.reason
    (refusal,) = check(Graph(quantized_graph(TensorProto.FLOAT8E4M3FN)), "8.6")
    assert "sm86, because the model contains HW-specific datatypes" in refusal.reason


def test_a_refusal_comes_whole_out_of_a_child_process(one_node):
    with pytest.raises(Refused) as caught:
        BACKEND.build(Graph(one_node("Mystery", domain="maker.example")), ADA)
    sent = pickle.loads(pickle.dumps(caught.value))
    assert (str(sent), sent.hint, sent.refusals) == (str(caught.value), caught.value.hint, caught.value.refusals)


@pytest.fixture(scope="module")
def dynamic(graphs):
    """The int8 graph with a dynamic first dimension called `batch`."""
    model = onnx.load_from_string(graphs["int8"])
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.shape.dim[0].dim_param = "batch"
    return Graph(model.SerializeToString())


def test_a_dynamic_dimension_is_built_by_its_profile(dynamic):
    profiled = replace(ADA, settings={"profiles": {"batch": [1, 2, 8]}})
    assert len(BACKEND.build(dynamic, profiled).files[FILE]) > 10_000


@pytest.mark.parametrize(
    ("profiles", "message", "hint"),
    [
        ({}, "dimension 'batch' of input 'image' is dynamic and has no profile", r"profiles: \{batch: \[1, 1, 8\]\}"),
        ({"batch": [1, 1, 8], "tokens": [1, 1, 8]}, "profile 'tokens' is of no dynamic dimension", "it has batch"),
        ({"batch": [4, 1, 8]}, "'profiles' is three sizes by the name of a dimension", ""),
        ({"batch": [0, 1, 8]}, "'profiles' is three sizes", ""),
        ({"batch": [1, 8]}, "'profiles' is three sizes", ""),
    ],
)
def test_profiles_that_do_not_fit_the_graph_are_refused_by_name(dynamic, profiles, message, hint):
    with pytest.raises(InputError, match=message) as caught:
        BACKEND.build(dynamic, replace(ADA, settings={"profiles": profiles}))
    assert re.search(hint, caught.value.hint or "")


@pytest.mark.parametrize("percent", [0, 1, 50, 99])
def test_a_graph_cut_anywhere_is_refused(percent, graphs):
    graph = graphs["conv"]
    with pytest.raises(StageError, match=r"refuses the graph|cannot build the engine"):
        BACKEND.build(Graph(graph[: len(graph) * percent // 100]), ADA)


def test_a_compute_capability_that_rtx_lacks_is_refused_with_those_it_has(graphs):
    with pytest.raises(EnvironmentProblem, match=r"does not build for compute capability 8\.7") as caught:
        BACKEND.build(Graph(graphs["conv"]), EngineOptions(compute_capabilities=("8.7",)))
    assert "8.9" in caught.value.hint


@pytest.mark.parametrize(
    ("key", "value"), [("workspace_mib", -1), ("workspace_mib", True), ("cuda_graph", "yes"), ("optimization_level", 6)]
)
def test_a_setting_of_the_wrong_kind_is_refused(key, value, graphs):
    with pytest.raises(InputError, match=f"'{key}' is"):
        BACKEND.build(Graph(graphs["conv"]), EngineOptions(compute_capabilities=("8.9",), settings={key: value}))


def test_a_build_reports_its_progress(graphs):
    seen: list[tuple[str, int, int]] = []
    told = replace(ADA, advance=lambda phase, step, steps: seen.append((phase, step, steps)))
    BACKEND.build(Graph(graphs["conv"]), told)
    assert len(seen) > 10
    assert all(0 <= step <= steps for _, step, steps in seen)
    assert seen[-1][1] == seen[-1][2]


@without_driver
def test_without_a_driver_the_reason_is_told_and_nothing_is_deserialised(graphs):
    assert "NVIDIA driver" in BACKEND.runnable()
    with pytest.raises(EnvironmentProblem, match=r"cannot run here: no .*NVIDIA driver"):
        BACKEND.open({FILE: b"rubbish"}, ADA)
    with pytest.raises(InputError, match="no compute capability to build for is named"):
        BACKEND.build(Graph(graphs["conv"]), EngineOptions())


@without_driver
def test_an_engine_is_held_to_the_machine_before_it_is_loaded(graphs):
    """NVIDIA's own check; it needs no driver to tell rubbish, and one to tell more."""
    trt = RTX.load()
    engine = BACKEND.build(Graph(graphs["conv"]), ADA).files[FILE]
    with pytest.raises(EnvironmentProblem, match="does not fit this machine: malformed engine") as caught:
        _deserialized(trt, b"rubbish" * 1000, collector(trt))
    assert "vlaopt build" in caught.value.hint
    with pytest.raises(EnvironmentProblem, match=r"does not fit this machine: .*CUDA driver") as caught:
        _deserialized(trt, engine, collector(trt))
    assert "driver" in caught.value.hint


class RuntimeCache:
    """RTX's `IRuntimeCache`; it takes nothing that begins with `!`."""

    def __init__(self) -> None:
        self.data = b""

    def deserialize(self, blob: bytes) -> bool:
        self.data = bytes(blob)
        return not blob.startswith(b"!")

    def reset(self) -> bool:
        self.data = b""
        return True

    def serialize(self) -> bytes:
        return self.data


class RuntimeConfig:
    """Of RTX's `IRuntimeConfig` what the cache needs."""

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        self.cache = cache
        return True


def test_kernels_compiled_while_opening_are_there_at_the_next_opening(tmp_path):
    config = RuntimeConfig()
    first = _RuntimeCache(config, tmp_path, "1.7-sm8.9-engine")
    config.cache.data = b"kernels"
    first.keep()
    again = RuntimeConfig()
    _RuntimeCache(again, tmp_path, "1.7-sm8.9-engine").keep()
    assert again.cache.data == b"kernels"
    other = RuntimeConfig()
    _RuntimeCache(other, tmp_path, "1.7-sm8.9-other").keep()
    assert other.cache.data == b""


def test_kernels_that_rtx_does_not_take_are_compiled_again(tmp_path):
    config = RuntimeConfig()
    first = _RuntimeCache(config, tmp_path, "key")
    config.cache.data = b"!of another driver"
    first.keep()
    again = RuntimeConfig()
    _RuntimeCache(again, tmp_path, "key")
    assert again.cache.data == b""


def test_without_a_folder_no_kernels_are_kept():
    config = RuntimeConfig()
    _RuntimeCache(config, None, "key").keep()
    assert config.cache.data == b""


def test_an_engine_with_other_files_is_refused():
    with pytest.raises(InputError, match=r"one file engine\.rtx, not strange\.bin"):
        BACKEND.open({"strange.bin": b""}, ADA)


def test_an_absent_library_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.setattr("vlaopt.backends.tensorrt.library.installed_version", lambda distribution: None)
    assert "vlaopt[rtx]" in BACKEND.missing()
    with pytest.raises(EnvironmentProblem, match="is not installed"):
        BACKEND.version()


def test_it_is_found_by_its_name():
    assert get("tensorrt-rtx") is BACKEND


def test_a_log_keeps_what_a_build_says_of_memory():
    log = collector(RTX.load())
    for line in ("Total Activation Memory: 4096 bytes", "Total Weights Memory: 512 bytes", "Total of nothing"):
        log.log(RTX.load().ILogger.INFO, line)
    assert total_bytes(log, "Weights") == 512
    assert total_bytes(log, "Scratch") is None
    assert log.errors == []


def test_a_line_of_the_log_is_told_without_functions_and_source_files():
    logged = (
        "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for "
        "target(s) sm86. In compileGraph at /_src/optimizer/myelin/codeGenerator.cpp:2012)"
    )
    assert meaning(logged) == "Myelin (Cannot compile for target(s) sm86)"
