"""JUnit XML: the shape that build servers read, and what failed in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.benchmark.assertions import Outcome, evaluate, parse_assertion
from vlaopt.benchmark.junit import as_junit
from vlaopt.benchmark.record import BenchRecord, BenchSettings

TOKEN, TEXT, COUNT, DECIMAL = r"\S(.*\S)?", r"(?s).*", r"\d+", r"\d+\.\d{3}"
SHAPE: dict[str, tuple[dict[str, str], dict[str, str], list[str]]] = {
    "testsuites": ({}, {}, ["testsuite"]),
    "testsuite": (
        {
            "name": TOKEN,
            "hostname": TOKEN,
            "package": TOKEN,
            "id": COUNT,
            "time": DECIMAL,
            "tests": COUNT,
            "failures": COUNT,
            "errors": COUNT,
            "timestamp": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d",
        },
        {"skipped": COUNT},
        ["properties", "testcase", "system-out", "system-err"],
    ),
    "properties": ({}, {}, ["property"]),
    "property": ({"name": TOKEN, "value": TEXT}, {}, []),
    "testcase": ({"name": TOKEN, "classname": TOKEN, "time": DECIMAL}, {}, ["skipped", "failure"]),
    "failure": ({"type": TEXT}, {"message": TEXT}, []),
    "skipped": ({}, {"message": TEXT}, []),
    "system-out": ({}, {}, []),
    "system-err": ({}, {}, []),
}
"""Required attributes, optional ones, and children in their order, from JUnit.xsd of github.com/windyroad/JUnit-Schema.

Its `skipped` may hold anything; times are decimals there, and at most three digits in Jenkins' own schema.
"""


def check(element: ElementTree.Element) -> None:
    """Hold an element and all below it to SHAPE."""
    required, optional, children = SHAPE[element.tag]
    assert required.keys() <= set(element.keys()) <= required.keys() | optional.keys(), element.tag
    for name, value in element.items():
        assert re.fullmatch({**required, **optional}[name], value), (element.tag, name, value)
    places = [children.index(child.tag) for child in element]
    assert places == sorted(places)
    for child in element:
        check(child)


@pytest.fixture
def record(bench: Callable[..., BenchRecord], policy: Callable[..., Any]) -> BenchRecord:
    """A valid run of 50 ticks of 10 ms."""
    return bench(policy(lambda n: 10.0), settings=BenchSettings(hz=50, duration_s=1))


def written(record: BenchRecord, outcomes: list[Outcome], name: str = "edge-vla 1.0.0 cpu-x86") -> ElementTree.Element:
    started = datetime(2026, 3, 4, 23, 30, tzinfo=timezone(timedelta(hours=-2)))
    root = ElementTree.fromstring(as_junit(record, outcomes, name=name, host="robot", started=started, seconds=12.5))
    check(root)
    return root


def judged(record: BenchRecord, *expressions: str) -> list[Outcome]:
    return evaluate([parse_assertion(expression) for expression in expressions], record)


def test_what_held_passes_and_what_was_missed_is_a_failure_with_its_reason(record: BenchRecord) -> None:
    root = written(record, judged(record, "p50_ms<11", "p50_ms<9"))
    suite = root[0]
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "3",
        "failures": "1",
        "errors": "0",
        "skipped": "0",
    }
    failures = {case.get("name"): [child.get("message") for child in case] for case in root.iter("testcase")}
    assert failures == {"verdict": [], "p50_ms<11": [], "p50_ms<9": ["p50_ms<9: measured 10"]}
    assert suite.get("timestamp") == "2026-03-05T01:30:00"
    assert suite.get("time") == "12.500"


@pytest.mark.parametrize(("verdict", "tag"), [("INVALID", "failure"), ("INCONCLUSIVE", "skipped")])
def test_a_run_that_is_not_valid_does_not_pass(record: BenchRecord, verdict: str, tag: str) -> None:
    doubtful = record.model_copy(update={"verdict": verdict, "reasons": ("busy machine",)})
    case = written(doubtful, []).find(".//testcase[@name='verdict']")
    assert case is not None
    assert [(child.tag, child.get("message")) for child in case] == [(tag, f"the run is {verdict}: busy machine")]


def test_the_properties_are_the_settings_and_the_machine(record: BenchRecord) -> None:
    properties = {found.get("name"): found.get("value") for found in written(record, []).iter("property")}
    assert properties["settings.hz"] == "50.0"
    assert properties["environment.governor"] == "performance"
    assert "subject.artifact" not in properties  # not known here


TEXTS = st.text(st.characters(exclude_categories=()), max_size=20)


def test_any_text_survives_as_xml_and_none_breaks_out_of_it(record: BenchRecord) -> None:
    @given(name=TEXTS, reason=TEXTS)
    def holds(name: str, reason: str) -> None:
        outcome = Outcome("p50_ms<9", 10.0, False, reason)
        root = written(record, [outcome], f"x{name}")
        assert len(list(root.iter("testcase"))) == 2

    holds()


def test_control_characters_are_shown_by_their_escapes(record: BenchRecord) -> None:
    failure = written(record, [Outcome("p50_ms<9", None, False, "\x1b[31m</failure>\udcff")]).find(".//failure")
    assert failure is not None
    assert failure.text == "p50_ms<9: \\x1b[31m</failure>\\udcff"
