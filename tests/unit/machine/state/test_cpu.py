"""The CPUs by Linux' files: MHz, °C, joules since opening, and reasons."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.machine import Sources
from vlaopt.machine.state.cpu import CpuProbe, open_cpu

POLICY = "sys/devices/system/cpu/cpufreq/policy{}/{}"
ZONE = "sys/class/powercap/intel-rapl:{}/{}"
THROTTLED = "sys/devices/system/cpu/cpu{}/thermal_throttle/{}_throttle_count"
RANGE_UJ = 65_532_610_987
"""Of a Xeon: `max_energy_range_uj` of its package."""


class Machine:
    """Files below a root, and a clock that is set."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.now_s = 0.0
        (root / "sys/devices/system/cpu").mkdir(parents=True)

    def write(self, files: Mapping[str, object]) -> None:
        for name, value in files.items():
            path = self.root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")

    def with_policies(
        self, *frequencies_khz: int, highest_khz: int = 3_800_000, governor: str = "powersave"
    ) -> Machine:
        for number, khz in enumerate(frequencies_khz):
            told = {"scaling_cur_freq": khz, "cpuinfo_max_freq": highest_khz, "scaling_governor": governor}
            self.write({POLICY.format(number, name): value for name, value in told.items()})
        return self

    def with_package(self, number: int, energy_uj: int) -> Machine:
        told = {"name": f"package-{number}", "energy_uj": energy_uj, "max_energy_range_uj": RANGE_UJ}
        self.write({ZONE.format(number, name): value for name, value in told.items()})
        return self

    def opened(self) -> CpuProbe:
        probe = open_cpu(Sources(root=self.root), clock=lambda: self.now_s)
        assert probe is not None
        return probe


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_frequency_is_that_of_the_fastest_cpu_in_mhz(machine: Machine) -> None:
    assert machine.with_policies(1_200_000, 3_512_345, 800_000).opened().read().clocks_mhz == {"cpu": 3512.345}


def test_cpus_of_two_kinds_are_told_apart_by_their_highest_frequency(machine: Machine) -> None:
    machine.with_policies(2_000_000, 2_100_000)
    machine.write({POLICY.format(1, "cpuinfo_max_freq"): 4_300_000})
    assert machine.opened().read().clocks_mhz == {"cpu-3800": 2000.0, "cpu-4300": 2100.0}


def test_a_frequency_that_is_not_told_is_left_out_and_no_cpufreq_is_a_reason(machine: Machine) -> None:
    without = machine.opened()
    assert without.missing["clocks_mhz"] == "no cpufreq"
    assert (without.read().clocks_mhz, without.read().held) == ({}, None)
    probe = machine.with_policies(1_200_000).opened()
    machine.write({POLICY.format(0, "scaling_cur_freq"): "<unknown>"})
    assert probe.read().clocks_mhz == {}


def test_clocks_are_held_by_the_governor_or_by_limits_of_every_cpu(machine: Machine) -> None:
    probe = machine.with_policies(1_200_000, 1_200_000, governor="performance").opened()
    assert probe.read().held is True
    machine.write({POLICY.format(1, "scaling_governor"): "schedutil"})
    assert probe.read().held is False
    machine.write({POLICY.format(1, "scaling_min_freq"): 2_201_600, POLICY.format(1, "scaling_max_freq"): 2_201_600})
    assert probe.read().held is True  # as jetson_clocks leaves it
    machine.write({POLICY.format(1, "scaling_min_freq"): 729_600})
    assert probe.read().held is False


@pytest.mark.parametrize("scope", ["core", "package"])
def test_throttling_is_told_while_its_count_grows(machine: Machine, scope: str) -> None:
    machine.write({THROTTLED.format(0, scope): 7, THROTTLED.format(1, scope): 0})
    probe = machine.opened()
    assert probe.read().throttling == ()
    machine.write({THROTTLED.format(1, scope): 1})
    assert [probe.read().throttling, probe.read().throttling] == [("CPU too hot",), ()]


def test_temperatures_are_the_packages_of_each_socket_and_not_each_core(machine: Machine) -> None:
    sensors = {"hwmon3": ("coretemp", 51_000), "hwmon4": ("coretemp", 48_500), "hwmon9": ("nvme", 33_000)}
    for folder, (driver, millis) in sensors.items():
        told = {"name": driver, "temp1_input": millis, "temp1_label": "Package id 0"}
        told |= {"temp2_input": 47_000, "temp2_label": "Core 0"}
        machine.write({f"sys/class/hwmon/{folder}/{name}": value for name, value in told.items()})
    machine.write({"sys/class/thermal/thermal_zone0/type": "acpitz", "sys/class/thermal/thermal_zone0/temp": 27_800})
    assert machine.opened().read().temperatures_c == {
        "coretemp Package id 0": 51.0,
        "coretemp Package id 0 #2": 48.5,
    }


