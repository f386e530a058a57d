"""Where the time of a chunk goes: processors, components and the loop, each from where the one before it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vlaopt import plots
from vlaopt.benchmark.record import Breakdown
from vlaopt.report.facts import Facts
from vlaopt.report.figures.marks import MUTED, PALE, RUNS, SMALL, WIDTH, shortened
from vlaopt.report.numbers import milliseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Part:
    """A bar: `ms` of a chunk, of which the device computes `device_ms` and copies take `copies_ms`."""

    name: str
    ms: float
    colour: str
    device_ms: float | None = None
    copies_ms: float | None = None


def drawn(facts: Facts) -> dict[str, str]:
    """The breakdown of a chunk."""
    breakdown = facts.record.breakdown if facts.record else None
    if breakdown is None:
        return {}
    parts = _parts(breakdown, [component.name for component in facts.components])
    words = ", ".join(f"{part.name} {milliseconds(part.ms)}" for part in parts)
    description = f"Of {milliseconds(breakdown.whole_ms)} for a whole chunk: {words}."
    paint = partial(_paint, parts, breakdown)
    height = 0.7 + 0.3 * (len(parts) + 1)
    return {
        "breakdown": plots.inline("breakdown", "Where the time goes", description, paint, width=WIDTH, height=height)
    }


def _parts(breakdown: Breakdown, order: Sequence[str]) -> list[Part]:
    """What comes before the components, these as they run, and what is left."""
    times = breakdown.components
    names = [*(name for name in order if name in times), *(name for name in times if name not in order)]
    components = [
        Part(_called(name, time.calls), time.wall_ms, RUNS, time.device_ms, time.copies_ms)
        for name, time in ((name, times[name]) for name in names)
    ]
    processors = Part("processors", breakdown.processors_ms, MUTED)
    return [processors, *components, Part("loop", breakdown.loop_ms, MUTED)]


def _called(name: str, calls: float) -> str:
    return shortened(name) if calls == 1 else f"{shortened(name)} ×{calls:g}"


def _paint(parts: Sequence[Part], breakdown: Breakdown, figure: Figure) -> None:
    axes = figure.subplots()
    ends = [sum(part.ms for part in parts[: number + 1]) for number in range(len(parts))]
    right = max(ends[-1], breakdown.whole_ms) or 1.0
    for row, (part, end) in enumerate(zip(parts, ends, strict=True)):
        _bar(axes, row, part, end - part.ms)
        _label(axes, end, row, milliseconds(part.ms))
    axes.barh(len(parts), breakdown.whole_ms, height=0.5, color="none", edgecolor=MUTED)
    _label(axes, breakdown.whole_ms, len(parts), milliseconds(breakdown.whole_ms))
    axes.set_yticks(range(len(parts) + 1), [*(part.name for part in parts), "whole chunk"])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(parts) + 0.5, -0.6)
    axes.set_xlim(0, 1.18 * right)
    axes.set_xlabel("time of a chunk (ms)")
    if any(part.device_ms is not None for part in parts):
        handles, labels = axes.get_legend_handles_labels()
        shown = dict(zip(labels, handles, strict=True))
        axes.legend(
            shown.values(),
            shown.keys(),
            loc="lower left",
            bbox_to_anchor=(0, 1),
            ncols=len(shown),
            fontsize=SMALL,
            borderpad=0,
            handlelength=1.2,
        )


def _bar(axes: Axes, row: int, part: Part, start: float) -> None:
    """The wall time pale where the device's is known, with that and the copies inside it; solid otherwise."""
    alpha = 0.35 if part.device_ms is not None else 1.0
    axes.barh(row, part.ms, left=start, height=0.6, color=part.colour, alpha=alpha, label="wall" if alpha < 1 else None)
    if part.device_ms is not None:
        axes.barh(row, part.device_ms, left=start, height=0.3, color=RUNS, label="on the device")
    if part.copies_ms:
        axes.barh(row, part.copies_ms, left=start + (part.device_ms or 0), height=0.3, color=PALE, label="copies")


def _label(axes: Axes, x: float, row: int, words: str) -> None:
    axes.annotate(words, (x, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=SMALL)
