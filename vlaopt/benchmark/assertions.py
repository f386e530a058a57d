"""`--assert "p99_ms<40"`: parsed, and held against a record. `compare` parses its own names by the same grammar."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from vlaopt.benchmark.record import BenchRecord, Timeline
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
_EXPRESSION = re.compile(r"\s*([A-Za-z][A-Za-z0-9_.-]*)\s*(<=|>=|==|!=|<|>)\s*([^\s<>=!]+)\s*")
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?")
# The one asked for most comes first: hints take it as their example.
_SPREAD = ("p99_ms", "p50_ms", "p90_ms", "p99.9_ms", "min_ms", "max_ms", "jitter_ms")
_COMPONENT = "component_ms."
METRICS = (
    *_SPREAD,
    "miss_rate",
    "misses",
    "dropped_ticks",
    *(f"back_to_back.{name}" for name in _SPREAD),
    "throughput_hz",
    "cold_start_ms",
    "host_mib",
    "device_mib",
    "energy_j",
    "energy_above_idle_j",
    "temperature_c",
    "overhead_us",
)
"""Numbers of a record, of the paced run unless `back_to_back.` says so; `metrics_of` adds the components'.

`energy_j` is of one chunk, `temperature_c` the highest of any sensor, the memory the largest of a fresh process.
"""
FORMER_METRICS = {"peak_memory_mib": "host_mib"}
"""What names of former versions mean now."""
WORDS = {"verdict": ("VALID", "INVALID", "INCONCLUSIVE")}
"""What of a record is a word, and the words it may be."""


@dataclass(frozen=True)
class Assertion:
    """One parsed expression: a metric against a number, or against a word."""

    expression: str
    metric: str
    comparison: str
    limit: float | str

    def holds(self, measured: float | str) -> bool:
        """Whether what was measured is within the limit; a word only meets words, a number numbers."""
        if isinstance(self.limit, str) or isinstance(measured, str):
            return (measured == self.limit) == (self.comparison == "==")
        return _OPERATORS[self.comparison](measured, self.limit)


@dataclass(frozen=True)
class Outcome:
    """An expression, what was measured (None: not available), whether it holds, and why not."""

    expression: str
    measured: float | str | None
    ok: bool
    reason: str | None


def metrics_of(components: Iterable[str]) -> tuple[str, ...]:
    """METRICS, with `component_ms.NAME` of each component: what it takes of one chunk."""
    return (*METRICS, *FORMER_METRICS, *(_COMPONENT + name for name in components))


def parse_assertion(
    expression: str, *, numbers: Sequence[str] = METRICS, words: Mapping[str, Sequence[str]] = WORDS
) -> Assertion:
    """`name op number` for one of `numbers`, or `name==WORD` and `name!=WORD` for one of `words`.

    Raises InputError for anything else, with the nearest name or the form to use.
    """
    found = _EXPRESSION.fullmatch(expression)
    if not found:
        raise InputError(
            f"--assert {expression!r} is not NAME OPERATOR NUMBER", hint=f'write it like "{numbers[0]}<40"'
        )
    name, comparison, limit = found.groups()
    if name in words:
        if comparison not in ("==", "!=") or limit not in words[name]:
            raise InputError(
                f"--assert {expression!r}: {name} is not {comparison} {limit}",
                hint=f"use == or != with {', '.join(words[name])}",
            )
        return Assertion(expression, name, comparison, limit)
    if name not in numbers:
        near = difflib.get_close_matches(name, [*numbers, *words], n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise InputError(
            f"--assert {expression!r}: unknown {name!r}", hint=f"{guess}known: {', '.join([*numbers, *words])}"
        )
    if not _NUMBER.fullmatch(limit):
        raise InputError(f"--assert {expression!r}: {limit!r} is not a number", hint=f'write it like "{name}<40"')
    return Assertion(expression, name, comparison, float(limit))


def evaluate(assertions: Sequence[Assertion], record: BenchRecord) -> list[Outcome]:
    """Each assertion held against `record`. Missed: not true, not available, or measured by a run that is not VALID."""
    return [_evaluate(assertion, record) for assertion in assertions]


def why_not_valid(record: BenchRecord) -> str:
    """The verdict with its reasons, as a reason in words."""
    return f"the run is {record.verdict}" + (f": {'; '.join(record.reasons)}" if record.reasons else "")


def _evaluate(assertion: Assertion, record: BenchRecord) -> Outcome:
    if assertion.metric in WORDS:
        ok = assertion.holds(record.verdict)
        return Outcome(assertion.expression, record.verdict, ok, None if ok else why_not_valid(record))
    measured, reason = _measured(FORMER_METRICS.get(assertion.metric, assertion.metric), record)
    if measured is None:
        return Outcome(assertion.expression, None, False, reason)
    if not assertion.holds(measured):
        return Outcome(assertion.expression, measured, False, f"measured {measured:g}")
    if record.verdict != "VALID":
        return Outcome(assertion.expression, measured, False, why_not_valid(record))
    return Outcome(assertion.expression, measured, True, None)


def _measured(metric: str, record: BenchRecord) -> tuple[float | None, str | None]:
    """The metric's value, or None and the reason."""
    if metric in _SPREAD:
        return _spread(metric, record.paced.latency_ms, record.paced.jitter_ms)
    if metric.startswith("back_to_back."):
        part = record.back_to_back
        return _spread(metric.removeprefix("back_to_back."), part.latency_ms, part.jitter_ms)
    if metric.startswith(_COMPONENT):
        components = record.breakdown.components if record.breakdown else {}
        found = components.get(metric.removeprefix(_COMPONENT))
        return (found.wall_ms if found else None), "not available"
    values: dict[str, float | None] = {
        "miss_rate": record.paced.miss_rate,
        "misses": record.paced.misses,
        "dropped_ticks": len(record.paced.dropped),
        "throughput_hz": record.back_to_back.throughput_hz,
        "cold_start_ms": record.cold_start.total_ms if record.cold_start else None,
        "host_mib": record.memory.host_mib,
        "device_mib": record.memory.device_mib,
        "energy_j": record.energy.joules,
        "energy_above_idle_j": record.energy.joules_above_idle,
        "temperature_c": _hottest(record.timeline),
        "overhead_us": record.overhead_us,
    }
    return values[metric], (metric.startswith("energy") and record.energy.reason) or "not available"


def _hottest(timeline: Timeline | None) -> float | None:
    series = timeline.series if timeline else {}
    seen = [value for name, values in series.items() if name.startswith("temperature_c.") for value in values]
    return max((value for value in seen if value is not None), default=None)


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
