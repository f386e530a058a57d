"""The promise: any facts are drawn, readably and without loss, as SVG that many of can stand on one page."""

from __future__ import annotations

import re
import sys
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.report.figures import made
from vlaopt.benchmark import record as bench
from vlaopt.errors import EnvironmentProblem
from vlaopt.quantization.plan import NodeScheme
from vlaopt.report.facts import Example, Layer, Trial
from vlaopt.report.figures import draw, latency, precision, timeline
from vlaopt.report.figures.marks import SMALL, precision_colours

pytest.importorskip("matplotlib")

NAMES = {
    "breakdown",
    "curve-batch",
    "curve-steps",
    "joints",
    "latency",
    "precision",
    "sensitivity",
    "stages",
    "timeline",
    "trajectories-3",
    "trajectories-5",
}
SLOW = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def figures() -> dict[str, str]:
    return draw(made.facts())


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def sizes(svg: str) -> Iterator[float]:
    yield from (float(size) for size in re.findall(r"([\d.]+)px", svg))


def test_all_that_the_facts_allow_is_drawn(figures: dict[str, str]) -> None:
    assert set(figures) == NAMES


@pytest.mark.parametrize(
    ("field", "empty", "missing"),
    [
        ("record", None, {"breakdown", "curve-batch", "curve-steps", "latency", "timeline"}),
        ("forms", (), {"stages"}),
        ("components", (), {"precision"}),
        ("error", None, {"joints"}),
        ("examples", (), {"trajectories-3", "trajectories-5"}),
        ("trials", (), {"sensitivity"}),
    ],
)
def test_what_the_facts_lack_is_not_drawn(field: str, empty: Any, missing: set[str]) -> None:
    assert set(draw(made.facts(**{field: empty}))) == NAMES - missing


def test_a_record_without_a_breakdown_and_curves_draws_the_rest() -> None:
    assert set(draw(made.facts(record=made.record([3.0] * 20)))) == NAMES - {
        "breakdown",
        "curve-batch",
        "curve-steps",
    }


def test_equal_facts_give_equal_text(figures: dict[str, str]) -> None:
    assert draw(made.facts()) == figures


