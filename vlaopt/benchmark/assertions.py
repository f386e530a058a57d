"""`--assert "p99_ms<40"`: parsed, and held against a record."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlaopt.benchmark.record import BenchRecord
from vlaopt.benchmark.statistics import Distribution
from vlaopt.errors import InputError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_EXPRESSION = re.compile(r"\s*([A-Za-z][A-Za-z0-9_.]*)\s*(<=|>=|==|!=|<|>)\s*([^\s<>=!]+)\s*")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
_VERDICTS = ("VALID", "INVALID", "INCONCLUSIVE")
_SPREAD = ("min_ms", "p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "max_ms", "jitter_ms")
METRICS = (
    *_SPREAD,
    "miss_rate",
    "misses",
    "dropped_ticks",
    *(f"back_to_back.{name}" for name in _SPREAD),
    "throughput_hz",
    "cold_start_ms",
    "peak_memory_mib",
    "energy_j",
    "overhead_us",
)


@dataclass(frozen=True)
class Assertion:
    """One parsed expression: a metric against a number, or the verdict against a word."""

    expression: str
    metric: str
    comparison: str
    limit: float | str


@dataclass(frozen=True)
class Outcome:
    """An expression, what was measured (None: not available), whether it holds, and why not."""

    expression: str
    measured: float | str | None
    ok: bool
    reason: str | None


def parse_assertion(expression: str) -> Assertion:
    """`name op number` or `verdict==WORD`; names are METRICS, of the paced run unless `back_to_back.` says so.

    Raises InputError for anything else, with the nearest name or the form to use.
    """
    found = _EXPRESSION.fullmatch(expression)
    if not found:
        raise InputError(f"--assert {expression!r} is not NAME OPERATOR NUMBER", hint='write it like "p99_ms<40"')
    name, comparison, limit = found.groups()
    if name == "verdict":
        if comparison not in ("==", "!=") or limit not in _VERDICTS:
            raise InputError(
                f"--assert {expression!r}: a verdict is not {comparison} {limit}",
                hint=f"use == or != with {', '.join(_VERDICTS)}",
            )
        return Assertion(expression, name, comparison, limit)
    if name not in METRICS:
        near = difflib.get_close_matches(name, [*METRICS, "verdict"], n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"--assert {expression!r}: unknown {name!r}", hint=f"{guess}known: {', '.join(METRICS)}, verdict"
        )
    if not _NUMBER.fullmatch(limit):
        raise InputError(f"--assert {expression!r}: {limit!r} is not a number", hint='write it like "p99_ms<40"')
    return Assertion(expression, name, comparison, float(limit))


def evaluate(assertions: Sequence[Assertion], record: BenchRecord) -> list[Outcome]:
    """Each assertion held against `record`. Missed: not true, not available, or measured by a run that is not VALID."""
    return [_evaluate(assertion, record) for assertion in assertions]


def _evaluate(assertion: Assertion, record: BenchRecord) -> Outcome:
    if isinstance(assertion.limit, str):
        ok = (record.verdict == assertion.limit) == (assertion.comparison == "==")
        return Outcome(assertion.expression, record.verdict, ok, None if ok else _why_not_valid(record))
    measured, reason = _measured(assertion.metric, record)
    if measured is None:
        return Outcome(assertion.expression, None, False, reason)
    if not _OPERATORS[assertion.comparison](measured, assertion.limit):
        return Outcome(assertion.expression, measured, False, f"measured {measured:g}")
    if record.verdict != "VALID":
        return Outcome(assertion.expression, measured, False, _why_not_valid(record))
    return Outcome(assertion.expression, measured, True, None)


def _why_not_valid(record: BenchRecord) -> str:
    return f"the run is {record.verdict}" + (f": {'; '.join(record.reasons)}" if record.reasons else "")


def _measured(metric: str, record: BenchRecord) -> tuple[float | None, str | None]:
    """The metric's value, or None and the reason."""
    if metric in _SPREAD:
        return _spread(metric, record.paced.latency_ms, record.paced.jitter_ms)
    if metric.startswith("back_to_back."):
        part = record.back_to_back
        return _spread(metric.removeprefix("back_to_back."), part.latency_ms, part.jitter_ms)
    values: dict[str, float | None] = {
        "miss_rate": record.paced.miss_rate,
        "misses": record.paced.misses,
        "dropped_ticks": len(record.paced.dropped),
        "throughput_hz": record.back_to_back.throughput_hz,
        "cold_start_ms": record.cold_start_ms,
        "peak_memory_mib": record.peak_memory_mib,
        "energy_j": record.energy.joules,
        "overhead_us": record.overhead_us,
    }
    return values[metric], record.energy.reason if metric == "energy_j" else "not available"


def _spread(metric: str, latency: Distribution, jitter_ms: float | None) -> tuple[float | None, str | None]:
    if metric == "jitter_ms":
        return jitter_ms, latency.p99.reason
    if metric in ("min_ms", "max_ms"):
        return (latency.min if metric == "min_ms" else latency.max), None
    percentiles = {
        "p50_ms": latency.p50,
        "p90_ms": latency.p90,
        "p99_ms": latency.p99,
        "p99.9_ms": latency.p99_9,
    }
    return percentiles[metric].value, percentiles[metric].reason
