"""The text for a pull request: short, the same for the same facts, and nothing in it becomes a link or a tag."""

from __future__ import annotations

from dataclasses import replace

from tests.unit.report.conftest import bare, facts, record
from tests.unit.report.test_page import EVIL
from vlaopt.report.facts import Gate
from vlaopt.report.markdown import as_markdown


def test_it_tells_the_headline_the_forms_the_latency_and_the_gates() -> None:
    told = as_markdown(facts())
    assert told.startswith("### made 1.0.0+000000000000 for cpu-x86\n")
    for line in (
        "| ✓ Actions | **2 of 2 gates held** |",
        "| ✓ Control rate | **50 Hz held** |",
        "| Speed | **6.49× eager** |",
        "| engine | 52.0 MB | 9.40 ms | ",
        "| p99.9 | insufficient samples | 600, p99.9 needs 4603 |",
        "| golden: mean action error | ",
    ):
        assert line in told
    assert told == as_markdown(facts())


def test_a_missed_gate_stands_out() -> None:
    told = as_markdown(facts(gates=(Gate("golden: gripper flips", 0.2, 0.01, False),)))
    assert "| ✗ Actions | **1 of 1 gates missed** |" in told
    assert "| golden: gripper flips | 0.200 | 0.0100 | **missed** |" in told


def test_what_was_not_measured_has_no_empty_table() -> None:
    told = as_markdown(bare())
    assert "| ? Control rate | **not measured** | the reason of record |" in told
    assert "p99" not in told
    assert "gates</summary>" not in told


def test_names_stay_text() -> None:
    whole = facts(
        gates=(Gate(f"{EVIL} [x](http://a.example) | a\nb", 0.1, 0.2, True),),
        record=record(verdict="INVALID", reasons=("![x](y)",)),
    )
    told = as_markdown(replace(whole, manifest=whole.manifest.model_copy(update={"name": EVIL})))
    assert "<script" not in told.replace("\\<script", "")
    assert "](" not in told.replace("\\](", "")
    rows = [line for line in told.splitlines() if "a.example" in line]
    assert len(rows) == 2  # the closest gate in the headline, and its own line
    assert all(row.replace("\\|", "").count("|") == 5 or "Actions" in row for row in rows)