def test_no_two_elements_of_a_page_share_an_id_and_every_reference_is_of_the_figure_itself(
    figures: dict[str, str],
) -> None:
    ids = [found for svg in figures.values() for found in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    for svg in figures.values():
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert {one or other for one, other in used} <= set(re.findall(r' id="([^"]+)"', svg))


def test_a_figure_is_one_element_that_styles_nothing_else_and_loads_nothing(figures: dict[str, str]) -> None:
    for svg in figures.values():
        assert svg.startswith("<svg ")
        assert "<style" not in svg
        assert set(re.findall(r"https?://[^\"]+", svg)) == {"http://www.w3.org/2000/svg"}


def test_a_figure_is_told_to_those_who_cannot_see_it(figures: dict[str, str]) -> None:
    for name, svg in figures.items():
        root = ET.fromstring(svg)
        assert root.attrib["aria-labelledby"] == f"{name}-title {name}-desc"
        title, description = root[0].text, root[1].text
        assert title and description and len(description) > 20


def test_every_figure_fits_a_phone_with_words_that_can_be_read(figures: dict[str, str]) -> None:
    for svg in figures.values():
        assert ET.fromstring(svg).attrib["viewBox"].split()[2] == "360"
        assert min(sizes(svg)) >= SMALL


def test_words_take_the_colour_of_the_page(figures: dict[str, str]) -> None:
    for svg in figures.values():
        fills = re.findall(r"<text style=\"[^\"]*fill: ([^;\"]+)", svg)
        assert "currentColor" in fills
        assert not {"#000000", "#ffffff"} & set(fills)


def test_names_from_elsewhere_stay_text() -> None:
    forms = (replace(made.facts().forms[0], name='<script>"$\\frac{$"&'),)
    svg = draw(made.facts(forms=forms))["stages"]
    assert "<script" not in svg
    assert any("<script>" in text for text in texts(svg))


@pytest.mark.parametrize(
    "name", ["手 ☃ 🤖", "a$b$c", "\x07bell\x00", "a.very.long.module." * 9, "", "_", "{0} %s <b>&amp;"]
)
def test_any_names_are_drawn_without_a_warning(name: str) -> None:
    component = made.component(name, "vision", 3)
    layers = (replace(component.layers[0], name=name), *component.layers)
    breakdown = made.BREAKDOWN.model_copy(update={"components": {name: made.BREAKDOWN.components["vision"]}})
    told = bench.Timeline(period_s=1, seconds=(0.0, 1.0), series={f"power_w.{name}": (1.0, 2.0)})
    facts = made.facts(
        components=(replace(component, layers=layers),),
        forms=(replace(made.facts().forms[0], name=name),),
        record=made.record([3.0, 4.0], breakdown=breakdown, timeline=told),
        trials=(Trial("start", {}, 0.1, 0.0, 1, True, None), Trial("", {name: "fp32"}, 0.2, 0.1, 1, True, None)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for svg in draw(facts).values():
            ET.fromstring(svg)


@SLOW
@given(
    samples=st.lists(st.floats(0.0, 1e5, allow_nan=False), min_size=1, max_size=300),
    hz=st.floats(0.1, 5000),
    data=st.data(),
)
def test_any_latencies_are_drawn(samples: list[float], hz: float, data: st.DataObject) -> None:
    dropped = sorted(data.draw(st.sets(st.integers(0, len(samples) - 1))))
    facts = made.facts(record=made.record(samples, hz=hz, dropped=dropped))
    for svg in (*latency.drawn(facts).values(), *timeline.drawn(facts).values()):
        assert "nan" not in svg.lower() and "inf " not in svg
        ET.fromstring(svg)


@pytest.mark.parametrize("count", [1, 2, 7, 14, 32])
def test_any_number_of_joints_is_drawn(count: int) -> None:
    examples = (made.example(0, count), made.example(1, count, chunk=1))
    svgs = draw(made.facts(count, record=None, examples=examples))
    assert [text for text in texts(svgs["joints"]) if text.startswith("action ")] == [
        f"action {joint}" for joint in range(count - 1)
    ]
    assert {"gripper", "reference", "optimised"} <= set(texts(svgs["trajectories-0"]))
    assert "trajectories-1" in svgs


def test_errors_of_nothing_at_all_are_drawn() -> None:
    assert "joints" in draw(made.facts(error=made.action_error(size=0.0), record=None))


def test_an_hour_at_50_hz_stays_small_and_keeps_its_spike() -> None:
    samples = np.full(180_000, 3.0)
    samples[123_456] = 1234.5
    svg = timeline.drawn(made.facts(record=made.record(samples.tolist())))["timeline"]
    assert len(svg) < 60_000
    calm = timeline.drawn(made.facts(record=made.record([3.0] * 180_000)))["timeline"]
    assert svg.count("#D55E00".lower()) > calm.count("#D55E00".lower())
    assert "1 of 180000 missed" in texts(svg)


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=2000), st.integers(1, 240))
def test_the_extremes_of_every_column_are_kept(values: list[float], most: int) -> None:
    samples = np.array(values)
    edges = timeline.columns_of(len(samples), most)
    least, largest = timeline.envelope(samples, edges)
    assert len(least) == min(most, len(samples))
    for place, value in enumerate(values):
        column = np.searchsorted(edges, place, side="right") - 1
        assert least[column] <= value <= largest[column]
    assert (least.min(), largest.max()) == (samples.min(), samples.max())


def test_dropped_ticks_are_told_and_marked() -> None:
    record = made.record([3.0] * 50 + [90.0, 70.0, 50.0] + [3.0] * 50, dropped=[51, 52])
    svg = timeline.drawn(made.facts(record=record))["timeline"]
    assert "3 of 103 missed, 2 never started ▾" in texts(svg)


def test_percentiles_of_too_few_samples_are_said_to_be_so() -> None:
    svg = latency.drawn(made.facts(record=made.record([3.0, 4.0, 5.0])))["latency"]
    assert texts(svg).count("too few samples") == 4


@given(st.lists(st.from_regex(r"([a-c]{1,2}[./]){0,4}[0-9]{1,3}", fullmatch=True), min_size=1, max_size=200))
def test_every_layer_has_its_place_in_few_groups(names: list[str]) -> None:
    layers = tuple(Layer(name, None, "int8", None, "int8") for name in names)
    groups = precision.groups(replace(made.component("vision", "vision", 1), layers=layers))
    assert sorted(layer.name for _, group in groups for layer in group) == sorted(names)
    assert len(groups) <= precision.ROWS


def test_layers_are_told_by_the_modules_they_are_of() -> None:
    names = [f"model.{part}.layers.{number}/Gemm" for part in ("encoder", "decoder") for number in range(20)]
    layers = tuple(Layer(name, None, "int8", None, "fp32") for name in names)
    component = replace(made.component("act", "single", 1), layers=layers)
    assert [(label, len(group)) for label, group in precision.groups(component)] == [
        ("encoder.layers", 20),
        ("decoder.layers", 20),
    ]
    svg = precision.drawn(made.facts(components=(component,)))["precision"]
    assert {"act", "40 fp32", "encoder.layers", "decoder.layers"} <= set(texts(svg))


def test_every_precision_has_a_colour_of_its_own() -> None:
    names = get_args(NodeScheme)
    assert len(set(precision_colours(names).values())) == len(names)
    assert precision_colours(("int8", "new"))["int8"] == precision_colours(names)["int8"]


def test_many_series_of_a_machine_are_one_band() -> None:
    seconds = np.arange(0, 300, 0.5).tolist()
    clocks: dict[str, tuple[float | None, ...]] = {
        f"clock_mhz.cpu{core}": (1500.0,) * 599 + (float(core),) for core in range(12)
    }
    told = bench.Timeline(period_s=0.5, seconds=tuple(seconds), series=clocks)
    svg = timeline.drawn(made.facts(record=made.record([3.0] * 15_000, timeline=told)))["timeline"]
    assert "12, such as cpu0" in texts(svg)
    assert len(svg) < 40_000


def test_a_rounding_error_does_not_look_like_a_movement() -> None:
    flat = np.ones((made.CHUNK, 1))
    svgs = draw(made.facts(1, record=None, examples=(Example(0, 1e-7, flat + 1e-7, flat),)))
    assert {"0.8", "1.0", "1.2"} <= set(texts(svgs["trajectories-0"]))


def test_a_machine_that_told_nothing_has_no_rows_below() -> None:
    nothing = made.timeline((0.0, 0.5), clock_mhz=(None, None))
    with_it = timeline.drawn(made.facts(record=made.record([3.0] * 9, timeline=nothing)))
    assert with_it == timeline.drawn(made.facts(record=made.record([3.0] * 9)))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EnvironmentProblem, match="matplotlib"):
        draw(made.facts())
