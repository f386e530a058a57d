"""Classic TensorRT on every lane of the stand-in: built, audited, bound to its machine, cached; each fault an error."""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests.standins import FOLDER, LANES, installed
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, get, misfits
from vlaopt.backends.tensorrt import building
from vlaopt.backends.tensorrt.building import Refused
from vlaopt.backends.tensorrt.classic import BACKEND, FILE
from vlaopt.errors import EnvironmentProblem, InputError, StageError

BEFORE_10_12 = ["10.3"]
ENDS = pytest.mark.parametrize("lane", [LANES[0], LANES[-1]], indirect=True)
"""The oldest and the newest, for what depends little on the lane."""
OPTIONS = EngineOptions()


@pytest.fixture
def standin():
    """Puts the stand-in of a lane in place of the one before, with the machine and the faults that are asked for."""
    with ExitStack() as stack:

        def switch(lane: str, **wanted: Any) -> None:
            stack.close()
            stack.enter_context(installed(lane, **wanted))

        yield switch


GUARDED = {"EngineStat"}
"""Names that are asked for where they are, after `hasattr`."""


@pytest.mark.parametrize("name", LANES)
def test_every_name_of_tensorrt_that_is_written_exists_in_every_lane(name):
    """Also where no test comes by; the stand-in holds the calls that tests make to their signatures."""
    surface = json.loads((FOLDER / "api" / f"{name}.json").read_text())
    known = {**dict.fromkeys(surface["classes"]), **surface["enums"]}
    room = Path(building.__file__).parent
    for module in ("building", "classic", "inspection", "log", "session", "whole_loop"):
        for owner, member in re.findall(r"\btrt\.([A-Z]\w+)(?:\.([A-Z]\w*))?", (room / f"{module}.py").read_text()):
            assert owner in known or owner in GUARDED, f"{module}: {owner}"
            if member and known.get(owner):
                assert member in known[owner], f"{module}: {owner}.{member}"


@pytest.fixture(params=LANES)
def lane(request, standin):
    """The stand-in of each lane, on an Orin."""
    standin(request.param)
    return request.param


@pytest.fixture(scope="module")
def int8(graphs):
    return Graph(graphs["int8"])


@pytest.fixture(scope="module")
def dynamic(graphs):
    """The convolutions with a dynamic first dimension called `batch`."""
    model = onnx.load_from_string(graphs["conv"])
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.shape.dim[0].dim_param = "batch"
    return Graph(model.SerializeToString())


def test_an_engine_is_built_audited_and_runs_as_the_reference_does(lane, int8):
    engine = BACKEND.build(int8, OPTIONS)
    assert set(engine.files) == {FILE}
    assert engine.layers == {"stem/conv": "int8", "head/fc": "int8"}
    assert engine.precisions == {"int8": 2}
    assert engine.facts["typing"] == "strong"
    assert engine.facts["weights_bytes"] > 0
    assert engine.facts["activation_bytes"] > 0
    assert engine.facts["fusions_lost"] == []
    assert engine.notes == ()
    json.dumps(engine.facts)
    session = BACKEND.open(engine.files, OPTIONS)
    reference = get("reference").open(get("reference").build(int8, OPTIONS).files, OPTIONS)
    assert session.inputs == reference.inputs
    image = {"image": np.random.default_rng(0).standard_normal((1, 3, 8, 8)).astype(np.float32)}
    assert np.abs(session.run(image)["features"] - reference.run(image)["features"]).max() < 0.02


@pytest.fixture(scope="module")
def half(graphs):
    """The convolutions in float16 throughout."""
    model = onnx.load_from_string(graphs["conv"])
    for weight in model.graph.initializer:
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).astype(np.float16), weight.name))
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.elem_type = TensorProto.FLOAT16
    return Graph(model.SerializeToString())


@ENDS
def test_float16_in_the_graph_is_float16_in_the_engine(lane, half):
    engine = BACKEND.build(half, OPTIONS)
    assert engine.precisions == {"fp16": 3}
    assert [port.dtype for port in BACKEND.open(engine.files, OPTIONS).inputs] == ["float16"]


def test_an_engine_needs_this_tensorrt_gpu_and_system(lane, int8, standin):
    needs = BACKEND.build(int8, OPTIONS).needs
    assert set(needs) == {"tensorrt", "gpu", "sm", "os"}
    assert needs["tensorrt"] == BACKEND.version()
    assert needs["tensorrt"].startswith(f"{lane}.")
    assert misfits(needs, BACKEND.machine()) == []
    standin(lane, gpu="NVIDIA Thor", sm="11.0")
    assert {misfit.what for misfit in misfits(needs, BACKEND.machine())} == {"gpu", "sm"}
    standin("11.4" if lane != "11.4" else "10.16")
    assert [misfit.what for misfit in misfits(needs, BACKEND.machine())] == ["tensorrt"]


