"""The state of the CPUs, from Linux' files: frequencies, governors, temperatures, throttling, energy (RAPL)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from vlaopt.machine.jetson import is_jetson
from vlaopt.machine.sources import Sources
from vlaopt.machine.state import State
from vlaopt.machine.state.sysfs import monitors, read_number, read_numbers
from vlaopt.machine.system import cpus, read_text

PERFORMANCE = "performance"
"""The governor that keeps a CPU at its highest frequency. Linux: Documentation/admin-guide/pm/cpufreq.rst."""

# A package below this power cannot have wrapped its counter twice unseen.
_MAX_WATTS = 1000
_CPU_SENSORS = ("coretemp", "k10temp", "zenpower")


def open_cpu(sources: Sources | None = None, clock: Callable[[], float] = time.monotonic) -> CpuProbe | None:
    """The probe of this machine's CPUs, or None where Linux' files are not there. `clock` gives seconds."""
    root = (sources or Sources()).root
    return CpuProbe(root, clock) if (root / "sys/devices/system/cpu").is_dir() else None


def policies(root: Path) -> list[Path]:
    """The folders of frequency policies: CPUs that share a clock. Empty where Linux does not scale them."""
    return sorted((root / "sys/devices/system/cpu/cpufreq").glob("policy[0-9]*"))


class CpuProbe:
    """The files below `root`. What is there is found once, when opened.

    Frequencies are those of the fastest CPU of each kind: one that has nothing to do slows down and says nothing.
    Clocks are held where each CPU's governor is `performance`, or where it may run at one frequency only. A reading
    takes four small files for each CPU.
    """

    name = "cpu"

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._policies = policies(root)
        self._kinds = _kinds(self._policies)
        on_jetson = is_jetson(root)  # its own probe reads the zones, and rails that count the CPUs
        self._sensors = _sensors(root) or ({} if on_jetson else _zones(root))
        self._throttle_counts = {
            str(path): path
            for scope in ("core", "package")
            for path in cpus(root, f"thermal_throttle/{scope}_throttle_count")
        }
        self._throttled = sum(read_numbers(self._throttle_counts).values())
        self._packages, reason = _packages(root, clock)
        self.board = tuple(self._packages)
        self.missing: Mapping[str, str] = {
            **({"energy_j": reason} if reason and not on_jetson else {}),
            **({} if self._kinds else {"clocks_mhz": "no cpufreq"}),
        }

    def read(self) -> State:
        throttled, before = sum(read_numbers(self._throttle_counts).values()), self._throttled
        self._throttled = throttled
        frequencies = {kind: read_numbers(files).values() for kind, files in self._kinds.items()}
        return State(
            clocks_mhz={kind: max(khz) / 1000 for kind, khz in frequencies.items() if khz},
            temperatures_c={name: millis / 1000 for name, millis in read_numbers(self._sensors).items()},
            energy_j={
                name: joules for name, package in self._packages.items() if (joules := package.joules()) is not None
            },
            throttling=("CPU too hot",) if throttled > before else (),
            held=all(_is_held(policy) for policy in self._policies) if self._policies else None,
        )

    def close(self) -> None:
        """Nothing is kept open."""


class _Package:
    """Energy of one package since it was opened: its counter in µJ, with the range at which that wraps undone.

    Linux: Documentation/power/powercap/powercap.rst. Where so much time passed between two readings that there may
    have been two wraps, the counter says nothing from then on.
    """

    def __init__(self, zone: Path, clock: Callable[[], float]) -> None:
        """Raises OSError where the counter cannot be read, ValueError where it is no number."""
        self._file, self._clock = zone / "energy_uj", clock
        self._range_uj = int((zone / "max_energy_range_uj").read_text())
        self._last_uj, self._last_s = int(self._file.read_text()), clock()
        self._total_uj: int | None = 0

    def joules(self) -> float | None:
        now_uj, now_s = read_number(self._file), self._clock()
        if now_uj is None:
            return None
        if self._total_uj is None or (now_s - self._last_s) * _MAX_WATTS * 1e6 > self._range_uj:
            self._total_uj = None
            return None
        self._total_uj += (now_uj - self._last_uj) % (self._range_uj + 1)
        self._last_uj, self._last_s = now_uj, now_s
        return self._total_uj / 1e6


def _packages(root: Path, clock: Callable[[], float]) -> tuple[dict[str, _Package], str | None]:
    """The packages by name, all or none, and why none.

    Zones also name parts of a package, and the whole board (psys), which would count it twice.
    """
    zones = sorted((root / "sys/class/powercap").glob("intel-rapl:*"))
    named = {name: zone for zone in zones if (name := read_text(zone / "name") or "").startswith("package")}
    if not named:
        return {}, "no RAPL counters"
    try:
        return {name: _Package(zone, clock) for name, zone in named.items()}, None
    except (OSError, ValueError) as error:
        return {}, f"RAPL counters cannot be read: {getattr(error, 'strerror', None) or error}"


def _is_held(policy: Path) -> bool:
    if read_text(policy / "scaling_governor") == PERFORMANCE:
        return True
    lowest = read_text(policy / "scaling_min_freq")
    return lowest is not None and lowest == read_text(policy / "scaling_max_freq")


def _kinds(folders: Iterable[Path]) -> dict[str, dict[str, Path]]:
    """Files of the frequencies now, by kind of CPU: `cpu`, or `cpu-2201` after the highest MHz where these differ."""
    kinds: dict[str, dict[str, Path]] = defaultdict(dict)
    for policy in folders:
        highest_khz = read_number(policy / "cpuinfo_max_freq")
        kind = "cpu" if highest_khz is None else f"cpu-{highest_khz / 1000:.0f}"
        kinds[kind][policy.name] = policy / "scaling_cur_freq"
    return dict(kinds) if len(kinds) != 1 else {"cpu": next(iter(kinds.values()))}


def _sensors(root: Path) -> dict[str, Path]:
    """Temperatures that the CPUs' own drivers give, each package's and not each core's."""
    found: dict[str, Path] = {}
    for driver in _CPU_SENSORS:
        for file in (file for folder in monitors(root, driver) for file in sorted(folder.glob("temp[0-9]*_input"))):
            number = file.name.removesuffix("_input")
            label = read_text(file.with_name(f"{number}_label")) or number
            if not label.startswith("Core "):
                found[_unused(f"{driver} {label}", found)] = file
    return found


def _zones(root: Path) -> dict[str, Path]:
    """Temperatures of the system's thermal zones, for CPUs whose own are not there."""
    found: dict[str, Path] = {}
    for folder in sorted((root / "sys/class/thermal").glob("thermal_zone[0-9]*")):
        if kind := read_text(folder / "type"):
            found[_unused(kind, found)] = folder / "temp"
    return found


def _unused(name: str, names: Iterable[str]) -> str:
    """`name`, numbered where there is one such already, as on two sockets."""
    taken = sum(other == name or other.startswith(f"{name} #") for other in names)
    return f"{name} #{taken + 1}" if taken else name
