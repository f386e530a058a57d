"""The report as Markdown, short enough for a comment on a pull request. Equal facts give equal text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from vlaopt.benchmark.record import BenchRecord
from vlaopt.report.facts import Facts
from vlaopt.report.headline import headline
from vlaopt.report.numbers import interval, memory, milliseconds, number, percentile, size

MARKS = {"good": "✓", "bad": "✗", "open": "?", "told": ""}
"""How a statement's status is told beside it."""
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~@!&])")


def as_markdown(facts: Facts) -> str:
    """Headline, forms, latency and gates. What the artifact holds is escaped: a name cannot become a link or a tag."""
    manifest = facts.manifest
    title = f"### {_plain(manifest.name)} {_plain(facts.version)} for {_plain(manifest.target)}"
    statements = [
        (f"{MARKS[one.status]} {one.about}".strip(), f"**{_plain(one.answer)}**", _plain(one.detail))
        for one in headline(facts)
    ]
    parts = ["\n".join([title, "", *_table(("", "", ""), statements)]), *_forms(facts), *_latency(facts.record)]
    return "\n\n".join([*parts, *_gates(facts), f"`{facts.id[:12]}`"]) + "\n"


def _forms(facts: Facts) -> Iterator[str]:
    rows = [
        (
            _plain(form.name),
            size(form.bytes),
            milliseconds(form.latency_ms),
            "reference" if form.stage == "reference" else number(form.error.executed.mean if form.error else None),
        )
        for form in facts.forms
    ]
    if rows:
        yield "\n".join(_table(("form", "size", "p50", "mean action error"), rows))


def _latency(record: BenchRecord | None) -> Iterator[str]:
    if record is None:
        return
    paced, burst = record.paced.latency_ms, record.back_to_back.latency_ms
    rows = [
        (name, percentile(one), interval(one), percentile(other), interval(other))
        for name, one, other in (
            ("p50", paced.p50, burst.p50),
            ("p90", paced.p90, burst.p90),
            ("p99", paced.p99, burst.p99),
            ("p99.9", paced.p99_9, burst.p99_9),
        )
    ]
    rows.append(("max", milliseconds(paced.max), "", milliseconds(burst.max), ""))
    columns = ("latency", f"paced at {record.settings.hz:g} Hz", "99 % interval", "back-to-back", "99 % interval")
    yield "\n".join(_table(columns, rows))
    energy = record.energy
    told = [
        f"cold start {milliseconds(record.cold_start.total_ms)}" if record.cold_start else "cold start not measured",
        f"host memory {memory(record.memory.host_mib)}",
        f"GPU memory {memory(record.memory.device_mib)}",
        f"energy {number(energy.joules)} J a chunk"
        if energy.joules is not None
        else f"energy {_reason(energy.reason)}",
        _plain(record.environment.gpu or record.environment.cpu_model or record.environment.architecture),
    ]
    yield " · ".join(told)


def _reason(reason: str | None) -> str:
    return _plain(reason or "not available")


def _gates(facts: Facts) -> Iterator[str]:
    rows = [
        (_plain(gate.name), number(gate.value), number(gate.limit), "held" if gate.held else "**missed**")
        for gate in facts.gates
    ]
    if rows:
        table = "\n".join(_table(("gate", "found", "limit", ""), rows))
        yield f"<details><summary>{len(rows)} gates</summary>\n\n{table}\n\n</details>"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def _plain(text: str) -> str:
    """Text as it is, on one line, whatever it means to Markdown."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
