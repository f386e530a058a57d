"""The report as one HTML page that needs nothing but itself: no script, no font, no image from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlaopt import __version__
from vlaopt.optional import require
from vlaopt.report import numbers
from vlaopt.report.facts import Facts
from vlaopt.report.figures.marks import action_names
from vlaopt.report.headline import headline

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

_UNITS = {"mhz": "MHz", "mib": "MiB", "c": "°C", "w": "W"}
_ACRONYMS = {"cpu": "CPU", "gpu": "GPU", "os": "operating system"}


def render(facts: Facts, figures: Mapping[str, str]) -> str:
    """The page. `figures` are SVG elements by name, trusted as they are; every other text is escaped.

    Equal facts give an equal page. Raises EnvironmentProblem without jinja2.
    """
    markup = require("markupsafe", "report").Markup
    page = (
        _environment()
        .get_template("page.html")
        .render(
            facts=facts,
            manifest=facts.manifest,
            spec=facts.spec,
            record=facts.record,
            statements=headline(facts),
            figures={name: markup(svg) for name, svg in figures.items()},
            joints=action_names(facts.spec),
            order=[component.name for component in facts.components],
            environment=environment(facts),
            meanwhile=meanwhile(facts),
            by_role=by_role(facts),
            vlaopt=__version__,
        )
    )
    return page.rstrip() + "\n"


def environment(facts: Facts) -> dict[str, str]:
    """What is known of the machine of the measurement, in words."""
    if facts.record is None:
        return {}
    told = facts.record.environment.model_dump(mode="json")
    known = {_label(name): _words(value) for name, value in told.items() if value not in (None, [], {})}
    unknown = [_label(name) for name, value in told.items() if value is None]
    return {**known, "not available here": ", ".join(unknown)} if unknown else known


def meanwhile(facts: Facts) -> dict[str, str]:
    """Between what the machine's clocks, temperatures and powers were during the paced run, and what held them down."""
    timeline = facts.record.timeline if facts.record else None
    if timeline is None:
        return {}
    kinds: dict[str, list[float]] = {}
    for name, values in timeline.series.items():
        kinds.setdefault(name.partition(".")[0], []).extend(value for value in values if value is not None)
    told = {
        _label(kind): f"{numbers.number(min(values))} – {numbers.number(max(values))}"
        for kind, values in kinds.items()
        if values
    }
    return told | {
        f"throttled: {reason}": f"{numbers.share(part)} of the time" for reason, part in timeline.throttling.items()
    }


def _label(field: str) -> str:
    """The name of a field as people write it, its unit in brackets."""
    name, _, unit = field.rpartition("_")
    words = f"{name} ({_UNITS[unit]})" if unit in _UNITS else field
    return " ".join(_ACRONYMS.get(word, word) for word in words.split("_"))


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(item)}" for name, item in sorted(value.items()))
    if isinstance(value, list):
        return ", ".join(_words(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def by_role(facts: Facts) -> dict[str, int]:
    """Bytes of the artifact's files by what they are for, the largest first."""
    sizes: dict[str, int] = {}
    for entry in facts.manifest.files:
        sizes[entry.role] = sizes.get(entry.role, 0) + entry.size
    return dict(sorted(sizes.items(), key=lambda item: (-item[1], item[0])))


def _environment() -> Environment:
    jinja2 = require("jinja2", "report")
    made: Environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vlaopt.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for write in (numbers.number, numbers.milliseconds, numbers.percentile, numbers.interval, numbers.size):
        made.filters[write.__name__] = write
    made.filters |= {"share": numbers.share, "memory": numbers.memory, "coded": _coded}
    return made


def _coded(text: str) -> Markup:
    """Text, escaped, with what stands between backquotes as code; one without a partner stands for itself."""
    markupsafe = require("markupsafe", "report")
    pieces = text.split("`")
    if len(pieces) % 2 == 0:
        pieces = [text]
    code = markupsafe.Markup("<code>{}</code>")
    told: Markup = markupsafe.Markup("").join(
        code.format(piece) if place % 2 else markupsafe.escape(piece) for place, piece in enumerate(pieces)
    )
    return told
