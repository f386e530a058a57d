"""The promise: every millisecond of a chunk is found where it was spent, and no clock costs what it measures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.standins import alive, installed
from tests.unit.backends.tensorrt.test_running import FACTOR, NOTHING, flow_spec, opened, prefix, step
from tests.unit.benchmark.conftest import FakeClock
from tests.unit.runtime.conftest import WorkingSession, unit_statistics
from tests.unit.runtime.test_loop import END, diffusing, talking, words
from vlaopt.artifact.artifact import Artifact
from vlaopt.backends import DeviceTime, Timing
from vlaopt.errors import InputError
from vlaopt.runtime.breakdown import break_down
from vlaopt.runtime.golden import Sample
from vlaopt.runtime.loop import noise_shape
from vlaopt.runtime.policy import Policy, open_artifact
from vlaopt.runtime.processors import Processors
from vlaopt.tensors import Array, pack


class OnDevice(WorkingSession):
    """One whose device computes for half of its time and copies for a quarter; its clock costs the host 5 ms a run."""

    times: list[DeviceTime] | None = None

    @contextmanager
    def device_times(self) -> Iterator[Sequence[DeviceTime]]:
        self.times = []
        try:
            yield self.times
        finally:
            self.times = None

    def run(self, feeds: Mapping[str, Array], resident: Collection[str] = ()) -> dict[str, Any]:
        if self.times is not None:
            self.times.append(DeviceTime(self.ms / 2, self.ms / 4))
            self.clock.work(5)
        return super().run(feeds, resident)


class Slow:
    """Processors that take 2 ms for the observation and 1 ms for the actions."""

    prepare_ms, actions_ms = 2.0, 1.0

    def __init__(self, processors: Any, clock: FakeClock) -> None:
        self.processors, self.clock = processors, clock

    def prepare(self, observation: Any) -> Any:
        self.clock.work(self.prepare_ms)
        return self.processors.prepare(observation)

    def actions(self, outputs: Any) -> Any:
        self.clock.work(self.actions_ms)
        return self.processors.actions(outputs)


def flowing(flow: Any, clock: FakeClock, kind: type[WorkingSession] = WorkingSession) -> Policy:
    """Four steps of 3 ms after an eye of 10 ms."""
    policy: Policy = flow(lambda x, t: x, steps=4)[0]
    sessions: dict[str, Any] = {
        "eye": kind(clock, 10, lambda state: {"prefix": state}),
        "aflow": kind(clock, 3, lambda x, t, prefix: {"v": x}),
    }
    processors: Any = Slow(policy.processors, clock)
    return Policy(policy.spec, processors, sessions, backend="fake")


def samples(count: int = 4) -> list[Sample]:
    return [({"joints": np.full(2, k, np.float32)}, np.full((1, 2, 2), k, np.float32)) for k in range(count)]


def test_a_chunk_is_its_components_processors_and_what_is_left(flow: Any) -> None:
    clock = FakeClock()
    found = break_down(flowing(flow, clock), samples(), seconds=3, clock=clock)
    assert {name: (part.calls, part.wall_ms) for name, part in found.components.items()} == {
        "eye": (1, 10),
        "aflow": (4, 12),
    }
    assert (found.processors_ms, found.loop_ms, found.whole_ms, found.together_ms) == (3, 0, 25, 25)


def test_the_loops_own_work_is_what_no_component_and_no_processor_took(
    flow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    policy = flowing(flow, clock)

    def busy_loop(spec: Any, sessions: Any, tensors: Any, noise: Array) -> dict[str, Array]:
        sessions["eye"].run(tensors)
        for _ in range(2):
            clock.work(0.75)
            sessions["aflow"].run({"x": noise, "t": noise, "prefix": noise})
        return {"x": noise}

    monkeypatch.setattr("vlaopt.runtime.breakdown.run_loop", busy_loop)
    found = break_down(policy, samples(), clock=clock)
    assert (found.whole_ms, found.loop_ms, found.components["aflow"].calls) == (20.5, 1.5, 2)


@given(
    eye_ms=st.floats(0, 50),
    step_ms=st.floats(0, 50),
    prepare_ms=st.floats(0, 50),
    actions_ms=st.floats(0, 50),
)
def test_parts_add_up_to_the_whole_whatever_they_take(
    flow: Any, eye_ms: float, step_ms: float, prepare_ms: float, actions_ms: float
) -> None:
    clock = FakeClock()
    policy = flowing(flow, clock)
    working: Any = policy
    working.sessions["eye"].ms, working.sessions["aflow"].ms = eye_ms, step_ms
    working.processors.prepare_ms, working.processors.actions_ms = prepare_ms, actions_ms
    found = break_down(policy, samples(2), seconds=0.001, clock=clock)
    eye, step = found.components["eye"].wall_ms, found.components["aflow"].wall_ms
    assert eye == pytest.approx(eye_ms, abs=1e-3)
    assert step == pytest.approx(4 * step_ms, abs=1e-3)
    assert found.processors_ms == pytest.approx(prepare_ms + actions_ms, abs=1e-3)
    assert found.loop_ms == 0
    assert found.whole_ms == pytest.approx(eye + step + found.processors_ms, abs=1e-3)


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_a_denoising_loop_is_broken_down_too(flow: Any, kind: str) -> None:
    clock = FakeClock()
    spec = diffusing(flow, kind, steps=3)
    sessions: dict[str, Any] = {
        "eye": WorkingSession(clock, 10, lambda state: {"prefix": state}),
        "aflow": WorkingSession(clock, 3, lambda x, t, prefix: {"e": x}),
    }
    policy = Policy(spec, Processors(spec, unit_statistics), sessions, backend="fake")
    noise = np.ones(noise_shape(spec), np.float32)
    found = break_down(policy, [({"joints": np.zeros(2, np.float32)}, noise)], clock=clock)
    assert (found.components["aflow"].calls, found.components["aflow"].wall_ms, found.whole_ms) == (3, 9, 19)


def test_a_sentence_counts_the_words_that_it_has(fake_session: Any) -> None:
    clock = FakeClock()
    spec = talking()
    sentences = [[5, END], [5, 4, END], [5, 4, 2, END]]
    speaking: dict[str, Any] = {}

    def read(state: Array) -> Any:
        speaking.update(words(fake_session, sentences[int(state[0, 0])]))
        return speaking["read"].function(state)

    sessions: dict[str, Any] = {
        "read": WorkingSession(clock, 10, read),
        "word": WorkingSession(clock, 3, lambda **feeds: speaking["word"].function(**feeds)),
        "aloud": WorkingSession(clock, 1, lambda **feeds: speaking["aloud"].function(**feeds)),
    }
    policy = Policy(spec, Processors(spec, unit_statistics), sessions, backend="fake")
    given = [({"joints": np.full(2, k, np.float32)}, None) for k in range(3)]
    found = break_down(policy, given, clock=clock)
    assert (found.components["word"].calls, found.components["word"].wall_ms, found.whole_ms) == (3, 9, 20)


def test_a_session_without_a_clock_on_its_device_has_no_device_time(flow: Any) -> None:
    clock = FakeClock()
    found = break_down(flowing(flow, clock), samples(), clock=clock)
    assert {(part.device_ms, part.copies_ms) for part in found.components.values()} == {(None, None)}


def test_device_times_are_sums_over_a_chunk_and_their_clock_is_not_in_the_wall_time(flow: Any) -> None:
    clock = FakeClock()
    policy = flowing(flow, clock, OnDevice)
    assert all(isinstance(session, Timing) for session in policy.sessions.values())
    found = break_down(policy, samples(), clock=clock)
    flowed, eye = found.components["aflow"], found.components["eye"]
    assert (flowed.device_ms, flowed.copies_ms, eye.device_ms, eye.copies_ms) == (6, 3, 5, 2.5)
    assert (flowed.wall_ms, eye.wall_ms, found.whole_ms) == (12, 10, 25)


def test_together_is_the_policy_as_it_normally_runs(flow: Any) -> None:
    clock = FakeClock()
    policy = flowing(flow, clock)

    def chain(links: Any, tensors: Any, noise: Array) -> dict[str, Any]:
        clock.work(7)
        return {"x": noise}

    for session in policy.sessions.values():
        session.chain = chain  # type: ignore[attr-defined]
    found = break_down(policy, samples(), clock=clock)
    assert (found.together_ms, found.whole_ms, found.components["aflow"].calls) == (10, 25, 4)


def test_a_slow_policy_is_measured_eight_times_and_a_fast_one_for_the_time_given(flow: Any) -> None:
    clock = FakeClock()
    policy = flowing(flow, clock)
    assert break_down(policy, samples(), seconds=0.1, clock=clock).chunks == 8
    clock.time_ns = 0
    # Half of the two seconds for each of the two ways, 25 ms a chunk.
    assert break_down(policy, samples(), seconds=2, clock=clock).chunks == 40
    assert break_down(policy, samples(), seconds=1000, clock=clock).chunks == 500


def test_medians_are_of_the_chunks_after_the_warm_up(flow: Any) -> None:
    clock = FakeClock()
    policy = flowing(flow, clock)
    eye: Any = policy.sessions["eye"]
    run = eye.run

    def warming(feeds: Any, resident: Any = ()) -> Any:
        eye.ms = 100 if len(eye.calls) < 20 else 10  # ten chunks of each way
        return run(feeds, resident)

    eye.run = warming
    found = break_down(policy, samples(), seconds=8, clock=clock)
    assert (found.components["eye"].wall_ms, found.whole_ms) == (10, 25)


def test_every_golden_observation_is_run_and_the_policys_own_noise_is_left_alone(flow: Any) -> None:
    clock = FakeClock()
    policy = flowing(flow, clock)
    untouched = policy._generator.bit_generator.state
    break_down(policy, samples(5), clock=clock)
    eye: Any = policy.sessions["eye"]
    assert {feeds["state"][0, 0] for feeds in eye.calls} == {0, 1, 2, 3, 4}
    assert policy._generator.bit_generator.state == untouched


def test_without_observations_there_is_nothing_to_measure(flow: Any) -> None:
    clock = FakeClock()
    with pytest.raises(InputError, match="no observations to measure with"):
        break_down(flowing(flow, clock), [], clock=clock)


def test_a_real_policy_is_broken_down_to_what_it_takes(
    tiny_artifact: Artifact, tiny_observation: dict[str, Any]
) -> None:
    policy = open_artifact(tiny_artifact, backend="onnxruntime")
    found = break_down(policy, [(tiny_observation, None)], seconds=0.1)
    parts = [part.wall_ms for part in found.components.values()] + [found.processors_ms, found.loop_ms]
    assert found.components.keys() == policy.sessions.keys()
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(found.whole_ms, rel=0.5)


@pytest.mark.parametrize("lane", ["10.3", "11.4"])
def test_an_engine_of_tensorrt_is_timed_by_its_device_and_is_one_cuda_graph_otherwise(lane: str) -> None:
    spec = flow_spec()
    statistics = {"unit.mean": np.zeros(3, np.float32), "unit.std": np.ones(3, np.float32)}
    processors = Processors(spec, lambda asset: pack(statistics))
    noise = np.ones((1, 4, 3), np.float32)
    with installed(lane):
        sessions = {"eye": opened(prefix()), "flow": opened(step())}
        policy = Policy(spec, processors, sessions, backend="tensorrt")
        before = policy.predict_chunk({"joints": FACTOR[0]}, noise)
        found = break_down(policy, [({"joints": FACTOR[0]}, noise)], seconds=0.1)
        after = policy.predict_chunk({"joints": FACTOR[0]}, noise)
        assert policy.told()["eye"] == ("in one CUDA graph: eye, flow × 4", "as a CUDA graph")
        for session in sessions.values():
            session.close()
        assert alive() == NOTHING
    assert np.array_equal(before, after)
    assert {name: part.calls for name, part in found.components.items()} == {"eye": 1, "flow": 4}
    for part in found.components.values():
        assert part.device_ms is not None
        assert part.copies_ms is not None
        assert part.device_ms > 0 < part.copies_ms
