"""Energy of the CPU packages, from the counters of Intel and AMD (RAPL). Unknown is a reason, never zero."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

# The counter wraps at its range; a package below this power cannot have wrapped twice unseen.
_MAX_WATTS = 1000


@dataclass(frozen=True)
class EnergyReading:
    """Each package's counter and the range at which it wraps, in µJ. Linux: Documentation/power/powercap."""

    counters_uj: tuple[int, ...]
    ranges_uj: tuple[int, ...]

    def joules_since(self, before: EnergyReading, elapsed_s: float) -> float | None:
        """Energy of all packages since `before`, one wrap allowed; None when there may have been more."""
        if any(elapsed_s * _MAX_WATTS * 1e6 > limit for limit in self.ranges_uj):
            return None
        pairs = zip(self.counters_uj, before.counters_uj, self.ranges_uj, strict=True)
        return sum((now - then) % (limit + 1) for now, then, limit in pairs) / 1e6


def _is_package(zone: Path) -> bool:
    """Zones also name parts of a package, and the whole board (psys), which would count it twice."""
    try:
        return (zone / "name").read_text().startswith("package")
    except OSError:
        return False


def read_energy(root: Path) -> EnergyReading | str:
    """The counters below `root`, or the reason why there are none."""
    packages = [path for path in sorted((root / "sys/class/powercap").glob("intel-rapl:*")) if _is_package(path)]
    if not packages:
        return "no RAPL counters"
    try:
        counters = tuple(int((path / "energy_uj").read_text()) for path in packages)
        ranges = tuple(int((path / "max_energy_range_uj").read_text()) for path in packages)
    except OSError as error:
        return f"RAPL counters cannot be read: {error.strerror}"
    return EnergyReading(counters, ranges)
