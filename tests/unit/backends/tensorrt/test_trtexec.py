"""trtexec: what it is told on each lane, and what is made of what it prints and writes."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from vlaopt import backends
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, Port
from vlaopt.backends.tensorrt import trtexec
from vlaopt.backends.tensorrt import trtexec_program as program_of
from vlaopt.backends.tensorrt.building import Refused
from vlaopt.backends.tensorrt.library import numbers
from vlaopt.errors import EnvironmentProblem, InputError, StageError

DATA = Path(__file__).with_name("trtexec")
FLAGS = json.loads((DATA / "flags.json").read_text())
VERSIONS = {"10.3": "10.3.0", "10.13": "10.13.3.9", "10.16": "10.16.2.10", "11.4": "11.4.0.12"}
BACKEND = trtexec.BACKEND

# Plays back logs instead of building, and "runs" a plan by doubling its float32 input.
PROGRAM = """
import json, os, signal, struct, sys
from pathlib import Path
folder = Path(sys.argv[0]).parent
told = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
with (folder / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
kind = "probe" if "--getPlanVersionOnly" in told else "build" if "--onnx" in told else "run"
runs = json.loads((folder / "runs.json").read_text())[kind]
done = sum(json.loads(call)[0].startswith("--onnx") for call in (folder / "calls").read_text().splitlines())
log, status = runs[min(max(done, 1), len(runs)) - 1]
print(log)
if status < 0:
    sys.stdout.flush()
    os.kill(os.getpid(), -status)
if kind == "build" and status == 0:
    Path(told["--saveEngine"]).write_bytes(b"a plan")
    Path(told["--exportLayerInfo"]).write_text((folder / "layers.json").read_text())
if kind == "run" and status == 0:
    name, _, place = told["--loadInputs"].rpartition(":")
    data = Path(place).read_bytes()
    values = [2 * value for value in struct.unpack(f"{len(data) // 4}f", data)]
    Path(told["--exportOutput"]).write_text(
        '[\\n  { "name" : "features"\\n  , "dimensions" : "1x4"\\n  , "values" : [ '
        + ", ".join(f"{value:g}" for value in values) + " ]\\n  }\\n]\\n"
    )
sys.exit(status)
"""

LAYERS = {
    "Layers": [
        {
            "Name": "stem/conv + stem/relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "image", "Dimensions": [1, 3, 8, 8], "Format/Datatype": "Row major Int8"}],
            "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw",
        },
        {
            "Name": "head/fc",
            "LayerType": "CaskGemmMatrixMultiply",
            "Inputs": [{"Name": "f", "Dimensions": [1, 16], "Format/Datatype": "Row major linear FP16"}],
            "TacticName": "sm80_xmma_gemm_f16f16_f16f32_f32_nn_n_tilesize32x32x64",
        },
    ],
    "Bindings": ["image", "features"],
}


def log_of(name: str) -> str:
    return (DATA / "logs" / f"{name}.txt").read_text()


class Program:
    """A stand-in for the program: its runs can be chosen, its calls looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "trtexec"
        self.path.write_text(f"#!{sys.executable} -S\n{PROGRAM}")
        self.path.chmod(0o755)
        (folder / "layers.json").write_text(json.dumps(LAYERS))
        self.plays()

    def plays(self, **runs: list[tuple[str, int]]) -> None:
        """The logs and exit statuses of a probe, of builds one after the other, and of runs."""
        passed = "&&&& PASSED TensorRT.trtexec [TensorRT v100300] # trtexec"
        usual = {"probe": [(log_of("probe-10.3"), 1)], "build": [(log_of("success-10.3"), 0)], "run": [(passed, 0)]}
        (self.folder / "runs.json").write_text(json.dumps({**usual, **runs}))

    def calls(self, kind: str) -> list[list[str]]:
        calls = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        return [call for call in calls if call[0].startswith(kind)]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    folder = tmp_path / "bin"
    folder.mkdir()
    made = Program(folder)
    monkeypatch.setenv(program_of.PROGRAM, str(made.path))
    program_of._probe.cache_clear()
    return made


def typings(version: str) -> list[list[str]]:
    strong = program_of.strong_typing(version)
    return [strong] if numbers(version) >= (10, 12) else [strong, ["--fp16", "--int8"]]


def commands(version: str) -> list[list[str]]:
    """What this version is told: a plain component, one with everything set, and the plan of each run once."""
    plain = program_of.build_arguments(trtexec.SETTINGS, [], {}, None)
    settings = {
        **trtexec.SETTINGS,
        "optimization_level": 5,
        "workspace_mib": 512,
        "version_compatible": True,
        "hardware_compatible": True,
    }
    shapes = {"prefix.tokens": [(1, 8, 64), (1, 48, 64), (1, 96, 64)], "mask": [(1, 8), (1, 48), (1, 96)]}
    everything = program_of.build_arguments(settings, [], shapes, Path("/cache/timing"))
    number = numbers(version)
    run = program_of.run_arguments(number, {"image": "0.bin", "state": "1.bin"}, {}, version_compatible=False)
    dynamic = program_of.run_arguments(number, {"mask": "0.bin"}, {"mask": (1, 48)}, version_compatible=True)
    builds = [[*build[:3], *typing, *build[3:]] for typing in typings(version) for build in (plain, everything)]
    return [*builds, run, dynamic]


@pytest.mark.parametrize("lane", VERSIONS)
def test_what_a_lane_is_told(lane: str) -> None:
    written = "".join("trtexec " + " ".join(command) + "\n" for command in commands(VERSIONS[lane]))
    golden = DATA / "commands" / f"{lane}.txt"
    if os.environ.get("VLAOPT_WRITE_GOLDEN"):
        golden.write_text(written)
    assert written == golden.read_text()


@pytest.mark.parametrize("lane", VERSIONS)
def test_a_lane_is_told_nothing_that_it_lacks(lane: str) -> None:
    told = {argument.partition("=")[0] for command in commands(VERSIONS[lane]) for argument in command}
    assert told <= {*FLAGS[lane]}


def test_a_flag_of_10_3_that_11_lacks_would_be_found() -> None:
    assert "--fp16" in FLAGS["10.3"]
    assert not {"--fp16", "--int8", "--calib"} & {*FLAGS["11.4"]}


def test_a_build_gives_the_plan_its_precisions_and_what_it_needs(program: Program, quantized_graph: Any) -> None:
    seen: list[tuple[str, int, int]] = []
    options = EngineOptions(cache=program.folder / "cache", advance=lambda *step: seen.append(step))
    engine = BACKEND.build(Graph(quantized_graph()), options)
    assert engine.files[trtexec.FILE] == b"a plan"
    assert engine.precisions == {"fp16": 1, "int8": 1}
    assert engine.layers == {"stem/conv": "int8", "head/fc": "fp16"}
    assert {**engine.needs, "os": ""} == {"tensorrt": "10.3.0", "sm": "8.7", "gpu": "Orin", "os": ""}
    assert backends.misfits(engine.needs, BACKEND.machine()) == []
    assert engine.facts["typing"] == "strong"
    assert engine.facts["weights_bytes"] == 6012416
    assert engine.facts["activation_bytes"] == 2097152
    assert engine.notes == ()
    assert seen == [("trtexec", 0, 1), ("trtexec", 1, 1)]
    (told,) = program.calls("--onnx")
    assert "--stronglyTyped" in told
    (cache,) = (argument for argument in told if argument.startswith("--timingCacheFile="))
    assert Path(cache.partition("=")[2]).parent == program.folder / "cache"


def test_a_compatible_plan_needs_less(program: Program, graphs: dict[str, bytes], monkeypatch: Any) -> None:
    settings = {"version_compatible": True, "hardware_compatible": True}
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    engine = BACKEND.build(Graph(graphs["conv"]), EngineOptions(settings=settings))
    assert {"tensorrt", "gpu"}.isdisjoint(engine.needs)
    assert engine.needs["tensorrt major"] == "10"
    assert "8.6 | 8.7" in engine.needs["sm"]
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(InputError, match="hardware_compatible engines are for x86 machines, this one is aarch64"):
        BACKEND.build(Graph(graphs["conv"]), EngineOptions(settings=settings))


def test_a_target_of_another_gpu_is_refused(program: Program, graphs: dict[str, bytes]) -> None:
    with pytest.raises(EnvironmentProblem, match=r"compute capability 11\.0; this machine's Orin is 8\.7"):
        BACKEND.build(Graph(graphs["conv"]), EngineOptions(compute_capabilities=("11.0",)))


def test_what_ran_out_of_memory_is_not_built_again_weakly_typed(program: Program, graphs: dict[str, bytes]) -> None:
    program.plays(build=[(log_of("out-of-memory-10.3"), 1), (log_of("success-10.3"), 0)])
    with pytest.raises(Refused, match=r"Cuda Runtime \(out of memory\)") as caught:
        BACKEND.build(Graph(graphs["conv"]), EngineOptions())
    assert "workspace_mib" in str(caught.value.hint)
    assert len(program.calls("--onnx")) == 1


def test_10_3_builds_weakly_typed_what_it_refuses_strongly(program: Program, quantized_graph: Any) -> None:
    program.plays(build=[(log_of("unsupported-operator-10.3"), 1), (log_of("success-10.3"), 0)])
    engine = BACKEND.build(Graph(quantized_graph()), EngineOptions())
    strong, weak = program.calls("--onnx")
    assert "--stronglyTyped" in strong
    assert "--int8" in weak
    assert not {"--stronglyTyped", "--fp16"} & {*weak}
    assert engine.facts["typing"] == "weak"
    assert engine.notes[0].startswith("weakly typed: strongly typed, trtexec cannot build the engine: node '/dense")


def test_10_13_builds_strongly_typed_or_not_at_all(program: Program, quantized_graph: Any) -> None:
    probe = log_of("probe-10.3").replace("[TensorRT v100300]", "[TensorRT v101303] [b9]")
    program.plays(probe=[(probe, 1)], build=[(log_of("unsupported-operator-10.13"), 1), (log_of("success-10.3"), 0)])
    with pytest.raises(Refused, match=r"node '/GridSample' \(GridSample3D\): creator && \"Plugin not found") as caught:
        BACKEND.build(Graph(quantized_graph()), EngineOptions())
    assert caught.value.refusals[0].node == "/GridSample"
    assert len(program.calls("--onnx")) == 1


@pytest.mark.parametrize(
    ("dtype", "quantized", "flags"),
    [
        (TensorProto.FLOAT16, False, ["--fp16"]),
        (TensorProto.BFLOAT16, True, ["--bf16", "--int8"]),
        (TensorProto.INT8, False, []),
        (TensorProto.FLOAT, False, []),
    ],
)
def test_weakly_typed_allows_what_the_graph_holds(dtype: int, quantized: bool, flags: list[str]) -> None:
    weight = helper.make_tensor("w", dtype, [1], [1])
    nodes = [helper.make_node("Add", ["x", "w"], ["y"])]
    weights = [weight]
    if quantized:
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s"], ["d"]))
        weights.append(helper.make_tensor("q", TensorProto.INT8, [1], [1]))
    graph = helper.make_graph(nodes, "g", [], [], weights)
    assert program_of.weak_typing(Graph(helper.make_model(graph).SerializeToString())) == flags


def test_a_build_that_the_system_kills_names_memory(program: Program, graphs: dict[str, bytes]) -> None:
    program.plays(build=[(log_of("killed-10.3"), -9)])
    with pytest.raises(Refused, match=r"the system ended trtexec \(SIGKILL\), most often because memory") as caught:
        BACKEND.build(Graph(graphs["conv"]), EngineOptions())
    assert "workspace_mib" in str(caught.value.hint)


def test_a_build_that_says_it_passed_but_wrote_no_plan_has_failed(program: Program, graphs: dict[str, bytes]) -> None:
    program.plays(build=[(log_of("success-10.3"), 0)])
    (program.folder / "trtexec").write_text(program.path.read_text().replace('.write_bytes(b"a plan")', ""))
    with pytest.raises(Refused, match="trtexec cannot build the engine: it says nothing"):
        BACKEND.build(Graph(graphs["conv"]), EngineOptions())


def test_uint8_quantization_is_refused_instead_of_read_as_int8(program: Program, graphs: dict[str, bytes]) -> None:
    warned = "[08/17/2025-20:09:49] [W] [TRT] onnxOpImporters.cpp:1: Unsupported quantization type. Defaulting to INT8."
    program.plays(build=[(warned + "\n" + log_of("success-10.3"), 0)])
    with pytest.raises(Refused, match="uint8 quantization as int8"):
        BACKEND.build(Graph(graphs["conv"]), EngineOptions())


def test_a_plan_runs_once_for_every_call(program: Program, graphs: dict[str, bytes]) -> None:
    program.plays()
    session = BACKEND.open({trtexec.FILE: b"a plan", trtexec.PORTS: ports()}, EngineOptions())
    assert session.inputs == (Port("x", "float32", (1, 4)),)
    x = np.array([[1, -2.5, np.inf, 3e-7]], np.float32)
    given = session.run({"x": x})["features"]
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, 2 * x, rtol=1e-5)
    assert "--includeDataTransfers" not in program.calls("--loadEngine")[-1]
    with pytest.raises(InputError, match=r"input 'x' has shape \(4,\), not \(1, 4\)"):
        session.run({"x": x[0]})
    with pytest.raises(InputError, match="input 'x' has dtype float64, not float32"):
        session.run({"x": x.astype(np.float64)})


