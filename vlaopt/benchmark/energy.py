"""Energy from readings of counters and of power. Unknown is a reason, never zero; knows no probe and no policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlaopt.benchmark.sampling import Readings

COVERED = 0.9
"""A name must be read over so much of the time; what it draws in the rest is taken to be the same."""


def joules(readings: Readings, names: Sequence[str]) -> dict[str, float] | str:
    """Energy of each name from the first to the last reading, or the reason why one of them cannot be told.

    A counter (`energy_j`) by its difference, for it misses nothing between
    readings; power (`power_w`) by the trapezoidal rule. None is left out of a sum: a part would pass for the whole.
    """
    if not names:
        return "no source of energy on this machine"
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
