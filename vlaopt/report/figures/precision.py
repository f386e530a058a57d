"""The precision that each layer runs in, component by component."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING

from vlaopt import plots
from vlaopt.report.facts import ComponentFacts, Facts, Layer
from vlaopt.report.figures.marks import SMALL, WIDTH, precision_colours, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELLS = 24
"""Layers in a line."""
ROWS = 20
"""Groups of a component at most: then coarser ones."""

_LABELS, _CELL, _LINE, _HEAD = 118.0, 9.6, 11.5, 24.0
"""Points: the column of names, a layer, a line of layers, a component's name."""

Group = tuple[str, Sequence[Layer]]


def drawn(facts: Facts) -> dict[str, str]:
    """A square for each layer in its order, in lines by the module that it is of."""
    components = [component for component in facts.components if component.layers]
    if not components:
        return {}
    counts = {component.name: _counts(component.layers) for component in components}
    description = "; ".join(
        f"{name}: " + ", ".join(f"{number} layers in {precision}" for precision, number in found.items())
        for name, found in counts.items()
    )
    grouped = {component.name: groups(component) for component in components}
    names = sorted({precision for found in counts.values() for precision in found})
    lines = sum(_lines(layers) for found in grouped.values() for _, layers in found)
    height = (_HEAD * (len(components) + 1) + _LINE * lines) / 72
    paint = partial(_paint, grouped, counts, names)
    title = "Precision of each layer"
    return {"precision": plots.inline("precision", title, description, paint, width=WIDTH, height=height)}


def groups(component: ComponentFacts) -> list[Group]:
    """The layers by the modules that they are of: as fine as fits in ROWS lines, never coarser than one group."""
    paths = [re.split(r"[./]", layer.name) for layer in component.layers]
    levels = zip(*(path[:-1] for path in paths), strict=False)
    shared = len(list(takewhile(lambda names: len(set(names)) == 1, levels)))
    deepest = max(len(path) for path in paths)
    for depth in range(deepest - 1, -1, -1):
        found: dict[str, list[Layer]] = {}
        for path, layer in zip(paths, component.layers, strict=True):
            found.setdefault(".".join(path[: min(depth, len(path) - 1)][shared:]), []).append(layer)
        if len(found) <= ROWS or depth == 0:
            break
    return list(found.items())


def _counts(layers: Iterable[Layer]) -> dict[str, int]:
    names = [_precision(layer) for layer in layers]
    return {name: names.count(name) for name in sorted(set(names))}


def _precision(layer: Layer) -> str:
    """What it runs in; of one that the engine does not name, what was planned."""
    return layer.runs or layer.scheme or "unknown"


def _lines(layers: Sequence[Layer]) -> int:
    return -(-len(layers) // CELLS)


def _paint(
    grouped: Mapping[str, Sequence[Group]],
    counts: Mapping[str, Mapping[str, int]],
    names: Sequence[str],
    figure: Figure,
) -> None:
    from matplotlib.patches import Patch

    colours = precision_colours(names)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, 72 * figure.get_figwidth())
    axes.set_ylim(72 * figure.get_figheight(), 0)
    handles = [Patch(color=colours[name], label=name) for name in names]
    axes.legend(
        handles=handles, loc="upper left", ncols=5, fontsize=SMALL, borderpad=0.2, handlelength=1, handleheight=1
    )
    y = _HEAD
    for component, found in grouped.items():
        words = ", ".join(f"{number} {name}" for name, number in counts[component].items())
        axes.text(2, y + 0.6 * _HEAD, component, fontweight="bold", fontsize=9)
        axes.text(_LABELS, y + 0.6 * _HEAD, words, fontsize=SMALL)
        y += _HEAD
        for label, layers in found:
            axes.text(2, y + 0.55 * _CELL, shortened(label or "in no module"), fontsize=SMALL, va="center")
            _cells(axes, layers, y, colours)
            y += _LINE * _lines(layers)


def _cells(axes: Axes, layers: Sequence[Layer], top: float, colours: Mapping[str, str]) -> None:
    """One path for each colour, so that a thousand layers stay small; pale where only the plan is known."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    squares: dict[tuple[str, float], list[Path]] = {}
    for number, layer in enumerate(layers):
        x, y = _LABELS + _CELL * (number % CELLS), top + _LINE * (number // CELLS)
        side = _CELL - 1.2
        corners = [(x, y), (x + side, y), (x + side, y + side), (x, y + side), (x, y)]
        look = (colours[_precision(layer)], 1.0 if layer.runs else 0.4)
        squares.setdefault(look, []).append(Path(corners, closed=True))
    for (colour, alpha), paths in squares.items():
        axes.add_patch(PathPatch(Path.make_compound_path(*paths), facecolor=colour, alpha=alpha, linewidth=0))
