"""The stand-in's trtexec takes the flags of its lane, builds and runs like the library, and prints like the program."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from tests.standins import LANES, environment, installed
from tests.unit.backends.conftest import conv_net, quantized_net, serialise
from tests.unit.standins.test_engine import by_onnxruntime, image

Trtexec = Callable[..., tuple[int, str, str]]


@pytest.fixture
def trtexec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Trtexec:
    """Runs the program in this process, in a folder of its own: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(conv_net())
    image().tofile(tmp_path / "image.bin")

    def run(lane: str, *arguments: str, **wanted: Any) -> tuple[int, str, str]:
        with installed(lane, **wanted):
            status = importlib.import_module("standin.trtexec").main(["trtexec", *arguments])
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


BUILD = ("--onnx=model.onnx", "--saveEngine=engine.plan", "--skipInference")
RUN = ("--loadEngine=engine.plan", "--loadInputs=image:image.bin", "--exportOutput=outputs.json")


@pytest.mark.parametrize("lane", LANES)
def test_a_built_plan_gives_what_its_graph_gives(trtexec, lane, tmp_path):
    status, out, err = trtexec(lane, *BUILD, "--profilingVerbosity=detailed", "--exportLayerInfo=layers.json")
    assert (status, err) == (0, "")
    assert re.match(r"&&&& RUNNING TensorRT\.trtexec \[TensorRT v1\d{5}\]( \[b\d+\])? # trtexec --onnx", out)
    assert "[I] Selected Device: NVIDIA Orin" in out
    assert "&&&& PASSED TensorRT.trtexec" in out.splitlines()[-1]
    told = json.loads((tmp_path / "layers.json").read_text())
    assert ("I/O Tensors" in told) == (lane == "11.4")
    assert (lane == "10.3") != ("[b" in out)
    copies = ["--includeDataTransfers"] if lane == "11.4" else []
    assert trtexec(lane, *RUN, *copies)[0] == 0
    (given,) = json.loads((tmp_path / "outputs.json").read_text())
    assert (given["name"], given["dimensions"]) == ("features", "1x4")
    np.testing.assert_allclose(given["values"], by_onnxruntime(conv_net(), {"image": image()})[0][0], rtol=1e-4)


def test_from_11_on_inputs_are_copied_only_when_told(trtexec, tmp_path):
    trtexec("11.4", *BUILD)
    trtexec("11.4", *RUN)
    (given,) = json.loads((tmp_path / "outputs.json").read_text())
    zeros = by_onnxruntime(conv_net(), {"image": np.zeros_like(image())})[0][0]
    np.testing.assert_allclose(given["values"], zeros, rtol=1e-4)


@pytest.mark.parametrize(
    ("lane", "flag"),
    [
        ("11.4", "--fp16"),
        ("11.4", "--calib"),
        ("10.3", "--noCudaGraph"),
        ("10.3", "--workspace"),
        ("10.16", "--buildOnly"),
    ],
)
def test_a_flag_that_the_lane_lacks_fails(trtexec, lane, flag):
    status, out, err = trtexec(lane, *BUILD, f"{flag}=1")
    assert status == 1
    assert f"[E] Unknown option: {flag} 1" in err
    assert "&&&& FAILED" in out


def test_flags_that_exist_and_do_nothing_here_do_not_pass_silently(trtexec):
    with pytest.raises(NotImplementedError, match="trtexec --sparsity is not written"):
        trtexec("10.3", *BUILD, "--sparsity=enable")


def test_weak_typing_needs_its_flags_and_strong_typing_refuses_them(trtexec, tmp_path):
    (tmp_path / "model.onnx").write_bytes(quantized_net())
    assert "int8 is not configured" in trtexec("10.3", *BUILD)[2]
    assert trtexec("10.3", *BUILD, "--int8")[0] == 0
    assert "do not take the precision flag kINT8" in trtexec("10.3", *BUILD, "--int8", "--stronglyTyped")[2]
    assert trtexec("11.4", *BUILD)[0] == 0


@pytest.mark.parametrize("lane", ["10.3", "11.4"])
def test_a_refused_node_is_told_like_the_parser_tells_it(trtexec, lane, tmp_path):
    nodes = [helper.make_node("Det", ["x"], ["y"], name="my/det")]
    (tmp_path / "model.onnx").write_bytes(serialise(nodes, {"x": [4, 4]}, {"y": []}, {}))
    status, _, err = trtexec(lane, *BUILD)
    assert status == 1
    assert '[E] [TRT] ModelImporter.cpp:140: While parsing node number 0 [Det -> "y"]:' in err
    assert ('\nname: "my/det"\nop_type: "Det"\n' if lane == "10.3" else "Node name: my/det") in err
    assert err.splitlines()[-1].endswith("[E] Engine set up failed")


def test_out_of_memory_and_a_plan_of_another_machine_are_errors_of_the_recorder(trtexec):
    assert "[E] Error[1]: [defaultAllocator.cpp::allocate::31]" in trtexec("10.3", *BUILD, faults=["out-of-memory"])[2]
    trtexec("10.3", *BUILD)
    status, _, err = trtexec("10.13", *RUN)
    assert status == 1
    assert "[E] Error[1]: IRuntime::deserializeCudaEngine" in err
    assert "[E] Engine deserialization failed" in err


def test_a_missing_plan_fails_behind_the_device(trtexec):
    status, out, err = trtexec("10.13", "--loadEngine=none.plan", "--getPlanVersionOnly")
    assert status == 1
    assert "[I] Compute Capability: 8.7" in out
    assert "[E] Error opening engine file: none.plan" in err


def test_without_a_gpu_it_ends_in_the_middle(trtexec, capsys):
    with pytest.raises(SystemExit, match="1"):
        trtexec("10.3", *BUILD, faults=["no-gpu"])
    told = capsys.readouterr()
    assert "Cuda failure: no CUDA-capable device is detected" in told.err
    assert "FAILED" not in told.out


def test_profiles_and_timing_caches(trtexec, tmp_path):
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="relu")]
    (tmp_path / "model.onnx").write_bytes(serialise(nodes, {"x": ["rows", 4]}, {"y": ["rows", 4]}, {}))
    shapes = ("--minShapes=x:1x4", "--optShapes=x:2x4", "--maxShapes=x:8x4")
    out = trtexec("10.3", *BUILD, *shapes, "--timingCacheFile=cache")[1]
    assert "[W] Could not read timing cache from: cache. A new timing cache will be generated and written." in out
    assert "Could not read timing cache" not in trtexec("10.3", *BUILD, *shapes, "--timingCacheFile=cache")[1]
    image(8, 4).tofile(tmp_path / "x.bin")
    told = ("--loadEngine=engine.plan", "--shapes=x:8x4", "--loadInputs=x:x.bin", "--exportOutput=outputs.json")
    assert trtexec("10.3", *told)[0] == 0
    assert json.loads((tmp_path / "outputs.json").read_text())[0]["dimensions"] == "8x4"
    assert trtexec("10.3", *(argument.replace("8x4", "9x4") for argument in told))[0] == 1


def test_the_program_is_found_on_the_path_and_started_by_its_name(tmp_path):
    (tmp_path / "model.onnx").write_bytes(conv_net())
    variables = {**os.environ, **environment("10.3", faults=["builder-killed"])}
    done = subprocess.run(["trtexec", *BUILD], env=variables, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9
    assert "&&&& RUNNING TensorRT.trtexec [TensorRT v100300] # " in done.stdout
    assert not (tmp_path / "engine.plan").exists()
