"""The state of the NVIDIA GPU that a program uses, through NVML (nvidia-ml-py)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlaopt.machine.jetson import is_jetson
from vlaopt.machine.sources import Sources
from vlaopt.machine.state import Probe, Silent, State
from vlaopt.machine.system import ROOT

THROTTLING = {
    0x004: "GPU at its power limit",
    0x008: "GPU slowed down by its hardware",
    0x010: "GPU slowed down to the others of its sync boost group",
    0x020: "GPU too hot",
    0x040: "GPU too hot (hardware)",
    0x080: "GPU slowed down by the power supply",
    0x100: "GPU held by display clocks",
}
"""Reasons why clocks are low, by their bits; not 0x1 (idle) and 0x2 (application clocks), which nobody minds.

Source: nvml.h, nvmlClocksEventReasons.
"""

_MIB = 1 << 20
# The namespace that a machine starts with, in which a process has the number that the driver knows.
# Linux: PROC_PID_INIT_INO of include/linux/proc_ns.h.
_FIRST_NAMESPACE = "pid:[4026531836]"


def open_nvml(sources: Sources | None = None) -> Probe | None:
    """The probe of the GPU that programs see first; None where there is no NVIDIA driver or no such GPU.

    A driver that cannot be asked gives a probe that says why; a Jetson's is no news, its own probe tells more.
    """
    sources = sources or Sources()
    on_jetson = is_jetson(sources.root)
    wanted = visible_gpu(sources.variables)
    if wanted is None:
        return None
    nvml: Any = sources.load("pynvml")
    try:
        if nvml is None:
            raise LookupError("nvidia-ml-py is not installed")
        probe = NvmlProbe(nvml, wanted, sources.root)
    except Exception as error:  # NVMLError, which is the library's own; and what a broken library raises
        with_driver = (sources.root / "proc/driver/nvidia/version").exists() and not on_jetson
        return Silent("nvml", {"energy_j": f"the GPU cannot be asked: {error}"}) if with_driver else None
    if on_jetson:  # whose rails count the GPU already
        probe.board, probe.missing = (), {}
    return probe


def visible_gpu(variables: Mapping[str, str]) -> str | None:
    """The GPU that CUDA gives a program first: its number or UUID; None where it gives none.

    Source: CUDA_VISIBLE_DEVICES in the CUDA programming guide. Without it, the first of NVML.
    """
    first = variables.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    return first if first.isdigit() or first.startswith(("GPU-", "MIG-")) else None


class NvmlProbe:
    """Each answer that NVML does not give on this GPU is left out. `held` never is known: NVML tells no locked clocks.

    Other programs are counted where process numbers are the driver's: not in a container with numbers of its own.
    This process and its parent are none of them, because a probe may be read by a child of what is measured.
    """

    name = "nvml"

    def __init__(self, nvml: Any, gpu: str, root: Path = ROOT) -> None:
        """Raises NVMLError, the library's own, where NVML does not start or has no such GPU."""
        self._nvml, self._root = nvml, root
        nvml.nvmlInit()
        try:
            by_number = gpu.isdigit()
            self._gpu = nvml.nvmlDeviceGetHandleByIndex(int(gpu)) if by_number else nvml.nvmlDeviceGetHandleByUUID(gpu)
        except nvml.NVMLError:
            nvml.nvmlShutdown()
            raise
        self._label = f"gpu{gpu}" if by_number else "gpu"
        first = self.read()
        self.board: tuple[str, ...] = (self._label,) if first.energy_j or first.power_w else ()
        self.missing: Mapping[str, str] = {} if self.board else {"energy_j": "NVML gives no power of this GPU"}

    def read(self) -> State:
        nvml, gpu = self._nvml, self._label
        clocks = {
            f"{gpu} sm": self._asked("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            f"{gpu} memory": self._asked("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
        }
        celsius = self._asked("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)
        milliwatts = self._asked("nvmlDeviceGetPowerUsage")
        millijoules = self._asked("nvmlDeviceGetTotalEnergyConsumption")
        memory = self._asked("nvmlDeviceGetMemoryInfo")
        return State(
            clocks_mhz={name: float(mhz) for name, mhz in clocks.items() if mhz is not None},
            temperatures_c={} if celsius is None else {gpu: float(celsius)},
            power_w={} if milliwatts is None else {gpu: milliwatts / 1000},
            energy_j={} if millijoules is None else {gpu: millijoules / 1000},
            throttling=self._throttling(),
            gpu_processes=self._others(),
            gpu_memory_mib=None if memory is None else memory.used / _MIB,
        )

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _throttling(self) -> tuple[str, ...]:
        bits = self._asked("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # drivers before 535 know it by its older name
            bits = self._asked("nvmlDeviceGetCurrentClocksThrottleReasons")
        return tuple(words for bit, words in THROTTLING.items() if (bits or 0) & bit)

    def _others(self) -> int | None:
        processes = self._asked("nvmlDeviceGetComputeRunningProcesses")
        if processes is None or not _sees_all_processes(self._root):
            return None
        return len({process.pid for process in processes} - {os.getpid(), os.getppid()})

    def _asked(self, question: str, *arguments: Any) -> Any:
        """The answer, or None where this driver, GPU or release of the library has none."""
        ask = getattr(self._nvml, question, None)
        try:
            return ask and ask(self._gpu, *arguments)
        except self._nvml.NVMLError:
            return None


def _sees_all_processes(root: Path) -> bool:
    try:
        return str((root / "proc/self/ns/pid").readlink()) == _FIRST_NAMESPACE
    except OSError:
        return False
