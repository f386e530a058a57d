"""How a report writes numbers: three digits, a unit, a percentile with its interval. Knows no artifact."""

from __future__ import annotations

import math

from vlaopt.benchmark.statistics import Percentile


def number(value: float | None) -> str:
    """Three digits, whole numbers in full; a dash where there is none."""
    if value is None:
        return "—"
    if isinstance(value, int):
        return f"{value:,}".replace(",", " ")
    size = abs(float(f"{value:.2e}"))  # first, so that 99.99 becomes 100 and not 100.0
    if size == 0 or size >= 100:
        return f"{value:,.0f}".replace(",", " ")
    if size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def milliseconds(value: float | None) -> str:
    """`0.775 ms`."""
    return "—" if value is None else f"{number(value)} ms"


def percentile(value: Percentile) -> str:
    """The percentile in ms, or that there are too few samples to state it."""
    return "insufficient samples" if value.value is None else milliseconds(value.value)


def interval(value: Percentile) -> str:
    """The interval of a percentile in ms, or how many samples there are and are needed."""
    if value.low is None or value.high is None:
        return (value.reason or "—").removeprefix("insufficient samples: ")
    return f"{number(value.low)} – {number(value.high)} ms"


def size(count: int) -> str:
    """Bytes: `1.33 MB`."""
    if count >= 1e9:
        return f"{number(count / 1e9)} GB"
    return f"{number(count / 1e6)} MB" if count >= 1e5 else f"{number(count / 1e3)} kB"


def memory(mib: float | None) -> str:
    """MiB as they are measured, in GiB from one on; that there is none is said."""
    if mib is None:
        return "not available"
    return f"{number(mib / 1024)} GiB" if mib >= 1024 else f"{number(mib)} MiB"


def share(value: float | None) -> str:
    """A fraction as a percentage."""
    return "—" if value is None else f"{number(100 * value)} %"
