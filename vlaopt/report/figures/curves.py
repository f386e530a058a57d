"""What a larger batch costs, and what fewer steps of the loop save and lose."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlaopt import plots
from vlaopt.benchmark.record import Curve
from vlaopt.benchmark.statistics import FLOATS
from vlaopt.report.facts import Facts
from vlaopt.report.figures.marks import MISSED, RUNS, WIDTH
from vlaopt.report.numbers import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OVER = {
    "batch": ("Cost over the batch", "observations in a batch"),
    "steps": ("Cost over the steps", "steps of the loop"),
}


def drawn(facts: Facts) -> dict[str, str]:
    """A figure for each curve of the record."""
    found = {}
    for curve in facts.record.curves if facts.record else ():
        if not any(point.latency_ms.value is not None for point in curve.points):
            continue
        name, (title, words) = f"curve-{curve.over}", _OVER[curve.over]
        errors = _known(point.action_error_mean for point in curve.points)
        panels = 1 + bool(np.isfinite(errors).any())
        description = f"Latency over {words}: " + ", ".join(
            f"{point.value}: {number(point.latency_ms.value)} ms" for point in curve.points
        )
        paint = partial(_paint, curve, words, errors, panels)
        found[name] = plots.inline(name, title, description, paint, width=WIDTH, height=0.8 + 1.3 * panels)
    return found


def _paint(curve: Curve, words: str, errors: FLOATS, panels: int, figure: Figure) -> None:
    grid = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    values = [point.value for point in curve.points]
    _latency(grid[0], curve)
    for axes in grid[1:]:
        axes.plot(values, errors, "s-", color=MISSED, markersize=4)
        axes.set_ylabel("mean error (std. dev.)")
        axes.set_ylim(bottom=0)
    grid[-1].set_xticks(values)
    grid[-1].set_xlabel(words)
    figure.align_ylabels()


def _latency(axes: Axes, curve: Curve) -> None:
    """Medians with their intervals; what could not be stated is left out."""
    values = [point.value for point in curve.points]
    latencies = [point.latency_ms for point in curve.points]
    low, high = _known(one.low for one in latencies), _known(one.high for one in latencies)
    axes.vlines(values, low, high, color=RUNS, linewidth=5, alpha=0.35)
    axes.plot(values, _known(one.value for one in latencies), "o-", color=RUNS, markersize=4)
    axes.set_ylabel("latency (ms)")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y")


def _known(values: Iterable[float | None]) -> FLOATS:
    return np.array(list(values), np.float64)
