"""The stand-in has exactly the names of its lane, and takes only what the real library would."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.standins import FOLDER, LANES, calls, installed


@pytest.fixture(params=LANES, scope="module")
def lane(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def trt(lane: str) -> Iterator[ModuleType]:
    with installed(lane) as module:
        yield module


def test_every_class_enum_function_and_constant_of_the_lane_is_there(trt, lane):
    api = json.loads((FOLDER / "api" / f"{lane}.json").read_text())
    assert trt.__version__ == api["version"]
    for name, members in api["enums"].items():
        assert {key: int(member) for key, member in getattr(trt, name).__members__.items()} == members
    for name, entry in api["classes"].items():
        for member in (*entry["methods"], *entry["properties"]):
            getattr(getattr(trt, name), member)
    for name in (*api["functions"], *api["constants"]):
        getattr(trt, name) if name not in ("attr", "value") else None


@pytest.mark.parametrize(
    ("lane", "name", "message"),
    [
        ("11.4", "BuilderFlag.INT8", "tensorrt 11.4 has no BuilderFlag.INT8"),
        ("11.4", "IInt8EntropyCalibrator2", "tensorrt 11.4 has no IInt8EntropyCalibrator2"),
        ("11.4", "NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "has no NetworkDefinitionCreationFlag.EXPLICIT_BATCH"),
        ("10.3", "IExecutionContext.execute_async_v2", "tensorrt 10.3 has no IExecutionContext.execute_async_v2"),
        ("10.3", "Builder.build_engine_with_config", "tensorrt 10.3 has no Builder.build_engine_with_config"),
        ("10.3", "DataType.FP4", "tensorrt 10.3 has no DataType.FP4"),
        ("10.16", "HardwareCompatibilityLevel.AMPERE", "has no HardwareCompatibilityLevel.AMPERE"),
    ],
)
def test_what_a_lane_lacks_fails_with_its_name(lane, name, message):
    with installed(lane) as trt, pytest.raises(AttributeError, match=message):
        found = trt
        for part in name.split("."):
            found = getattr(found, part)


@pytest.mark.parametrize(
    ("lane", "strongly", "compatible"), [("10.3", 1, 13), ("10.13", 1, 13), ("10.16", 1, 13), ("11.4", 0, 12)]
)
def test_enum_values_are_the_lanes(lane, strongly, compatible):
    with installed(lane) as trt:
        assert int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) == strongly
        assert int(trt.BuilderFlag.VERSION_COMPATIBLE) == compatible
        assert trt.BuilderFlag(compatible) == trt.BuilderFlag.VERSION_COMPATIBLE
        assert compatible != trt.BuilderFlag.VERSION_COMPATIBLE
        assert str(trt.BuilderFlag.TF32) == "BuilderFlag.TF32"


def test_calibrators_went_with_11(lane):
    with installed(lane) as trt:
        config = trt.Builder(trt.Logger()).create_builder_config()
        if lane != "11.4":
            config.int8_calibrator = None
            assert config.int8_calibrator is None
            return
        with pytest.raises(AttributeError, match=r"tensorrt 11\.4 has no IBuilderConfig\.int8_calibrator"):
            _ = config.int8_calibrator
        with pytest.raises(AttributeError, match=r"has no IBuilderConfig\.int8_calibrator to set"):
            config.int8_calibrator = None


def test_attributes_that_are_no_properties_cannot_be_set(trt):
    builder = trt.Builder(trt.Logger())
    with pytest.raises(AttributeError, match=r"has no Builder\.max_workspace_size to set"):
        builder.max_workspace_size = 1 << 20
    network = builder.create_network(0)
    with pytest.raises(AttributeError, match=r"INetworkDefinition\.num_layers cannot be set"):
        network.num_layers = 3


@pytest.mark.parametrize(
    "call",
    [
        lambda trt, builder, config: trt.Builder(),
        lambda trt, builder, config: trt.Builder("a logger"),
        lambda trt, builder, config: builder.create_network("strong"),
        lambda trt, builder, config: builder.create_network(flag=1),
        lambda trt, builder, config: builder.build_serialized_network(builder.create_network(0)),
        lambda trt, builder, config: config.set_memory_pool_limit(0, 1 << 20),
        lambda trt, builder, config: config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, 1.5),
        lambda trt, builder, config: config.set_timing_cache(None, False),
        lambda trt, builder, config: trt.OnnxParser(builder.create_network(0), trt.Logger()).parse("a path"),
    ],
)
def test_calls_are_held_against_their_signatures(trt, call):
    builder = trt.Builder(trt.Logger())
    with pytest.raises(TypeError, match="incompatible function arguments"):
        call(trt, builder, builder.create_builder_config())


def test_values_of_properties_are_held_to_their_kind(trt):
    config = trt.Builder(trt.Logger()).create_builder_config()
    for name in (
        "profiling_verbosity",
        "hardware_compatibility_level",
        "progress_monitor",
        "builder_optimization_level",
    ):
        with pytest.raises(TypeError, match="incompatible function arguments"):
            setattr(config, name, "much")


def test_objects_of_the_library_are_not_made_by_hand(trt):
    with pytest.raises(TypeError, match="No constructor defined"):
        trt.INetworkDefinition()


def test_a_subclass_must_initialise_its_base(trt):
    class Silent(trt.ILogger):
        def __init__(self) -> None:
            pass

        def log(self, severity: object, message: str) -> None:
            pass

    with pytest.raises(TypeError, match=r"ILogger\.__init__\(\) must be called when overriding __init__"):
        Silent()


def test_what_is_not_written_says_so(trt):
    with pytest.raises(NotImplementedError, match=r"stand-in: .*add_relu|stand-in: INetworkDefinition\.add_identity"):
        trt.Builder(trt.Logger()).create_network(0).add_identity(
            trt.ITensor.make(_name="x", _shape=[1], _dims=[1], _mode="", _dtype=trt.float32)
        )
    with pytest.raises(NotImplementedError, match=r"stand-in: Builder\.error_recorder"):
        _ = trt.Builder(trt.Logger()).error_recorder


def test_every_call_is_logged(tmp_path):
    with installed("10.3", log=tmp_path / "calls") as trt:
        trt.Builder(trt.Logger(trt.Logger.ERROR)).create_network(flags=2)
    assert [line.split("(")[0] for line in calls(tmp_path / "calls")] == ["Logger", "Builder", "Builder.create_network"]
    assert calls(tmp_path / "calls")[-1] == "Builder.create_network(2)"


def test_an_unknown_fault_or_lane_is_refused():
    with pytest.raises(ValueError, match="unknown fault burns"), installed("10.3", faults=["burns"]):
        pass
    with pytest.raises(ValueError, match=r"unknown lane '9\.9'"), installed("9.9"):
        pass
