"""NVIDIA GPUs and their driver: from NVML, else from nvidia-smi, else from what the device tree names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict

from vlaopt.machine.jetson import CHIPS, chip
from vlaopt.machine.sources import Sources
from vlaopt.machine.system import read_text

_FIELDS = ("name", "memory.total", "memory.free", "driver_version", "compute_cap")
_MIB = 1 << 20
Answer = TypeVar("Answer")


class Gpu(BaseModel):
    """One GPU. `sm` is its compute capability, '8.7'. Memory in MiB, None where it shares the machine's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    sm: str | None = None
    memory_mib: int | None = None
    free_mib: int | None = None


class Driver(BaseModel):
    """The NVIDIA driver: its version, the newest CUDA it takes, the GPUs it shows, and who said so."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: str | None = None
    cuda: str | None = None
    gpus: tuple[Gpu, ...] = ()
    told_by: str | None = None


def read_driver(sources: Sources) -> Driver:
    """What the most exact source knows; what is missing there comes from the kernel module's own file."""
    found = _from_nvml(sources) or _from_nvidia_smi(sources) or _from_device_tree(sources.root) or Driver()
    return found if found.version else found.model_copy(update={"version": module_version(sources.root)})


def module_version(root: Path) -> str | None:
    """The version of the loaded kernel module, from /proc/driver/nvidia/version.

    The line is `NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  …` or, of the open module, `NVRM version:
    NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  …`.
    """
    text = read_text(root / "proc/driver/nvidia/version") or ""
    found = re.search(r"^NVRM version:.*Kernel Module(?: for \S+)?\s+(\d[\d.]*)", text, re.MULTILINE)
    return found[1] if found else None


def process_memory_mib(process: int, sources: Sources) -> float | None:
    """What a process holds on all GPUs, in MiB; None without NVML, or where it does not tell of this process.

    It tells nothing on a Jetson, and in a container knows processes by their numbers outside.
    """

    def programs_of(nvml: Any) -> list[Any]:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        return [program for handle in handles for program in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]

    programs = _through_nvml(sources, programs_of) or []
    held = [program.usedGpuMemory for program in programs if program.pid == process]
    return round(sum(held) / _MIB, 1) if held and None not in held else None


def _from_nvml(sources: Sources) -> Driver | None:
    """Through nvidia-ml-py. Each answer that NVML does not give on this GPU is left out, as on a Jetson."""

    def driver_of(nvml: Any) -> Driver:
        gpus = [_gpu_of(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]
        cuda = _asked(nvml, nvml.nvmlSystemGetCudaDriverVersion)
        return Driver(
            version=_words(_asked(nvml, nvml.nvmlSystemGetDriverVersion)),
            cuda=None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            gpus=tuple(gpus),
            told_by="NVML",
        )

    return _through_nvml(sources, driver_of)


def _through_nvml(sources: Sources, question: Callable[[Any], Answer]) -> Answer | None:
    """What `question` gives of the started library; None where there is none, or it fails."""
    nvml: Any = sources.load("pynvml")
    if nvml is None:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    try:
        return question(nvml)
    except nvml.NVMLError:
        return None
    finally:
        nvml.nvmlShutdown()


def _gpu_of(nvml: Any, handle: Any) -> Gpu:
    capability = _asked(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    memory = _asked(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    return Gpu(
        name=_words(_asked(nvml, nvml.nvmlDeviceGetName, handle)) or "a GPU without a name",
        sm=None if capability is None else f"{capability[0]}.{capability[1]}",
        memory_mib=None if memory is None else memory.total // _MIB,
        free_mib=None if memory is None else memory.free // _MIB,
    )


def _asked(nvml: Any, question: Any, *arguments: Any) -> Any:
    try:
        return question(*arguments)
    except nvml.NVMLError:
        return None


def _words(value: Any) -> str | None:
    """Older releases of nvidia-ml-py answer in bytes."""
    return value.decode() if isinstance(value, bytes) else value


def _from_nvidia_smi(sources: Sources) -> Driver | None:
    for fields in (_FIELDS, _FIELDS[:-1]):  # drivers before 510 do not know compute_cap and refuse the whole query
        query = f"--query-gpu={','.join(fields)}"
        listed = sources.run(["nvidia-smi", query, "--format=csv,noheader,nounits"])
        rows = [[_given(cell) for cell in line.split(",")] for line in (listed or "").splitlines()]
        gpus = [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields) and row[0]]
        if gpus:
            break
    else:
        return None
    cuda = re.search(r"CUDA (?:UMD )?Version: *([\d.]+)", sources.run(["nvidia-smi"]) or "")
    return Driver(
        version=gpus[0].get("driver_version"),
        cuda=cuda[1] if cuda else None,
        gpus=tuple(
            Gpu(
                name=str(row["name"]),
                sm=row.get("compute_cap"),
                memory_mib=_whole(row.get("memory.total")),
                free_mib=_whole(row.get("memory.free")),
            )
            for row in gpus
        ),
        told_by="nvidia-smi",
    )


def _given(cell: str) -> str | None:
    """A cell of nvidia-smi's table; on a Jetson most are `[N/A]`."""
    text = cell.strip()
    return None if not text or "N/A" in text or "Not Supported" in text else text


def _whole(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _from_device_tree(root: Path) -> Driver | None:
    known = CHIPS.get(chip(root) or "")
    return Driver(gpus=(Gpu(name=known[0], sm=known[1]),), told_by="the device tree") if known else None
