"""The promise: states are read elsewhere on the clock of this process, and no failing reader ends a measurement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.benchmark import sampled_work as work
from tests.unit.test_isolated import gone
from vlaopt.benchmark import sampling
from vlaopt.benchmark.sampling import Sampler

ROOT = Path(__file__).parents[3]


def test_states_are_read_by_another_process_on_this_clock() -> None:
    before_ns = time.perf_counter_ns()
    with Sampler(0.02, work.told) as sampler:
        (reader,) = sampler.processes
        time.sleep(0.3)
        sampler.read()
        first = len(sampler.states)
        time.sleep(0.1)
        sampler.read()
    after_ns = time.perf_counter_ns()
    assert reader != os.getpid()
    assert {state.temperatures_c["process"] for _, state in sampler.states} == {float(reader)}
    moments_ns = [moment_ns for moment_ns, _ in sampler.states]
    assert moments_ns == sorted(moments_ns)
    assert before_ns < moments_ns[0] < moments_ns[-1] < after_ns
    # none is lost or told twice; a busy machine may have taken some periods
    assert [state.power_w["rail"] for _, state in sampler.states] == list(range(1, len(moments_ns) + 1))
    assert 2 <= first < len(moments_ns) <= 30
    assert sampler.failure is None


def test_each_period_has_its_moment_drawn_so_that_no_phase_of_a_tick_is_favoured() -> None:
    period_s = 0.02
    with Sampler(period_s, work.told) as sampler:
        time.sleep(1.0)
        sampler.read()
    moments_s = [moment_ns / 1e9 for moment_ns, _ in sampler.states[:-1]]
    eighths = {int(8 * (moment_s % period_s) / period_s) for moment_s in moments_s}
    assert len(eighths) >= 6


def test_what_probes_say_of_themselves_is_known_once_they_are_open() -> None:
    with Sampler(1.0, work.told) as sampler:
        assert (sampler.sources, sampler.board) == (("told",), ("rail",))
        assert sampler.missing == {"clocks_mhz": "no clocks; none either", "energy_j": "no counter"}


def test_the_reader_steps_aside() -> None:
    with Sampler(1.0, work.niced) as sampler:
        assert sampler.sources == (f"nice {min(19, os.nice(0) + sampling.NICE)}",)


@pytest.mark.skipif(sys.platform != "linux", reason="processes are pinned on Linux alone")
def test_the_reader_leaves_the_cores_to_which_the_measurement_is_pinned() -> None:
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip("one core only")
    mine = min(allowed)
    os.sched_setaffinity(0, {mine})
    try:
        with Sampler(1.0, work.told) as sampler:
            assert mine not in os.sched_getaffinity(sampler.processes[0])
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(
    ("opened", "states", "failure"),
    [
        (work.refused, 0, "the driver is not loaded"),
        (work.dying, 2, "the reader of the machine's state ended with exit code 7 and no result"),
        (work.hanging, 2, "the reader of the machine's state gave no answer in 0.5 s"),
    ],
)
def test_a_reader_that_fails_leaves_what_it_told_and_a_reason(
    monkeypatch: pytest.MonkeyPatch, opened: sampling.Opener, states: int, failure: str
) -> None:
    monkeypatch.setattr(sampling, "ANSWER_S", 0.5)
    with Sampler(100.0, opened) as sampler:
        for _ in range(4):
            sampler.read()
        assert sampler.processes == ()
    assert len(sampler.states) == states
    assert sampler.failure == failure


def test_the_readers_probes_of_this_very_machine_open_and_close() -> None:
    with Sampler() as sampler:
        (reader,) = sampler.processes
        sampler.read()
        assert len(sampler.states) >= 1
    assert sampler.failure is None
    assert gone(reader)


def test_no_reader_outlives_a_measurement_that_is_killed() -> None:
    code = (
        "import sys, time; from tests.unit.benchmark import sampled_work as work\n"
        "from vlaopt.benchmark.sampling import Sampler\n"
        "with Sampler(0.05, work.told) as sampler:\n"
        "    print(*sampler.processes, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    reader = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=20)
    assert gone(reader)
