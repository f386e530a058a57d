"""What a machine's own files, commands and libraries say of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.machine.sampled import NAMES, sample
from vlaopt.machine import Gpu, Sources, read_machine
from vlaopt.machine.gpu import module_version, read_driver
from vlaopt.machine.jetson import CHIPS, jetpack, l4t, power_mode
from vlaopt.machine.libraries import cuda_version, read_tensorrt
from vlaopt.machine.packages import installed_packages, upstream, version_of
from vlaopt.machine.sources import import_library, run_command


def silent(root: Path, **given: Any) -> Sources:
    """A machine on which there is nothing but the files below `root`."""
    nothing: dict[str, Any] = {"run": lambda command: None, "installed": lambda name: None, "load": lambda name: None}
    nothing["variables"] = {}
    return Sources(root=root, **{**nothing, **given})


def write(root: Path, name: str, text: str) -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return root


def test_an_orin_with_jetpack_6() -> None:
    machine = sample("orin-jetpack6").machine
    assert (machine.board, machine.chip) == ("NVIDIA Jetson AGX Orin Developer Kit", "tegra234")
    assert (machine.l4t, machine.jetpack, machine.cuda) == ("36.4.3", "6.2", "12.6.11")
    assert (machine.power_mode, machine.power_modes[0]) == ("MODE_30W", "MAXN")
    assert machine.gpu == Gpu(name="Orin (nvgpu)", sm="8.7")
    assert (machine.driver.version, machine.driver.cuda) == ("540.4.0", "12.6")
    assert machine.tensorrt.model_dump() == {
        "system": "10.3.0.30",
        "python": "10.3.0",
        "rtx": None,
        "trtexec": "/usr/src/tensorrt/bin/trtexec",
        "trtexec_version": "10.3.0",
    }
    assert machine.memory_mib == 62841


def test_jetpack_7_is_told_by_jetson_linux_and_its_driver_by_nvidia_smi() -> None:
    machine = sample("orin-jetpack7").machine
    assert (machine.l4t, machine.jetpack) == ("39.2.0", "7.2")
    assert module_version(sample("orin-jetpack7").sources.root) is None  # the file says TempVersion
    assert machine.driver.version == "595.78"
    assert (machine.power_mode, machine.power_modes) == ("MAXN", {})
    assert (machine.tensorrt.trtexec, machine.tensorrt.trtexec_version) == ("trtexec", "10.16.2")


@pytest.mark.parametrize(
    ("revision", "release"),
    [
        ("R36 (release), REVISION: 3.0", "6.0"),
        ("R36 (release), REVISION: 5.0", "6.2.2"),
        ("R38 (release), REVISION: 2.1", "7.0"),
        ("R38 (release), REVISION: 2.2", "7.0"),
    ],
)
def test_without_packages_jetson_linux_tells_the_jetpack(tmp_path: Path, revision: str, release: str) -> None:
    write(tmp_path, "etc/nv_tegra_release", f"# {revision}, GCID: 1, BOARD: generic, EABI: aarch64")
    assert jetpack({}, l4t(tmp_path)) == release


def test_a_thor_and_its_compute_capability() -> None:
    machine = sample("thor").machine
    assert (machine.jetpack, machine.gpu) == ("7.0", Gpu(name="NVIDIA Thor", sm="11.0"))
    assert machine.tensorrt.system == "10.13.3.9"


def test_cards_of_their_own_memory() -> None:
    card = sample("x86-rtx4090").machine
    assert card.gpu == Gpu(name="NVIDIA GeForce RTX 4090", sm="8.9", memory_mib=24564, free_mib=22858)
    assert (card.is_jetson, card.tensorrt.rtx) == (False, "1.7.1.116")
    server = sample("h200-server").machine
    assert (len(server.driver.gpus), server.tensorrt.python) == (8, "11.4.0.9")
    assert server.providers[0] == "TensorrtExecutionProvider"


def test_a_machine_that_tells_nothing_is_not_available_and_not_an_error(tmp_path: Path) -> None:
    machine = read_machine(silent(tmp_path))
    assert (machine.gpu, machine.driver.version, machine.cuda, machine.jetpack) == (None, None, None, None)
    assert (machine.os, machine.kernel, machine.memory_mib, machine.libraries) == (None, None, None, {})


def test_files_that_are_folders_or_rubbish_are_not_available(tmp_path: Path) -> None:
    for name in ("etc/nv_tegra_release", "proc/meminfo", "var/lib/dpkg/status"):
        (tmp_path / name).mkdir(parents=True)
    write(tmp_path, "usr/local/cuda/version.json", "[1, 2]")
    write(tmp_path, "proc/device-tree/compatible", "\0\0")
    write(tmp_path, "proc/driver/nvidia/version", "NVRM version: none")
    machine = read_machine(silent(tmp_path, run=lambda command: "command not found\n,,,,\n"))
    assert (machine.l4t, machine.memory_mib, machine.cuda, machine.chip) == (None, None, None, None)
    assert (machine.gpu, machine.driver.version) == (None, None)


@pytest.mark.parametrize("name", NAMES)
def test_facts_are_json(name: str) -> None:
    facts = json.loads(json.dumps(sample(name).machine.to_json()))
    assert facts["architecture"] == sample(name).sources.architecture


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.216.03  Thu Apr  3 01:14:19 UTC 2025", "535.216.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  35.3.1  Release Build  (buildbrain)", "35.3.1"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  TempVersion  Release Build", None),
    ],
)
def test_the_driver_is_read_from_both_kernel_modules(tmp_path: Path, line: str, version: str | None) -> None:
    assert module_version(write(tmp_path, "proc/driver/nvidia/version", line + "\n")) == version


def test_a_driver_too_old_to_tell_the_compute_capability_is_asked_without(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> str | None:
        refused = command[0] != "nvidia-smi" or any("compute_cap" in word for word in command)
        return None if refused else "Tesla V100-SXM2-16GB, 16384, 16000, 470.82.01\n" if len(command) > 1 else ""

    driver = read_driver(silent(tmp_path, run=run))
    assert driver.gpus == (Gpu(name="Tesla V100-SXM2-16GB", memory_mib=16384, free_mib=16000),)
    assert (driver.version, driver.told_by) == ("470.82.01", "nvidia-smi")


class Nvml:
    """Enough of nvidia-ml-py; `silent` are the questions that this GPU does not answer."""

    class NVMLError(Exception):
        pass

    def __init__(self, *silent: str) -> None:
        self.silent = silent
        self.ended = 0

    def __getattr__(self, name: str) -> Any:
        answers: dict[str, Any] = {
            "nvmlInit": None,
            "nvmlDeviceGetCount": 1,
            "nvmlDeviceGetHandleByIndex": "handle",
            "nvmlDeviceGetName": b"NVIDIA H200",
            "nvmlDeviceGetCudaComputeCapability": (9, 0),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=143771 << 20, free=143139 << 20),
            "nvmlSystemGetDriverVersion": "580.95.05",
            "nvmlSystemGetCudaDriverVersion": 13000,
        }

        def answer(*arguments: Any) -> Any:
            if name == "nvmlShutdown":
                self.ended += 1
                return None
            if name in self.silent:
                raise self.NVMLError
            return answers[name]

        return answer


def test_nvml_is_asked_first_and_left_closed(tmp_path: Path) -> None:
    nvml = Nvml()
    driver = read_driver(silent(tmp_path, load={"pynvml": nvml}.get))
    assert driver.gpus == (Gpu(name="NVIDIA H200", sm="9.0", memory_mib=143771, free_mib=143139),)
    assert (driver.version, driver.cuda, driver.told_by) == ("580.95.05", "13.0", "NVML")
    assert nvml.ended == 1


def test_what_nvml_does_not_answer_is_not_available(tmp_path: Path) -> None:
    nvml = Nvml("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetCudaComputeCapability", "nvmlSystemGetDriverVersion")
    write(tmp_path, "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\n")
    driver = read_driver(silent(tmp_path, load={"pynvml": nvml}.get))
    assert driver.gpus == (Gpu(name="NVIDIA H200"),)
    assert driver.version == "580.65.06"


def test_without_nvml_and_nvidia_smi_the_device_tree_names_the_gpu(tmp_path: Path) -> None:
    write(tmp_path, "proc/device-tree/compatible", "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0")
    driver = read_driver(silent(tmp_path, load={"pynvml": Nvml("nvmlInit")}.get))
    assert driver.gpus == (Gpu(name="Orin", sm="8.7"),)
    assert set(CHIPS) == {"tegra194", "tegra234", "tegra264"}


def test_the_power_mode_is_asked_for_where_its_file_is_not_there(tmp_path: Path) -> None:
    def run(command: Sequence[str]) -> str | None:
        return "NV Power Mode: MAXN_SUPER\n2\n" if command == ["nvpmodel", "-q"] else None

    assert power_mode(silent(tmp_path, run=run)) == "MAXN_SUPER"
    assert power_mode(silent(tmp_path)) is None


def test_packages_that_were_removed_do_not_count(tmp_path: Path) -> None:
    status = "Package: nvidia-jetpack\nStatus: deinstall ok config-files\nVersion: 6.1+b123\n\n"
    status += "Package: libnvinfer8\nStatus: install ok installed\nVersion: 8.6.2.3-1+cuda12.2\n\n"
    status += "Package: libnvinfer10\nStatus: install ok installed\nVersion: 1:10.3.0.30-1+cuda12.5\n"
    packages = installed_packages(write(tmp_path, "var/lib/dpkg/status", status))
    assert packages == {"libnvinfer8": "8.6.2.3-1+cuda12.2", "libnvinfer10": "1:10.3.0.30-1+cuda12.5"}
    assert version_of(packages, r"libnvinfer\d+") == "10.3.0.30"
    assert [upstream(version) for version in ("6.2+b77", "7.0-b128", "2.1~rc1")] == ["6.2", "7.0", "2.1"]


def test_libraries_without_packages_are_found_by_their_files(tmp_path: Path) -> None:
    for name in ("libnvinfer.so.10", "libnvinfer.so.10.13.3", "libnvinfer.so.9.9.9"):
        write(tmp_path, f"usr/lib/aarch64-linux-gnu/{name}", "")
    write(tmp_path, "usr/local/cuda/lib64/libcudart.so.13.0.48", "")
    write(tmp_path, "usr/src/tensorrt/bin/trtexec", "")
    found = read_tensorrt(silent(tmp_path), {})
    assert (found.system, found.trtexec, found.trtexec_version) == ("10.13.3", "/usr/src/tensorrt/bin/trtexec", None)
    assert cuda_version(tmp_path, {}) == "13.0.48"


def test_trtexec_that_is_named_is_the_only_one_asked(tmp_path: Path) -> None:
    asked = []

    def run(command: Sequence[str]) -> str | None:
        asked.append(command[0])
        return "&&&& RUNNING TensorRT.trtexec [TensorRT v110100] [b3] # trtexec --help\n"

    found = read_tensorrt(silent(tmp_path, run=run, variables={"VLAOPT_TRTEXEC": "/opt/tensorrt/trtexec"}), {})
    assert (found.trtexec, found.trtexec_version) == ("/opt/tensorrt/trtexec", "11.1.0")
    assert asked == ["/opt/tensorrt/trtexec"]


def test_a_command_that_is_missing_or_fails_gives_nothing() -> None:
    assert run_command(["a-command-that-nobody-has"]) is None
    assert run_command([sys.executable, "-c", "print('out'); raise SystemExit(3)"]) is None
    assert run_command([sys.executable, "-c", "print('out')"]) == "out\n"


def test_a_library_that_breaks_while_it_is_imported_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "breaks_at_import.py", "raise AttributeError('built for another numpy')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert import_library("breaks_at_import") is None
    assert import_library("json") is json
