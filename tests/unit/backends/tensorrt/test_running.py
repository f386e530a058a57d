"""Engines built and run on the stand-ins of all lanes: CUDA graphs, whole loops, residents, profiles, failures."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.standins import LANES, alive, calls, installed
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.policy_spec import (
    Chunk,
    Component,
    EulerLoop,
    Noise,
    NormaliseProcessor,
    PolicySpec,
    TensorSpec,
    Unnormalise,
)
from vlaopt.backends import EngineOptions, Euler, Link, Resident
from vlaopt.backends.tensorrt.classic import BACKEND
from vlaopt.backends.tensorrt.log import collector
from vlaopt.backends.tensorrt.whole_loop import update_network
from vlaopt.errors import EnvironmentProblem, InputError, StageError
from vlaopt.runtime.loop import run_loop

EULER = Euler("x", "t", "v", (1.0, 0.75, 0.5, 0.25), -0.25)
NOISE = np.random.default_rng(7).standard_normal((1, 4, 3)).astype(np.float32)
NOTHING = {"device": 0, "pinned": 0, "streams": 0, "events": 0, "graphs": 0, "executables": 0}

anywhere = pytest.mark.parametrize("lane", LANES)


@pytest.fixture(autouse=True)
def _nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """No test of this file may leave a module of a stand-in behind."""
    yield
    assert "standin" not in sys.modules


def onnx(nodes: list[Any], inputs: dict[str, list[Any]], outputs: dict[str, list[Any]], kind: int) -> Graph:
    ports = [
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in side.items()] for side in (inputs, outputs)
    ]
    opsets = [helper.make_opsetid("", 20)]
    graph = helper.make_graph(nodes, "component", *ports)
    return Graph(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def step(kind: int = TensorProto.FLOAT) -> Graph:
    """x, t, prefix → v = x · prefix + t"""
    nodes = [
        helper.make_node("Mul", ["x", "prefix"], ["m"], name="m"),
        helper.make_node("Add", ["m", "t"], ["v"], name="a"),
    ]
    return onnx(nodes, {"x": [1, 4, 3], "t": [1], "prefix": [1, 3]}, {"v": [1, 4, 3]}, kind)


def prefix() -> Graph:
    """state → prefix = state²"""
    nodes = [helper.make_node("Mul", ["state", "state"], ["prefix"], name="square")]
    return onnx(nodes, {"state": [1, 3]}, {"prefix": [1, 3]}, TensorProto.FLOAT)


def opened(graph: Graph, cache: Path | None = None, **settings: Any) -> Any:
    options = EngineOptions(settings=settings, cache=cache)
    return BACKEND.open(BACKEND.build(graph, options).files, options)


def by_hand(factor: np.ndarray) -> np.ndarray:
    """The loop over `step` as the runtime does it on the host, in the type of `factor` but for the state."""
    state, kind = NOISE, factor.dtype
    for time in EULER.times:
        velocity = state.astype(kind) * factor + np.full(1, time, kind)
        state = state + np.float32(EULER.dt) * velocity.astype(np.float32)
    return state


def looped(session: Any, factor: np.ndarray) -> Any:
    """What a loop over `step` gives, run at once."""
    return session.chain((Link("flow", session, euler=EULER),), {"prefix": factor}, NOISE)


FACTOR = np.full((1, 3), 0.25, np.float32)


@anywhere
def test_a_component_is_launched_as_a_cuda_graph_after_its_first_run(lane: str, tmp_path: Path) -> None:
    with installed(lane, log=tmp_path / "calls"):
        session = opened(step())
        for value in (1, 2, 3):
            feeds = {"x": np.full((1, 4, 3), value, np.float32), "t": np.ones(1, np.float32), "prefix": FACTOR}
            assert session.run(feeds)["v"].tolist() == (feeds["x"] * FACTOR + 1).tolist()
        assert session.told == ("as a CUDA graph",)
        session.close()
        assert alive() == NOTHING
    called = [line.split("(")[0] for line in calls(tmp_path / "calls")]
    assert (called.count("IExecutionContext.execute_async_v3"), called.count("cuda.cudaGraphLaunch")) == (2, 2)


@anywhere
@pytest.mark.parametrize("library", ["cuda-python", "pycuda"])
def test_either_library_tells_what_a_run_takes_on_the_device(lane: str, library: str) -> None:
    faults = ["no-cuda-python"] if library == "pycuda" else []
    feeds = {"x": NOISE, "t": np.ones(1, np.float32), "prefix": FACTOR}
    with installed(lane, faults=faults):
        session = opened(step())
        assert session.stream.library.name == library
        for _ in range(2):
            with session.device_times() as times:
                for _ in range(3):
                    assert session.run(feeds)["v"] == pytest.approx(NOISE * FACTOR + 1, abs=1e-6)
            assert len(times) == 3
            assert all(taken.compute_ms > 0 < taken.copies_ms for taken in times)
        assert alive()["events"] == 4
        session.close()
        assert alive() == NOTHING


@anywhere
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_a_whole_loop_gives_what_its_steps_give_and_is_one_launch(lane: str, kind: int, tmp_path: Path) -> None:
    factor = FACTOR.astype(helper.tensor_dtype_to_np_dtype(kind))
    with installed(lane, log=tmp_path / "calls"):
        session = opened(step(kind))
        for _ in range(3):
            given = looped(session, factor)
            assert (given["x"].dtype, given["v"].dtype) == (np.float32, factor.dtype)
            assert given["x"] == pytest.approx(by_hand(factor), abs=1e-6)
        assert session.told == ("in one CUDA graph: flow × 4",)
        session.close()
        assert alive() == NOTHING
    called = [line.split("(")[0] for line in calls(tmp_path / "calls")]
    # Queued twice, to warm up and to be captured, each step with its update; launched for each chunk after the first.
    assert called.count("IExecutionContext.execute_async_v3") == 2 * 2 * len(EULER.times)
    assert called.count("cuda.cudaGraphLaunch") == 2


def test_noise_of_another_shape_is_refused_by_the_name_of_the_state() -> None:
    with installed("11.4"):
        session = opened(step())
        with pytest.raises(InputError, match=r"input 'x' has shape \(1, 1, 3\), not \(1, 4, 3\)"):
            session.chain((Link("flow", session, euler=EULER),), {"prefix": FACTOR}, NOISE[:, :1])
        assert looped(session, FACTOR)["x"] == pytest.approx(by_hand(FACTOR), abs=1e-6)
        session.close()


def test_the_engine_that_updates_the_state_is_built_once_on_a_machine(tmp_path: Path) -> None:
    with installed("10.3", log=tmp_path / "calls"):
        options = EngineOptions(cache=tmp_path / "cache")
        files = BACKEND.build(step(), options).files
        built = []
        for _ in range(2):
            session = BACKEND.open(files, options)
            assert looped(session, FACTOR)["x"] == pytest.approx(by_hand(FACTOR), abs=1e-6)
            built.append(sum(line.startswith("Builder.build_serialized") for line in calls(tmp_path / "calls")))
            session.close()
    assert built == [2, 2]  # the step's engine and the update's, then none


def tensor(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=shape)


def flow_spec() -> PolicySpec:
    """state → eye → prefix → flow (x, t, prefix → v), four steps"""
    x, t, v, kept = tensor("x", 1, 4, 3), tensor("t", 1), tensor("v", 1, 4, 3), tensor("prefix", 1, 3)
    return PolicySpec(
        type="flow",
        action_dim=3,
        control_hz=10,
        components={
            "eye": Component(kind="prefix", inputs=(tensor("state", 1, 3),), outputs=(kept,)),
            "flow": Component(kind="step", inputs=(x, t, kept), outputs=(v,)),
        },
        loop=EulerLoop(steps=4, start=1, end=0, step="flow", state_input="x", time_input="t", velocity_output="v"),
        noise=Noise(law="normal", shape=(1, 4, 3)),
        chunk=Chunk(size=4, n_action_steps=2),
        preprocess=(NormaliseProcessor(input="joints", output="state", size=3, statistics="unit"),),
        postprocess=Unnormalise(input="x", statistics="unit"),
    )


def traffic(lines: list[str]) -> Counter[str]:
    """How often data was copied, which way, and a graph launched."""
    words = ("HostToDevice", "DeviceToDevice", "DeviceToHost", "GraphLaunch")
    return Counter(word for line in lines for word in words if word in line)


@anywhere
def test_a_whole_policy_is_one_launch_and_only_its_ends_cross_the_bus(lane: str, tmp_path: Path) -> None:
    given = {"state": np.sqrt(FACTOR)}
    with installed(lane, log=tmp_path / "calls"):
        sessions = {"eye": opened(prefix()), "flow": opened(step())}
        first = run_loop(flow_spec(), sessions, given, NOISE)
        before = len(calls(tmp_path / "calls"))
        second = run_loop(flow_spec(), sessions, given, NOISE)
        seen = traffic(calls(tmp_path / "calls")[before:])
        stepwise = run_loop(flow_spec(), sessions, given, NOISE, steer=lambda state, velocity, time: velocity)
        assert sessions["eye"].told == ("in one CUDA graph: eye, flow × 4", "as a CUDA graph")
        for session in sessions.values():
            session.close()
        assert alive() == NOTHING
    assert "prefix" not in second
    assert second["x"] == pytest.approx(by_hand(FACTOR), abs=1e-6)
    assert np.array_equal(first["x"], second["x"])
    assert stepwise["x"] == pytest.approx(second["x"], abs=1e-6)
    # In: the observation, and the noise as state and as input. Out: the state and the last velocity.
    assert seen == {"GraphLaunch": 1, "HostToDevice": 3, "DeviceToHost": 2}


@anywhere
def test_what_only_components_take_stays_on_the_device_without_graphs_too(lane: str, tmp_path: Path) -> None:
    with installed(lane, log=tmp_path / "calls"):
        sessions = {"eye": opened(prefix(), cuda_graph=False), "flow": opened(step(), cuda_graph=False)}
        before = len(calls(tmp_path / "calls"))
        result = run_loop(flow_spec(), sessions, {"state": np.sqrt(FACTOR)}, NOISE)
        seen = traffic(calls(tmp_path / "calls")[before:])
        for session in sessions.values():
            session.close()
    assert result["x"] == pytest.approx(by_hand(FACTOR), abs=1e-6)
    # In: the observation, then state and time of each step. Over: the prefix, once. Out: each step's velocity.
    assert seen == {"HostToDevice": 1 + 2 * 4, "DeviceToDevice": 1, "DeviceToHost": 4}


@anywhere
def test_components_of_one_pass_are_one_launch_and_what_is_wanted_comes_out(lane: str, tmp_path: Path) -> None:
    def doubling(taken: str, given: str) -> Graph:
        node = helper.make_node("Add", [taken, taken], [given], name="double")
        return onnx([node], {taken: [1, 3]}, {given: [1, 3]}, TensorProto.FLOAT)

    with installed(lane, log=tmp_path / "calls"):
        eye, arm, head = (opened(doubling(*ports)) for ports in (("a", "b"), ("b", "c"), ("c", "d")))
        links = (Link("eye", eye, frozenset({"b"})), Link("arm", arm), Link("head", head))
        for value in (1, 2, 3):
            given = eye.chain(links, {"a": np.full((1, 3), value, np.float32)}, None)
            assert given["c"].tolist() == [[4 * value] * 3]
            assert given["d"].tolist() == [[8 * value] * 3]
            assert isinstance(given["b"], Resident)
        assert head.told == ("in one CUDA graph: eye, arm, head",)
        assert traffic(calls(tmp_path / "calls"))["GraphLaunch"] == 2
        # A component of a chain still runs by itself, and what it took from the chain is not there any more.
        assert arm.run({"b": np.full((1, 3), 5, np.float32)})["c"].tolist() == [[10] * 3]
        assert arm.run({"b": given["b"]})["c"].tolist() == [[12] * 3]
        with pytest.raises(InputError, match="input 'a' is missing"):
            eye.chain(links, {}, None)
        head.close()
        with pytest.raises(InputError, match="session is closed"):
            eye.chain(links, {"a": FACTOR}, None)
        eye.close()
        arm.close()
        assert alive() == NOTHING


def test_components_that_meet_in_different_types_are_left_to_the_runtime() -> None:
    halves = onnx(
        [helper.make_node("Add", ["b", "b"], ["c"], name="a")], {"b": [1, 3]}, {"c": [1, 3]}, TensorProto.FLOAT16
    )
    singles = onnx(
        [helper.make_node("Add", ["a", "a"], ["b"], name="a")], {"a": [1, 3]}, {"b": [1, 3]}, TensorProto.FLOAT
    )
    with installed("11.4"):
        first, second = opened(singles), opened(halves)
        assert first.chain((Link("eye", first), Link("arm", second)), {"a": FACTOR}, None) is None
        assert first.told == ("one by one: eye, arm: b is given as float32, and arm takes float16",)
        first.close()
        second.close()
        assert alive() == NOTHING


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("capture-fails", "operation not permitted when stream is capturing"), ("instantiate-fails", "CUDA error 2")],
)
@anywhere
def test_what_cannot_be_captured_runs_without_and_says_so(lane: str, fault: str, reason: str) -> None:
    feeds = {"x": NOISE, "t": np.ones(1, np.float32), "prefix": FACTOR}
    with installed(lane, faults=[fault]):
        session = opened(step())
        for _ in range(2):
            assert session.run(feeds)["v"] == pytest.approx(NOISE * FACTOR + 1, abs=1e-6)
            assert looped(session, FACTOR)["x"] == pytest.approx(by_hand(FACTOR), abs=1e-6)
        component, loop = session.told
        assert component.startswith("without a CUDA graph: ")
        assert loop.startswith("at once, without a CUDA graph: ")
        assert reason in component
        assert reason in loop
        session.close()
        assert alive() == NOTHING


@anywhere
def test_a_loop_whose_update_cannot_be_built_is_left_to_the_runtime(lane: str) -> None:
    with installed(lane):
        files = BACKEND.build(step(), EngineOptions()).files
    with installed(lane, faults=["build-none"]):
        session = BACKEND.open(files, EngineOptions())
        assert looped(session, FACTOR) is None
        [told] = session.told
        assert told.startswith("one by one: flow: TensorRT cannot make the engine that updates the state: ")
        assert session.run({"x": NOISE, "t": np.ones(1, np.float32), "prefix": FACTOR})["v"].shape == (1, 4, 3)
        session.close()
        assert alive() == NOTHING


@pytest.mark.parametrize("taken", ["FLOAT", "HALF", "BF16"])
@pytest.mark.parametrize("velocity", ["FLOAT", "HALF", "BF16"])
def test_nvidias_own_builder_takes_the_update_of_the_state(taken: str, velocity: str) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX is not installed", exc_type=ImportError)
    log = collector(trt)
    builder = trt.Builder(log)
    kinds = {"taken": getattr(trt.DataType, taken), "velocity": getattr(trt.DataType, velocity)}
    dt = np.full((1, 1, 1), -0.1, np.float32)
    network = update_network(trt, builder, (1, 50, 32), dt, **kinds)
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert builder.build_serialized_network(network, config) is not None, log.errors
    outputs = {network.get_output(index).name: network.get_output(index).dtype for index in range(network.num_outputs)}
    assert outputs == {"next": trt.DataType.FLOAT} | ({} if taken == "FLOAT" else {"taken": kinds["taken"]})


def test_without_the_wish_for_cuda_graphs_there_is_neither_graph_nor_whole_loop() -> None:
    with installed("11.4"):
        session = opened(step(), cuda_graph=False)
        assert looped(session, FACTOR) is None
        session.run({"x": NOISE, "t": np.ones(1, np.float32), "prefix": FACTOR})
        assert session.told == ()
        session.close()


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("execute-fails", StageError, "refused to run the engine: .*unspecified launch failure"),
        ("sticky-error", EnvironmentProblem, "CUDA error 700: an illegal memory access"),
    ],
)
@anywhere
def test_a_run_that_fails_tells_the_reason_and_what_it_held_is_freed(
    lane: str, fault: str, error: type[Exception], message: str
) -> None:
    with installed(lane):
        files = BACKEND.build(step(), EngineOptions()).files
    with installed(lane, faults=[fault]):
        session = BACKEND.open(files, EngineOptions())
        with pytest.raises(error, match=message) as caught:
            session.run({"x": NOISE, "t": np.ones(1, np.float32), "prefix": FACTOR})
        session.close()
        if fault == "execute-fails":  # after a sticky error nothing can be freed any more, nor must it
            assert alive() == NOTHING
        else:
            assert caught.value.hint == "this error stays until the process ends; start it again"


@anywhere
def test_an_engine_that_finds_no_memory_leaves_none_behind(lane: str) -> None:
    with installed(lane):
        files = BACKEND.build(step(), EngineOptions()).files
    with installed(lane, memory_mib=0):
        with pytest.raises(EnvironmentProblem, match=r"out of memory|execution context"):
            BACKEND.open(files, EngineOptions())
        assert alive() == NOTHING


@anywhere
def test_dynamic_dimensions_run_within_their_profile(lane: str) -> None:
    nodes = [helper.make_node("Mul", ["a", "b"], ["c"], name="m")]
    graph = onnx(nodes, {"a": ["rows", 3], "b": ["rows", 3]}, {"c": ["rows", 3]}, TensorProto.FLOAT)
    with installed(lane):
        session = opened(graph, profiles={"rows": [2, 3, 4]})
        for rows in (2, 4, 3):
            a = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
            assert session.run({"a": a, "b": a})["c"].tolist() == (a * a).tolist()
        assert session.told == ("without a CUDA graph: its shapes are dynamic",)
        for rows in (1, 5):
            a = np.zeros((rows, 3), np.float32)
            with pytest.raises(
                InputError, match=f"dimension 0 of input 'a' is {rows}; the engine was built for 2 to 4"
            ):
                session.run({"a": a, "b": a})
        with pytest.raises(InputError, match=r"input 'a' has shape \(0, 3\)"):
            session.run({"a": np.zeros((0, 3), np.float32), "b": np.zeros((2, 3), np.float32)})
        session.close()
        assert alive() == NOTHING


@anywhere
def test_pycuda_runs_all_of_it_but_graphs_and_says_so(lane: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(lane), monkeypatch.context() as patched:
        patched.setitem(sys.modules, "cuda", None)
        sessions = {"eye": opened(prefix()), "flow": opened(step())}
        for _ in range(2):
            result = run_loop(flow_spec(), sessions, {"state": np.sqrt(FACTOR)}, NOISE)
            assert result["x"] == pytest.approx(by_hand(FACTOR), abs=1e-6)
        assert sessions["eye"].told == ("at once, without a CUDA graph: pycuda has no CUDA graphs: eye, flow × 4",)
        for session in sessions.values():
            session.close()
        assert alive() == NOTHING


def test_a_policy_that_nobody_has_any_more_leaves_nothing_on_the_device() -> None:
    with installed("11.4"):
        sessions = {"eye": opened(prefix()), "flow": opened(step())}
        run_loop(flow_spec(), sessions, {"state": np.sqrt(FACTOR)}, NOISE)
        assert alive()["executables"] == 1
        sessions.clear()
        gc.collect()
        assert alive() == NOTHING
