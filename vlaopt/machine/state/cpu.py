"""The state of the CPUs, from Linux' files: frequencies, governors, temperatures, throttling, energy (RAPL)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from vlaopt.machine.jetson import is_jetson
from vlaopt.machine.sources import Sources
from vlaopt.machine.state import State
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
    """Frequencies are those of the fastest CPU of each kind: a CPU that has nothing to do slows down and says nothing.

    Clocks are held where each CPU's governor is `performance`, or where it may run at one frequency only. One file is
    read for each CPU's frequency, governor and count of throttling, and a few more.
    """

    name = "cpu"

    def __init__(self, root: Path, clock: Callable[[], float]) -> None:
        self._policies = policies(root)
        self._kinds = _kinds(self._policies)
        # a Jetson's own probe reads its zones
        self._sensors = _sensors(root) or ({} if is_jetson(root) else _zones(root))
        self._throttle_counts = [
            path for scope in ("core", "package") for path in cpus(root, f"thermal_throttle/{scope}_throttle_count")
        ]
        self._throttled = _total(self._throttle_counts)
        self._packages, reason = _packages(root, clock)
        self.board = tuple(self._packages)
        self.missing: Mapping[str, str] = {
            **({"energy_j": reason} if reason else {}),
            **({} if self._kinds else {"clocks_mhz": "no cpufreq"}),
        }

    def read(self) -> State:
        throttled, before = _total(self._throttle_counts), self._throttled
        self._throttled = throttled
        frequencies = {kind: max(_thousandths(files), default=None) for kind, files in self._kinds.items()}
        temperatures = {name: next(_thousandths([file]), None) for name, file in self._sensors.items()}
        return State(
            clocks_mhz={kind: mhz for kind, mhz in frequencies.items() if mhz is not None},
            temperatures_c={name: celsius for name, celsius in temperatures.items() if celsius is not None},
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
        try:
            now_uj, now_s = int(self._file.read_text()), self._clock()
        except (OSError, ValueError):
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


def _kinds(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Files of the frequencies now, by kind of CPU: `cpu`, or `cpu-2201` after the highest MHz where these differ."""
    kinds: dict[str, list[Path]] = defaultdict(list)
    for policy in folders:
        highest = next(_thousandths([policy / "cpuinfo_max_freq"]), None)
        kinds["cpu" if highest is None else f"cpu-{highest:.0f}"].append(policy / "scaling_cur_freq")
    return dict(kinds) if len(kinds) != 1 else {"cpu": next(iter(kinds.values()))}


def _sensors(root: Path) -> dict[str, Path]:
    """Temperatures that the CPUs' own drivers give, each package's and not each core's."""
    found: dict[str, Path] = {}
    for folder in sorted((root / "sys/class/hwmon").glob("hwmon[0-9]*")):
        if (chip := read_text(folder / "name")) in _CPU_SENSORS:
            for file in sorted(folder.glob("temp[0-9]*_input")):
                label = read_text(file.with_name(file.name.replace("input", "label"))) or file.name.split("_")[0]
                if not label.startswith("Core "):
                    found[_unused(f"{chip} {label}", found)] = file
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


def _thousandths(files: Iterable[Path]) -> Iterator[float]:
    """MHz from files in kHz, °C from those in m°C; without those that cannot be read or say `<unknown>`."""
    for file in files:
        text = read_text(file) or ""
        if text.lstrip("-").isdigit():
            yield int(text) / 1000


def _total(files: Iterable[Path]) -> int:
    return sum(int(text) for file in files if (text := read_text(file) or "").isdigit())
