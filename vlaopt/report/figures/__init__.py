"""The figures of a report, drawn from its facts. One file each; a figure whose facts are missing is not drawn."""

from __future__ import annotations

from vlaopt.report.facts import Facts
from vlaopt.report.figures import (
    breakdown,
    curves,
    joints,
    latency,
    precision,
    sensitivity,
    stages,
    timeline,
    trajectories,
)

FIGURES = (stages, latency, timeline, breakdown, curves, joints, trajectories, precision, sensitivity)


def draw(facts: Facts) -> dict[str, str]:
    """SVG elements by name, all that `facts` allow; equal facts give equal text.

    Raises EnvironmentProblem without matplotlib.
    """
    return {name: svg for figure in FIGURES for name, svg in figure.drawn(facts).items()}
