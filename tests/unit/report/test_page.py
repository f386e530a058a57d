"""The page stands alone: sound HTML, every anchor resolves, nothing is fetched, nothing that it tells breaks out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from tests.unit.report.conftest import MISSING, bare, facts, record
from tests.unit.report.figures import made
from vlaopt.benchmark.record import Energy
from vlaopt.benchmark.statistics import summarise
from vlaopt.report import figures
from vlaopt.report.facts import Facts, Trial
from vlaopt.report.page import render

VOID = {"meta", "link", "br", "input", "img", "hr"}
EVIL = '<script>alert("1")</script>"\'><img src=http://evil.example/x onerror=alert(1)>'


class Page(HTMLParser):
    """What a page holds; raises AssertionError where an element is not closed or closed twice."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has a handler {name}"
            if name == "id":
                self.ids.append(value or "")
            elif tag == "a" and name == "href":
                self.links.append(value or "")
            elif name in ("src", "href", "srcset", "action", "data", "xlink:href"):
                self.loaded.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def page(found: Facts) -> Page:
    return Page(render(found, figures.draw(found)))


@pytest.mark.parametrize("found", [facts(), bare()], ids=["everything", "as little as can be"])
def test_the_page_is_sound_and_needs_nothing_but_itself(found: Facts) -> None:
    text = render(found, figures.draw(found))
    told = Page(text)
    assert [name for name, count in Counter(told.ids).items() if count > 1] == []
    assert all(link.startswith("#") and link[1:] in told.ids for link in told.links)
    assert all(link.startswith(("#", "data:")) for link in told.loaded)
    assert told.tags["script"] == told.tags["img"] == told.tags["iframe"] == 0
    assert "default-src 'none'" in text
    assert "@import" not in text
    assert "url(http" not in text


def test_every_drawn_figure_stands_on_the_page_with_a_caption() -> None:
    found = facts()
    drawn = figures.draw(found)
    told = Page(render(found, drawn))
    assert {f"figure-{name}" for name in drawn} <= set(told.ids)
    assert told.tags["figure"] == told.tags["figcaption"] == len(drawn)


def test_no_figure_is_drawn_of_what_is_missing_and_each_reason_is_told() -> None:
    told = page(bare())
    for name in set(MISSING) - {"inputs"}:
        assert MISSING[name][1:] in told.text, name
    assert MISSING["inputs"] in told.text
    assert "figure-latency" not in told.ids


def test_no_text_of_an_artifact_breaks_out_of_the_page() -> None:
    whole = facts()
    assert whole.record
    manifest = whole.manifest.model_copy(
        update={"name": EVIL, "target": EVIL, "recipe": {"description": EVIL}, "tools": {EVIL: EVIL}}
    )
    processor = whole.spec.preprocess[0].model_copy(update={"input": EVIL})
    evil = replace(
        whole,
        manifest=manifest,
        spec=whole.spec.model_copy(update={"preprocess": (processor,), "type": EVIL}),
        record=record(reasons=(EVIL,), verdict="INVALID", told={EVIL: (EVIL,)}, energy=Energy(reason=EVIL)),
        record_from=EVIL,
        version=EVIL,
        verified_on=EVIL,
        gates=tuple(replace(gate, name=EVIL) for gate in whole.gates),
        forms=tuple(replace(form, name=EVIL, backend=EVIL) for form in whole.forms),
        components=tuple(
            replace(one, reason=EVIL, layers=tuple(replace(layer, name=EVIL, reason=EVIL) for layer in one.layers[:1]))
            for one in whole.components
        ),
        trials=(Trial(EVIL, {EVIL: EVIL}, 0.1, 0.1, 1, False, EVIL), Trial(EVIL, {}, 0.1, 0.1, 1, True, None)),
        fits=tuple(replace(fit, tensor=EVIL) for fit in whole.fits),
        inputs={EVIL: EVIL},
        recipe_text=f"</code></pre>{EVIL}",
        missing=dict.fromkeys(MISSING, f"`{EVIL}` and ` {EVIL}"),
    )
    told = page(evil)
    assert told.tags["script"] == told.tags["img"] == 0
    assert EVIL in told.text


def test_percentiles_of_too_few_samples_are_told_as_such() -> None:
    few = made.record([5.0] * 20)
    told = page(facts(record=record(paced=few.paced))).text
    assert "insufficient samples 20, p99 needs 459" in told


def test_energy_is_joules_or_a_reason_never_zero() -> None:
    measured = record(energy=Energy(joules=0.412, joules_above_idle=0.3, source="VDD_IN"))
    assert "0.412 J, 0.300 J above idle (VDD_IN)" in page(facts(record=measured)).text
    none = record(energy=Energy(reason="not available: no RAPL counters"))
    told = page(facts(record=none)).text
    assert "not available: no RAPL counters" in told
    assert " J" not in told.split("energy of a chunk")[1][:60]


def test_words_between_backquotes_are_code_and_a_single_one_is_itself() -> None:
    told = render(facts(examples=(), missing={**MISSING, "examples": "`vlaopt verify A` keeps them"}), {})
    assert "<code>vlaopt verify A</code> keeps them" in told
    told = render(facts(examples=(), missing={**MISSING, "examples": "a ` alone"}), {})
    assert "A ` alone" in told


def test_equal_facts_give_an_equal_page() -> None:
    assert render(facts(), figures.draw(facts())) == render(facts(), figures.draw(facts()))


def test_a_component_in_a_loop_says_how_often_it_runs() -> None:
    assert "step, 10× in a loop (euler)" in page(facts()).text


def test_success_in_closed_loop_stands_beside_the_reference() -> None:
    whole = facts()
    found = {"successes": 48, "episodes": 50, "interval": [0.865, 0.989]}
    reference = {"reference": {"successes": 49, "episodes": 50}}
    for closed, end in ((found, "."), ({**found, **reference}, "; the reference 49 of 50.")):
        manifest = whole.manifest.model_copy(update={"metrics": {"verify": {"closed_loop": closed}}})
        assert f"48 of 50 episodes (86.5 % – 98.9 %, Wilson 95 %){end}" in page(replace(whole, manifest=manifest)).text


def test_what_the_machine_did_meanwhile_is_told_from_least_to_most() -> None:
    throttled = made.timeline((0.0, 0.5), clock_mhz=(1500.0, None), temperature_c=(50.0, 53.0)).model_copy(
        update={"throttling": {"power cap": 0.5}}
    )
    told = page(facts(record=record(timeline=throttled))).text
    assert "clock (MHz) while paced 1 500 – 1 500" in told
    assert "temperature (°C) while paced 50.0 – 53.0" in told
    assert "throttled: power cap while paced 50.0 % of the time" in told


def test_what_the_machine_did_not_tell_is_named() -> None:
    told = page(facts()).text
    assert "memory (MiB)" in told
    assert "governor" in told.split("not available here")[1]


def test_every_table_names_its_columns() -> None:
    text: Any = render(facts(), {})
    tables = text.split("<table>")[1:]
    assert tables
    assert all('scope="col"' in table.split("</table>")[0] for table in tables)


def test_the_latency_table_is_of_the_record() -> None:
    spread = summarise([4.0] * 500)
    told = page(facts(record=record(back_to_back=made.record([4.0] * 500).back_to_back))).text
    assert spread.p99.value == 4.0
    assert "4.00 – 4.00 ms" in told
