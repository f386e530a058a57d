"""`--assert`: a small strict grammar, and nothing holds that was not measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from vlaopt.benchmark.assertions import METRICS, Outcome, evaluate, parse_assertion
from vlaopt.benchmark.record import BenchRecord, BenchSettings
from vlaopt.errors import InputError


@pytest.fixture
def record(bench: Callable[..., BenchRecord], policy: Callable[..., Any]) -> BenchRecord:
    """A valid run of 1500 ticks: p50 10 ms, no p99.9."""
    return bench(policy(lambda n: 10.0), settings=BenchSettings(hz=50, duration_s=30))


def held(expression: str, record: BenchRecord) -> Outcome:
    return evaluate([parse_assertion(expression)], record)[0]


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
        ("peak_memory_mib<600", 512.0),
        ("verdict==VALID", "VALID"),
        ("verdict!=INVALID", "VALID"),
    ],
)
def test_what_was_measured_is_compared(record: BenchRecord, expression: str, measured: float | str) -> None:
    assert held(expression, record) == Outcome(expression, measured, True, None)


def test_a_limit_that_is_passed_is_missed_with_the_measured_value(record: BenchRecord) -> None:
    assert held("p99_ms<10", record) == Outcome("p99_ms<10", 10.0, False, "measured 10")


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("p99.9_ms<1000", "insufficient samples: 1500, p99.9 needs 4603"),
        ("back_to_back.jitter_ms<1000", "insufficient samples: 300, p99 needs 459"),
        ("cold_start_ms<1000", "not available"),
        ("energy_j<1000", "not available: no RAPL counters"),
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
def test_every_metric_can_be_asked_for(record: BenchRecord, metric: str) -> None:
    outcome = held(f"{metric}>=0", record)
    assert outcome.ok or outcome.measured is None


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
        ("verdit==VALID", "unknown 'verdit'", "did you mean verdict?"),
        ("verdict==FINE", "a verdict is not == FINE", "VALID, INVALID, INCONCLUSIVE"),
        ("verdict<VALID", "a verdict is not < VALID", "VALID, INVALID, INCONCLUSIVE"),
    ],
)
def test_anything_else_is_refused_with_a_hint(expression: str, message: str, hint: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        parse_assertion(expression)
    assert hint in str(caught.value.hint)
