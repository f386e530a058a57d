"""`--assert`: a small strict grammar, and nothing holds that was not measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vlaopt.benchmark.assertions import METRICS, Outcome, evaluate, metrics_of, parse_assertion
from vlaopt.benchmark.record import (
    BenchRecord,
    BenchSettings,
    Breakdown,
    ColdStart,
    ComponentTime,
    Energy,
    Memory,
    Timeline,
)
from vlaopt.errors import InputError


@pytest.fixture
def record(bench: Callable[..., BenchRecord], policy: Callable[..., Any]) -> BenchRecord:
    """A valid run of 1500 ticks: p50 10 ms, no p99.9; nothing is known but its latencies."""
    measured = bench(policy(lambda n: 10.0), settings=BenchSettings(hz=50, duration_s=30))
    unknown = {"energy": Energy(reason="not available: no RAPL counters"), "timeline": None}
    return measured.model_copy(update=unknown)


@pytest.fixture
def whole(record: BenchRecord) -> BenchRecord:
    """The same with everything known."""
    parts = {"vision": ComponentTime(calls=1, wall_ms=7.0), "head-2": ComponentTime(calls=4, wall_ms=2.0)}
    known = {
        "cold_start": ColdStart(import_ms=100, open_ms=40, first_ms=10.5),
        "memory": Memory(host_mib=512.0, device_mib=96.5),
        "energy": Energy(joules=0.25, joules_above_idle=0.125, source="rapl"),
        "breakdown": Breakdown(
            chunks=9, whole_ms=10.0, together_ms=10.0, components=parts, processors_ms=0.5, loop_ms=0.5
        ),
        "timeline": Timeline(
            period_s=0.5,
            seconds=(0.0, 0.5),
            series={
                "temperature_c.cpu": (61.5, None),
                "temperature_c.gpu": (48.0, 63.25),
                "clock_mhz.cpu": (2200, 2200),
            },
        ),
    }
    return record.model_copy(update=known)


def held(expression: str, record: BenchRecord) -> Outcome:
    components = record.breakdown.components if record.breakdown else ("vision",)
    return evaluate([parse_assertion(expression, numbers=metrics_of(components))], record)[0]


@pytest.mark.parametrize(
    ("expression", "measured"),
    [
        ("p99_ms<40", 10.0),
        ("miss_rate<0.001", 0.0),
        (" p50_ms <= 1e1 ", 10.0),
        ("min_ms>=10", 10.0),
        ("misses==0", 0),
        ("dropped_ticks!=1", 0),
        ("jitter_ms<.5", 0.0),
        ("back_to_back.p50_ms<11", 10.0),
        ("throughput_hz>99", 100.0),
        ("verdict==VALID", "VALID"),
        ("verdict!=INVALID", "VALID"),
    ],
)
def test_what_was_measured_is_compared(record: BenchRecord, expression: str, measured: float | str) -> None:
    assert held(expression, record) == Outcome(expression, measured, True, None)


@pytest.mark.parametrize(
    ("expression", "measured"),
    [
        ("cold_start_ms<200", 150.5),
        ("host_mib<=512", 512.0),
        ("peak_memory_mib<600", 512.0),
        ("device_mib<100", 96.5),
        ("energy_j<0.3", 0.25),
        ("energy_above_idle_j<0.2", 0.125),
        ("temperature_c<70", 63.25),
        ("component_ms.vision<8", 7.0),
        ("component_ms.head-2<3", 2.0),
    ],
)
def test_so_is_what_the_rest_of_the_record_tells(whole: BenchRecord, expression: str, measured: float) -> None:
    assert held(expression, whole) == Outcome(expression, measured, True, None)


def test_a_limit_that_is_passed_is_missed_with_the_measured_value(record: BenchRecord) -> None:
    assert held("p99_ms<10", record) == Outcome("p99_ms<10", 10.0, False, "measured 10")


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("p99.9_ms<1000", "insufficient samples: 1500, p99.9 needs 4603"),
        ("back_to_back.jitter_ms<1000", "insufficient samples: 300, p99 needs 459"),
        ("cold_start_ms<1000", "not available"),
        ("host_mib<1000", "not available"),
        ("device_mib<1000", "not available"),
        ("temperature_c<1000", "not available"),
        ("component_ms.vision<1000", "not available"),
        ("energy_j<1000", "not available: no RAPL counters"),
        ("energy_above_idle_j<1000", "not available: no RAPL counters"),
    ],
)
def test_what_is_not_available_is_missed_with_the_reason(record: BenchRecord, expression: str, reason: str) -> None:
    assert held(expression, record) == Outcome(expression, None, False, reason)


def test_nothing_but_the_verdict_itself_holds_on_a_run_that_is_not_valid(record: BenchRecord) -> None:
    doubtful = record.model_copy(update={"verdict": "INCONCLUSIVE", "reasons": ("busy machine",)})
    why = "the run is INCONCLUSIVE: busy machine"
    assert held("p50_ms<40", doubtful) == Outcome("p50_ms<40", 10.0, False, why)
    assert held("verdict==VALID", doubtful) == Outcome("verdict==VALID", "INCONCLUSIVE", False, why)
    assert held("verdict==INCONCLUSIVE", doubtful).ok


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_be_asked_for(record: BenchRecord, whole: BenchRecord, metric: str) -> None:
    unknown = held(f"{metric}>=0", record)
    assert unknown.ok or (unknown.measured is None and unknown.reason)
    if metric not in ("p99.9_ms", "back_to_back.p99_ms", "back_to_back.p99.9_ms", "back_to_back.jitter_ms"):
        assert held(f"{metric}>=0", whole).ok


@pytest.mark.parametrize(
    ("expression", "message", "hint"),
    [
        ("", "is not NAME OPERATOR NUMBER", "p99_ms<40"),
        ("p99_ms", "is not NAME OPERATOR NUMBER", "p99_ms<40"),
        ("p99_ms<<40", "is not NAME OPERATOR NUMBER", "p99_ms<40"),
        ("p99_ms=40", "is not NAME OPERATOR NUMBER", "p99_ms<40"),
        ("p50_ms<40<50", "is not NAME OPERATOR NUMBER", "p99_ms<40"),
        ("p99_ms<40ms", "'40ms' is not a number", "p99_ms<40"),
        ("p99_ms<nan", "'nan' is not a number", "p99_ms<40"),
        ("p99_ms<1e9999", "'1e9999' is not a number", "p99_ms<40"),
        ("p99ms<40", "unknown 'p99ms'", "did you mean p99_ms?"),
        ("component_ms.vison<40", "unknown 'component_ms.vison'", "did you mean component_ms.vision?"),
        ("verdit==VALID", "unknown 'verdit'", "did you mean verdict?"),
        ("verdict==FINE", "verdict is not == FINE", "VALID, INVALID, INCONCLUSIVE"),
        ("verdict<VALID", "verdict is not < VALID", "VALID, INVALID, INCONCLUSIVE"),
    ],
)
def test_anything_else_is_refused_with_a_hint(expression: str, message: str, hint: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_assertion(expression, numbers=metrics_of(["vision"]))
    assert hint in str(caught.value.hint)


def test_another_command_has_names_of_its_own_in_the_same_grammar() -> None:
    own: dict[str, Any] = {"numbers": ("ratio",), "words": {"answer": ("FASTER", "SLOWER")}}
    assert parse_assertion("ratio<1.05", **own).holds(1.04)
    assert not parse_assertion("ratio<1.05", **own).holds(1.05)
    assert parse_assertion("answer!=SLOWER", **own).holds("FASTER")
    with pytest.raises(InputError, match="unknown 'p99_ms'") as caught:
        parse_assertion("p99_ms<40", **own)
    assert caught.value.hint == "known: ratio, answer"
