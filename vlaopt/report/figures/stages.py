"""Before and after: size, latency and error of each form that the policy took."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from vlaopt import plots
from vlaopt.report.facts import Facts, Form
from vlaopt.report.figures.marks import MISSED, MUTED, RUNS, SMALL, WIDTH, shortened
from vlaopt.report.numbers import milliseconds, number, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure = tuple[str, Callable[[Form], float | None], Callable[[float], str], str]
"""What a panel shows: its title, the value of a form, its words, its colour."""

_MEASURES: tuple[Measure, ...] = (
    ("size", lambda form: form.bytes, lambda count: size(int(count)), MUTED),
    ("latency, p50", lambda form: form.latency_ms, milliseconds, RUNS),
    ("mean error (std. dev.)", lambda form: form.error.executed.mean if form.error else None, number, MISSED),
)


def drawn(facts: Facts) -> dict[str, str]:
    """A row for each form, the reference first."""
    forms = facts.forms
    if not forms:
        return {}
    description = "; ".join(
        f"{form.name}: " + ", ".join(words(value) for _, of, words, _ in _MEASURES if (value := of(form)) is not None)
        for form in forms
    )
    paint = partial(_paint, forms)
    height = 0.4 + 0.36 * len(forms)
    return {"stages": plots.inline("stages", "Before and after", description, paint, width=WIDTH, height=height)}


def _paint(forms: Sequence[Form], figure: Figure) -> None:
    known = [measure for measure in _MEASURES if any(measure[1](form) is not None for form in forms)]
    panels = figure.subplots(1, len(known), sharey=True, squeeze=False)[0]
    for axes, measure in zip(panels, known, strict=True):
        _panel(axes, forms, *measure)
    panels[0].set_yticks(range(len(forms)), [shortened(form.name) for form in forms])
    panels[0].set_ylim(len(forms) - 0.4, -0.6)


def _panel(
    axes: Axes,
    forms: Sequence[Form],
    title: str,
    of: Callable[[Form], float | None],
    words: Callable[[float], str],
    colour: str,
) -> None:
    """A bar for each form, its value in words above it."""
    for row, value in enumerate(of(form) for form in forms):
        if value is not None:
            axes.barh(row + 0.2, value, height=0.26, color=colour)
        axes.annotate(
            "–" if value is None else words(value), (0, row - 0.08), fontsize=SMALL, va="center", annotation_clip=False
        )
    axes.set_title(title, fontsize=SMALL)
    axes.set_xlim(left=0)
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["bottom", "left"]].set_visible(False)
