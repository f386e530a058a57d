"""A clock that moves only when told, a policy of known latency, and a machine made of files and told states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlaopt.benchmark.measure import Call, measure
from vlaopt.benchmark.record import BenchRecord, BenchSettings
from vlaopt.benchmark.sampling import Sampler
from vlaopt.machine.state import State

OBSERVATIONS = [{"state": np.full(4, index, np.float32)} for index in range(8)]
CHUNKS: list[np.ndarray] = [np.full((10, 4), index, np.float32) for index in range(8)]

JETSON = {
    "proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd asimddp bf16\n\nprocessor\t: 1\nFeatures\t: fp asimd\n",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/loadavg": "0.05 0.10 0.20 1/300 4242\n",
    "proc/meminfo": "MemTotal:       31457280 kB\nMemFree: 1 kB\n",
    "proc/self/status": "Name:\tpython\nVmHWM:\t  524288 kB\nCpus_allowed_list:\t0-1\n",
    "proc/sys/kernel/osrelease": "5.15.148-tegra\n",
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "performance\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1190400\n",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "2201600\n",
    "sys/devices/system/cpu/cpu0/topology/core_id": "0\n",
    "sys/devices/system/cpu/cpu0/topology/physical_package_id": "0\n",
    "sys/devices/system/cpu/cpu1/topology/core_id": "1\n",
    "sys/devices/system/cpu/cpu1/topology/physical_package_id": "0\n",
}


class FakeClock:
    """Stands still until a policy works or a schedule sleeps. Waking takes `wake_up_ns` longer than asked."""

    def __init__(self, wake_up_ns: int = 0) -> None:
        self.time_ns = 10**9
        self.wake_up_ns = wake_up_ns

    def now_ns(self) -> int:
        return self.time_ns

    def sleep_until(self, moment_ns: int) -> None:
        self.time_ns = max(self.time_ns, moment_ns) + self.wake_up_ns

    def work(self, milliseconds: float) -> None:
        self.time_ns += round(milliseconds * 1e6)


class FakePolicy:
    """Gives the expected chunk of each observation; its n-th call (from 0) takes `latency_ms(n)`."""

    def __init__(self, clock: FakeClock, latency_ms: Callable[[int], float]) -> None:
        self.clock = clock
        self.latency_ms = latency_ms
        self.count = 0
        self.seen: list[int] = []

    def __call__(self, observation: Mapping[str, Any]) -> np.ndarray:
        self.clock.work(self.latency_ms(self.count))
        self.count += 1
        index = int(observation["state"][0])
        self.seen.append(index)
        chunk: np.ndarray = CHUNKS[index].copy()
        return chunk


class FakeSampler(Sampler):
    """Reads a state told by the time in s, at each half second of the fake clock that has passed and when asked."""

    def __init__(self, clock: FakeClock, state: Callable[[float], State]) -> None:
        super().__init__(period_s=0.5)
        self.clock = clock
        self.state = state
        self.missing = {"energy_j": "no RAPL counters"}
        self.reader: int | None = None

    @property
    def processes(self) -> tuple[int, ...]:
        return () if self.reader is None else (self.reader,)

    def read(self) -> None:
        now_ns = self.clock.now_ns()
        last_ns = self.states[-1][0] if self.states else now_ns
        moments_ns = [*range(last_ns + 500_000_000, now_ns, 500_000_000), now_ns]
        self.states += [(moment_ns, self.state(moment_ns / 1e9)) for moment_ns in moments_ns]


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def policy(clock: FakeClock) -> Callable[[Callable[[int], float]], FakePolicy]:
    """Makes a policy from the law of its latencies."""
    return lambda latency_ms: FakePolicy(clock, latency_ms)


@pytest.fixture
def sampler(clock: FakeClock) -> FakeSampler:
    """A sampler on the fake clock whose machine tells nothing; give it another `state`."""
    return FakeSampler(clock, lambda seconds: State())


@pytest.fixture
def tree(tmp_path: Path) -> Callable[[Mapping[str, str]], Path]:
    """Writes files below a root, over those already there, and gives the root."""

    def write(files: Mapping[str, str]) -> Path:
        for name, text in files.items():
            path = tmp_path / "root" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "root"

    return write


@pytest.fixture
def jetson(tree: Callable[[Mapping[str, str]], Path]) -> Path:
    """The root of a quiet two-core machine whose clocks are locked."""
    return tree(JETSON)


@pytest.fixture
def bench(clock: FakeClock, sampler: FakeSampler, jetson: Path) -> Callable[..., BenchRecord]:
    """Measures a call on the quiet machine; keywords as of `measure`, with the expected chunks given by default."""

    def run(call: Call, **settings: Any) -> BenchRecord:
        given = {
            "expected": CHUNKS,
            "tolerance": 0.01,
            "settings": BenchSettings(),
            "sampler": sampler,
            **settings,
        }
        return measure(call, given.pop("observations", OBSERVATIONS), clock=clock, root=jetson, **given)

    return run
