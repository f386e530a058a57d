"""What parts of a policy cost in action error, and what they gain in time, each alone in another precision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlaopt import plots
from vlaopt.report.facts import Facts
from vlaopt.report.figures.marks import MISSED, MUTED, RUNS, SMALL, WIDTH, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST = 14
"""Parts that are drawn: those that matter most."""


@dataclass(frozen=True)
class Cost:
    """What one part changes: the mean action error in standard deviations, and milliseconds of a chunk."""

    part: str
    error: float
    ms: float


def drawn(facts: Facts) -> dict[str, str]:
    """What each part of a search for mixed precision, moved alone, takes off the error and adds in time."""
    start = next((trial.error for trial in facts.trials if not trial.moved and trial.error is not None), None)
    if start is None:
        return {}
    costs = {
        f"{scope} in {scheme}": Cost(f"{scope} in {scheme}", trial.error - start, trial.against_uniform_ms)
        for trial in facts.trials
        if len(trial.moved) == 1 and trial.error is not None and trial.against_uniform_ms is not None
        for scope, scheme in trial.moved.items()
    }
    if not costs:
        return {}
    shown = sorted(costs.values(), key=lambda cost: cost.error)[:MOST]
    description = "; ".join(f"{cost.part}: error {cost.error:+.2g}, {cost.ms:+.2g} ms" for cost in shown)
    paint = partial(paint_costs, shown, "change of the mean error", "change of the time (ms)")
    title = "What each part costs, alone in another precision"
    return {"sensitivity": plots.inline("sensitivity", title, description, paint, width=WIDTH, height=height(shown))}


def height(costs: Sequence[Cost]) -> float:
    """Inches for `paint_costs`."""
    return 0.5 + 0.36 * len(costs)


def paint_costs(costs: Sequence[Cost], error: str, ms: str, figure: Figure) -> None:
    """A row for each part: the error and the milliseconds beside each other; `error` and `ms` say what they are."""
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, [cost.error for cost in costs], MISSED, error)
    _bars(right, [cost.ms for cost in costs], RUNS, ms)
    for row, cost in enumerate(costs):
        left.annotate(
            shortened(cost.part, 40),
            (0, row - 0.3),
            xycoords=("axes fraction", "data"),
            fontsize=SMALL,
            va="center",
            annotation_clip=False,
        ).set_in_layout(False)
    left.set_ylim(len(costs) - 0.4, -0.7)


def _bars(axes: Axes, values: Sequence[float], colour: str, words: str) -> None:
    rows = np.arange(len(values)) + 0.12
    axes.barh(rows, values, height=0.36, color=colour)
    axes.vlines(np.zeros(len(values)), rows - 0.22, rows + 0.22, color=MUTED, linewidth=0.8)
    low, high = min([0.0, *values]), max([0.0, *values])
    room = 0.4 * (high - low) or 1.0
    axes.set_xlim(low - room, high + room)
    for row, value in zip(rows, values, strict=True):
        side = 1 if value >= 0 else -1
        axes.annotate(
            f"{value:+.2g}",
            (value, row),
            xytext=(3 * side, 0),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=SMALL,
        ).set_in_layout(False)
    axes.set_title(words, fontsize=SMALL)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
