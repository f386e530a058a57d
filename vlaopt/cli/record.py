"""A record of a measurement as a person reads it in a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from vlaopt.cli import terminal

if TYPE_CHECKING:
    from vlaopt.benchmark.assertions import Outcome
    from vlaopt.benchmark.environment import Environment
    from vlaopt.benchmark.record import BenchRecord, Breakdown, Curve, Energy, Timeline, WakeUp
    from vlaopt.benchmark.statistics import Distribution, Percentile

NO_VALUE = "—"
KINDS = {"clock_mhz": ("clocks", "MHz"), "temperature_c": ("temperature", "°C"), "power_w": ("power", "W")}
"""Series of a timeline that are told, by the start of their names: what they are, and their unit."""
MOST_SERIES = 4


def show_record(record: BenchRecord) -> None:
    """Print it: latency, misses, where the time goes, what else was measured, and whether it can be believed."""
    _show_latency(record)
    if record.breakdown:
        _show_breakdown(record.breakdown)
    for curve in record.curves:
        _show_curve(curve)
    if record.breakdown or record.curves:
        terminal.give("")
    for line in _figures(record):
        terminal.give_words(line)
    terminal.give_words(_verdict(record))


def show_outcomes(outcomes: Sequence[Outcome], verdict: str) -> None:
    """Print which assertions held, and why the others did not; `verdict` is a reason that was told before."""
    for outcome in outcomes:
        reason = "see the verdict" if outcome.reason == verdict else outcome.reason
        terminal.give_words(
            f"{'held  ' if outcome.ok else 'MISSED'} {outcome.expression}" + (f" ({reason})" if reason else "")
        )


def _show_latency(record: BenchRecord) -> None:
    figures = ("min", "p50", "p90", "p99", "p99.9", "max", "jitter")
    table = terminal.table(
        "", *figures, right=figures, whole=figures, title=f"latency in ms ({record.environment.cpu_model})"
    )
    unstated: list[str] = []
    for name, part in ((f"paced at {record.settings.hz:g} Hz", record.paced), ("back-to-back", record.back_to_back)):
        spread = part.latency_ms
        cells = [spread.p50, spread.p90, spread.p99, spread.p99_9]
        unstated += [f"{name}: {cell.reason}" for cell in cells if cell.value is None][:1]
        jitter = NO_VALUE if part.jitter_ms is None else f"{part.jitter_ms:.3f}"
        table.add_row(name, f"{spread.min:.3f}", *map(_stated, cells), f"{spread.max:.3f}", jitter)
    terminal.give_table(table)
    for line in filter(None, [_intervals(record.paced.latency_ms), *(f"{NO_VALUE} {reason}" for reason in unstated)]):
        terminal.give_words(line)
    paced = record.paced
    terminal.give_words(
        f"misses: {paced.misses} of {paced.ticks} ticks past their deadline of {paced.deadline_ms:g} ms, "
        f"{len(paced.dropped)} dropped{_wake_up(paced.wake_up)}; back-to-back "
        f"{record.back_to_back.throughput_hz:.1f} chunks per second"
    )


def _intervals(latency: Distribution) -> str:
    """Where the paced percentiles truly lie, for those that can be stated."""
    stated = {"p50": latency.p50, "p90": latency.p90, "p99": latency.p99, "p99.9": latency.p99_9}
    told = [f"{name} {cell.low:.3f} … {cell.high:.3f}" for name, cell in stated.items() if cell.low is not None]
    return f"paced, at 99 % confidence: {', '.join(told)}" if told else ""


def _wake_up(wake_up: WakeUp) -> str:
    if wake_up.p50_us is None:
        return ""
    return f"; the schedule itself woke {wake_up.p50_us:.0f} µs late at p50, {wake_up.max_us:.0f} µs at most"


def _show_breakdown(breakdown: Breakdown) -> None:
    """A column that no component has a value for is left out."""
    terminal.give("")
    components = breakdown.components
    on_device = any(part.device_ms is not None for part in components.values())
    numbers = ("calls", "ms", "share", *(("device ms", "copies ms") if on_device else ()))
    table = terminal.table("part", *numbers, right=numbers, whole=numbers, title="where a chunk goes")
    rows = [
        (name, f"{part.calls:g}", part.wall_ms, part.device_ms, part.copies_ms) for name, part in components.items()
    ]
    rows += [("processors", "", breakdown.processors_ms, None, None), ("loop", "", breakdown.loop_ms, None, None)]
    for name, calls, wall_ms, device_ms, copies_ms in rows:
        device = [NO_VALUE if value is None else f"{value:.3f}" for value in (device_ms, copies_ms)]
        share = f"{wall_ms / breakdown.whole_ms:.0%}" if breakdown.whole_ms else NO_VALUE
        table.add_row(name, calls, f"{wall_ms:.3f}", share, *(device if on_device else ()))
    terminal.give_table(table)
    terminal.give_words(
        f"medians of {breakdown.chunks} chunks: {breakdown.whole_ms:.3f} ms part by part, "
        f"{breakdown.together_ms:.3f} ms as the policy normally runs"
    )


def _show_curve(curve: Curve) -> None:
    terminal.give("")
    errors = any(point.action_error_mean is not None for point in curve.points)
    numbers = (curve.over, "p50 in ms", "99 % interval", *(("action error",) if errors else ()))
    table = terminal.table(*numbers, right=numbers, whole=numbers, title=f"latency over {curve.over}")
    for point in curve.points:
        latency = point.latency_ms
        interval = NO_VALUE if latency.low is None else f"{latency.low:.3f} … {latency.high:.3f}"
        error = NO_VALUE if point.action_error_mean is None else f"{point.action_error_mean:.4f}"
        table.add_row(str(point.value), _stated(latency), interval, *((error,) if errors else ()))
    terminal.give_table(table)
    if errors:
        terminal.give_words("action error: mean of the executed actions, in standard deviations of each")


def _figures(record: BenchRecord) -> Iterator[str]:
    cold = record.cold_start
    yield "cold start: " + (
        f"{cold.total_ms:.0f} ms in a fresh process (library {cold.import_ms:.0f}, opening {cold.open_ms:.0f}, "
        f"first chunk {cold.first_ms:.0f})"
        if cold
        else "not available"
    )
    yield f"memory: {_mebibytes(record.memory.host_mib)} on the host, {_mebibytes(record.memory.device_mib)} on the GPU"
    yield f"energy: {_energy(record.energy)}"
    yield from _state(record.environment)
    yield from _machine(record.timeline)
    if record.settings.load:
        yield f"load: {record.settings.load} busy beside it, in the paced and the back-to-back run"
    for name, told in record.told.items():
        yield f"{name} ran {'; '.join(told)}"
    worst = record.actions.worst_difference
    yield (
        f"actions checked: {record.actions.checked}"
        + ("" if worst is None else f", worst difference {worst:.2f} of the tolerance")
        + f"; harness {record.overhead_us:.1f} µs per call"
    )


def _state(environment: Environment) -> Iterator[str]:
    """How the machine was set when the measurement began, as far as it tells."""
    held = environment.clocks_held
    known = {
        f"power mode {environment.power_mode}": environment.power_mode,
        f"driver {environment.driver}": environment.driver,
        "clocks held": held,
        "clocks not held": held is False,
        f"locked for this: {', '.join(environment.locked)}": environment.locked,
        f"{environment.gpu_processes} other programs on the GPU": environment.gpu_processes,
    }
    if any(known.values()):
        yield f"at the start: {', '.join(words for words, told in known.items() if told)}"


def _machine(timeline: Timeline | None) -> Iterator[str]:
    """What the machine did meanwhile, the lowest and highest of each series."""
    missing = []
    for kind, (what, unit) in KINDS.items():
        found = {
            name.removeprefix(f"{kind}."): known
            for name, values in (timeline.series if timeline else {}).items()
            if name.startswith(f"{kind}.") and (known := [value for value in values if value is not None])
        }
        if not found:
            missing.append(what)
            continue
        more = f", {len(found) - MOST_SERIES} more" if len(found) > MOST_SERIES else ""
        told = ", ".join(f"{name} {_range(known)}" for name, known in list(found.items())[:MOST_SERIES])
        yield f"{what} in {unit}: {told}{more}"
    if missing:
        yield f"{', '.join(missing)}: not available"
    if timeline and timeline.throttling:
        yield "throttling: " + ", ".join(f"{why} ({share:.0%})" for why, share in timeline.throttling.items())


def _energy(energy: Energy) -> str:
    if energy.joules is None:
        return energy.reason or "not available"
    above = (
        ""
        if energy.joules_above_idle is None
        else f", {energy.joules_above_idle * 1e3:.2f} mJ above the machine at rest"
    )
    return f"{energy.joules * 1e3:.2f} mJ per chunk{above} ({energy.source})"


def _verdict(record: BenchRecord) -> str:
    return f"verdict: {record.verdict}" + (f": {'; '.join(record.reasons)}" if record.reasons else "")


def _stated(percentile: Percentile) -> str:
    return NO_VALUE if percentile.value is None else f"{percentile.value:.3f}"


def _mebibytes(value: float | None) -> str:
    return "not available" if value is None else f"{value:.0f} MiB"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.4g}", f"{max(values):.4g}"
    return low if low == high else f"{low}–{high}"
