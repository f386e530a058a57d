"""A plot is one self-contained file with the same bytes for the same data, and says what it needs."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from vlaopt import plots
from vlaopt.errors import EnvironmentProblem


def draw(path: Path, title: str = "latency < error & size") -> bytes:
    with plots.drawn(path, title) as figure:
        axes = figure.subplots()
        axes.plot([1, 2, 4], [1, 10, 100], label="seen")
        axes.set_yscale("log")
        axes.legend()
    return path.read_bytes()


def test_equal_data_gives_equal_bytes(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert draw(tmp_path / "a.svg") == draw(tmp_path / "b.svg")


def test_it_is_svg_with_text_and_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = draw(tmp_path / "a.svg")
    root = ET.fromstring(data)
    assert root.tag.endswith("svg")
    assert {"latency < error & size", "seen"} <= {text.strip() for text in root.itertext()}
    assert b"<image" not in data and b'href="http' not in data


def inline(name: str = "spread") -> str:
    def paint(figure: Any) -> None:
        axes = figure.subplots()
        axes.plot([1, 2, 4], [1, 10, 100], marker="o", label="a < b")
        axes.legend()

    return plots.inline(name, "Spread & more", "Three points.", paint)


def test_a_plot_in_a_page_has_its_name_in_every_id() -> None:
    pytest.importorskip("matplotlib")
    root = ET.fromstring(inline())
    ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    assert len(ids) == len(set(ids)) > 2
    assert all(found.startswith("spread-") for found in ids)
    assert inline("other") == inline().replace("spread-", "other-")


def test_a_plot_in_a_page_is_told_and_takes_the_pages_colour() -> None:
    pytest.importorskip("matplotlib")
    svg = inline()
    root = ET.fromstring(svg)
    assert [root[0].text, root[1].text] == ["Spread & more", "Three points."]
    assert "a < b" in {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert "fill: currentColor" in svg and plots.INK not in svg
    assert "<style" not in svg and "<?xml" not in svg and "DOCTYPE" not in svg


def test_equal_plots_in_a_page_are_equal_text() -> None:
    pytest.importorskip("matplotlib")
    assert inline() == inline()


def test_names_with_dollar_signs_are_no_formula(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert "a$b$c" in draw(tmp_path / "a.svg", "a$b$c").decode()


def test_the_users_own_style_stays_outside(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    plain = draw(tmp_path / "a.svg")
    with matplotlib.rc_context({"axes.grid": False, "font.size": 30.0}):
        assert draw(tmp_path / "b.svg") == plain
        assert matplotlib.rcParams["font.size"] == 30.0


def test_nothing_is_written_when_drawing_fails(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(RuntimeError, match="half"), plots.drawn(tmp_path / "a.svg", "x"):
        raise RuntimeError("half")
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EnvironmentProblem, match="matplotlib") as raised, plots.drawn(tmp_path / "a.svg", "x"):
        pass
    assert raised.value.hint == "pip install 'vlaopt[plot]'"
