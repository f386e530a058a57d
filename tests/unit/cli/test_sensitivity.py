"""The table, the JSON and the plot of a sensitivity whose figures are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.quantization.test_search import action_error
from vlaopt.cli import sensitivity as command
from vlaopt.quantization.groups import Group
from vlaopt.quantization.sensitivity import Cost, Sensitivity, Suggestion

FOUND = Sensitivity(
    costs=(
        Cost(Group("head.output/Gemm", (("head", "output/Gemm"),)), refused="it crashes"),
        Cost(Group("head.mlp", (("head", "a/Gemm"), ("head", "b/Gemm"))), 0.02, 0.0, 0.1, 0.001, 250_000),
        Cost(Group("vision", (("vision", "c/Conv"),)), 0.01, 0.0, 0.0, 0.5, 1_500_000),
    ),
    base=action_error(0.004),
    base_ms=2.0,
)
RULES = [Suggestion("head.mlp", "fp32", "it gains no time and costs +0.0200")]


def trials(*, measured: bool) -> Any:
    return SimpleNamespace(backend="onnxruntime", measured=measured)


def test_the_table_has_a_row_for_every_part_and_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    command._show(FOUND, RULES, trials(measured=True))
    told = " ".join(capsys.readouterr().out.split())
    assert "against 2.000 ms and a mean error of 0.0040 in FP32 part" in told
    assert "head.output/Gemm 1 refused: it crashes" in told
    assert "head.mlp 2 +0.0200 +0.0000 +0.100 +0.001 ms 0.25 MB gains none" in told
    assert "vision 1 +0.0100 +0.0000 +0.000 +0.500 ms 1.50 MB 0.0200" in told
    assert '- {scope: "head.mlp", scheme: fp32} # it gains no time and costs +0.0200' in told


def test_estimated_times_are_told_as_such(capsys: pytest.CaptureFixture[str]) -> None:
    command._show(FOUND, [], trials(measured=False))
    assert "times are estimated by multiply-adds" in " ".join(capsys.readouterr().out.split())
    assert command._as_json(FOUND, [], trials(measured=False))["times"] == "estimated by multiply-adds"


def test_the_json_holds_everything() -> None:
    told = json.loads(json.dumps(command._as_json(FOUND, RULES, trials(measured=True)), allow_nan=False))
    assert [part["group"] for part in told["parts"]] == ["head.output/Gemm", "head.mlp", "vision"]
    assert told["parts"][1]["nodes"] == ["head.a/Gemm", "head.b/Gemm"]
    assert told["fp32"]["ms"] == 2.0
    assert told["rules"] == [{"scope": "head.mlp", "scheme": "fp32", "why": RULES[0].why}]


def test_the_plot_names_every_part_that_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command._draw(tmp_path / "parts.svg", FOUND, "parts")
    drawn = (tmp_path / "parts.svg").read_text()
    assert "head.mlp" in drawn and "vision" in drawn
    assert "head.output" not in drawn


def test_the_plot_of_parts_that_were_all_refused_is_empty(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    command._draw(tmp_path / "parts.svg", replace(FOUND, costs=FOUND.costs[:1]), "parts")
    assert "head.output" not in (tmp_path / "parts.svg").read_text()