@ENDS
def test_a_plan_of_another_gpu_is_refused_with_tensorrts_reason(lane, int8, standin):
    files = BACKEND.build(int8, OPTIONS).files
    standin(lane, gpu="NVIDIA Thor", sm="11.0")
    with pytest.raises(EnvironmentProblem, match=r"TensorRT cannot load the engine: \S+") as caught:
        BACKEND.open(files, OPTIONS)
    assert "vlaopt engine" in caught.value.hint


def test_a_version_compatible_engine_needs_less_and_says_what_it_brings(lane, int8):
    engine = BACKEND.build(int8, EngineOptions(settings={"version_compatible": True}))
    assert engine.needs["tensorrt major"] == lane.partition(".")[0]
    assert "tensorrt" not in engine.needs
    assert "host code" in engine.notes[0]
    assert BACKEND.open(engine.files, EngineOptions(settings={"version_compatible": True})).inputs


@ENDS
def test_a_hardware_compatible_engine_needs_any_gpu_from_ampere_on(lane, int8, monkeypatch):
    compatible = EngineOptions(settings={"hardware_compatible": True})
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    needs = BACKEND.build(int8, compatible).needs
    assert "gpu" not in needs
    assert "8.6" in needs["sm"].split(" | ")
    assert "7.5" not in needs["sm"].split(" | ")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(InputError, match="hardware_compatible engines are for x86 machines, this one is aarch64"):
        BACKEND.build(int8, compatible)


def test_the_second_build_begins_with_the_times_of_the_first(lane, int8, tmp_path, standin):
    options = EngineOptions(cache=tmp_path)
    assert BACKEND.build(int8, options).facts["timing_cache"] == "new"
    assert BACKEND.build(int8, options).facts["timing_cache"] == "reused"
    (path,) = tmp_path.glob("timing-*[!k]")
    path.write_bytes(path.read_bytes()[:-1])
    engine = BACKEND.build(int8, options)
    assert engine.facts["timing_cache"] == "discarded"
    assert "timing cache discarded" in engine.notes[0]
    standin(lane, gpu="NVIDIA Thor", sm="11.0")
    assert BACKEND.build(int8, options).facts["timing_cache"] == "new"


@ENDS
def test_a_timing_cache_of_another_gpu_under_this_ones_name_is_not_taken(lane, int8, tmp_path, standin):
    options = EngineOptions(cache=tmp_path)
    BACKEND.build(int8, options)
    (path,) = tmp_path.glob("timing-*[!k]")
    standin(lane, gpu="NVIDIA Thor", sm="11.0")
    BACKEND.build(int8, options)
    (other,) = set(tmp_path.glob("timing-*[!k]")) - {path}
    other.write_bytes(path.read_bytes())
    engine = BACKEND.build(int8, options)
    assert engine.facts["timing_cache"] == "discarded"
    assert "TensorRT does not take it" in engine.notes[0]


@ENDS
def test_a_dynamic_dimension_is_built_by_its_profile_and_refused_without_one(lane, dynamic):
    engine = BACKEND.build(dynamic, EngineOptions(settings={"profiles": {"batch": (1, 2, 4)}}))
    session = BACKEND.open(engine.files, OPTIONS)
    for batch in (1, 4):
        assert session.run({"image": np.zeros((batch, 3, 16, 16), np.float32)})["features"].shape == (batch, 4)
    with pytest.raises(InputError, match="dimension 'batch' of input 'image' is dynamic and has no profile"):
        BACKEND.build(dynamic, OPTIONS)


@ENDS
def test_a_build_reports_its_progress(lane, int8):
    seen: list[tuple[str, int, int]] = []
    BACKEND.build(int8, replace(OPTIONS, advance=lambda *told: seen.append(told)))
    assert len(seen) > 10
    assert all(0 <= step <= steps for _, step, steps in seen)


@ENDS
def test_the_parser_names_the_node(lane, one_node):
    with pytest.raises(Refused, match=r"TensorRT refuses the graph: node 'my/node 1' \(Mystery\): ") as caught:
        BACKEND.build(Graph(one_node("Mystery", domain="maker.example")), OPTIONS)
    assert caught.value.refusals[0].operator == "Mystery"


@ENDS
def test_uint8_quantization_is_refused(lane, quantized_graph):
    with pytest.raises(StageError, match="TensorRT refuses the graph"):
        BACKEND.build(Graph(quantized_graph(TensorProto.UINT8)), OPTIONS)


@ENDS
def test_settings_reach_the_builder(lane, int8, standin, tmp_path):
    standin(lane, log=tmp_path / "calls")
    BACKEND.build(int8, EngineOptions(settings={"workspace_mib": 64, "optimization_level": 1}))
    calls = (tmp_path / "calls").read_text()
    assert "WORKSPACE" in calls
    assert str(64 << 20) in calls


