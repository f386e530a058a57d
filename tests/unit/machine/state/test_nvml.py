"""An NVIDIA GPU by NVML: MHz, °C, W, J, MiB, and words for the bits; what it does not answer is left out."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlaopt.machine import Sources
from vlaopt.machine.state import State
from vlaopt.machine.state.nvml import THROTTLING, open_nvml, visible_gpu

pynvml = pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")

FIRST_NAMESPACE = "pid:[4026531836]"
OTHER = 4_194_303
"""A process number that is neither this process's nor its parent's: the highest that Linux gives."""


class Nvml:
    """A GPU behind the names of nvidia-ml-py, as an H200 answers them; a name that the library has not is an error."""

    NVMLError = pynvml.NVMLError
    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM
    NVML_CLOCK_MEM = pynvml.NVML_CLOCK_MEM
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(self, *silent: str, **answers: Any) -> None:
        self.silent = silent
        self.opened = 0
        self.answers: dict[str, Any] = {
            "nvmlDeviceGetTemperature": 41,
            "nvmlDeviceGetPowerUsage": 118_250,
            "nvmlDeviceGetTotalEnergyConsumption": 90_071_992_547,
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=143_771 << 20, free=143_259 << 20, used=512 << 20),
            "nvmlDeviceGetCurrentClocksEventReasons": 0,
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0,
            "nvmlDeviceGetComputeRunningProcesses": [],
            **answers,
        }
        assert all(hasattr(pynvml, name) for name in (*self.answers, *silent))

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        if index > 3:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return f"gpu {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {pynvml.NVML_CLOCK_SM: 1980, pynvml.NVML_CLOCK_MEM: 3201}[kind]

    def __getattr__(self, name: str) -> Any:
        if name not in self.answers:
            raise AttributeError(name)

        def answer(*arguments: Any) -> Any:
            if name in self.silent:
                raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
            return self.answers[name]

        return answer


def sources(root: Path, nvml: Any, **variables: str) -> Sources:
    return Sources(root=root, run=lambda command: None, load={"pynvml": nvml}.get, variables=variables)


def state(root: Path, nvml: Nvml) -> State:
    probe = open_nvml(sources(root, nvml))
    assert probe is not None
    return probe.read()


@pytest.fixture
def numbered(tmp_path: Path) -> Path:
    """The root of a machine whose processes have the numbers that the driver knows."""
    (tmp_path / "proc/self/ns").mkdir(parents=True)
    (tmp_path / "proc/self/ns/pid").symlink_to(FIRST_NAMESPACE)
    return tmp_path


def test_all_answers_in_their_units(tmp_path: Path) -> None:
    nvml = Nvml()
    probe = open_nvml(sources(tmp_path, nvml))
    assert probe is not None
    assert probe.read() == State(
        clocks_mhz={"gpu0 sm": 1980.0, "gpu0 memory": 3201.0},
        temperatures_c={"gpu0": 41.0},
        power_w={"gpu0": 118.25},
        energy_j={"gpu0": 90_071_992.547},
        gpu_memory_mib=512.0,
    )
    assert (probe.board, probe.missing, nvml.opened) == (("gpu0",), {}, 1)
    probe.close()
    assert nvml.opened == 0


def test_bits_are_words_and_those_of_idle_and_of_application_clocks_are_none(tmp_path: Path) -> None:
    harmless = pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonApplicationsClocksSetting
    assert state(tmp_path, Nvml(nvmlDeviceGetCurrentClocksEventReasons=harmless)).throttling == ()
    hot = pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonSwPowerCap | harmless
    told = state(tmp_path, Nvml(nvmlDeviceGetCurrentClocksEventReasons=hot)).throttling
    assert told == ("GPU at its power limit", "GPU too hot")


def test_every_reason_that_the_library_knows_has_words_or_is_harmless() -> None:
    harmless = pynvml.nvmlClocksEventReasonGpuIdle | pynvml.nvmlClocksEventReasonApplicationsClocksSetting
    assert sum(THROTTLING) | harmless == pynvml.nvmlClocksEventReasonAll


def test_an_older_driver_is_asked_by_the_older_name(tmp_path: Path) -> None:
    bits = pynvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    nvml = Nvml("nvmlDeviceGetCurrentClocksEventReasons", nvmlDeviceGetCurrentClocksThrottleReasons=bits)
    assert state(tmp_path, nvml).throttling == ("GPU slowed down by the power supply",)
    del nvml.answers["nvmlDeviceGetCurrentClocksEventReasons"]  # as releases before 12.535 of the library
    assert state(tmp_path, nvml).throttling == ("GPU slowed down by the power supply",)


def test_what_nvml_does_not_answer_is_left_out(tmp_path: Path) -> None:
    silent = open_nvml(sources(tmp_path, Nvml(*Nvml().answers)))
    assert silent is not None
    assert silent.read() == State(clocks_mhz={"gpu0 sm": 1980.0, "gpu0 memory": 3201.0})
    assert (silent.board, silent.missing) == ((), {"energy_j": "NVML gives no power of this GPU"})
    without_counter = open_nvml(sources(tmp_path, Nvml("nvmlDeviceGetTotalEnergyConsumption")))
    assert without_counter is not None
    assert without_counter.board == ("gpu0",)


def test_other_programs_are_those_that_are_neither_this_one_nor_its_parent(numbered: Path) -> None:
    programs = [SimpleNamespace(pid=pid) for pid in (os.getpid(), os.getppid(), OTHER, OTHER)]
    nvml = Nvml(nvmlDeviceGetComputeRunningProcesses=programs)
    assert state(numbered, nvml).gpu_processes == 1
    assert state(numbered, Nvml()).gpu_processes == 0


def test_in_a_container_with_its_own_process_numbers_other_programs_are_not_known(numbered: Path) -> None:
    nvml = Nvml(nvmlDeviceGetComputeRunningProcesses=[SimpleNamespace(pid=OTHER)])
    (numbered / "proc/self/ns/pid").unlink()
    (numbered / "proc/self/ns/pid").symlink_to("pid:[4026532201]")
    assert state(numbered, nvml).gpu_processes is None


@pytest.mark.parametrize(
    ("visible", "gpu"),
    [("", None), ("-1", None), ("NoDevFiles", None), ("2,0", "2"), (" 1", "1"), ("GPU-8f7e", "GPU-8f7e")],
)
def test_the_gpu_is_the_first_that_a_program_sees(visible: str, gpu: str | None) -> None:
    assert visible_gpu({"CUDA_VISIBLE_DEVICES": visible}) == gpu
    assert visible_gpu({}) == "0"


def test_names_carry_the_number_of_the_gpu(tmp_path: Path) -> None:
    second = open_nvml(sources(tmp_path, Nvml(), CUDA_VISIBLE_DEVICES="2"))
    by_uuid = open_nvml(sources(tmp_path, Nvml(), CUDA_VISIBLE_DEVICES="GPU-8f7e"))
    assert second is not None
    assert by_uuid is not None
    assert (second.board, by_uuid.board) == (("gpu2",), ("gpu",))
    assert open_nvml(sources(tmp_path, Nvml(), CUDA_VISIBLE_DEVICES="")) is None


def test_no_driver_is_no_probe_and_a_driver_that_cannot_be_asked_says_why(tmp_path: Path) -> None:
    refusing = Nvml()
    outside = sources(tmp_path, refusing, CUDA_VISIBLE_DEVICES="7")
    assert open_nvml(sources(tmp_path, None)) is None
    assert open_nvml(outside) is None
    assert refusing.opened == 0
    driver = tmp_path / "proc/driver/nvidia/version"
    driver.parent.mkdir(parents=True)
    driver.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun\n")
    without_library, refused = open_nvml(sources(tmp_path, None)), open_nvml(outside)
    assert without_library is not None
    assert refused is not None
    assert without_library.missing == {"energy_j": "the GPU cannot be asked: nvidia-ml-py is not installed"}
    assert refused.missing == {"energy_j": "the GPU cannot be asked: Invalid Argument"}
    assert (refused.board, refused.read()) == ((), State())


def test_a_jetson_counts_its_gpu_by_its_rails(tmp_path: Path) -> None:
    compatible = tmp_path / "proc/device-tree/compatible"
    compatible.parent.mkdir(parents=True)
    compatible.write_text("nvidia,p3834-0008\0nvidia,tegra264\0")
    probe = open_nvml(sources(tmp_path, Nvml("nvmlDeviceGetTotalEnergyConsumption")))
    assert probe is not None
    assert (probe.board, probe.missing) == ((), {})
    assert open_nvml(sources(tmp_path, None)) is None
