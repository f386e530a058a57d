"""The machine a measurement was made on, read from /proc and /sys; nothing is changed. None: not available."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vlaopt.hashing import digest_json
from vlaopt.machine import jetson
from vlaopt.machine import system as machine
from vlaopt.machine.gpu import module_version
from vlaopt.machine.sources import Sources
from vlaopt.machine.state import State
from vlaopt.machine.system import ROOT, cpus, field, read_text

_INSTRUCTION_SETS = re.compile(r"(avx|amx|sse4|fma$|f16c|asimd|sve|sme(?!p)|i8mm|bf16|fphp|dotprod)")
_OF_THE_MOMENT = {"load_average", "frequency_mhz", "clocks_mhz", "temperatures_c", "gpu_processes"}


class Environment(BaseModel):
    """Where a measurement was made. Frequencies in MHz, memory in MiB, temperatures in °C; None means not available.

    `libraries` and `gpu` (its name alone) come from whoever drives them, `driver` is NVIDIA's. `clocks_mhz`,
    `temperatures_c` and `gpu_processes` (other programs on the GPU) are of the start. `clocks_held` is whether all
    clocks that tell are fixed, `locked` what was locked for this measurement.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    system: str
    architecture: str
    cpu_model: str | None
    cpu_features: tuple[str, ...]
    physical_cores: int | None
    logical_cores: int
    affinity: str | None
    cpu_quota: str | None
    governor: str | None
    frequency_mhz: float | None
    max_frequency_mhz: float | None
    load_average: tuple[float, float, float] | None
    memory_mib: int | None
    os: str | None
    kernel: str | None
    python: str
    container: str | None
    virtual: bool
    libraries: dict[str, str]
    gpu: str | None
    driver: str | None = None
    power_mode: str | None = None
    clocks_held: bool | None = None
    locked: tuple[str, ...] = ()
    clocks_mhz: dict[str, float] = {}
    temperatures_c: dict[str, float] = {}
    gpu_processes: int | None = None

    def loose_governor(self) -> str | None:
        """The governor that lets clocks change; None where it is not known, or where clocks are held by their limits.

        jetson_clocks leaves the governor and sets lowest and highest clock alike.
        """
        return None if self.clocks_held or self.governor == "performance" else self.governor

    def comparable(self) -> dict[str, object]:
        """What two measurements must share to be compared: all but what is of the moment."""
        shared = self.model_dump(mode="json", exclude={*_OF_THE_MOMENT, "memory_mib"})
        # the kernel keeps a few MiB more or less at each boot
        return {**shared, "memory_gib": None if self.memory_mib is None else round(self.memory_mib / 1024)}

    def fingerprint(self) -> str:
        """Digest of what must be equal for two measurements to be comparable."""
        return digest_json(self.comparable())

    def machine_key(self) -> str:
        """Name of this class of machine, for folders: `linux-x86_64-intel-xeon-2c-1f0a9c3e`, of [A-Za-z0-9._-] only.

        The digest covers the whole names and the instruction sets, which decide what an engine may use.
        """
        identity = {
            "system": self.system,
            "architecture": self.architecture,
            "cpu_model": self.cpu_model,
            "cpu_features": self.cpu_features,
            "logical_cores": self.logical_cores,
            "gpu": self.gpu,
        }
        names = [self.system, self.architecture, self.gpu, self.cpu_model or "cpu", f"{self.logical_cores}c"]
        return "-".join([*(_slug(name) for name in names if name), digest_json(identity)[:8]])


def read_environment(
    *,
    libraries: Mapping[str, str] | None = None,
    gpu: str | None = None,
    state: State | None = None,
    locked: Sequence[str] = (),
    root: Path = ROOT,
    system: str = platform.system(),
    architecture: str = platform.machine(),
) -> Environment:
    """The environment described by the files below `root`, and by what probes read (`state`)."""
    state = state or State()
    frequency = root / "sys/devices/system/cpu/cpu0/cpufreq"
    load = (read_text(root / "proc/loadavg") or "").split()
    flags = machine.cpu_flags(root)
    quota = read_text(root / "sys/fs/cgroup/cpu.max")
    return Environment(
        system=system,
        architecture=architecture,
        cpu_model=machine.cpu_model(root),
        cpu_features=tuple(sorted(flag for flag in flags if _INSTRUCTION_SETS.match(flag))),
        physical_cores=machine.physical_cores(root),
        logical_cores=machine.logical_cores(root),
        affinity=field(read_text(root / "proc/self/status"), "Cpus_allowed_list"),
        cpu_quota=None if quota is None or quota.startswith("max") else quota,
        governor=_governor(root),
        frequency_mhz=_megahertz(frequency / "scaling_cur_freq"),
        max_frequency_mhz=_megahertz(frequency / "cpuinfo_max_freq"),
        load_average=(float(load[0]), float(load[1]), float(load[2])) if len(load) >= 3 else None,
        memory_mib=machine.memory_mib(root),
        os=machine.os_name(root),
        kernel=machine.kernel(root),
        python=platform.python_version(),
        container=machine.container(root),
        virtual="hypervisor" in flags or read_text(root / "sys/hypervisor/type") is not None,
        libraries=dict(sorted((libraries or {}).items())),
        gpu=gpu,
        driver=module_version(root),
        power_mode=jetson.power_mode(Sources(root=root)) if jetson.is_jetson(root) else None,
        clocks_held=state.held,
        locked=tuple(locked),
        clocks_mhz=dict(state.clocks_mhz),
        temperatures_c=dict(state.temperatures_c),
        gpu_processes=state.gpu_processes,
    )