@ENDS
def test_where_the_gpu_shares_memory_kernels_are_tried_within_what_is_free(lane, int8, standin, tmp_path):
    standin(lane, log=tmp_path / "calls")
    BACKEND.build(int8, OPTIONS)
    assert "TACTIC_DRAM" in (tmp_path / "calls").read_text()


@ENDS
def test_a_target_of_other_gpus_is_refused(lane, int8):
    with pytest.raises(EnvironmentProblem, match=r"target is for compute capability 11\.0; .*Orin is 8\.7"):
        BACKEND.build(int8, EngineOptions(compute_capabilities=("11.0",)))


# Each fault that the stand-in can be told to have.


@pytest.mark.parametrize("lane", BEFORE_10_12, indirect=True)
def test_where_strong_typing_fails_before_10_12_the_engine_is_weakly_typed_and_says_why(lane, int8, half, standin):
    standin(lane, faults=("strong-refused",))
    engine = BACKEND.build(int8, OPTIONS)
    assert engine.facts["typing"] == "weak"
    assert engine.facts["flags"] == ["INT8"]
    assert "weakly typed: strongly typed, TensorRT cannot build the engine: " in engine.notes[0]
    assert engine.layers == {"stem/conv": "int8", "head/fc": "int8"}
    weak = BACKEND.build(half, OPTIONS)
    assert weak.facts["flags"] == ["FP16"]
    assert weak.precisions == {"fp16": 3}


def test_a_build_that_gives_nothing_is_told_with_the_reason_of_the_log(lane, int8, standin):
    standin(lane, faults=("build-none",))
    with pytest.raises(StageError, match=r"TensorRT cannot build the engine: .*implementation for node") as caught:
        BACKEND.build(int8, OPTIONS)
    assert caught.value.hint is None


@ENDS
def test_memory_that_runs_out_is_told_with_what_helps(lane, int8, standin):
    standin(lane, faults=("out-of-memory",))
    with pytest.raises(StageError, match="out of memory") as caught:
        BACKEND.build(int8, OPTIONS)
    assert "workspace_mib" in caught.value.hint


def test_precision_that_was_ignored_is_seen_in_the_audit(lane, int8, standin):
    standin(lane, faults=("ignores-precision",))
    assert BACKEND.build(int8, OPTIONS).layers == {"stem/conv": "fp32", "head/fc": "fp32"}


def test_a_plan_that_cannot_be_loaded_fails_the_build_and_the_opening(lane, int8, standin):
    files = BACKEND.build(int8, OPTIONS).files
    standin(lane, faults=("deserialize-none",))
    with pytest.raises(StageError, match=r"TensorRT does not load the engine that it built: \S+"):
        BACKEND.build(int8, OPTIONS)
    with pytest.raises(EnvironmentProblem, match=r"TensorRT cannot load the engine: \S+"):
        BACKEND.open(files, OPTIONS)


@ENDS
@pytest.mark.parametrize(("fault", "reason"), [("no-driver", "driver"), ("no-gpu", "no CUDA-capable device")])
def test_without_driver_or_gpu_nothing_is_built_or_opened(lane, int8, standin, fault, reason):
    standin(lane, faults=(fault,))
    assert reason in BACKEND.runnable()
    assert set(BACKEND.machine()) == {"os", "tensorrt", "tensorrt major"}
    with pytest.raises(EnvironmentProblem, match=f"cannot be built here: .*{reason}"):
        BACKEND.build(int8, OPTIONS)
    with pytest.raises(EnvironmentProblem, match=f"cannot run here: .*{reason}"):
        BACKEND.open({FILE: b"rubbish"}, OPTIONS)


def test_an_engine_with_other_files_is_refused():
    with pytest.raises(InputError, match=r"one file engine\.plan, not strange\.bin"):
        BACKEND.open({"strange.bin": b""}, OPTIONS)


def test_an_absent_library_is_reported_with_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    monkeypatch.setattr("vlaopt.backends.tensorrt.library.installed_version", lambda distribution: None)
    assert "vlaopt[tensorrt]" in BACKEND.missing()
    assert BACKEND.runnable() == BACKEND.missing()
    with pytest.raises(EnvironmentProblem, match="is not installed"):
        BACKEND.version()
    assert "tensorrt" not in BACKEND.machine()


def test_a_library_whose_own_libraries_are_absent_is_told_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvdla_compiler.so: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    monkeypatch.setattr("vlaopt.backends.tensorrt.cuda.problem", lambda: None)
    assert BACKEND.missing() is None
    assert BACKEND.runnable() == "tensorrt cannot be imported: libnvdla_compiler.so: cannot open shared object file"
