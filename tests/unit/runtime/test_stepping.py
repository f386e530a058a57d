"""The promise: one action per step, whether from a queue, a history of observations, or the mean of many chunks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.artifact.policy_spec import Chunk, PolicySpec, TokeniseProcessor
from vlaopt.errors import InputError
from vlaopt.runtime.stepping import Ensemble, Stepper
from vlaopt.tensors import Array


class Chunks:
    """A policy whose chunks say when they were predicted: 10 · number of the call + row; keeps what it was given."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.given: list[Mapping[str, Any]] = []

    def __call__(self, observation: Mapping[str, Any]) -> Array:
        self.given.append(observation)
        return np.float32(10 * (len(self.given) - 1)) + np.arange(self.size, dtype=np.float32)[:, None].repeat(2, 1)


def changed(spec: PolicySpec, **fields: Any) -> PolicySpec:
    return PolicySpec.model_validate({**spec.model_dump(by_alias=True), **fields})


def seen(step: int) -> dict[str, Any]:
    return {"camera": np.full((2, 2, 3), step, np.uint8), "joints": np.full(2, step, np.float32)}


@settings(max_examples=30)
@given(size=st.integers(1, 6), data=st.data())
def test_every_action_is_that_of_the_newest_chunk_made_in_time(
    tiny_spec: PolicySpec, size: int, data: st.DataObject
) -> None:
    executed = data.draw(st.integers(1, size))
    chunks = Chunks(size)
    stepper = Stepper(changed(tiny_spec, chunk={"size": size, "n_action_steps": executed}), chunks)
    for step in range(20):
        assert stepper.needs_observation == (step % executed == 0)
        action = stepper.predict(seen(step))
        assert action.tolist() == [10 * (step // executed) + step % executed] * 2
    assert [int(o["joints"][0]) for o in chunks.given] == list(range(0, 20, executed))


def test_a_new_episode_starts_with_a_new_chunk(tiny_spec: PolicySpec) -> None:
    chunks = Chunks(3)
    stepper = Stepper(tiny_spec, chunks)
    stepper.predict(seen(0))
    stepper.reset()
    assert stepper.needs_observation
    assert stepper.predict(seen(1)).tolist() == [10, 10]


def test_a_history_holds_the_last_steps_and_is_filled_with_the_first(tiny_spec: PolicySpec) -> None:
    chunks = Chunks(3)
    stepper = Stepper(changed(tiny_spec, history=3), chunks)
    for step in range(5):
        assert stepper.needs_observation
        stepper.predict(seen(step))
    assert [o["joints"][:, 0].tolist() for o in chunks.given] == [[0, 0, 0], [0, 1, 2], [2, 3, 4]]
    assert chunks.given[1]["camera"].shape == (3, 2, 2, 3)
    assert chunks.given[1]["camera"][:, 0, 0, 0].tolist() == [0, 1, 2]
    stepper.reset()
    stepper.predict(seen(9))
    assert chunks.given[-1]["joints"][:, 0].tolist() == [9, 9, 9]


def test_the_text_of_a_history_is_the_newest(tiny_spec: PolicySpec) -> None:
    words = TokeniseProcessor(input="task", output="tokens", max_length=4, asset="tokenizer.json")
    spec = changed(tiny_spec, history=2, preprocess=[*tiny_spec.model_dump()["preprocess"], words.model_dump()])
    chunks = Chunks(3)
    stepper = Stepper(spec, chunks)
    for step, task in enumerate(("push", "push", "pull")):
        stepper.predict({**seen(step), "task": task})
    assert chunks.given[-1]["task"] == "pull"


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"joints": np.full(2, np.nan, np.float32)}, "joints: not finite"),
        ({"joints": np.zeros((2, 2), np.float32)}, r"joints: shape \[2, 2\] given, \[2\] needed"),
        ({"camera": np.zeros((4, 4, 3), np.uint8)}, "camera: shape"),
        ({"gain": 1}, "has unknown gain"),
    ],
)
def test_a_refused_observation_is_not_remembered(tiny_spec: PolicySpec, wrong: dict[str, Any], reason: str) -> None:
    chunks = Chunks(3)
    stepper = Stepper(changed(tiny_spec, history=2, chunk={"size": 3, "n_action_steps": 1}), chunks)
    stepper.predict(seen(1))
    with pytest.raises(InputError, match=reason):
        stepper.predict({**seen(5), **wrong})
    stepper.predict(seen(2))
    assert chunks.given[-1]["joints"][:, 0].tolist() == [1, 2]


@pytest.mark.parametrize(("weight", "size"), [(0.01, 100), (0.0, 7), (-0.1, 20), (1.5, 4), (0.01, 1)])
def test_an_ensemble_is_lerobots(weight: float, size: int) -> None:
    pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
    import torch
    from lerobot.policies.act.modeling_act import ACTTemporalEnsembler

    theirs, mine, rng = ACTTemporalEnsembler(weight, size), Ensemble(weight, size), np.random.default_rng(0)
    for _ in range(130):
        chunk = rng.standard_normal((size, 3), dtype=np.float32)
        expected = theirs.update(torch.from_numpy(chunk)[None])[0].numpy()
        assert np.abs(mine.update(chunk) - expected).max() <= 1e-6


@settings(max_examples=40)
@given(weight=st.floats(-0.5, 2), size=st.integers(1, 8), steps=st.integers(1, 20), seed=st.integers(0, 99))
def test_an_ensemble_is_the_weighted_mean_of_all_predictions_for_its_step(
    weight: float, size: int, steps: int, seed: int
) -> None:
    chunks = np.random.default_rng(seed).standard_normal((steps, size, 2), dtype=np.float32)
    ensemble = Ensemble(weight, size)
    for now in range(steps):
        action = ensemble.update(chunks[now])
        about_now = [chunks[made, now - made] for made in range(max(0, now - size + 1), now + 1)]  # the oldest first
        weights = np.exp(-weight * np.arange(len(about_now)))
        assert action == pytest.approx(np.average(about_now, axis=0, weights=weights), abs=1e-5)


def test_with_an_ensemble_every_step_predicts_and_reset_forgets_it(tiny_spec: PolicySpec) -> None:
    chunks = Chunks(3)
    stepper = Stepper(changed(tiny_spec, chunk={"size": 3, "n_action_steps": 1, "ensemble": 0.0}), chunks)
    needed, actions = [], []
    for step in range(4):
        needed.append(stepper.needs_observation)
        actions.append(float(stepper.predict(seen(step))[0]))
    assert needed == [True] * 4
    # For step 1: row 1 of chunk 0 and row 0 of chunk 1, and so on, equally weighted.
    assert actions == pytest.approx([0, (1 + 10) / 2, (2 + 11 + 20) / 3, (12 + 21 + 30) / 3])
    stepper.reset()
    assert stepper.predict(seen(9)).tolist() == [40, 40]


def test_the_chunk_that_is_given_is_not_changed(tiny_spec: PolicySpec) -> None:
    chunk = np.ones((3, 2), np.float32)
    spec = tiny_spec.model_copy(update={"chunk": Chunk(size=3, n_action_steps=1, ensemble=0.5)})
    stepper = Stepper(spec, lambda observation: chunk)
    for step in range(5):
        stepper.predict(seen(step))
    assert (chunk == 1).all()
