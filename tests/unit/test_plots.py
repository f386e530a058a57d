"""A plot is one self-contained file with the same bytes for the same data, and says what it needs."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

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
