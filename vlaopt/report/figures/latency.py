"""The distribution of latencies: what most chunks take, and how far the slow ones are from the deadline."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlaopt import plots
from vlaopt.benchmark.record import BenchRecord
from vlaopt.benchmark.statistics import FLOATS, Distribution
from vlaopt.report.facts import Facts
from vlaopt.report.figures.marks import LEAST_MS, OTHER, RUNS, SMALL, WIDTH, limit_line, scale_x, share_of_width
from vlaopt.report.numbers import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BINS = 60


def drawn(facts: Facts) -> dict[str, str]:
    """Paced and back-to-back over each other, their percentiles with intervals below."""
    record = facts.record
    if record is None:
        return {}
    paced, together = record.paced.latency_ms, record.back_to_back.latency_ms
    description = (
        f"Histogram of {paced.count} paced and {together.count} back-to-back latencies. Paced they are "
        f"{number(paced.min)} to {number(paced.max)} ms, the deadline is {record.paced.deadline_ms:.4g} ms."
    )
    paint = partial(_paint, record)
    return {"latency": plots.inline("latency", "Latency of a chunk", description, paint, width=WIDTH, height=3.4)}


def _paint(record: BenchRecord, figure: Figure) -> None:
    deadline = record.paced.deadline_ms
    series = [
        (f"paced at {record.settings.hz:g} Hz", RUNS, record.paced.samples_ms, record.paced.latency_ms),
        ("back-to-back", OTHER, record.back_to_back.samples_ms, record.back_to_back.latency_ms),
    ]
    samples = [np.maximum(np.asarray(values, np.float64), LEAST_MS) for _, _, values, _ in series]
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    edges = scale_x(below, np.concatenate([*samples, [deadline]]), BINS)
    for (label, colour, _, distribution), values in zip(series, samples, strict=True):
        _histogram(above, values, edges, colour, label)
        _percentiles(below, distribution, deadline, colour, beside=0.18 if colour == RUNS else -0.18)
    above.set_ylim(bottom=0)
    above.set_ylabel("% of chunks")
    above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, borderpad=0, handlelength=1.2)
    limit_line(above, deadline, f"deadline {deadline:.4g} ms")
    limit_line(below, deadline, "")
    below.set_xlabel("latency (ms)")


def _histogram(axes: Axes, values: FLOATS, edges: FLOATS, colour: str, label: str) -> None:
    """Shares of chunks; a bar too low to be seen has a mark on the axis, so that a single slow chunk shows."""
    counts, _ = np.histogram(values, edges)
    axes.stairs(100 * counts / len(values), edges, fill=True, color=colour, alpha=0.35, label=label)
    axes.stairs(100 * counts / len(values), edges, color=colour, linewidth=1.0)
    low = (counts > 0) & (counts < 0.02 * counts.max())
    if low.any():
        middles = (edges[:-1] + edges[1:]) / 2
        axes.plot(middles[low], np.zeros(low.sum()), "|", color=colour, markersize=6, clip_on=False)


def _percentiles(axes: Axes, distribution: Distribution, deadline: float, colour: str, *, beside: float) -> None:
    """A row for each percentile that can be stated: the value, its interval as a line; the largest as a mark."""
    rows = {"p50": distribution.p50, "p90": distribution.p90, "p99": distribution.p99, "p99.9": distribution.p99_9}
    free = deadline if share_of_width(axes, deadline) > 0.85 else axes.get_xlim()[1]
    for place, one in enumerate(rows.values()):
        row = place - beside
        if one.value is None or one.low is None or one.high is None:
            if beside > 0:
                _label(axes, free, row, "too few samples")
            continue
        axes.plot([one.low, one.high], [row, row], color=colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
        axes.plot([one.value], [row], "o", color=colour, markersize=4)
        if beside > 0:
            _label(axes, one.high, row, number(one.value))
    axes.plot([distribution.max], [len(rows) - beside], "|", color=colour, markersize=8, markeredgewidth=2)
    if beside > 0:
        _label(axes, distribution.max, len(rows) - beside, number(distribution.max))
    axes.set_yticks(range(len(rows) + 1), [*rows, "max"])
    axes.set_ylim(len(rows) + 0.5, -0.6)
    axes.tick_params(axis="y", length=0)


def _label(axes: Axes, x: float, row: float, words: str) -> None:
    side = -1 if share_of_width(axes, x) > 0.85 else 1
    axes.annotate(
        words,
        (x, row),
        xytext=(5 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=SMALL,
    ).set_in_layout(False)
