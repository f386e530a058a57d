"""What trtexec printed, after public listings, is read as what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlaopt.backends.tensorrt.trtexec_log import parse

LOGS = Path(__file__).with_name("trtexec") / "logs"


def log_of(name: str):
    return parse((LOGS / f"{name}.txt").read_text())


def test_a_success_tells_version_device_and_memory():
    log = log_of("success-10.3")
    assert (log.version, log.passed, log.gpu, log.sm, log.memory_mib) == ("10.3.0", True, "Orin", "8.7", 30696)
    assert log.sizes == {"weights_bytes": 6012416, "activation_bytes": 2097152}
    assert log.errors == ()


def test_a_build_goes_on_without_a_kernel_that_found_no_memory():
    log = log_of("success-10.16")
    assert (log.version, log.passed, log.gpu, log.sm) == ("10.16.2.10", True, "NVIDIA Thor", "11.0")
    assert log.sizes["weights_bytes"] == 5147648
    assert len(log.errors) == 1


def test_running_out_of_memory_names_the_layer_and_a_hint():
    log = log_of("out-of-memory-10.3")
    assert not log.passed
    refusals = log.refusals(1)
    assert refusals[0].reason == "Cuda Runtime (out of memory)"
    assert refusals[-1].node == "{ForeignNode[/1/Constant_36_output_0.../1/Slice_4]}"
    assert all("Engine set up failed" not in refusal.reason for refusal in refusals)
    assert "workspace_mib" in str(log.hint(1))


@pytest.mark.parametrize(
    ("name", "node"),
    [("unsupported-operator-10.3", "/dense_motion_network/GridSample"), ("unsupported-operator-10.13", "/GridSample")],
)
def test_an_operator_that_is_not_supported_is_named_with_its_node(name: str, node: str):
    log = log_of(name)
    (refusal,) = log.refusals(1)
    assert (refusal.node, refusal.operator) == (node, "GridSample3D")
    assert refusal.reason == 'creator && "Plugin not found, are the plugin name, version, and namespace correct?"'
    assert log.hint(1) is None


def test_a_node_without_a_name_is_named_by_its_number():
    nameless = (LOGS / "unsupported-operator-10.3.txt").read_text().replace('name: "/dense_motion_network/', 'no: "')
    assert parse(nameless).refusals(1)[0].node == "#11"


def test_a_node_is_named_as_newer_parsers_print_it_too():
    text = (LOGS / "unsupported-operator-10.3.txt").read_text()
    newer = text.replace('name: "/dense_motion_network/GridSample"', "Node name: /dense_motion_network/GridSample")
    assert newer != text
    assert parse(newer).refusals(1)[0].node == "/dense_motion_network/GridSample"


@pytest.mark.parametrize(("signal", "told"), [(9, "most often because memory ran out"), (11, r"crashed (SIGSEGV)")])
def test_a_signal_that_ended_it_is_told(signal: int, told: str):
    log = log_of("killed-10.3")
    assert not log.passed
    assert told in log.refusals(-signal)[0].reason
    assert (log.hint(-signal) is not None) == (signal == 9)


def test_without_a_gpu_cudas_reason_is_told():
    log = log_of("no-gpu-10.3")
    assert (log.no_device, log.sm, log.gpu) == (True, None, None)
    assert log.refusals(1)[0].reason == "Cuda failure: no CUDA-capable device is detected"


def test_a_plan_that_does_not_load_is_told_with_tensorrts_reason():
    (refusal,) = log_of("other-plan-10.13").refusals(1)
    assert "incompatible serialization version" in refusal.reason


def test_what_is_no_log_has_no_version():
    log = parse("sh: trtexec: not found\n")
    assert (log.version, log.passed) == ("", False)
    assert log.refusals(127)[0].reason == "it says nothing"
