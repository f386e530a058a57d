"""How an artifact's tensors were calibrated, told to a person: a table and a plot, the worst first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vlaopt.cli import terminal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vlaopt.quantization.fit import CalibrationReport, TensorFit

ROWS, HISTOGRAMS, LOOPS = 20, 6, 3
"""How many tensors the table, the plot's histograms and its loop steps show."""
_COLUMNS = 3
_LEGEND = (
    "noise: RMS error of symmetric 8-bit numbers over the range, relative to the tensor's RMS",
    "saturated: share of the values beyond the range; outliers: largest |x| over the 99.9th percentile",
    "typical: median |x| in steps of those numbers, of 127; below 1 most values become 0",
)


def show(report: CalibrationReport) -> None:
    """The table."""
    worst = report.worst_first()
    terminal.give(f"{report.calibrator} on {report.samples} samples, loop steps: {report.steps}, {len(worst)} tensors")
    numbers = ("range", "seen", "noise", "saturated", "outliers", "typical")
    table = terminal.table("tensor", "taken by", *numbers, "largest |x| by step", right=numbers)
    for component, tensor, fit in worst[:ROWS]:
        table.add_row(
            f"{component}: {tensor}",
            _first_of(fit.taken_by),
            _interval(*fit.range),
            _interval(*fit.seen),
            f"{fit.noise:.2%}",
            f"{fit.saturated:.3%}",
            f"{fit.outliers:.3g}",
            f"{fit.typical:.3g}",
            _by_step(fit),
        )
    terminal.give_table(table)
    for line in _LEGEND:
        terminal.give_words(line)
    if len(worst) > ROWS:
        terminal.give_words(f"{len(worst) - ROWS} more tensors with less noise; --json has all")


def plot(report: CalibrationReport, path: Path) -> None:
    """Write the plot to `path`, an SVG file."""
    from vlaopt import plots

    worst = report.worst_first()[:HISTOGRAMS]
    loops = report.loops_first()[:LOOPS]
    columns = max(1, min(_COLUMNS, len(worst)))
    rows = -(-len(worst) // columns) + bool(loops)
    title = f"Calibration: {report.calibrator} on {report.samples} samples; the tensors that 8 bits hold worst"
    with plots.drawn(path, title, width=1.0 + 4.0 * columns, height=0.6 + 2.9 * rows) as figure:
        grid = figure.subplots(rows, columns, squeeze=False)
        places = list(grid[: rows - bool(loops)].flat)
        for place, one in zip(places, worst, strict=False):
            _histogram(place, *one, colours=plots.COLOURS)
        for place, one in zip(grid[-1] if loops else (), loops, strict=False):
            _steps(place, *one, merged=report.steps, colours=plots.COLOURS)
        for unused in (*places[len(worst) :], *(grid[-1][len(loops) :] if loops else ())):
            unused.set_axis_off()


def _histogram(axes: Axes, component: str, tensor: str, fit: TensorFit, *, colours: Sequence[str]) -> None:
    largest, cut = _largest(fit.seen), _largest(fit.range)
    width = largest / len(fit.bars) or 1.0
    edges = [width * place for place in range(len(fit.bars) + 1)]
    axes.stairs(fit.bars, edges, fill=True, color=colours[5])
    axes.axvline(cut, color=colours[1])
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.5)
    told = f"noise {fit.noise:.2%}, {fit.saturated:.3%} beyond {cut:.3g}"
    axes.set_title(f"{_named(component, tensor, fit)}\n{told}")
    axes.set_xlabel("|x|")
    axes.set_ylabel("values")


def _steps(axes: Axes, component: str, tensor: str, fit: TensorFit, *, merged: str, colours: Sequence[str]) -> None:
    numbers = range(len(fit.steps))
    lows, highs = zip(*(step.seen for step in fit.steps), strict=True)
    axes.fill_between(numbers, lows, highs, color=colours[5], alpha=0.5, step="mid", label="seen")
    own = [step.range for step in fit.steps if step.range is not None]
    for side in range(2 if own else 0):
        label = "each step's range" if side else None
        axes.plot(numbers, [pair[side] for pair in own], color=colours[0], marker=".", label=label)
    for side, limit in enumerate(fit.range):
        axes.axhline(limit, color=colours[1], label=f"range, steps {merged}" if side else None)
    axes.set_title(f"{_named(component, tensor, fit)}\nlargest |x| by step: {_by_step(fit)}")
    axes.set_xlabel("loop step")
    axes.set_ylabel("x")
    axes.set_xticks(numbers[:: -(-len(numbers) // 10)])
    axes.legend(loc="center")


def _largest(pair: tuple[float, float]) -> float:
    return max(-pair[0], pair[1])


def _first_of(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more}" if names else ""


def _interval(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"


def _by_step(fit: TensorFit) -> str:
    if not fit.steps:
        return ""
    largest = [_largest(step.seen) for step in fit.steps]
    return f"{min(largest):.3g} to {max(largest):.3g} over {len(largest)}"


def _named(component: str, tensor: str, fit: TensorFit, width: int = 40) -> str:
    """The place of a tensor, told by the first node that takes it, whose name a rule of the recipe matches."""
    place = f"{component}.{fit.taken_by[0]}" if fit.taken_by else f"{component}: {tensor}"
    return place if len(place) <= width else f"…{place[1 - width :]}"
