"""Plots for people: one style, and SVG whose bytes follow from the data alone. Knows nothing of policies."""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
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

INK = "#141415"
"""What is black here becomes the colour of the text around it in a plot that is part of a page, light or dark."""

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
    # Names come from elsewhere, and a dollar sign in them is no formula.
    "text.parse_math": False,
    "svg.hashsalt": "vlaopt",
}

_IN_A_PAGE: dict[str, Any] = {
    "axes.facecolor": "none",
    "axes.grid": False,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlecolor": INK,
    "axes.titlesize": 9,
    "figure.facecolor": "none",
    "grid.alpha": 0.15,
    "grid.color": INK,
    "legend.fontsize": 9,
    "text.color": INK,
    "xtick.labelcolor": INK,
    "xtick.color": "#888888",
    "xtick.labelsize": 8,
    "ytick.color": "#888888",
    "ytick.labelcolor": INK,
    "ytick.labelsize": 8,
}


_SVG = "http://www.w3.org/2000/svg"
_REFERENCE = re.compile(r"(?:^|(?<=url\())#([\w.-]+)")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
_LONG = re.compile(r"\d+\.\d{3,}")
_FONTS = re.compile(r"'DejaVu Sans'[^;]*")


@contextmanager
def drawn(path: Path, title: str, *, width: float = 9.0, height: float = 5.0) -> Iterator[Figure]:
    """An empty figure of `width` × `height` inches to draw on; when the block ends well it is the SVG file at `path`.

    Equal drawings give equal bytes. Raises EnvironmentProblem without matplotlib, or when `path` cannot be written.
    """
    with _figure(_STYLE, width, height) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield figure
        data = _saved(figure, Title=title)
    replace_file(path, data)


def inline(
    name: str,
    title: str,
    description: str,
    paint: Callable[[Figure], None],
    *,
    width: float = 5.0,
    height: float = 2.8,
) -> str:
    """What `paint` draws on an empty figure of `width` × `height` inches, as an SVG element for a page.

    It is as wide as its place, see-through, in the page's font and colour of text; `title` and `description` are for
    those who hear it. `name` is in all of its ids, so that plots of other names can stand on the same page. Equal
    drawings give equal text. Raises EnvironmentProblem without matplotlib.
    """
    with _figure({**_STYLE, **_IN_A_PAGE}, width, height) as figure:
        paint(figure)
        data = _saved(figure)
    return _embedded(data, name, title, description)


@contextmanager
def _figure(style: dict[str, Any], width: float, height: float) -> Iterator[Figure]:
    """matplotlib's defaults and `style`, not the user's matplotlibrc."""
    matplotlib, figures = require("matplotlib", "plot"), require("matplotlib.figure", "plot")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**style, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)})
        yield figures.Figure(figsize=(width, height))


def _saved(figure: Figure, **metadata: str) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        # Text stays text: whoever shows it brings the font.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, format="svg", metadata={**metadata, "Date": None, "Creator": None})
    return file.getvalue()


def _embedded(file: bytes, name: str, title: str, description: str) -> str:
    """One element: no ids but those that are used, no rules of style, which would hold for all of the page."""
    drawing = ET.fromstring(_printable(file.decode()))
    labels = {"title": title, "desc": description}
    root = ET.Element(
        "svg",
        {
            "xmlns": _SVG,
            "viewBox": drawing.attrib["viewBox"],
            "role": "img",
            "aria-labelledby": " ".join(f"{name}-{tag}" for tag in labels),
            "stroke-linejoin": "round",
        },
    )
    for tag, words in labels.items():
        ET.SubElement(root, tag, {"id": f"{name}-{tag}"}).text = _printable(words)
    parts = [
        child for child in drawing if child.find(f"{{{_SVG}}}style") is None and not child.tag.endswith("metadata")
    ]
    root.extend(parts)
    nodes = [node for part in parts for node in part.iter()]
    used = {one for node in nodes for value in node.attrib.values() for one in _REFERENCE.findall(value)}
    for node in nodes:
        node.tag, node.tail = _local(node.tag), None
        node.text = node.text if node.tag == "text" else None
        node.attrib = {
            _local(key): _attribute(key, value, name)
            for key, value in node.attrib.items()
            if (key != "id" or value in used) and not value.startswith("rotate(-0 ")
        }
    return ET.tostring(root, encoding="unicode")


def _attribute(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key in ("d", "x", "y"):
        return _LONG.sub(lambda found: f"{float(found[0]):.2f}", " ".join(value.split()))
    return _FONTS.sub("system-ui, sans-serif", _REFERENCE.sub(rf"#{name}-\1", value)).replace(INK, "currentColor")


def _printable(text: str) -> str:
    """Names come from elsewhere, and XML has no place for control characters."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
