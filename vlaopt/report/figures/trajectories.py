"""Example trajectories: what the optimised policy does on a golden sample, over what the reference does."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from vlaopt import plots
from vlaopt.plots import INK
from vlaopt.report.facts import Example, Facts
from vlaopt.report.figures.marks import MISSED, MUTED, SMALL, WIDTH, action_names
from vlaopt.report.numbers import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW = 0.85
"""Inches."""
LEAST_SPAN = 0.5
"""Standard deviations that an axis shows at least: rounding must not look like a movement."""


def drawn(facts: Facts) -> dict[str, str]:
    """A figure for each example."""
    found = {}
    for example in facts.examples:
        name = f"trajectories-{example.sample}"
        description = (
            f"Actions of the optimised policy and of the reference over {len(example.actions)} steps of a chunk, joint "
            f"by joint; their mean error is {number(example.error)} standard deviations."
        )
        columns = min(facts.spec.action_dim, 2 if facts.spec.action_dim <= 4 else 3)
        height = 0.5 + ROW * -(-facts.spec.action_dim // columns)
        paint = partial(_paint, facts, example, columns)
        title = f"Golden sample {example.sample}"
        found[name] = plots.inline(name, title, description, paint, width=WIDTH, height=height)
    return found


def _paint(facts: Facts, example: Example, columns: int, figure: Figure) -> None:
    names = action_names(facts.spec)
    grid = figure.subplots(-(-len(names) // columns), columns, sharex=True, squeeze=False)
    for joint, axes in enumerate(grid.flat):
        if joint >= len(names):
            axes.set_axis_off()
            continue
        _joint(axes, example, joint, facts.spec.chunk.n_action_steps)
        _span(axes, LEAST_SPAN * facts.deviations[joint])
        axes.set_title(names[joint], fontsize=SMALL, pad=2)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, fontsize=SMALL, handlelength=1.5)
    figure.supxlabel("step of the chunk", fontsize=9)
    figure.supylabel("action (robot's units)", fontsize=9)


def _joint(axes: Axes, example: Example, joint: int, executed: int) -> None:
    """The reference broad and pale below, so that two equal lines are both seen; what is not executed is shaded."""
    steps = np.arange(len(example.actions))
    marker = "." if len(steps) == 1 else None
    axes.plot(
        steps, example.reference[:, joint], color=MUTED, linewidth=3.5, alpha=0.55, marker=marker, label="reference"
    )
    axes.plot(steps, example.actions[:, joint], color=MISSED, linewidth=1.1, marker=marker, label="optimised")
    if executed < len(steps):
        axes.axvspan(executed - 0.5, len(steps) - 0.5, color=INK, alpha=0.06, linewidth=0, label="not executed")
    axes.set_xlim(-0.5, len(steps) - 0.5)
    axes.locator_params(axis="y", nbins=3)
    axes.locator_params(axis="x", nbins=4, integer=True)


def _span(axes: Axes, least: float) -> None:
    """Widens the vertical axis to `least`, about its middle."""
    low, high = axes.get_ylim()
    room = max(0.0, least - (high - low)) / 2
    axes.set_ylim(low - room, high + room)
