"""The eager policy turns an observation into actions in the robot's units, and refuses what it cannot read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlaopt.errors import InputError
from vlaopt.policies.edge_vla.policy import EdgeVLAPolicy, Statistics, build_tokenizer

FRONT, STATE = "observation.images.front", "observation.state"


def test_a_chunk_is_in_the_robots_units(policy: EdgeVLAPolicy, observation: dict[str, Any]) -> None:
    chunk = policy.predict_chunk(observation)
    assert chunk.shape == (6, 4) and chunk.dtype == np.float32
    assert np.abs(chunk).max() <= 1.0


def test_both_image_forms_give_the_same_chunk(policy: EdgeVLAPolicy, observation: dict[str, Any]) -> None:
    planar = (observation[FRONT].transpose(2, 0, 1) / 255.0).astype(np.float32)
    np.testing.assert_allclose(
        policy.predict_chunk({**observation, FRONT: planar}), policy.predict_chunk(observation), atol=1e-6
    )


def test_predict_steps_through_the_chunk_and_looks_again(policy: EdgeVLAPolicy, observation: dict[str, Any]) -> None:
    chunk = policy.predict_chunk(observation)
    assert policy.needs_observation
    np.testing.assert_array_equal(policy.predict(observation), chunk[0])
    assert not policy.needs_observation
    np.testing.assert_array_equal(policy.predict({}), chunk[1])
    assert policy.needs_observation


def test_reset_forgets_the_rest_of_the_chunk(policy: EdgeVLAPolicy, observation: dict[str, Any]) -> None:
    policy.predict(observation)
    policy.reset()
    assert policy.needs_observation


def test_a_prediction_does_not_change_when_its_chunk_is_written_to(
    policy: EdgeVLAPolicy, observation: dict[str, Any]
) -> None:
    policy.predict_chunk(observation)[:] = 9
    assert np.abs(policy.predict_chunk(observation)).max() <= 1.0


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (FRONT, np.zeros((3, 32, 32), np.uint8), r"observation.images.front is uint8 \[3, 32, 32\], needed is uint8"),
        (FRONT, np.zeros((32, 32, 3), np.float64), "observation.images.front is float64"),
        (STATE, np.zeros(4), "observation.state is float64"),
        (STATE, np.zeros(3, np.float32), r"observation.state is float32 \[3\], needed is float32 \[4\]"),
        (STATE, np.array([0, 0, np.nan, 0], np.float32), "observation.state holds values that are not finite"),
        ("task", 3, "task is int, needed is a string"),
    ],
)
def test_refuses_by_name(
    policy: EdgeVLAPolicy, observation: dict[str, Any], name: str, value: object, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        policy.predict_chunk({**observation, name: value})


@pytest.mark.parametrize("name", [FRONT, STATE, "task"])
def test_says_what_is_missing(policy: EdgeVLAPolicy, observation: dict[str, Any], name: str) -> None:
    del observation[name]
    with pytest.raises(InputError, match=f"the observation has no '{name}'"):
        policy.predict_chunk(observation)


def test_tokens_are_words_without_case_padded_with_zero() -> None:
    tokenizer = build_tokenizer(["Open the drawer", "close the drawer"], 6)
    ids = tokenizer.encode("OPEN the Drawer").ids
    assert len(ids) == 6 and ids[3:] == [0, 0, 0]
    assert 1 not in ids and tokenizer.encode("unheard").ids[0] == 1
    assert len(tokenizer.encode("open " * 20).ids) == 6


def test_the_tokenizer_does_not_depend_on_the_order_of_instructions() -> None:
    assert build_tokenizer(["a b", "c"], 4).to_str() == build_tokenizer(["c", "a b"], 4).to_str()


def test_a_dimension_that_never_moves_is_not_divided_by_zero() -> None:
    statistics = Statistics.of(np.ones((5, 4), np.float32), np.ones((5, 2, 4), np.float32))
    assert (statistics.state_std > 0).all() and (statistics.action_std > 0).all()