def test_a_plan_of_another_version_is_told_with_tensorrts_reason(program: Program) -> None:
    program.plays(run=[(log_of("other-plan-10.13"), 1)])
    session = BACKEND.open({trtexec.FILE: b"a plan", trtexec.PORTS: ports()}, EngineOptions())
    with pytest.raises(StageError, match=r"trtexec cannot run the plan: Serialization \(.*incompatible"):
        session.run({"x": np.zeros((1, 4), np.float32)})


def test_a_run_that_logs_an_error_has_failed_whatever_it_says_at_its_end(program: Program) -> None:
    said = log_of("other-plan-10.13").replace("FAILED", "PASSED")
    program.plays(run=[(said, 0)])
    session = BACKEND.open({trtexec.FILE: b"a plan", trtexec.PORTS: ports()}, EngineOptions())
    with pytest.raises(StageError, match="incompatible serialization version"):
        session.run({"x": np.zeros((1, 4), np.float32)})


def test_outputs_of_another_shape_than_the_graph_says_are_refused(program: Program) -> None:
    session = BACKEND.open({trtexec.FILE: b"a plan", trtexec.PORTS: ports(outputs=(1, 5))}, EngineOptions())
    with pytest.raises(StageError, match=r"cannot be read: 'features' has shape \(1, 4\), not \(1, 5\)"):
        session.run({"x": np.zeros((1, 4), np.float32)})


