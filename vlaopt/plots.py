"""Plots for people: one style, and SVG files whose bytes follow from the data alone. Knows nothing of policies."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlaopt.files import replace_file
from vlaopt.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by colour-blind people too (M. Okabe, K. Ito, "Color Universal Design", 2008)."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""As many as colours, so that a plot can be read without them."""

_STYLE: dict[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    # Text stays text: small files, words that can be searched and selected. DejaVu is wide, so others fit its places.
    "svg.fonttype": "none",
    "svg.hashsalt": "vlaopt",
}


@contextmanager
def drawn(path: Path, title: str, *, width: float = 9.0, height: float = 5.0) -> Iterator[Figure]:
    """An empty figure of `width` × `height` inches to draw on; when the block ends well it is the SVG file at `path`.

    Equal drawings give equal bytes. Raises EnvironmentProblem without matplotlib, or when `path` cannot be written.
    """
    matplotlib, figures = require("matplotlib", "plot"), require("matplotlib.figure", "plot")
    # matplotlib's defaults, not the user's matplotlibrc.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)})
        figure = figures.Figure(figsize=(width, height))
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Title": title, "Date": None, "Creator": None})
    replace_file(path, file.getvalue())
