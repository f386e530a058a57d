"""The promise: loop steps and execution horizon change when an artifact is opened, or the number is refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vlaopt
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.policy_spec import DiffusionLoop, PolicySpec
from vlaopt.errors import InputError
from vlaopt.runtime.adjust import adjusted
from vlaopt.runtime.policy import Policy, open_artifact

OBSERVATION = {"joints": np.asarray([1, 2], np.float32)}
NOISE = np.asarray([[[1, -1], [0.5, 2]]], np.float32)


def test_nothing_asked_is_nothing_changed(tiny_spec: PolicySpec) -> None:
    assert adjusted(tiny_spec) == tiny_spec


def test_other_steps_are_those_of_a_policy_built_with_them(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: np.tanh(x), steps=4)
    spec = adjusted(policy.spec, steps=16)
    finer = Policy(spec, policy.processors, sessions, backend="fake")
    expected = flow(lambda x, t: np.tanh(x), steps=16)[0].predict_chunk(OBSERVATION, NOISE)
    assert np.array_equal(finer.predict_chunk(OBSERVATION, NOISE), expected)
    assert policy.spec.loop.steps == 4


def test_an_opened_artifact_executes_as_many_actions_as_asked(
    tiny_artifact: Artifact, tiny_observation: dict[str, Any], tiny_chunk: np.ndarray
) -> None:
    for policy in (vlaopt.open(tiny_artifact.path, n_action_steps=3), open_artifact(tiny_artifact, n_action_steps=3)):
        actions = [policy.predict(tiny_observation) for _ in range(3)]
        assert np.stack(actions) == pytest.approx(tiny_chunk, abs=1e-6)
        assert policy.needs_observation
    assert vlaopt.open(tiny_artifact.path).spec.chunk.n_action_steps == 2


def test_an_artifact_without_steps_is_refused_before_anything_opens(tiny_artifact: Artifact) -> None:
    with pytest.raises(InputError, match="steps: a loop of kind single has no number of steps"):
        vlaopt.open(tiny_artifact.path, steps=5, backend="no such backend")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"steps": 0}, "^steps: Input should be greater than or equal to 1"),
        ({"steps": 2.5}, "^steps: Input should be a valid integer"),
        ({"n_action_steps": 0}, "^n_action_steps: Input should be greater than or equal to 1"),
        ({"n_action_steps": 3}, "^n_action_steps 3 is more than the chunk's 2"),
    ],
)
def test_a_number_the_policy_cannot_take_is_refused(flow: Any, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        adjusted(flow(lambda x, t: x)[0].spec, **fields)


def test_more_steps_than_the_training_had_are_refused(flow: Any) -> None:
    names = {"step": "aflow", "state_input": "x", "time_input": "t", "prediction_output": "v"}
    loop = DiffusionLoop(kind="ddim", steps=2, prediction="epsilon", alphas_cumprod=(0.9, 0.5, 0.1), **names)
    spec = flow(lambda x, t: x)[0].spec.model_copy(update={"loop": loop})
    assert adjusted(spec, steps=3).loop.steps == 3
    with pytest.raises(InputError, match=r"^4 steps are more than the 3 of the training"):
        adjusted(spec, steps=4)


def test_temporal_ensembling_executes_one_action_only(flow: Any) -> None:
    spec = flow(lambda x, t: x)[0].spec
    ensemble = spec.model_copy(update={"chunk": spec.chunk.model_copy(update={"ensemble": 0.1, "n_action_steps": 1})})
    with pytest.raises(InputError, match="temporal ensembling predicts at every step, n_action_steps is 2"):
        adjusted(ensemble, n_action_steps=2)
