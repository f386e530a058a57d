"""The files of a Jetson tell its power, clocks, temperatures and throttling, in W, MHz, °C and words."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.machine.sampled import SAMPLES, sample
from vlaopt.benchmark.energy import joules
from vlaopt.machine import Sources
from vlaopt.machine.state import Probe
from vlaopt.machine.state.jetson import open_jetson
from vlaopt.machine.state.probes import merged, open_probes
from vlaopt.machine.state.rails import FED_BY_ANOTHER, TOTALS, board_of
from vlaopt.machine.state.sysfs import read_number

LABELS = st.lists(st.sampled_from(("VIN", "VDD_IN", "VDD_GPU", "VIN_SYS_5V0", *FED_BY_ANOTHER)), unique=True)


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    return _copied("orin-jetpack6", tmp_path)


@pytest.fixture
def thor(tmp_path: Path) -> Path:
    return _copied("thor", tmp_path)


def test_an_agx_orin_is_the_sum_of_its_rails_but_its_memory_which_another_rail_feeds() -> None:
    probe = _opened(sample("orin-jetpack6").sources.root)
    assert probe.read().power_w == {
        "VDD_GPU_SOC": pytest.approx(12.008 * 0.280),
        "VDD_CPU_CV": pytest.approx(12.008 * 0.040),
        "VIN_SYS_5V0": pytest.approx(4.968 * 0.980),
        "VDDQ_VDD2_1V8AO": pytest.approx(4.968 * 0.080),
    }
    assert probe.board == ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0")


def test_a_thor_is_what_its_carrier_takes() -> None:
    probe = _opened(sample("thor").sources.root)
    assert probe.read().power_w == {
        "VDD_GPU": pytest.approx(19.864 * 0.020),
        "VDD_CPU_SOC_MSS": pytest.approx(19.856 * 0.300),
        "VIN_SYS_5V0": pytest.approx(5.088 * 1.740),
        "VIN": pytest.approx(20.986),
    }
    assert probe.board == ("VIN",)


def test_an_orin_nano_is_vdd_in(tmp_path: Path) -> None:
    monitor = tmp_path / "sys/class/hwmon/hwmon1"
    rails = {"VDD_IN": (5016, 2400), "VDD_CPU_GPU_CV": (5008, 496), "VDD_SOC": (5008, 480)}
    _write(monitor / "name", "ina3221")
    for channel, (label, (millivolts, milliamperes)) in enumerate(rails.items(), start=1):
        _write(monitor / f"in{channel}_label", label)
        _write(monitor / f"in{channel}_input", millivolts)
        _write(monitor / f"curr{channel}_input", milliamperes)
    _write(tmp_path / "sys/class/devfreq/17000000.gpu/cur_freq", 1_020_000_000)
    probe = _opened(tmp_path)
    assert probe.board == ("VDD_IN",)
    assert probe.read().power_w["VDD_IN"] == pytest.approx(12.0384)


@given(LABELS)
def test_a_board_counts_each_part_once(labels: list[str]) -> None:
    board = board_of(labels)
    assert set(board) <= set(labels)
    assert not set(board) & set(FED_BY_ANOTHER)
    assert len(board) == 1 or not set(board) & set(TOTALS)


def test_zones_whose_unit_is_off_are_left_out(orin: Path) -> None:
    _write(orin / "sys/class/thermal/thermal_zone1/temp", -256_000)
    temperatures = _opened(orin).read().temperatures_c
    assert temperatures["tj-thermal"] == 47.5
    assert temperatures["tdiode-thermal"] == 39.75
    assert not {"cv0-thermal", "gpu-thermal"} & set(temperatures)


def test_clocks_are_in_mhz_and_that_of_a_gpu_that_is_off_is_left_out(thor: Path) -> None:
    probe = _opened(thor)
    assert probe.read().clocks_mhz == {"gpu-gpc-0": 1575.0, "emc": 4266.0}
    _write(thor / "sys/class/devfreq/gpu-gpc-0/cur_freq", 0)
    assert probe.read().clocks_mhz == {"emc": 4266.0}


def test_the_clock_of_the_memory_of_an_orin_is_told_to_root(orin: Path) -> None:
    assert "EMC" in _opened(orin).missing["clocks_mhz"]
    _write(orin / "sys/kernel/debug/bpmp/debug/clk/emc/rate", 3_199_000_000)
    probe = _opened(orin)
    assert probe.read().clocks_mhz == {"17000000.gpu": 306.0, "emc": 3199.0}
    assert probe.missing == {}


def test_clocks_are_held_where_the_gpu_may_run_at_one_only_or_stays_at_its_highest(orin: Path) -> None:
    probe = _opened(orin)
    assert probe.read().held is False
    _write(orin / "sys/class/devfreq/17000000.gpu/min_freq", 1_300_500_000)
    assert probe.read().held is True
    _write(orin / "sys/class/devfreq/17000000.gpu/min_freq", 306_000_000)
    _write(orin / "sys/class/devfreq/17000000.gpu/governor", "performance")
    assert probe.read().held is True
    shutil.rmtree(orin / "sys/class/devfreq")
    assert probe.read().held is None


def test_a_cooling_device_at_work_is_throttling_and_a_fan_is_not(thor: Path) -> None:
    probe = _opened(thor)
    assert probe.read().throttling == ()
    _write(thor / "sys/class/thermal/cooling_device9/cur_state", 1)
    _write(thor / "sys/class/thermal/cooling_device7/cur_state", 4)
    assert probe.read().throttling == ("temperature (gpu-throttle-alert)",)


def test_alarms_since_the_reading_before_are_throttling(thor: Path) -> None:
    alarms = thor / "sys/class/hwmon/hwmon6"
    probe = _opened(thor)
    assert probe.read().throttling == (), "the one alarm of oc3 came before the probe was opened"
    _write(alarms / "oc1_event_cnt", 1)  # not enabled: takes no clocks away
    _write(alarms / "oc3_event_cnt", 180)
    assert probe.read().throttling == ("electrical limit (oc3)",)
    assert probe.read().throttling == ()


def test_a_reading_asks_each_i2c_register_once(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = _opened(sample("orin-jetpack6").sources.root)
    asked: list[str] = []
    opened = os.open

    def noted(path: Path, flags: int) -> int:
        asked.append(str(path))
        return opened(path, flags)

    monkeypatch.setattr(os, "open", noted)
    probe.read()
    assert len(asked) == len(set(asked)) == 37
    assert sum("/hwmon3/" in path or "/hwmon4/" in path for path in asked) == 2 * 4


def test_a_sensor_that_says_try_again_is_left_out_at_once(thor: Path) -> None:
    current = thor / "sys/class/hwmon/hwmon5/curr1_input"
    current.unlink()
    os.mkfifo(current)
    writer = os.open(current, os.O_RDWR)  # a pipe that somebody may still write to answers EAGAIN
    try:
        assert set(_opened(thor).read().power_w) == {"VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"}
    finally:
        os.close(writer)


def test_files_that_fail_or_vanish_are_left_out(thor: Path) -> None:
    probe = _opened(thor)
    before = probe.read()
    zone = thor / "sys/class/thermal/thermal_zone0/temp"
    zone.unlink()
    zone.symlink_to("/proc/self/mem")  # opens, and fails to be read
    _write(thor / "sys/class/thermal/thermal_zone2/temp", "")
    shutil.rmtree(thor / "sys/class/hwmon/hwmon4")
    after = probe.read()
    assert set(before.temperatures_c) - set(after.temperatures_c) == {"tj-thermal", "cpu-thermal"}
    assert set(before.power_w) - set(after.power_w) == {"VIN"}
    shutil.rmtree(thor / "sys")
    assert probe.read() == type(after)()


@pytest.mark.parametrize("text", ["", "n/a", "1.5", "\0"])
def test_what_is_no_whole_number_is_none(tmp_path: Path, text: str) -> None:
    _write(tmp_path / "number", text)
    assert read_number(tmp_path / "number") is None
    assert read_number(tmp_path) is None


def test_a_jetson_without_a_power_monitor_says_so() -> None:
    probe = _opened(sample("orin-jetpack7").sources.root)
    assert probe.board == ()
    assert "INA3221" in probe.missing["energy_j"]


@pytest.mark.parametrize("name", ["cpu-only", "h200-server", "x86-rtx4090"])
def test_another_machine_has_no_such_probe(name: str) -> None:
    assert open_jetson(sample(name).sources) is None


@pytest.mark.parametrize("name", ["orin-jetpack6", "thor"])
def test_the_probes_of_a_jetson_tell_its_power_clocks_and_temperatures(name: str) -> None:
    probes = open_probes(sample(name).sources)
    state = merged(probes)
    board = [part for probe in probes for part in probe.board]
    assert board == list(_opened(sample(name).sources.root).board), "no other probe counts a part of the board again"
    assert all(state.power_w[part] > 0 for part in board)
    assert {"cpu", "emc" if name == "thor" else "17000000.gpu"} <= set(state.clocks_mhz)
    assert "tj-thermal" in state.temperatures_c
    assert state.held is (name == "thor")


@pytest.mark.parametrize(("name", "watts"), [("orin-jetpack6", 3.36224 + 0.48032 + 4.86864), ("thor", 20.986)])
def test_two_seconds_of_a_board_are_its_energy(name: str, watts: float) -> None:
    probes = open_probes(sample(name).sources)
    readings = [(second * 10**9, merged(probes)) for second in (5, 6, 7)]
    spent = joules(readings, [part for probe in probes for part in probe.board])
    assert isinstance(spent, dict)
    assert sum(spent.values()) == pytest.approx(2 * watts)


def test_a_container_without_a_device_tree_is_on_a_jetson_whose_gpu_is_counted_once(thor: Path) -> None:
    shutil.rmtree(thor / "proc")
    (thor / "etc/nv_tegra_release").unlink()
    libraries: dict[str, Any] = {"pynvml": _Nvml()}
    probes = open_probes(Sources(root=thor, load=libraries.get, variables={}))
    assert [(probe.name, probe.board) for probe in probes] == [("jetson", ("VIN",)), ("cpu", ()), ("nvml", ())]
    assert merged(probes).power_w["gpu0"] == 12.5, "told, and counted with VIN"


class _Nvml:
    """nvidia-ml-py where it tells nothing but the power of a Thor's GPU."""

    NVMLError = RuntimeError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def nvmlInit(self) -> None: ...

    def nvmlShutdown(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return 12_500


def _copied(name: str, folder: Path) -> Path:
    return Path(shutil.copytree(SAMPLES / name / "root", folder / "root"))


def _opened(root: Path) -> Probe:
    probe = open_jetson(Sources(root=root, load=lambda _: None))
    assert probe is not None
    return probe


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{value}\n" if value != "" else "")
