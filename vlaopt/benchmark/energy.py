"""Energy from readings of counters and of power, whatever probe they are of. Unknown is a reason, never zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlaopt.benchmark.record import Energy
from vlaopt.benchmark.sampling import Readings, Sampler

COVERED = 0.9
"""A name must be read over so much of the time; what it draws in the rest is taken to be the same."""


def per_chunk(sampler: Sampler | None, readings: Readings, idle: Readings, *, chunks: int) -> Energy:
    """Energy of each of the chunks that were computed while `readings` were taken; `idle` are of a time without any."""
    if sampler is None:
        return Energy(reason="not available: the machine's state was not read")
    if sampler.failure or not sampler.board:
        reason = sampler.failure or sampler.missing.get("energy_j", "no source of energy on this machine")
        return Energy(reason=f"not available: {reason}")
    parts, resting = joules(readings, sampler.board), joules(idle, sampler.board)
    if isinstance(parts, str):
        return Energy(reason=f"not available: {parts}")
    whole, above = sum(parts.values()), None
    if not isinstance(resting, str):
        above = whole - sum(resting.values()) / elapsed_s(idle) * elapsed_s(readings)
    uncounted = sampler.missing.get("energy_j")
    return Energy(
        joules=round(whole / chunks, 6),
        joules_above_idle=None if above is None else round(above / chunks, 6),
        parts={name: round(value / chunks, 6) for name, value in parts.items()},
        source=" + ".join(sampler.sources) + (f"; not counted: {uncounted}" if uncounted else ""),
    )


def joules(readings: Readings, names: Sequence[str]) -> dict[str, float] | str:
    """Energy of each name from the first to the last reading, or the reason why one of them cannot be told.

    A counter (`energy_j`) by its difference, for it misses nothing between
    readings; power (`power_w`) by the trapezoidal rule. None is left out of a sum: a part would pass for the whole.
    """
    found = {}
    for name in names:
        spent = _joules(readings, name)
        if isinstance(spent, str):
            return f"{name} {spent}"
        found[name] = spent
    return found


def elapsed_s(readings: Readings) -> float:
    """Seconds from the first reading to the last."""
    return (readings[-1][0] - readings[0][0]) / 1e9 if readings else 0.0


def _joules(readings: Readings, name: str) -> float | str:
    counter = [(moment, state.energy_j[name]) for moment, state in readings if name in state.energy_j]
    known = counter or [(moment, state.power_w[name]) for moment, state in readings if name in state.power_w]
    whole_s = elapsed_s(readings)
    if len(known) < 2:
        return f"was read too seldom ({len(known)})"
    seconds = np.asarray([moment - known[0][0] for moment, _ in known], np.float64) / 1e9
    values = np.asarray([value for _, value in known], np.float64)
    if not seconds[-1] >= COVERED * whole_s > 0:
        return f"was read for {seconds[-1]:.3g} s of {whole_s:.3g} s only"
    if counter and (np.diff(values) < 0).any():
        return "is a counter that went back"
    spent = values[-1] - values[0] if counter else ((values[1:] + values[:-1]) / 2 * np.diff(seconds)).sum()
    return float(spent * whole_s / seconds[-1])
