"""The promise: one action per call, a new chunk when the old is used up, and noise that can be repeated."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.runtime.conftest import unit_statistics
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.errors import InputError
from vlaopt.runtime.policy import Policy, open_artifact
from vlaopt.runtime.processors import Processors
from vlaopt.tensors import Array

JOINTS = {"joints": np.asarray([1, 2], np.float32)}


@pytest.fixture(scope="module")
def opened(tiny_artifact: Artifact) -> Policy:
    return open_artifact(tiny_artifact)


@pytest.fixture
def policy(opened: Policy) -> Policy:
    opened.reset()
    return opened


def test_components_wired_by_name_give_the_chunk_worked_out_by_hand(
    policy: Policy, tiny_observation: dict[str, Any], tiny_chunk: Array
) -> None:
    chunk = policy.predict_chunk(tiny_observation)
    assert (chunk.dtype, chunk.shape) == (np.float32, (3, 2))
    assert chunk == pytest.approx(tiny_chunk, abs=1e-6)


def test_predict_steps_through_the_executed_part_of_each_chunk(
    policy: Policy, tiny_observation: dict[str, Any], tiny_chunk: Array
) -> None:
    later = {**tiny_observation, "joints": np.asarray([5, 10], np.float32)}
    actions = [policy.predict(observation) for observation in (tiny_observation, later, later, tiny_observation)]
    assert actions[0] == pytest.approx(tiny_chunk[0], abs=1e-6)
    assert actions[1] == pytest.approx(tiny_chunk[1], abs=1e-6)
    assert actions[2] == pytest.approx(tiny_chunk[0] + [1, 0.5], abs=1e-6)
    assert actions[3] == pytest.approx(tiny_chunk[1] + [1, 0.5], abs=1e-6)
    assert all((action.dtype, action.shape) == (np.float32, (2,)) for action in actions)


def test_an_observation_is_needed_only_for_a_new_chunk(policy: Policy, tiny_observation: dict[str, Any]) -> None:
    needed = []
    for _ in range(4):
        needed.append(policy.needs_observation)
        policy.predict(tiny_observation)
    assert needed == [True, False, True, False]


def test_reset_forgets_the_rest_of_the_chunk(
    policy: Policy, tiny_observation: dict[str, Any], tiny_chunk: Array
) -> None:
    policy.predict(tiny_observation)
    policy.reset()
    assert policy.needs_observation
    assert policy.predict(tiny_observation) == pytest.approx(tiny_chunk[0], abs=1e-6)


def test_a_refused_observation_leaves_the_policy_ready(policy: Policy, tiny_observation: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="joints: not finite"):
        policy.predict({**tiny_observation, "joints": np.asarray([np.nan, 1], np.float32)})
    assert policy.needs_observation
    policy.predict(tiny_observation)


def batch_of(observation: dict[str, Any], size: int) -> list[dict[str, Any]]:
    return [{**observation, "joints": np.asarray([row, 2 * row], np.float32)} for row in range(size)]


def test_a_batch_gives_the_stack_of_its_rows(policy: Policy, tiny_observation: dict[str, Any]) -> None:
    rows = batch_of(tiny_observation, 3)
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    chunks = policy.predict_chunk(stacked)
    assert chunks.shape == (3, 3, 2)
    assert np.array_equal(chunks, np.stack([policy.predict_chunk(row) for row in rows]))


def test_a_batch_of_lists_gives_the_same(policy: Policy, tiny_observation: dict[str, Any]) -> None:
    rows = batch_of(tiny_observation, 2)
    listed = {name: [row[name] for row in rows] for name in rows[0]}
    assert np.array_equal(policy.predict_chunk(listed), np.stack([policy.predict_chunk(row) for row in rows]))


@pytest.mark.parametrize(
    ("camera", "joints", "reason"),
    [
        ((2, 2, 2, 3), (2,), "differ in their batch dimension: .*camera.*2.*joints.*None"),
        ((2, 2, 2, 3), (3, 2), "differ in their batch dimension"),
        ((0, 2, 2, 3), (0, 2), "the observation's batch is empty"),
        ((2, 4, 4, 3), (2, 2), r"camera: shape \[4, 4, 3\] given"),
        ((2, 2, 2, 2, 3), (1, 1, 2), "camera: shape"),
    ],
)
def test_a_wrong_batch_is_refused(
    policy: Policy, camera: tuple[int, ...], joints: tuple[int, ...], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        policy.predict_chunk({"camera": np.zeros(camera, np.uint8), "joints": np.zeros(joints, np.float32)})


def test_a_batch_with_an_unknown_part_is_refused_by_its_name(policy: Policy) -> None:
    batch = {"camera": np.zeros((2, 2, 2, 3), np.uint8), "joints": np.zeros((2, 2), np.float32), "gain": 5}
    with pytest.raises(InputError, match="has unknown gain"):
        policy.predict_chunk(batch)


def test_predict_takes_one_time_step_not_a_batch(policy: Policy) -> None:
    batch = {"camera": np.zeros((2, 2, 2, 3), np.uint8), "joints": np.zeros((2, 2), np.float32)}
    with pytest.raises(InputError, match=r"camera: shape \[2, 2, 2, 3\] given, \[2, 2, 3\] needed"):
        policy.predict(batch)


@pytest.mark.parametrize("observation", [None, [], "x", 5])
def test_what_is_no_observation_is_refused(policy: Policy, observation: Any) -> None:
    for call in (policy.predict, policy.predict_chunk):
        with pytest.raises(InputError, match="a dict of camera, joints is needed"):
            call(observation)


def test_a_policy_without_noise_takes_none(policy: Policy, tiny_observation: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="this policy takes none"):
        policy.predict_chunk(tiny_observation, np.zeros((), np.float32))


def test_a_component_without_a_session_is_named(tiny_spec: PolicySpec, policy: Policy) -> None:
    with pytest.raises(InputError, match="there is no engine for component 'eye'"):
        Policy(tiny_spec, policy.processors, {"arm": object()}, backend="fake")  # type: ignore[dict-item]


def still(x: Array, t: Array) -> Array:
    return np.zeros_like(x)


def test_fixed_noise_is_the_same_at_every_call(flow: Any) -> None:
    policy, _ = flow(still, seed="fixed")
    first = policy.predict_chunk(JOINTS)
    assert np.array_equal(policy.predict_chunk(JOINTS), first)
    policy.reset()
    assert np.array_equal(policy.predict_chunk(JOINTS), first)
    assert np.array_equal(flow(still, seed="fixed")[0].predict_chunk(JOINTS), first)


def test_noise_per_call_is_a_sequence_that_reset_starts_again(flow: Any) -> None:
    policy, _ = flow(still, seed="per-call")
    first = [policy.predict_chunk(JOINTS) for _ in range(3)]
    assert len({chunk.tobytes() for chunk in first}) == 3
    policy.reset()
    assert all(np.array_equal(policy.predict_chunk(JOINTS), chunk) for chunk in first)


def test_each_row_of_a_batch_has_its_own_noise_in_the_order_of_single_calls(flow: Any) -> None:
    policy, _ = flow(still, seed="per-call")
    batch = policy.predict_chunk({"joints": np.zeros((3, 2), np.float32)})
    policy.reset()
    assert np.array_equal(batch, np.stack([policy.predict_chunk(JOINTS) for _ in range(3)]))


def test_given_noise_is_used_and_draws_nothing(flow: Any) -> None:
    policy, _ = flow(still, seed="per-call")
    first = policy.predict_chunk(JOINTS)
    policy.reset()
    given = np.full((1, 2, 2), 5, np.float32)
    assert policy.predict_chunk(JOINTS, given).tolist() == [[5, 5], [5, 5]]
    assert np.array_equal(policy.predict_chunk(JOINTS), first)


def test_another_seed_is_another_sequence(flow: Any) -> None:
    one, sessions = flow(still)
    spec = one.spec
    other = Policy(spec, one.processors, sessions, backend="fake", seed=8)
    assert isinstance(one.processors, Processors)
    assert not np.array_equal(one.predict_chunk(JOINTS), other.predict_chunk(JOINTS))


def remembering(flow: Any, **fields: Any) -> Policy:
    """The flow policy with a history of two, whose actions are the states it sees, the older one first."""
    policy, sessions = flow(lambda x, t: x)
    spec = PolicySpec.model_validate({**policy.spec.model_dump(by_alias=True), "history": 2, **fields})
    sessions["eye"].function = lambda state: {"prefix": state}
    sessions["aflow"].function = lambda x, t, prefix: {"v": prefix}
    return Policy(spec, Processors(spec, unit_statistics), sessions, backend="fake")


def joints(*values: float) -> Array:
    return np.asarray([[value] * 2 for value in values], np.float32)


ZERO = np.zeros((1, 2, 2), np.float32)


def test_a_history_is_seen_whole_filled_or_row_by_row_of_a_batch(flow: Any) -> None:
    policy = remembering(flow)
    assert np.array_equal(policy.predict_chunk({"joints": joints(3, 7)}, ZERO), joints(3, 7))
    assert np.array_equal(policy.predict_chunk({"joints": joints(5)[0]}, ZERO), joints(5, 5))
    batch = np.stack([joints(1, 2), joints(3, 4), joints(5, 6)])
    assert np.array_equal(policy.predict_chunk({"joints": batch}, ZERO), batch)


def test_predict_remembers_the_steps_before(flow: Any) -> None:
    fixed = {"law": "uniform", "shape": (1, 2, 2), "low": 0, "high": 1e-9}
    policy = remembering(flow, chunk={"size": 2, "n_action_steps": 1}, noise=fixed)
    older = []
    for value in (1, 2, 3):
        assert policy.needs_observation
        older.append(policy.predict({"joints": joints(value)[0]}))
    assert np.stack(older) == pytest.approx(joints(1, 1, 2), abs=1e-6)
    policy.reset()
    assert policy.predict({"joints": joints(9)[0]}) == pytest.approx(joints(9)[0], abs=1e-6)


def test_an_ensemble_is_the_mean_of_chunks(flow: Any) -> None:
    policy, sessions = flow(still)
    ensemble = {"size": 2, "n_action_steps": 1, "ensemble": 0.0}
    spec = PolicySpec.model_validate({**policy.spec.model_dump(by_alias=True), "chunk": ensemble})
    averaged = Policy(spec, policy.processors, sessions, backend="fake", seed=7)
    chunks = [policy.predict_chunk(JOINTS) for _ in range(2)]
    actions = [averaged.predict(JOINTS) for _ in range(2)]
    assert np.array_equal(actions[0], chunks[0][0])
    assert actions[1] == pytest.approx((chunks[0][1] + chunks[1][0]) / 2)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "reference"])
def test_tensors_that_stay_in_the_backend_change_nothing(
    tiny_artifact: Artifact, tiny_observation: dict[str, Any], backend: str
) -> None:
    policy = open_artifact(tiny_artifact, backend=backend)
    seen: list[dict[str, Array]] = []
    watched = policy.predict_chunk(tiny_observation, tap=lambda name, given, made: seen.append({**given, **made}))
    assert all(isinstance(value, np.ndarray) for tensors in seen for value in tensors.values())
    for _ in range(3):
        assert np.array_equal(policy.predict_chunk(tiny_observation), watched)


def test_a_policy_passes_on_what_its_sessions_say_of_how_they_ran(flow: Any) -> None:
    policy, sessions = flow(still)
    assert policy.told() == {}
    sessions["aflow"].told = ("as a CUDA graph",)
    assert policy.told() == {"aflow": ("as a CUDA graph",)}
