"""The promise: load takes cores and memory while it is asked for, and is gone afterwards whatever happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.test_isolated import gone
from vlaopt.benchmark import load
from vlaopt.benchmark.environment import read_activity
from vlaopt.errors import StageError

ROOT = Path(__file__).parents[3]


def resident_mib(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def own_jiffies(working: load.Load) -> int:
    activity = read_activity(beside=working.processes)
    assert activity is not None
    return activity.own


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_each_process_works_all_the_time_and_beyond_the_caches() -> None:
    with load.busy(2) as working:
        begin, deadline = own_jiffies(working), time.monotonic() + 20
        # on free cores 40 jiffies of 10 ms take 0.2 s; others may be at work here
        while own_jiffies(working) - begin < 40 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert own_jiffies(working) - begin >= 40
        assert all(resident_mib(process) > 48 for process in working.processes)
        assert working.lost() == 0


def test_no_load_is_no_process() -> None:
    with load.busy(0) as working:
        assert (working.processes, working.lost()) == ((), 0)


def test_it_ends_with_the_body_also_when_that_fails() -> None:
    with pytest.raises(KeyboardInterrupt, match="stop"), load.busy(2) as working:
        raise KeyboardInterrupt("stop")
    assert all(gone(process) for process in working.processes)


def test_one_that_ends_early_is_counted() -> None:
    with load.busy(2) as working:
        os.kill(working.processes[0], signal.SIGKILL)
        deadline = time.monotonic() + 10
        while not working.lost() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert working.lost() == 1


def test_one_that_does_not_get_ready_is_an_error_and_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "READY_S", 0.0)
    with pytest.raises(StageError, match=r"load process 1 of 2 gave no answer in 0 s"), load.busy(2):
        raise AssertionError("not ready")


def test_none_outlives_a_measurement_that_is_killed() -> None:
    code = (
        "import time; from vlaopt.benchmark import load\n"
        "with load.busy(2) as working:\n"
        "    print(*working.processes, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    processes = [int(number) for number in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.communicate(timeout=20)
    assert len(processes) == 2
    assert all(gone(process) for process in processes)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="only root has a real-time class on Linux")
def test_it_leaves_the_real_time_class_of_what_is_measured() -> None:
    code = (
        "import os; from vlaopt.benchmark import load\n"
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))\n"
        "with load.busy(1) as working:\n"
        "    print(os.sched_getscheduler(working.processes[0]), os.sched_getscheduler(0))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if "PermissionError" in done.stderr:
        pytest.skip("no real-time class is allowed here")
    assert done.stdout.split() == [str(os.SCHED_OTHER), str(os.SCHED_FIFO)]
