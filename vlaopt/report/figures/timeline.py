"""Latency over time, every tick in it, with what the machine did meanwhile on the same axis."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vlaopt import plots
from vlaopt.benchmark.record import BenchRecord, Timeline
from vlaopt.benchmark.statistics import FLOATS
from vlaopt.plots import COLOURS, INK
from vlaopt.report.facts import Facts
from vlaopt.report.figures.marks import LEAST_MS, MISSED, RUNS, SMALL, WIDTH, apart, label_log, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INTEGERS = np.ndarray[Any, np.dtype[np.int64]]
COLUMNS, SINGLY = 240, 960
"""Columns that more ticks than `SINGLY` are gathered in: narrower ones could not be told apart on a phone."""

_MACHINE = {"clock_mhz": "MHz", "temperature_c": "°C", "power_w": "W"}
"""What is drawn below, if the machine told it, and its unit."""

_LINES = (COLOURS[0], COLOURS[2], COLOURS[3], COLOURS[4])


def drawn(facts: Facts) -> dict[str, str]:
    """The paced run from its first tick to its last."""
    record = facts.record
    if record is None:
        return {}
    paced = record.paced
    description = (
        f"Latency of each of {paced.ticks} ticks at {record.settings.hz:g} Hz over time: {paced.misses} missed the "
        f"deadline of {paced.deadline_ms:.4g} ms, {len(paced.dropped)} of them were dropped."
    )
    rows = _rows(record.timeline)
    height = 2.2 + 0.75 * len(rows)
    paint = partial(_paint, record, rows)
    return {"timeline": plots.inline("timeline", "Latency over time", description, paint, width=WIDTH, height=height)}


def columns_of(count: int, most: int) -> INTEGERS:
    """The edges of at most `most` columns of nearly equal width that `count` neighbours are gathered in."""
    return np.linspace(0, count, min(most, count) + 1).astype(np.int64)


def envelope(values: FLOATS, edges: INTEGERS) -> tuple[FLOATS, FLOATS]:
    """The least and the largest value of each column. No extreme is lost; NaN is skipped."""
    return np.fmin.reduceat(values, edges[:-1]), np.fmax.reduceat(values, edges[:-1])


def _rows(timeline: Timeline | None) -> dict[str, dict[str, Sequence[float | None]]]:
    """The series of each kind that have a value, by what is measured."""
    if timeline is None:
        return {}
    found: dict[str, dict[str, Sequence[float | None]]] = {}
    for name, values in timeline.series.items():
        kind, _, of = name.partition(".")
        if kind in _MACHINE and any(value is not None for value in values):
            found.setdefault(kind, {})[of] = values
    return {kind: found[kind] for kind in _MACHINE if kind in found}


def _paint(record: BenchRecord, rows: dict[str, dict[str, Sequence[float | None]]], figure: Figure) -> None:
    heights = [2.2, *(1.0 for _ in rows)]
    grid = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    _latencies(grid[0], record)
    for axes, (kind, series) in zip(grid[1:], rows.items(), strict=True):
        assert record.timeline is not None
        _machine(axes, record.timeline.seconds, series, _MACHINE[kind])
    grid[-1].set_xlabel("time (s)")
    grid[-1].set_xlim(0, record.paced.ticks / record.settings.hz)
    grid[-1].locator_params(axis="x", nbins=7)
    figure.align_ylabels()


def _latencies(axes: Axes, record: BenchRecord) -> None:
    """The median of each column as a line, its middle 80 % in the colour, its slowest tick pale; late in another."""
    paced, hz = record.paced, record.settings.hz
    samples = np.maximum(np.asarray(paced.samples_ms, np.float64), LEAST_MS)
    edges = columns_of(len(samples), COLUMNS if len(samples) > SINGLY else SINGLY)
    largest = envelope(samples, edges)[1]
    columns = np.split(samples, edges[1:-1])
    low, middle, high = (np.array([np.quantile(column, q) for column in columns]) for q in (0.1, 0.5, 0.9))
    bottom = _scale(axes, samples, paced.deadline_ms)
    in_time, middle_in_time = np.minimum(largest, paced.deadline_ms), np.minimum(high, paced.deadline_ms)
    axes.stairs(in_time, edges / hz, baseline=bottom, fill=True, color=RUNS, alpha=0.3)
    if len(columns) < len(samples):
        axes.stairs(
            middle_in_time, edges / hz, baseline=np.minimum(low, middle_in_time), fill=True, color=RUNS, alpha=0.5
        )
    axes.stairs(middle, edges / hz, baseline=None, color=RUNS, linewidth=1.0)
    for top, alpha in ((largest, 0.45), (high, 1.0)):
        if (top > paced.deadline_ms).any():
            late = np.where(top > paced.deadline_ms, top, np.nan)
            axes.stairs(late, edges / hz, baseline=paced.deadline_ms, fill=True, color=MISSED, alpha=alpha)
    if paced.dropped:
        at = np.unique(np.searchsorted(edges, paced.dropped, side="right") - 1)
        middles = (edges[at] + edges[at + 1]) / 2 / hz
        axes.plot(middles, np.ones(len(at)), "v", color=MISSED, markersize=4, transform=axes.get_xaxis_transform())
    axes.axhline(paced.deadline_ms, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_ylabel("latency (ms)")
    _told_above(axes, record)


def _scale(axes: Axes, samples: FLOATS, deadline_ms: float) -> float:
    """Room for all ticks and the deadline; gives where the axis begins."""
    top = max(float(samples.max()), deadline_ms)
    if not apart(float(np.median(samples)), top):
        axes.set_ylim(0, 1.08 * top)
        return 0.0
    bottom = 0.7 * min(float(samples.min()), deadline_ms)
    axes.set_yscale("log")
    axes.set_ylim(bottom, 1.3 * top)
    label_log(axes.yaxis)
    return bottom


def _told_above(axes: Axes, record: BenchRecord) -> None:
    paced = record.paced
    dropped = f", {len(paced.dropped)} never started ▾" if paced.dropped else ""
    axes.set_title(f"deadline {paced.deadline_ms:.4g} ms", fontsize=SMALL)
    axes.set_title(f"{paced.misses} of {paced.ticks} missed{dropped}", loc="right", fontsize=SMALL)


def _machine(axes: Axes, seconds: Sequence[float], series: dict[str, Sequence[float | None]], unit: str) -> None:
    """A line for each of few series, which are named; the extent of all where there are more, such as cores.

    A label that begins with _ is matplotlib's own and not shown.
    """
    moments = np.array(seconds, np.float64)
    values = {name: np.array(series[name], np.float64) for name in sorted(series)}
    if len(values) > len(_LINES):
        label = f"{len(values)}, such as {shortened(min(values))}"
        _band(axes, moments, np.stack(list(values.values())), RUNS, label)
    else:
        for colour, (name, one) in zip(_LINES, values.items(), strict=False):
            _band(axes, moments, one[None], colour, shortened(name.lstrip("_")) or unit)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 0.92), ncols=len(_LINES), fontsize=SMALL, borderpad=0, handlelength=1.2
    )
    axes.set_ylabel(unit)
    axes.margins(y=0.2)
    axes.locator_params(axis="y", nbins=3)


def _band(axes: Axes, seconds: FLOATS, values: FLOATS, colour: str, label: str) -> None:
    """From the least to the largest of `values` [series, moments] in each column, and the middle as a line."""
    edges = columns_of(len(seconds), COLUMNS // 2)
    least, _ = envelope(np.fmin.reduce(values), edges)
    _, largest = envelope(np.fmax.reduce(values), edges)
    at = seconds[edges[:-1]]
    axes.fill_between(at, least, largest, color=colour, alpha=0.3, linewidth=0)
    axes.plot(at, (least + largest) / 2, color=colour, linewidth=1.2, label=label)
