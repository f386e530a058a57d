"""All probes as one state; one that fails takes nothing from the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.unit.machine.sampled import NAMES, sample
from vlaopt.machine import Sources
from vlaopt.machine.state import Silent, State
from vlaopt.machine.state import probes as probes_module
from vlaopt.machine.state.probes import merged, missing, open_probes


class Fixed:
    """A probe that reads always the same, or raises that."""

    board: tuple[str, ...] = ()
    missing: Mapping[str, str] = {}

    def __init__(self, state: State | Exception, name: str = "fixed") -> None:
        self.name = name
        self.state = state

    def read(self) -> State:
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    def close(self) -> None: ...


def test_states_are_put_together() -> None:
    cpu = State(clocks_mhz={"cpu": 3000.0}, energy_j={"package-0": 1.5}, throttling=("CPU too hot",), held=True)
    gpu = State(clocks_mhz={"gpu0 sm": 1980.0}, power_w={"gpu0": 90.0}, gpu_processes=0, gpu_memory_mib=512.0)
    assert merged([Fixed(cpu), Fixed(gpu)]) == State(
        clocks_mhz={"cpu": 3000.0, "gpu0 sm": 1980.0},
        power_w={"gpu0": 90.0},
        energy_j={"package-0": 1.5},
        throttling=("CPU too hot",),
        held=True,
        gpu_processes=0,
        gpu_memory_mib=512.0,
    )


@pytest.mark.parametrize(
    ("told", "held"),
    [((), None), ((None,), None), ((True, None), True), ((True, True), True), ((True, False, None), False)],
)
def test_clocks_are_held_where_all_that_tell_say_so(told: tuple[bool | None, ...], held: bool | None) -> None:
    assert merged([Fixed(State(held=one)) for one in told]).held is held


def test_a_probe_that_cannot_be_read_is_left_out_this_time() -> None:
    broken = Fixed(OSError("the bus is busy"))
    assert merged([broken, Fixed(State(temperatures_c={"cpu": 40.0}))]) == State(temperatures_c={"cpu": 40.0})
    broken.state = State(temperatures_c={"gpu": 50.0})
    assert merged([broken]) == State(temperatures_c={"gpu": 50.0})


def test_a_probe_that_cannot_be_opened_says_why_and_the_others_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(sources: Sources) -> Fixed:
        raise RuntimeError("driver and library differ")

    monkeypatch.setattr(probes_module, "open_nvml", breaks)
    (tmp_path / "sys/devices/system/cpu").mkdir(parents=True)
    cpu, nvml = open_probes(Sources(root=tmp_path, load=lambda name: None, variables={}))
    assert cpu.name == "cpu"
    assert nvml == Silent("nvml", {"energy_j": "nvml cannot be asked: driver and library differ"})


@pytest.mark.parametrize("name", NAMES)
def test_no_name_is_told_twice_on_a_sampled_machine(name: str) -> None:
    probes = open_probes(sample(name).sources)
    states = [probe.read() for probe in probes]
    for field in ("clocks_mhz", "temperatures_c", "power_w", "energy_j"):
        names = [label for state in states for label in getattr(state, field)]
        assert len(names) == len(set(names))
    whole = merged(probes)
    assert {label for probe in probes for label in probe.board} <= {*whole.power_w, *whole.energy_j}


def test_reasons_of_several_probes_are_all_told() -> None:
    probes = [
        Silent("a", {"energy_j": "no counters"}),
        Silent("b", {"energy_j": "no rails", "clocks_mhz": "no clocks"}),
    ]
    assert missing(probes) == {"energy_j": "no counters; no rails", "clocks_mhz": "no clocks"}
