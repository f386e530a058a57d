"""Every launch is a process of its own, timed inside; what goes wrong there is the same one error here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.unit.cli.conftest import write_artifact
from vlaopt import backends
from vlaopt.benchmark.compare import FEWEST
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.machine.gpu import process_memory_mib
from vlaopt.machine.sources import Sources
from vlaopt.progress import Silent
from vlaopt.runtime import launch as launching
from vlaopt.runtime.launch import Launch, Plan, in_turns, launch, plan


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "artifact").path


def launched(latency_ms: float, *, around_ms: float = 500.0) -> Launch:
    return Launch(around_ms, 0.0, latency_ms, (latency_ms,) * 3, 100.0, None)


def test_a_launch_tells_its_cold_start_its_calls_and_its_memory(artifact: Path) -> None:
    found = launch(artifact, calls=7, warmup=2)
    assert len(found.latencies_ms) == 7
    assert min(found.latencies_ms) > 0
    assert found.latencies_ms[0] < found.first_ms < found.cold_start_ms
    assert found.import_ms > 10  # no Python starts faster, and numpy and ONNX Runtime come on top
    assert found.cold_start_ms == pytest.approx(found.import_ms + found.open_ms + found.first_ms)
    assert found.host_mib is not None
    assert 20 < found.host_mib < 2000


def test_what_the_parent_holds_is_not_counted(artifact: Path) -> None:
    ballast = bytearray(400 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])
    held = launch(artifact, calls=3, warmup=1).host_mib
    assert held is not None
    assert held < 400


def test_errors_of_the_other_process_come_back_as_they_are(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such artifact directory"):
        launch(tmp_path / "nowhere", calls=3, warmup=1)
    with pytest.raises(InputError, match="unknown backend 'fast'") as caught:
        launch(artifact, backend="fast", calls=3, warmup=1)
    assert "onnxruntime" in (caught.value.hint or "")
    if reason := backends.get("tensorrt-rtx").runnable():
        with pytest.raises(EnvironmentProblem, match="tensorrt-rtx cannot run here") as refused:
            launch(artifact, backend="tensorrt-rtx", calls=3, warmup=1)
        assert reason in str(refused.value)


def test_every_built_in_backend_that_is_a_library_is_known_by_its_module() -> None:
    assert set(backends.LIBRARIES) == set(backends.BUILT_IN) - {"trtexec"}


class Told:
    """Stands for launching: knows what each policy takes, and remembers the order in which they were launched."""

    def __init__(self, latencies_ms: dict[str, float]) -> None:
        self.latencies_ms = latencies_ms
        self.launches: list[tuple[str, int, int, int]] = []

    def __call__(self, path: Path, *, calls: int, warmup: int, seed: int = 0, **how: Any) -> Launch:
        self.launches.append((path.name, calls, warmup, seed))
        return launched(self.latencies_ms[path.name])


def test_turns_launch_all_once_each_round_in_an_order_drawn_anew_on_the_same_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = Told({"a": 1.0, "b": 2.0, "c": 3.0})
    monkeypatch.setattr(launching, "launch", told)
    paths = [Path(name) for name in "abc"]
    found = in_turns(paths, Plan(12, 5, 1, 0.0), backend=None, trust=False, progress=Silent())
    assert [{launch.median_ms for launch in side} for side in found] == [{1.0}, {2.0}, {3.0}]
    rounds = [told.launches[first : first + 3] for first in range(0, 36, 3)]
    assert all({name for name, *_ in round_} == set("abc") for round_ in rounds)
    assert all(len({seed for *_, seed in round_}) == 1 for round_ in rounds)
    assert {round_[0][0] for round_ in rounds} == set("abc")
    assert len({seed for *_, seed in told.launches}) == 12


def test_what_is_left_is_said_between_launches_and_nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    said: list[str] = []
    drawn: list[str] = []

    class Watched(Silent):
        @contextmanager
        def still(self) -> Iterator[Callable[[str], None]]:
            drawn.append("still")
            yield said.append
            drawn.append("drawn again")

    def launch_4_seconds(path: Path, **how: Any) -> Launch:
        assert drawn == ["still"]
        now[0] += 4.0
        return launched(1.0)

    monkeypatch.setattr(launching, "launch", launch_4_seconds)
    monkeypatch.setattr(launching, "time", SimpleNamespace(monotonic=lambda: now[0]))
    in_turns([Path("a"), Path("b")], Plan(5, 5, 1, 40.0), backend=None, trust=False, progress=Watched())
    assert said[:2] == ["5 launches of each in turns: about 40 s", "3 of 10 launches, about 28 s left"]
    assert len(said) == 4
    assert drawn == ["still", "drawn again"]


@pytest.mark.parametrize(
    ("latency_ms", "seconds", "expected"),
    [
        (0.01, 300.0, (20, 2000, 500)),  # fast: as many launches as are asked, and the most calls
        (10.0, 300.0, (20, 100, 25)),  # a second of calls in each launch
        (1000.0, 100.0, (12, 3, 1)),  # slow: as many launches as fit
        (60_000.0, 100.0, (FEWEST, 3, 1)),  # never fewer than can be judged
    ],
)
def test_a_plan_keeps_within_its_time_or_is_the_fewest(
    monkeypatch: pytest.MonkeyPatch, latency_ms: float, seconds: float, expected: Sequence[int]
) -> None:
    told = Told({"a": latency_ms})
    monkeypatch.setattr(launching, "launch", told)
    now = iter([0.0, 4 * latency_ms / 1e3 + 4.0])  # four calls, and four seconds around them
    monkeypatch.setattr(launching, "time", SimpleNamespace(monotonic=lambda: next(now)))
    found = plan([Path("a")], runs=20, seconds=seconds, backend=None, trust=False, progress=Silent())
    assert (found.runs, found.calls, found.warmup) == tuple(expected)
    assert found.seconds <= seconds or found.runs == FEWEST


class Nvml(ModuleType):
    """One GPU, on which two programs run; the numbers are bytes, as NVML gives them."""

    class NVMLError(Exception):
        pass

    def __init__(self, used: int | None) -> None:
        super().__init__("pynvml")
        self.used = used
        self.open = 0

    def nvmlInit(self) -> None:
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:
        program = type("Program", (), {})
        mine, other = program(), program()
        mine.pid, mine.usedGpuMemory = os.getpid(), self.used
        other.pid, other.usedGpuMemory = 1, 1 << 33
        return [mine, other]


def test_gpu_memory_is_that_of_the_process_alone_or_not_available() -> None:
    nvml = Nvml(300 << 20)
    assert process_memory_mib(os.getpid(), Sources(load=lambda _: nvml)) == 300.0
    assert nvml.open == 0
    assert process_memory_mib(2, Sources(load=lambda _: nvml)) is None
    assert process_memory_mib(os.getpid(), Sources(load=lambda _: Nvml(None))) is None
    assert process_memory_mib(os.getpid(), Sources(load=lambda _: None)) is None
