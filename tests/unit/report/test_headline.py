"""The statements say what held, what did not and what is open, and never more than the facts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.report.conftest import MISSING, bare, facts, record
from tests.unit.report.figures import made
from vlaopt.report.facts import Facts, Gate
from vlaopt.report.headline import Statement, headline


def said(found: Facts) -> dict[str, Statement]:
    return {one.about: one for one in headline(found)}


def test_everything_held() -> None:
    told = said(facts())
    assert told["Actions"].status == "good"
    assert told["Actions"].answer == "2 of 2 gates held"
    assert told["Control rate"].status == "good"
    assert told["Control rate"].answer == "50 Hz held"
    assert told["Speed"].answer == "6.49× eager"
    assert told["Size"].answer == "52.0 MB"
    assert told["Size"].detail == "26.0 % of eager"


def test_a_missed_gate_is_named_and_no_speed_is_told_beside_it() -> None:
    gates = (Gate("golden: mean action error", 0.01, 0.05, True), Gate("golden: gripper flips", 0.2, 0.01, False))
    told = said(facts(gates=gates))
    assert told["Actions"].status == "bad"
    assert told["Actions"].answer == "1 of 2 gates missed"
    assert told["Actions"].detail == "missed: golden: gripper flips 0.200 of 0.0100"
    assert told["Speed"].status == "open"
    assert "×" not in told["Speed"].answer


def test_one_missed_tick_is_a_rate_not_held() -> None:
    slow = made.record([5.0] * 599 + [25.0])
    told = said(facts(record=record(paced=slow.paced)))["Control rate"]
    assert told.status == "bad"
    assert told.answer == "50 Hz not held: 0.167 % missed"
    assert "1 of 600 ticks" in told.detail


@pytest.mark.parametrize("verdict", ["INVALID", "INCONCLUSIVE"])
def test_a_measurement_that_is_not_valid_leaves_the_rate_open_with_its_reasons(verdict: str) -> None:
    told = said(facts(record=record(verdict=verdict, reasons=("busy machine", "it throttled"))))["Control rate"]
    assert (told.status, told.answer) == ("open", f"50 Hz: {verdict}")
    assert told.detail.startswith("busy machine; it throttled; 0 of 600 ticks missed")


def test_the_rate_of_another_backend_is_not_that_of_the_engine() -> None:
    told = said(facts(missing={"engine_record": "measured on onnxruntime, not the engine on tensorrt"}))["Control rate"]
    assert (told.status, told.answer) == ("open", "50 Hz: not of the engine")
    assert "not the engine on tensorrt" in told.detail


def test_actions_of_portable_graphs_do_not_hold_for_the_engine() -> None:
    whole = facts(verified_on="verified: the portable graphs")
    metrics = {"verify": {"engine_not_run": "no GPU"}}
    told = said(replace(whole, manifest=whole.manifest.model_copy(update={"metrics": metrics})))["Actions"]
    assert (told.status, told.detail) == ("open", "verified: the portable graphs")


def test_a_gain_measured_on_a_busy_machine_is_open() -> None:
    told = said(facts(missing={"forms_quiet": "the machine was busy meanwhile: others took 69%"}))["Speed"]
    assert told.status == "open"
    assert "others took 69%" in told.detail


def test_what_was_not_measured_is_open_with_its_reason() -> None:
    told = said(bare())
    assert [told[about].status for about in ("Actions", "Control rate", "Speed")] == ["open"] * 3
    assert told["Actions"].detail == MISSING["gates"]
    assert told["Control rate"].detail == MISSING["record"]
    assert told["Speed"].detail == MISSING["forms_how"]


def test_without_forms_the_speed_is_that_of_the_record() -> None:
    told = said(facts(forms=(), missing=MISSING))["Speed"]
    assert told.answer.endswith("ms a chunk")
    assert "not compared" in told.detail
