"""The two sides of a comparison: one latency for each independent run of a policy, and what else is known of it.

Knows records; what launches of an artifact say is told by whoever makes them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, get_args

import numpy as np

from vlaopt.benchmark.assertions import Assertion, Outcome
from vlaopt.benchmark.compare import FEWEST, Answer, Comparison, compare, compare_rounds
from vlaopt.benchmark.record import BenchRecord
from vlaopt.benchmark.statistics import FLOATS, median
from vlaopt.errors import InputError

Unit = Literal["launches in turns", "launches", "blocks of one launch"]
ONE_LAUNCH: Unit = "blocks of one launch"
PACED, BACK_TO_BACK = "paced", "back_to_back"
FIGURES = (
    "p99_ms",
    "miss_rate",
    "energy_j",
    "cold_start_ms",
    "host_mib",
    "device_mib",
    "size_mb",
    "action_error_mean",
)
"""What a person weighs against speed. `p99_ms` and `miss_rate` are of the paced run, `energy_j` is of one chunk,
`action_error_mean` of the executed golden actions in standard deviations."""
_OF_FIGURE = "ratio."
_OF_LATENCY = ("ratio", "ratio_low", "ratio_high", "speedup", "difference_ms", "p_value")
NUMBERS = (
    *_OF_LATENCY,
    *(f"{BACK_TO_BACK}.{name}" for name in _OF_LATENCY),
    *(f"{_OF_FIGURE}{name}" for name in FIGURES),
)
"""What `--assert` may limit, of B against A: of the headline unless `back_to_back.` says so. `ratio.NAME` is the ratio
of a figure."""
WORDS = {name: get_args(Answer) for name in ("answer", f"{BACK_TO_BACK}.answer")}
BLOCKS = 20
"""Parts of a run whose medians stand for it. From 10 to 30 hardly differ (Schmeiser 1982, "Batch size effects in the
analysis of simulation output", Operations Research 30): fewer tell too little, shorter ones depend on each other."""
BLOCK_CALLS = 5
LAUNCH_SPREAD, DOUBTFUL_SPREAD = 0.01, 0.20
"""Standard deviation of launches of one policy, as a share of its latency, where no more is known; the second where the
record is in doubt: on two shared cores it was 0.9 % back-to-back, and 20 % paced while others took most of the time."""


@dataclass(frozen=True)
class Side:
    """One side. `latencies_ms` has independent latencies by how they were called, the headline first.

    `unit` says what each of them is of; launches in turns are by round. `doubts` are why they may not be right. A
    figure that is not known is None, or absent.
    """

    source: str
    unit: Unit
    latencies_ms: Mapping[str, FLOATS]
    figures: Mapping[str, float | None]
    doubts: tuple[str, ...] = ()


def hold(a: Side, b: Side) -> dict[str, Comparison]:
    """B held against A, for each way of calling that both were measured in; the headline first."""
    comparisons = {}
    for how, latencies in a.latencies_ms.items():
        if (others := b.latencies_ms.get(how)) is None:
            continue
        if a.unit == b.unit == "launches in turns":
            comparisons[how] = compare_rounds(latencies, others)
        else:
            unseen = math.hypot(_unseen(a, b, how), _unseen(b, a, how))
            comparisons[how] = compare(latencies, others, unseen=unseen)
    return comparisons


def _unseen(side: Side, other: Side, how: str) -> float:
    """What a single launch does not tell, as a share: how launches differ; no less than those of the other side do."""
    if side.unit != ONE_LAUNCH:
        return 0.0
    shown = float(np.std(np.log(other.latencies_ms[how]))) if other.unit != ONE_LAUNCH else 0.0
    return max(DOUBTFUL_SPREAD if side.doubts else LAUNCH_SPREAD, shown)


def judge(assertions: Sequence[Assertion], a: Side, b: Side, comparisons: Mapping[str, Comparison]) -> list[Outcome]:
    """Each assertion held against B's comparison with A. What is not available does not hold."""
    return [_judge(assertion, _measured(assertion.metric, a, b, comparisons)) for assertion in assertions]


def _judge(assertion: Assertion, measured: float | str | None) -> Outcome:
    if measured is None:
        return Outcome(assertion.expression, None, False, "not available")
    holds = assertion.holds(measured)
    told = measured if isinstance(measured, str) else f"{measured:g}"
    return Outcome(assertion.expression, measured, holds, None if holds else f"measured {told}")


def _measured(metric: str, a: Side, b: Side, comparisons: Mapping[str, Comparison]) -> float | str | None:
    if metric.startswith(_OF_FIGURE):
        name = metric.removeprefix(_OF_FIGURE)
        return ratio(a.figures.get(name), b.figures.get(name))
    how, _, name = metric.rpartition(".")
    comparison = comparisons.get(how or next(iter(comparisons)))
    value: float | str | None = getattr(comparison, name, None)
    return value


def ratio(a: float | None, b: float | None) -> float | None:
    """B / A where both are known and A is not zero."""
    return b / a if a and b is not None else None


def of_records(records: Sequence[BenchRecord], source: str) -> Side:
    """The side that records of one policy are: each a launch, or one whose run is cut into blocks.

    Raises InputError for records that are not comparable with each other, more than one but too few to stand for
    launches, and a run too short to be cut.
    """
    for record in records:
        check_comparable(records[0], record)
    doubts = tuple(dict.fromkeys(reason for record in records for reason in record.reasons))
    if len(records) == 1:
        latencies = {how: _blocks(samples, source) for how, samples in _samples(records[0]).items()}
        return Side(source, ONE_LAUNCH, latencies, figures(records), doubts)
    if len(records) < FEWEST:
        raise InputError(
            f"{len(records)} records, {FEWEST} are needed for each to stand for a launch",
            where=source,
            hint="give one record, or a folder with one for each of ten launches or more",
        )
    samples = [_samples(record) for record in records]
    latencies = {how: np.asarray([median(each[how]) for each in samples], np.float64) for how in samples[0]}
    return Side(source, "launches", latencies, figures(records), doubts)


def figures(records: Sequence[BenchRecord]) -> dict[str, float | None]:
    """The figures that records hold: over several, the median of those that know it, and the mean miss rate."""
    cold = [record.cold_start.total_ms if record.cold_start else None for record in records]
    return {
        "p99_ms": typical([record.paced.latency_ms.p99.value for record in records]),
        "miss_rate": fmean(record.paced.miss_rate for record in records),
        "energy_j": typical([record.energy.joules for record in records]),
        "cold_start_ms": typical(cold),
        "host_mib": typical([record.memory.host_mib for record in records]),
        "device_mib": typical([record.memory.device_mib for record in records]),
    }


def check_comparable(a: BenchRecord, b: BenchRecord) -> None:
    """Raises InputError for an INVALID record, and naming what differs where records are of other policies, control
    rates, loads or machines.

    Libraries, and the GPU, count where both name them: the policies may run on different backends.
    """
    for record in (a, b):
        if record.verdict == "INVALID":
            raise InputError(f"a record is INVALID: {'; '.join(record.reasons)}", hint="measure it again")
    if a.subject.policy != b.subject.policy:
        raise InputError(f"records of different policies: {a.subject.policy} and {b.subject.policy}")
    if a.settings.hz != b.settings.hz:
        raise InputError(f"records at different control rates: {a.settings.hz:g} and {b.settings.hz:g} Hz")
    if a.settings.load != b.settings.load:
        raise InputError(f"records under different load: {a.settings.load} and {b.settings.load} busy processes")
    if differing := _differing(a.environment.comparable(), b.environment.comparable()):
        raise InputError(
            f"records from different environments: {'; '.join(differing)}", hint="measure both again on one machine"
        )


def typical(values: Sequence[float | None]) -> float | None:
    """The median of those that are known, or None."""
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    one, other = _flat(one), _flat(other)
    optional = {name for name in one.keys() | other.keys() if name.startswith("libraries.")} | {"gpu"}
    return [
        f"{name} {one.get(name)!r} and {other.get(name)!r}"
        for name in one | other
        if one.get(name) != other.get(name)
        and not (name in optional and (one.get(name) is None or other.get(name) is None))
    ]


def _flat(facts: Mapping[str, object]) -> dict[str, object]:
    libraries = facts["libraries"]
    assert isinstance(libraries, dict)
    named = {f"libraries.{name}": version for name, version in libraries.items()}
    return {**{name: value for name, value in facts.items() if name != "libraries"}, **named}


def _samples(record: BenchRecord) -> dict[str, tuple[float, ...]]:
    return {PACED: record.paced.samples_ms, BACK_TO_BACK: record.back_to_back.samples_ms}


def _blocks(samples_ms: Sequence[float], source: str) -> FLOATS:
    """Medians of BLOCKS equally long parts, one after the other; of fewer where each would have too few calls."""
    count = min(BLOCKS, len(samples_ms) // BLOCK_CALLS)
    if count < FEWEST:
        raise InputError(
            f"{len(samples_ms)} calls, {FEWEST * BLOCK_CALLS} are needed to compare",
            where=source,
            hint="measure longer: vlaopt bench --duration",
        )
    return np.asarray([median(block) for block in np.array_split(np.asarray(samples_ms), count)], np.float64)
