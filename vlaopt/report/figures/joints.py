"""The action error of each joint, with the limits that all of them together are held to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlaopt import plots
from vlaopt.benchmark.actions import ErrorStatistics
from vlaopt.report.facts import Facts
from vlaopt.report.figures.marks import MISSED, OTHER, RUNS, SMALL, WIDTH, action_names, scale_x
from vlaopt.report.numbers import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATISTICS = {"mean": ("o", RUNS), "p95": ("d", OTHER), "max": ("|", MISSED)}
LEAST, DECADES = 1e-12, 1e4
"""Standard deviations, and how far below the largest an error is drawn: 0 has no place on a logarithmic axis."""


def drawn(facts: Facts) -> dict[str, str]:
    """On golden observations, over executed steps."""
    if facts.error is None:
        return {}
    names, errors = action_names(facts.spec), facts.error.per_action
    worst = max(range(len(names)), key=lambda joint: errors[joint].mean)
    description = (
        f"Mean, 95th percentile and largest error of {len(names)} actions in standard deviations; on average "
        f"{names[worst]} is off most, by {number(errors[worst].mean)}."
    )
    told = [gate.name.removeprefix("golden: ") for gate in facts.gates]
    limits = {
        statistic: gate.limit
        for statistic in STATISTICS
        for name, gate in zip(told, facts.gates, strict=True)
        if name == f"{statistic} action error"
    }
    paint = partial(_paint, names, errors, limits)
    height = 0.9 + 0.21 * len(names)
    return {"joints": plots.inline("joints", "Error of each joint", description, paint, width=WIDTH, height=height)}


def _paint(
    names: Sequence[str], errors: Sequence[ErrorStatistics], limits: Mapping[str, float], figure: Figure
) -> None:
    """A row for each joint: the mean, the 95th percentile, the largest; a dashed line for each limit in sight."""
    axes = figure.subplots()
    largest = max(*(error.max for error in errors), LEAST)
    values = {name: np.array([max(getattr(error, name), largest / DECADES) for error in errors]) for name in STATISTICS}
    near = {name: limit for name, limit in limits.items() if 0 < limit <= 5 * largest}
    scale_x(axes, np.concatenate([*values.values(), list(near.values())]))
    rows = np.arange(len(names))
    axes.hlines(rows, values["mean"], values["max"], color=MISSED, linewidth=1.0, alpha=0.5)
    for name, (marker, colour) in STATISTICS.items():
        axes.plot(values[name], rows, marker, color=colour, markersize=5, label=name)
        if name in near:
            axes.axvline(near[name], color=colour, linewidth=1.0, linestyle=(0, (4, 3)), label=f"limit of {name}")
    axes.set_yticks(rows, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y")
    axes.set_xlabel("error of executed actions (standard deviations)")
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=6, fontsize=SMALL, borderpad=0, handlelength=1.2, columnspacing=1
    )