def machine_key(*, gpu: str | None = None, root: Path = ROOT) -> str:
    """The key of this machine, with its GPU where engines are built for one; see `Environment.machine_key`."""
    return read_environment(gpu=gpu, root=root).machine_key()


def cpu_features(root: Path = ROOT) -> frozenset[str]:
    """All features of this machine's CPUs as /proc/cpuinfo names them; empty where there is none to read."""
    return frozenset(machine.cpu_flags(root))


def usable_cores(root: Path = ROOT) -> int:
    """Physical cores that this process may run on; its logical ones where the machine does not tell them apart."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, machine.physical_cores(root) or allowed))


@dataclass(frozen=True)
class Activity:
    """Counters that grow as the machine works: jiffies of all CPUs, the busy ones, its own; throttle events.

    Its own are those of this process and of the ones that it runs beside.
    """

    total: int
    busy: int
    own: int
    throttled: int

    def others_since(self, before: Activity) -> float | None:
        """Share of all CPU time that other processes and the hypervisor took; None within half a second of `before`."""
        total = self.total - before.total
        # a jiffy is 10 ms: fewer than 50 of them say nothing in percent
        return max(0, self.busy - before.busy - self.own + before.own) / total if total >= 50 else None


def read_activity(root: Path = ROOT, beside: Sequence[int] = ()) -> Activity | None:
    """The counters now, or None where the machine has none; `beside` are processes that count as this one's.

    Fields as in proc(5), /proc/stat and /proc/PID/stat.
    """
    stat, own = read_text(root / "proc/stat"), _jiffies(root, "self")
    if stat is None or own is None:
        return None
    user, nice, kernel, idle, iowait, irq, softirq, steal = (int(part) for part in stat.split()[1:9])
    busy = user + nice + kernel + irq + softirq + steal
    counts = (read_text(path) for path in cpus(root, "thermal_throttle/core_throttle_count"))
    throttled = sum(int(count) for count in counts if count)
    own += sum(_jiffies(root, str(process)) or 0 for process in beside)
    return Activity(busy + idle + iowait, busy, own, throttled)


def _jiffies(root: Path, process: str) -> int | None:
    """CPU time that a process has taken, in user and kernel mode."""
    stat = read_text(root / "proc" / process / "stat")
    if stat is None:
        return None
    # the second field is the command in brackets and may hold spaces
    utime, stime = stat.rpartition(")")[2].split()[11:13]
    return int(utime) + int(stime)


def peak_memory_mib(root: Path = ROOT) -> float | None:
    """The largest resident size of this process since it started (VmHWM), whatever it was doing then."""
    peak_kib = field(read_text(root / "proc/self/status"), "VmHWM")
    return None if peak_kib is None else round(int(peak_kib.split()[0]) / 1024, 1)


def _megahertz(path: Path) -> float | None:
    """A frequency that the kernel gives in kHz, or as `<unknown>`."""
    kilohertz = read_text(path) or ""
    return int(kilohertz) / 1000 if kilohertz.isdigit() else None


def _governor(root: Path) -> str | None:
    governors = {read_text(path) for path in cpus(root, "cpufreq/scaling_governor")} - {None}
    return "+".join(sorted(str(governor) for governor in governors)) or None


def _slug(name: str) -> str:
    plain = re.sub(r"\((r|tm|c)\)|\b(cpu|processor)\b|@.*", " ", name.lower())
    return re.sub(r"[^a-z0-9_]+", "-", plain).strip("-")[:32].strip("-") or "unknown"
