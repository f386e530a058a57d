"""Stage verify shows what it measured: two golden samples with their actions, in its report and not in its metrics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.unit.cli.conftest import write_artifact
from vlaopt.artifact.artifact import Artifact
from vlaopt.progress import Silent
from vlaopt.runtime.golden import Golden
from vlaopt.stages import verify


@pytest.fixture
def result(tmp_path: Path) -> verify.Result:
    artifact = write_artifact(tmp_path / "artifact", off_by=0.01)
    return verify.measure(artifact, artifact.recipe(), None, Silent())


def test_an_example_holds_the_actions_that_its_error_is_of(tmp_path: Path, result: verify.Result) -> None:
    golden = Golden.of(Artifact.open(tmp_path / "artifact"))
    for example in result.examples:
        actions = np.array(example["actions"])
        assert actions.shape == golden.actions.shape[1:]
        assert np.abs(actions - golden.actions[example["sample"]]).mean() == pytest.approx(example["error"], rel=1e-2)
        assert example["error"] == pytest.approx(0.01, rel=1e-2)


def test_the_metrics_of_the_manifest_stay_small(result: verify.Result) -> None:
    assert "examples" not in result.metrics
    assert len(json.dumps(result.metrics)) < 3000


def test_the_worst_sample_comes_first_then_the_median() -> None:
    actions = np.arange(5.0).reshape(5, 1, 1)
    examples = verify._examples(actions, np.array([0.3, 0.1, 0.9, 0.2, 0.4]))
    assert [(example["sample"], example["error"]) for example in examples] == [(2, 0.9), (0, 0.3)]
    assert examples[0]["actions"] == [[2.0]]


def test_a_single_sample_is_told_once() -> None:
    assert [one["sample"] for one in verify._examples(np.zeros((1, 2, 3)), np.array([0.5]))] == [0]


def test_numbers_have_six_digits() -> None:
    assert verify._examples(np.full((1, 1, 1), 1 / 3), np.array([2 / 3]))[0] == {
        "sample": 0,
        "error": 0.666667,
        "actions": [[0.333333]],
    }