def test_a_session_leaves_no_files_behind(program: Program, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    session = BACKEND.open({trtexec.FILE: b"a plan", trtexec.PORTS: ports()}, EngineOptions())
    session.run({"x": np.zeros((1, 4), np.float32)})
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del session
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_profile_gives_shapes_and_a_dimension_without_one_is_refused(program: Program) -> None:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    dynamic = Graph(helper.make_model(graph).SerializeToString())
    BACKEND.build(dynamic, EngineOptions(settings={"profiles": {"batch": (1, 2, 8)}}))
    assert {"--minShapes=x:1x4", "--optShapes=x:2x4", "--maxShapes=x:8x4"} <= {*program.calls("--onnx")[0]}
    with pytest.raises(InputError, match="dimension 'batch' of input 'x' is dynamic and has no profile"):
        BACKEND.build(dynamic, EngineOptions())
    with pytest.raises(InputError, match="profile 'length' is of no dynamic dimension"):
        BACKEND.build(dynamic, EngineOptions(settings={"profiles": {"batch": (1, 2, 8), "length": (1, 1, 1)}}))


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("y", TensorProto.UINT8, "tensor 'y' is uint8, which does not pass through trtexec's files"),
        ("a,b", TensorProto.FLOAT, "tensor 'a,b' has a name that trtexec cannot be told"),
    ],
)
def test_an_output_that_its_files_cannot_hold_is_refused(name: str, dtype: int, message: str) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info(name, dtype, [4])
    graph = helper.make_graph([helper.make_node("Cast", ["x"], [name], to=dtype)], "g", [x], [y])
    with pytest.raises(StageError, match=message):
        BACKEND.build(Graph(helper.make_model(graph).SerializeToString()), EngineOptions())


