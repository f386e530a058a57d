"""A measurement and its assertions as JUnit XML, which build servers read: one case each, one for the verdict.

The shape is that of Apache Ant's JUnit reports: github.com/windyroad/JUnit-Schema, JUnit.xsd.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from xml.etree import ElementTree

from vlaopt.benchmark.assertions import Outcome, why_not_valid
from vlaopt.benchmark.record import BenchRecord

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 cannot hold at all, not even escaped: https://www.w3.org/TR/xml/#charsets."""


def as_junit(
    record: BenchRecord, outcomes: Sequence[Outcome], *, name: str, host: str, started: datetime, seconds: float
) -> bytes:
    """One test suite called `name`, measured on `host` from `started` (with its time zone) for `seconds`.

    A missed assertion is a failure, and so is a run that is INVALID; one that is INCONCLUSIVE is skipped: it neither
    passed nor failed. The properties are the settings and the machine.
    """
    cases = [_verdict_case(record, seconds), *map(_assertion_case, outcomes)]
    for case in cases:
        case.set("classname", f"vlaopt.bench.{_token(name)}")
    suite = ElementTree.Element(
        "testsuite",
        name=_token(name),
        package="vlaopt.bench",
        id="0",
        hostname=_token(host) or "localhost",
        timestamp=started.astimezone(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S"),  # the schema allows no time zone
        tests=str(len(cases)),
        failures=str(sum(case.find("failure") is not None for case in cases)),
        errors="0",
        skipped=str(sum(case.find("skipped") is not None for case in cases)),
        time=f"{seconds:.3f}",
    )
    properties = ElementTree.SubElement(suite, "properties")
    for key, value in _properties(record):
        ElementTree.SubElement(properties, "property", name=key, value=_allowed(value))
    suite.extend(cases)
    ElementTree.SubElement(suite, "system-out").text = "\n".join(map(_line, outcomes))
    ElementTree.SubElement(suite, "system-err")
    whole = ElementTree.Element("testsuites")
    whole.append(suite)
    ElementTree.indent(whole)
    written: bytes = ElementTree.tostring(whole, encoding="utf-8", xml_declaration=True)
    return written


def _verdict_case(record: BenchRecord, seconds: float) -> ElementTree.Element:
    """It carries the whole time: the assertions are about the same run."""
    case = ElementTree.Element("testcase", name="verdict", time=f"{seconds:.3f}")
    if record.verdict == "INVALID":
        _fail(case, why_not_valid(record), "verdict")
    elif record.verdict == "INCONCLUSIVE":
        ElementTree.SubElement(case, "skipped", message=_allowed(why_not_valid(record)))
    return case


def _assertion_case(outcome: Outcome) -> ElementTree.Element:
    case = ElementTree.Element("testcase", name=_token(outcome.expression), time="0.000")
    if not outcome.ok:
        _fail(case, f"{outcome.expression}: {outcome.reason}", "assertion")
    return case


def _fail(case: ElementTree.Element, message: str, kind: str) -> None:
    ElementTree.SubElement(case, "failure", message=_allowed(message), type=kind).text = _allowed(message)


def _properties(record: BenchRecord) -> Iterator[tuple[str, str]]:
    """What is known of the subject, the settings and the machine, by dotted names."""
    for section in ("subject", "settings", "environment"):
        for key, value in getattr(record, section).model_dump(mode="json").items():
            if isinstance(value, dict):
                yield from ((f"{section}.{key}.{inner}", str(found)) for inner, found in value.items())
            elif value not in (None, []):
                yield f"{section}.{key}", " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _line(outcome: Outcome) -> str:
    measured = outcome.measured if outcome.measured is not None else "not available"
    return _allowed(f"{'held' if outcome.ok else 'MISSED'} {outcome.expression} (measured: {measured})")


def _token(text: str) -> str:
    """Text without line breaks and blanks at its ends."""
    return " ".join(_allowed(text).split())


def _allowed(text: str) -> str:
    """Text with every character that XML cannot hold written as its escape."""
    return _NOT_XML.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
