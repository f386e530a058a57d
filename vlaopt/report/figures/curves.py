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
        errors = any(point.action_error_mean is not None for point in curve.points)
        description = f"Latency over {words}: " + ", ".join(
            f"{point.value}: {number(point.latency_ms.value)} ms" for point in curve.points
        )
        paint = partial(_paint, curve, words, errors)
        found[name] = plots.inline(name, title, description, paint, width=WIDTH, height=3.4 if errors else 2.1)
    return found


def _paint(curve: Curve, words: str, errors: bool, figure: Figure) -> None:
    panels = figure.subplots(2 if errors else 1, 1, sharex=True, squeeze=False)[:, 0]
    _latency(panels[0], curve)
    if errors:
        lost = _known(point.action_error_mean for point in curve.points)
        panels[1].plot([point.value for point in curve.points], lost, "s-", color=MISSED, markersize=4)
        panels[1].set_ylabel("mean error (std. dev.)")
        panels[1].set_ylim(bottom=0)
    panels[-1].set_xticks([point.value for point in curve.points])
    panels[-1].set_xlabel(words)
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
