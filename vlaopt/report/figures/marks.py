"""What the figures have in common: what a colour means, what an action is called, how an axis is scaled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.benchmark.statistics import FLOATS
from vlaopt.plots import COLOURS, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

WIDTH = 5.0
"""Inches, 360 points: as wide as a phone, where the figures' 8 points are then still 7 pixels."""

SMALL = 8
"""Points. Nothing is smaller."""

RUNS, MISSED, OTHER, PALE = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[5]
"""The policy that runs; what was missed; a second series; the extent of what `RUNS` is the middle of."""

LEAST_MS = 0.001
"""Samples are rounded to 1 µs, and 0 has no place on a logarithmic axis."""

MUTED = "#888888"
"""The reference, and what only helps to read."""

_PRECISIONS = {
    "fp32": MUTED,
    "fp16": PALE,
    "bf16": OTHER,
    "int8": RUNS,
    "int8-dynamic": "#882255",
    "int8-weights": COLOURS[4],
    "int4-weights": "#DDCC77",
    "fp8": COLOURS[3],
    "nvfp4": "#AA4499",
}
"""Those that are not of COLOURS are of P. Tol, "Colour Schemes" (2021), the scheme muted."""
_APART = 6.0


def precision_colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each precision, the same in all figures; rare ones share what colours are left."""
    rare = [name for name in names if name not in _PRECISIONS]
    left = (MISSED, INK)
    return {name: _PRECISIONS.get(name) or left[rare.index(name) % len(left)] for name in names}


def shortened(name: str, most: int = 20) -> str:
    """The end of a name that is too long for its place."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def action_names(spec: PolicySpec) -> list[str]:
    """A name for every action; a policy names none."""
    return ["gripper" if joint == spec.gripper else f"action {joint}" for joint in range(spec.action_dim)]


def apart(low: float, high: float) -> bool:
    """Whether two positive values are so far apart that a linear axis would press the smaller ones together."""
    return high > _APART * low


def scale_x(axes: Axes, values: FLOATS, bins: int = 1) -> FLOATS:
    """Make room for all of `values` (positive) and give the edges of `bins` bins; logarithmic where they lie far apart.

    A tail of fifty times the median would leave nothing of the rest on a linear axis.
    """
    low, high = float(values.min()), float(values.max())
    if apart(low, high):
        low, high = low / 1.15, high * 1.15
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        label_log(axes.xaxis)
        return np.geomspace(low, high, bins + 1)
    room = 0.04 * (high - low) or 0.05 * high
    axes.set_xlim(low - room, high + room)
    return np.linspace(low - room, high + room, bins + 1)


def label_log(axis: Axis) -> None:
    """Plain numbers at 1, 2 and 5 of each decade; at 1 alone where there are many decades."""
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def share_of_width(axes: Axes, x: float) -> float:
    """How far to the right `x` is: 0 at the left end of the axes, 1 at the right."""
    place, _ = axes.transAxes.inverted().transform(axes.transData.transform((x, axes.get_ylim()[0])))
    return float(place)


def limit_line(axes: Axes, value: float, words: str) -> None:
    """A vertical limit across the axes, named at its top on the side where there is room."""
    axes.axvline(value, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    left = share_of_width(axes, value) > 0.5
    axes.annotate(
        words,
        (value, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if left else 4, -1),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        fontsize=SMALL,
    ).set_in_layout(False)
