"""The promise: golden data come back from an artifact as they were recorded, each noise with its observation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlaopt.artifact.artifact import Artifact
from vlaopt.errors import InputError
from vlaopt.runtime.golden import ACTIONS, INPUTS, OBSERVATIONS, TEXT, Golden
from vlaopt.runtime.policy import open_artifact
from vlaopt.tensors import Array, pack, unpack

Publish = Callable[..., Artifact]


def recorded(noise: bool = True) -> Golden:
    rows = tuple({"joints": np.full(2, row, np.float32), "task": f"task {row}"} for row in range(3))
    drawn = np.arange(12, dtype=np.float32).reshape(3, 1, 2, 2) if noise else None
    return Golden(rows, np.arange(12, dtype=np.float32).reshape(3, 2, 2), drawn)


def files_of(golden: Golden) -> dict[str, tuple[str, bytes]]:
    inputs = [{"state": np.full((1, 2), row, np.float32)} for row in range(len(golden.observations))]
    return {path: ("golden", data) for path, data in golden.files(inputs).items()}


@pytest.mark.parametrize("noise", [True, False])
def test_golden_data_come_back_as_recorded(tmp_path: Path, publish: Publish, noise: bool) -> None:
    golden = recorded(noise)
    found = Golden.of(publish(tmp_path / "artifact", files_of(golden)))
    assert np.array_equal(found.actions, golden.actions)
    assert (found.noise is None) == (golden.noise is None)
    for mine, theirs in zip(found.observations, golden.observations, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine["task"] == theirs["task"]
        assert np.array_equal(mine["joints"], theirs["joints"])


def test_the_components_inputs_are_stacked_over_samples() -> None:
    stacked = unpack(files_of(recorded())[INPUTS][1], where=INPUTS)
    assert stacked["state"].tolist() == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("noise", [True, False])
def test_each_observation_is_run_with_its_own_noise(noise: bool) -> None:
    golden = recorded(noise)
    seen: list[tuple[str, Any]] = []

    def predict(observation: Any, drawn: Array | None) -> Array:
        seen.append((observation["task"], None if drawn is None else float(drawn[0, 0, 0])))
        return np.zeros((2, 2), np.float32)

    assert golden.run(predict).shape == (3, 2, 2)
    assert seen == [("task 0", 0.0), ("task 1", 4.0), ("task 2", 8.0)] if noise else [(t, None) for t, _ in seen]


def test_a_policy_is_checked_on_its_own_golden_data(
    tmp_path: Path, publish: Publish, tiny_files: Any, tiny_observation: dict[str, Any], tiny_chunk: Array
) -> None:
    golden = Golden((tiny_observation,), tiny_chunk[None], None)
    inputs = [{"state": np.ones((1, 2), np.float32)}]
    files = {path: ("golden", data) for path, data in golden.files(inputs).items()}
    artifact = publish(tmp_path / "artifact", {**tiny_files, **files})
    found = Golden.of(artifact)
    assert found.run(open_artifact(artifact).predict_chunk) == pytest.approx(found.actions, abs=1e-6)


def test_an_artifact_without_golden_data_is_refused(tmp_path: Path, publish: Publish) -> None:
    with pytest.raises(InputError, match="holds no golden data"):
        Golden.of(publish(tmp_path / "artifact", {}))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({ACTIONS: pack({"noise": np.zeros(3, np.float32)})}, "holds no actions"),
        ({ACTIONS: pack({"actions": np.zeros((2, 2, 2), np.float32)})}, "differ in number"),
        ({ACTIONS: pack({"actions": np.zeros((3, 2, 2)), "noise": np.zeros((2, 1))})}, "differ in number"),
        ({OBSERVATIONS: pack({"joints": np.zeros((4, 2), np.float32)})}, "differ in number"),
        ({TEXT: b'{"task": ["one"]}'}, "differ in number"),
    ],
)
def test_golden_data_that_do_not_fit_together_are_refused(
    tmp_path: Path, publish: Publish, changed: dict[str, bytes], reason: str
) -> None:
    files = {**files_of(recorded()), **{path: ("golden", data) for path, data in changed.items()}}
    with pytest.raises(InputError, match=reason):
        Golden.of(publish(tmp_path / "artifact", files))
