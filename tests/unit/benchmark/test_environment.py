"""What the machine says about itself, from trees of files as real machines have them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from vlaopt.benchmark.environment import (
    Environment,
    cpu_features,
    peak_memory_mib,
    read_activity,
    read_environment,
    usable_cores,
)
from vlaopt.machine.state import State

Tree = Callable[[Mapping[str, str]], Path]

XEON = {
    "proc/cpuinfo": "processor\t: 0\nmodel name\t: Intel(R) Xeon(R) Gold 6338 CPU @ 2.00GHz\n"
    "flags\t: fpu avx2 smep hypervisor\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "<unknown>\n",
    "proc/1/cgroup": "0::/kubepods/besteffort/pod1\n",
    "sys/fs/cgroup/cpu.max": "150000 100000\n",
}


def read(root: Path, architecture: str = "aarch64", gpu: str | None = None) -> Environment:
    return read_environment(root=root, system="Linux", architecture=architecture, gpu=gpu, libraries={"x": "1.0"})


def test_a_jetson_is_read(jetson: Path) -> None:
    machine = read(jetson, gpu="Orin")
    assert machine.model_dump(exclude={"python"}) == {
        "system": "Linux",
        "architecture": "aarch64",
        "cpu_model": "NVIDIA Jetson AGX Orin Developer Kit",
        "cpu_features": ("asimd", "asimddp", "bf16"),
        "physical_cores": 2,
        "logical_cores": 2,
        "affinity": "0-1",
        "cpu_quota": None,
        "governor": "performance",
        "frequency_mhz": 1190.4,
        "max_frequency_mhz": 2201.6,
        "load_average": (0.05, 0.1, 0.2),
        "memory_mib": 30720,
        "os": "Ubuntu 22.04.5 LTS",
        "kernel": "5.15.148-tegra",
        "container": None,
        "virtual": False,
        "libraries": {"x": "1.0"},
        "gpu": "Orin",
        "driver": None,
        "power_mode": None,
        "clocks_held": None,
        "locked": (),
        "clocks_mhz": {},
        "temperatures_c": {},
        "gpu_processes": None,
    }


def test_power_mode_and_driver_are_read_where_the_machine_has_them(tree: Tree) -> None:
    root = tree(
        {
            "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0",
            "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=MAXN >\n< POWER_MODEL ID=2 NAME=MODE_30W >\n",
            "var/lib/nvpmodel/status": "pmode:0002\n",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0\n",
        }
    )
    machine = read(root)
    assert (machine.power_mode, machine.driver) == ("MODE_30W", "540.4.0")
    tree({"var/lib/nvpmodel/status": "pmode:0000\n"})
    assert read(root).fingerprint() != machine.fingerprint()


def test_the_state_at_the_start_is_kept_and_only_what_lasts_makes_another_machine(jetson: Path) -> None:
    cool = State(clocks_mhz={"gpu0 sm": 210.0}, temperatures_c={"gpu0": 31.0}, held=False, gpu_processes=0)
    warm = replace(cool, clocks_mhz={"gpu0 sm": 1980.0}, temperatures_c={"gpu0": 77.0}, gpu_processes=3)
    before, after = (read_environment(root=jetson, state=state) for state in (cool, warm))
    assert (after.clocks_mhz, after.temperatures_c, after.gpu_processes) == ({"gpu0 sm": 1980.0}, {"gpu0": 77.0}, 3)
    assert after.fingerprint() == before.fingerprint()
    held = read_environment(root=jetson, state=replace(cool, held=True))
    locked = read_environment(root=jetson, state=cool, locked=("GPU 0 at 1980 MHz",))
    assert len({before.fingerprint(), held.fingerprint(), locked.fingerprint()}) == 3
    assert {machine.machine_key() for machine in (before, after, held, locked)} == {before.machine_key()}


def test_a_limited_container_on_a_virtual_machine_says_so(tree: Tree) -> None:
    machine = read(tree(XEON), "x86_64")
    assert (machine.container, machine.virtual, machine.cpu_quota) == ("kubepods", True, "150000 100000")
    assert (machine.cpu_features, machine.frequency_mhz) == (("avx2",), None)


def test_all_features_of_an_x86_cpu_are_read(tree: Tree, tmp_path: Path) -> None:
    assert cpu_features(tree(XEON)) == {"fpu", "avx2", "smep", "hypervisor"}
    assert cpu_features(tmp_path / "nowhere") == frozenset()


def test_all_features_of_an_arm_cpu_are_read(jetson: Path) -> None:
    assert {"asimd", "asimddp", "bf16"} <= cpu_features(jetson)


def test_a_machine_that_tells_nothing_is_not_available_and_not_an_error(tmp_path: Path) -> None:
    machine = read(tmp_path)
    assert (machine.cpu_model, machine.governor, machine.memory_mib, machine.load_average) == (None, None, None, None)
    assert peak_memory_mib(tmp_path) is None
    assert read_activity(tmp_path) is None


def test_cores_with_different_governors_are_not_called_locked(jetson: Path, tree: Tree) -> None:
    tree({"sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "schedutil\n"})
    assert read(jetson).governor == "performance+schedutil"


def test_a_governor_is_loose_unless_limits_hold_the_clocks(jetson: Path, tree: Tree) -> None:
    assert read(jetson).loose_governor() is None
    tree({"sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "schedutil\n"})
    assert read(jetson).loose_governor() == "performance+schedutil"
    assert read_environment(root=jetson, state=State(held=False)).loose_governor() == "performance+schedutil"
    assert read_environment(root=jetson, state=State(held=True)).loose_governor() is None


def test_load_and_momentary_frequency_do_not_make_another_machine_but_a_governor_does(jetson: Path, tree: Tree) -> None:
    before = read(jetson)
    tree({"proc/loadavg": "7 7 7 1/1 1\n", "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "729600\n"})
    assert read(jetson).fingerprint() == before.fingerprint()
    tree({"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n"})
    assert read(jetson).fingerprint() != before.fingerprint()


def test_the_machine_key_is_a_folder_name_of_the_class_of_machine(tree: Tree) -> None:
    machine = read(tree(XEON), "x86_64")
    key = machine.machine_key()
    assert key == "linux-x86_64-intel-xeon-gold-6338-1c-8c81f431"  # as in folders that were made before
    assert machine.model_copy(update={"kernel": "6.9", "governor": "powersave"}).machine_key() == key
    assert machine.model_copy(update={"cpu_features": ("avx2", "amx_int8")}).machine_key() != key
    with_gpu = machine.model_copy(update={"gpu": "NVIDIA RTX 6000 / Ada (48 GB)"}).machine_key()
    assert re.fullmatch(r"[A-Za-z0-9._-]+", with_gpu)
    assert "nvidia-rtx-6000" in with_gpu


def test_cpu_time_of_others_is_what_is_busy_and_not_ours(tree: Tree) -> None:
    stat = "cpu  {user} 0 100 1000 0 0 0 {steal} 0 0\ncpu0 1 2 3\n"
    own = "42 (a (odd) name) R 1 1 1 0 -1 0 0 0 0 0 {utime} 20 0 0 20 0\n"
    throttle = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    root = tree({"proc/stat": stat.format(user=0, steal=0), "proc/self/stat": own.format(utime=0), throttle: "3\n"})
    before = read_activity(root)
    tree({"proc/stat": stat.format(user=160, steal=40), "proc/self/stat": own.format(utime=100), throttle: "5\n"})
    after = read_activity(root)
    assert before is not None
    assert after is not None
    assert after.others_since(before) == pytest.approx(0.5)
    assert after.throttled - before.throttled == 2
    assert before.others_since(before) is None


def test_peak_memory_is_the_high_water_mark(jetson: Path) -> None:
    assert peak_memory_mib(jetson) == 512.0


def test_the_cores_a_process_may_use_are_physical_ones_and_no_more_than_it_is_allowed(
    jetson: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert usable_cores(jetson) == 2
    assert usable_cores(tmp_path / "nowhere") == 4
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1}, raising=False)
    assert usable_cores(jetson) == 1