def test_without_the_program_the_reason_names_what_brings_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(program_of.PROGRAM, str(tmp_path / "absent"))
    assert BACKEND.missing() == "trtexec is not found; VLAOPT_TRTEXEC may name it"
    assert BACKEND.runnable() == BACKEND.missing()
    with pytest.raises(EnvironmentProblem, match="trtexec is not found") as caught:
        BACKEND.version()
    assert "JetPack's package libnvinfer-bin brings it" in str(caught.value.hint)


def test_without_a_gpu_it_does_not_run(program: Program, graphs: dict[str, bytes]) -> None:
    program.plays(probe=[(log_of("no-gpu-10.3"), 1)])
    assert BACKEND.missing() is None
    assert BACKEND.version() == "10.3.0"
    assert BACKEND.runnable() == "trtexec finds no GPU: Cuda failure: no CUDA-capable device is detected"
    with pytest.raises(EnvironmentProblem, match="trtexec cannot build here: trtexec finds no GPU"):
        BACKEND.build(Graph(graphs["conv"]), EngineOptions())


def test_a_program_that_is_none_is_told(program: Program) -> None:
    program.plays(probe=[("error while loading shared libraries: libnvinfer.so.10: cannot open", 127)])
    assert "does not run" in str(BACKEND.runnable())


def test_an_engine_with_other_files_is_refused() -> None:
    with pytest.raises(InputError, match=r"a trtexec engine is engine\.plan and ports\.json, not engine\.rtx"):
        BACKEND.open({"engine.rtx": b""}, EngineOptions())


def test_it_is_found_by_its_name_and_its_times_say_nothing() -> None:
    assert backends.get("trtexec") is BACKEND
    assert not BACKEND.timed
    assert BACKEND.native


def ports(outputs: tuple[int, ...] = (1, 4)) -> bytes:
    told = {
        "inputs": [{"name": "x", "dtype": "float32", "shape": [1, 4]}],
        "outputs": [{"name": "features", "dtype": "float32", "shape": list(outputs)}],
        "version_compatible": False,
    }
    return json.dumps(told).encode()
