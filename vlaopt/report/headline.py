"""What a team decides on, in five statements: actions, control rate, speed, size, precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlaopt.benchmark.record import BenchRecord
from vlaopt.report.facts import Facts, Form
from vlaopt.report.numbers import milliseconds, number, percentile, share, size

Status = Literal["good", "bad", "open", "told"]
"""Held, missed, not decided for a reason that is given; or a figure that nothing judges."""


@dataclass(frozen=True)
class Statement:
    """One answer: what it is about, how it stands, the answer in a few words, and what it rests on."""

    about: str
    status: Status
    answer: str
    detail: str


def headline(facts: Facts) -> tuple[Statement, ...]:
    """The statements, the most important first."""
    return (_actions(facts), _rate(facts), _speed(facts), _size(facts), _precision(facts))


def _actions(facts: Facts) -> Statement:
    about = "Actions"
    if not facts.gates:
        return Statement(about, "open", "not verified", facts.missing.get("gates", "no gate is set in the recipe"))
    missed = [gate for gate in facts.gates if not gate.held]
    closest = max(facts.gates, key=lambda gate: gate.value / gate.limit if gate.limit else float(gate.value > 0))
    told = missed[0] if missed else closest
    detail = f"{'missed' if missed else 'closest'}: {told.name} {number(told.value)} of {number(told.limit)}"
    count = len(facts.gates)
    if missed:
        return Statement(about, "bad", f"{len(missed)} of {count} gates missed", detail)
    if facts.manifest.metrics.get("verify", {}).get("engine_not_run"):
        return Statement(about, "open", "held by the portable graphs", facts.verified_on or detail)
    return Statement(about, "good", f"{count} of {count} gates held", detail)


def _rate(facts: Facts) -> Statement:
    about, record = "Control rate", facts.record
    if record is None:
        return Statement(about, "open", "not measured", facts.missing["record"])
    paced = record.paced
    rate = f"{record.settings.hz:g} Hz"
    detail = (
        f"{number(paced.misses)} of {number(paced.ticks)} ticks missed; p99 {percentile(paced.latency_ms.p99)}, "
        f"max {milliseconds(paced.latency_ms.max)} of {paced.deadline_ms:g} ms"
    )
    if record.verdict != "VALID":
        return Statement(about, "open", f"{rate}: {record.verdict}", "; ".join([*record.reasons, detail]))
    if elsewhere := facts.missing.get("engine_record"):
        return Statement(about, "open", f"{rate}: not of the engine", f"{elsewhere}; {detail}")
    if paced.misses:
        return Statement(about, "bad", f"{rate} not held: {share(paced.miss_rate)} missed", detail)
    return Statement(about, "good", f"{rate} held", detail)


def _speed(facts: Facts) -> Statement:
    about, last = "Speed", _last(facts)
    if any(not gate.held for gate in facts.gates):
        return Statement(about, "open", "not told", "how fast actions are that miss their gates decides nothing")
    first = facts.forms[0] if facts.forms else None
    if first and last and first is not last and first.latency_ms and last.latency_ms:
        detail = f"{milliseconds(last.latency_ms)} a chunk, {first.name} takes {milliseconds(first.latency_ms)}"
        busy = facts.missing.get("forms_quiet")
        answer = f"{number(first.latency_ms / last.latency_ms)}× {first.name}"
        return Statement(about, "open" if busy else "told", answer, f"{detail}; {busy}" if busy else detail)
    reason = facts.missing.get("forms_how", "not every form runs on this machine")
    if facts.record:
        decides = facts.record.verdict == "VALID" and "engine_record" not in facts.missing
        status: Status = "told" if decides else "open"
        return Statement(about, status, f"{_median(facts.record)} a chunk", f"not compared with eager: {reason}")
    return Statement(about, "open", "not measured", reason)


def _median(record: BenchRecord) -> str:
    """The p50 of calls that follow each other, or of however few there were the least."""
    burst = record.back_to_back.latency_ms
    return milliseconds(burst.p50.value) if burst.p50.value is not None else f"≥ {milliseconds(burst.min)}"


def _last(facts: Facts) -> Form | None:
    """The form that ships."""
    return facts.forms[-1] if facts.forms else None


def _size(facts: Facts) -> Statement:
    last = _last(facts)
    shipped = last.bytes if last else sum(component.bytes for component in facts.components)
    whole = next((form for form in facts.forms if form.stage in ("reference", "export")), None)
    if whole is None or whole is last:
        return Statement("Size", "told", size(shipped), "components without processors")
    return Statement("Size", "told", size(shipped), f"{share(shipped / whole.bytes)} of {whole.name}")


def _precision(facts: Facts) -> Statement:
    counts: dict[str, int] = {}
    for component in facts.components:
        for name, count in component.precisions.items():
            counts[name] = counts.get(name, 0) + count
    engine = facts.manifest.engine
    runs_on = f"{engine.backend} {engine.backend_version}" if engine else "portable graphs, no engine yet"
    if not counts:
        plain = "fp32" if not facts.manifest.metrics.get("quantize", {}).get("layers") else "not known here"
        return Statement("Precision", "told", plain, runs_on)
    order = sorted(counts, key=lambda name: (-counts[name], name))
    answer = ", ".join(f"{counts[name]} {name}" for name in order)
    return Statement("Precision", "told", answer, f"layers as they {'run' if engine else 'are planned'}; {runs_on}")