def test_an_amd_cpu_tells_its_own_labels_and_a_sensor_without_one_its_number(machine: Machine) -> None:
    told = {"name": "k10temp", "temp1_input": 45_125, "temp1_label": "Tctl", "temp3_input": 40_000}
    machine.write({f"sys/class/hwmon/hwmon0/{name}": value for name, value in told.items()})
    assert machine.opened().read().temperatures_c == {"k10temp Tctl": 45.125, "k10temp temp3": 40.0}


def test_zones_are_read_where_the_cpu_has_no_sensor_but_not_those_of_a_jetson(machine: Machine) -> None:
    zone = {"type": "cpu-thermal", "temp": -1_500}
    machine.write({f"sys/class/thermal/thermal_zone0/{name}": value for name, value in zone.items()})
    assert machine.opened().read().temperatures_c == {"cpu-thermal": -1.5}
    machine.write({"proc/device-tree/compatible": "nvidia,tegra234"})
    assert machine.opened().read().temperatures_c == {}
    assert "energy_j" not in machine.opened().missing  # its rails count the CPUs


def test_a_sensor_that_goes_away_ends_nothing(machine: Machine) -> None:
    machine.with_policies(1_200_000).with_package(0, 5)
    told = {"name": "k10temp", "temp1_input": 45_000, "temp1_label": "Tctl"}
    machine.write({f"sys/class/hwmon/hwmon0/{name}": value for name, value in told.items()})
    probe = machine.opened()
    for name in (
        "sys/class/hwmon/hwmon0/temp1_input",
        POLICY.format(0, "scaling_cur_freq"),
        ZONE.format(0, "energy_uj"),
    ):
        (machine.root / name).unlink()
    state = probe.read()
    assert (state.temperatures_c, state.clocks_mhz, state.energy_j) == ({}, {}, {})


def test_energy_is_that_of_the_packages_and_of_nothing_twice(machine: Machine) -> None:
    machine.with_package(0, 9_000_000).with_package(1, 0)
    for zone, name in {"0:0": "core", "0:1": "dram", "2": "psys"}.items():
        told = {"name": name, "energy_uj": 5, "max_energy_range_uj": RANGE_UJ}
        machine.write({ZONE.format(zone, file): value for file, value in told.items()})
    probe = machine.opened()
    assert (probe.board, "energy_j" in probe.missing) == (("package-0", "package-1"), False)
    assert probe.read().energy_j == {"package-0": 0.0, "package-1": 0.0}
    machine.write({ZONE.format(0, "energy_uj"): 11_500_000, ZONE.format("0:0", "energy_uj"): 99})
    assert probe.read().energy_j == {"package-0": 2.5, "package-1": 0.0}


@given(
    start=st.integers(0, RANGE_UJ),
    steps=st.lists(st.integers(0, RANGE_UJ), max_size=6),
)
def test_a_counter_that_wraps_goes_on(start: int, steps: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    machine = Machine(tmp_path_factory.mktemp("root")).with_package(0, start)
    probe, spent_uj = machine.opened(), 0
    for step_uj in steps:
        spent_uj += step_uj
        machine.with_package(0, (start + spent_uj) % (RANGE_UJ + 1))
        assert probe.read().energy_j == {"package-0": spent_uj / 1e6}


def test_a_counter_that_may_have_wrapped_twice_tells_nothing_any_more(machine: Machine) -> None:
    probe = machine.with_package(0, 0).opened()
    machine.now_s = 65.0
    assert probe.read().energy_j == {"package-0": 0.0}
    machine.now_s += 66.0  # 1 kW for that long is more than the range
    assert probe.read().energy_j == {}
    machine.now_s += 1.0
    assert probe.read().energy_j == {}


def test_why_there_is_no_energy_is_said(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.opened().missing["energy_j"] == "no RAPL counters"
    machine.with_package(0, 5)
    (machine.root / ZONE.format(0, "max_energy_range_uj")).unlink()
    assert machine.opened().missing["energy_j"] == "RAPL counters cannot be read: No such file or directory"
    read = Path.read_text

    def denied(path: Path, *arguments: str, **named: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *arguments, **named)

    machine.with_package(0, 5)
    monkeypatch.setattr(Path, "read_text", denied)
    probe = machine.opened()
    assert probe.missing["energy_j"] == "RAPL counters cannot be read: Permission denied"
    assert (probe.board, probe.read().energy_j) == ((), {})


def test_without_linux_there_is_no_probe(tmp_path: Path) -> None:
    assert open_cpu(Sources(root=tmp_path)) is None
