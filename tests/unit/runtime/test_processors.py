"""The promise: observations become tensors exactly as written down, and what is wrong with one is said by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from vlaopt.artifact.policy_spec import PolicySpec, TokeniseProcessor, Unnormalise
from vlaopt.errors import InputError
from vlaopt.runtime.processors import Processors
from vlaopt.tensors import Array, pack

STATISTICS = {
    "state.mean": np.asarray([1, 2], np.float32),
    "state.std": np.asarray([2, 4], np.float32),
    "action.mean": np.asarray([10, 20], np.float32),
    "action.std": np.asarray([1, 0.5], np.float32),
}


def tokenizer(length: int = 4) -> bytes:
    words = tokenizers.Tokenizer(WordLevel({"[PAD]": 0, "push": 1, "the": 2, "button": 3, "?": 4}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    words.enable_padding(length=length)
    words.enable_truncation(length)
    text: str = words.to_str()
    return text.encode()


def reader(statistics: dict[str, Array] | None = None, words: bytes | None = None) -> Callable[[str], bytes]:
    assets = {
        "statistics.safetensors": pack(STATISTICS if statistics is None else statistics),
        "tokenizer.json": tokenizer() if words is None else words,
    }
    return assets.__getitem__


@pytest.fixture
def spec(tiny_spec: PolicySpec) -> PolicySpec:
    """The tiny policy with a task."""
    words = TokeniseProcessor(input="task", output="tokens", max_length=4, asset="tokenizer.json")
    return tiny_spec.model_copy(update={"preprocess": (*tiny_spec.preprocess, words)})


@pytest.fixture
def observation(tiny_observation: dict[str, Any]) -> dict[str, Any]:
    return {**tiny_observation, "task": "push the button"}


def test_a_frame_of_bytes_becomes_channels_first_in_zero_to_one(spec: PolicySpec, observation: dict[str, Any]) -> None:
    frame = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    image = Processors(spec, reader()).prepare({**observation, "camera": frame})["image"]
    assert (image.dtype, image.shape, image.flags["C_CONTIGUOUS"]) == (np.float32, (1, 3, 2, 2), True)
    for row, column, channel in np.ndindex(2, 2, 3):
        assert image[0, channel, row, column] == pytest.approx(frame[row, column, channel] / 255, rel=1e-6)


def test_a_float_frame_is_taken_as_it_is(spec: PolicySpec, observation: dict[str, Any]) -> None:
    frame = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 2, 2)
    image = Processors(spec, reader()).prepare({**observation, "camera": frame})["image"]
    assert np.array_equal(image, frame[None])


def test_both_forms_of_a_frame_agree(spec: PolicySpec, observation: dict[str, Any]) -> None:
    processors = Processors(spec, reader())
    frame = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 21
    as_float = (frame.transpose(2, 0, 1) / np.float32(255)).astype(np.float32)
    one, two = (processors.prepare({**observation, "camera": camera})["image"] for camera in (frame, as_float))
    assert one == pytest.approx(two, abs=1e-7)


def test_vectors_are_normalised_and_sentences_become_tokens(spec: PolicySpec, observation: dict[str, Any]) -> None:
    tensors = Processors(spec, reader()).prepare(observation)
    assert tensors.keys() == {"image", "state", "tokens"}
    assert tensors["state"].tolist() == [[1, 1]]
    assert tensors["state"].dtype == np.float32
    assert tensors["tokens"].tolist() == [[1, 2, 3, 0]]
    assert tensors["tokens"].dtype == np.int64


def test_many_different_sentences_are_all_tokenised(spec: PolicySpec, observation: dict[str, Any]) -> None:
    processors = Processors(spec, reader())
    for number in range(200):
        tokens = processors.prepare({**observation, "task": f"push {number}"})["tokens"]
        assert tokens.tolist() == [[1, 4, 0, 0]]


def without(observation: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in observation.items() if key != name}


def floats(*values: float) -> Array:
    return np.asarray(values, np.float32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda o: without(o, "camera"), "the observation lacks camera"),
        (lambda o: {}, "the observation lacks camera, joints, task"),
        (lambda o: {**o, "depth": 1, "camera2": 2}, "the observation has unknown camera2, depth"),
        (lambda o: {**without(o, "task"), "tsak": "x"}, "the observation lacks task and has unknown tsak"),
        (lambda o: {**o, 5: 1}, "the observation has unknown 5"),
        (lambda o: None, "the observation is a NoneType, a dict of camera, joints, task is needed"),
        (lambda o: [1, 2], "the observation is a list"),
        (lambda o: {**o, "camera": None}, "camera: NoneType given, a numpy array is needed"),
        (lambda o: {**o, "camera": o["camera"].tolist()}, "camera: list given, a numpy array is needed"),
        (lambda o: {**o, "camera": o["camera"].astype(np.int64)}, "camera: dtype int64 given, float32 needed"),
        (lambda o: {**o, "camera": o["camera"] / 255}, "camera: dtype float64 given, float32 needed"),
        (lambda o: {**o, "camera": np.zeros((3, 2, 2), np.uint8)}, r"camera: shape \[3, 2, 2\] given, \[2, 2, 3\]"),
        (lambda o: {**o, "camera": np.zeros((2, 2, 3), np.float32)}, r"camera: shape \[2, 2, 3\] given, \[3, 2, 2\]"),
        (lambda o: {**o, "camera": np.zeros((4, 4, 3), np.uint8)}, r"camera: shape \[4, 4, 3\]"),
        (lambda o: {**o, "camera": np.full((3, 2, 2), 255, np.float32)}, "camera: float image outside 0–1: 255 … 255"),
        (lambda o: {**o, "camera": np.full((3, 2, 2), -0.1, np.float32)}, "camera: float image outside 0–1"),
        (lambda o: {**o, "camera": np.full((3, 2, 2), np.nan, np.float32)}, r"camera: not finite at \[0, 0, 0\]"),
        (lambda o: {**o, "joints": floats(1, np.nan)}, r"joints: not finite at \[1\]: nan"),
        (lambda o: {**o, "joints": floats(np.inf, 1)}, r"joints: not finite at \[0\]: inf"),
        (lambda o: {**o, "joints": floats(1, 2, 3)}, r"joints: shape \[3\] given, \[2\] needed"),
        (lambda o: {**o, "joints": floats(1, 2)[None]}, r"joints: shape \[1, 2\] given, \[2\] needed"),
        (lambda o: {**o, "joints": np.zeros(2)}, "joints: dtype float64 given, float32 needed"),
        (lambda o: {**o, "task": 5}, r"task: int given, a sentence \(str\) is needed"),
        (lambda o: {**o, "task": b"push"}, "task: bytes given"),
        (lambda o: {**o, "task": None}, "task: NoneType given"),
    ],
)
def test_a_wrong_observation_is_refused_by_name(
    spec: PolicySpec, observation: dict[str, Any], change: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        Processors(spec, reader()).prepare(change(observation))


def test_actions_are_brought_to_the_robots_units_and_clipped(tiny_spec: PolicySpec) -> None:
    limited = tiny_spec.model_copy(
        update={"postprocess": Unnormalise(input="raw", statistics="action", low=9, high=21)}
    )
    raw = np.asarray([[[0, 0], [1, 1], [-5, 5]]], np.float32)
    actions = Processors(limited, reader()).actions({"raw": raw})
    assert actions.tolist() == [[10, 20], [11, 20.5], [9, 21]]
    assert actions.dtype == np.float32


@pytest.mark.parametrize(("low", "expected"), [(None, [5, 22.5]), (8, [8, 22.5])])
def test_actions_without_limits_are_not_clipped(
    tiny_spec: PolicySpec, low: float | None, expected: list[float]
) -> None:
    free = tiny_spec.model_copy(update={"postprocess": Unnormalise(input="raw", statistics="action", low=low)})
    actions = Processors(free, reader()).actions({"raw": np.asarray([[[-5, 5]] * 3], np.float32)})
    assert actions.tolist() == [expected] * 3


def test_half_precision_actions_are_unnormalised_in_float32(tiny_spec: PolicySpec) -> None:
    actions = Processors(tiny_spec, reader()).actions({"raw": np.full((1, 3, 2), 2**-10, np.float16)})
    assert actions[0].tolist() == [np.float32(10 + 2**-10), np.float32(20 + 2**-11)]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_actions_that_are_not_finite_are_refused_even_where_clipping_would_hide_it(
    tiny_spec: PolicySpec, bad: float
) -> None:
    raw = np.zeros((1, 3, 2), np.float32)
    raw[0, 2, 1] = bad  # only the last joint of the last step
    with pytest.raises(InputError, match=r"raw: not finite at \[2, 1\]"):
        Processors(tiny_spec, reader()).actions({"raw": raw})


@pytest.mark.parametrize("shape", [(1, 3, 1), (1, 2, 2), (3, 2), (2, 3, 2)])
def test_actions_of_another_shape_are_refused(tiny_spec: PolicySpec, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"raw: the components gave shape .*, \[1, 3, 2\] needed"):
        Processors(tiny_spec, reader()).actions({"raw": np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        ({**STATISTICS, "state.std": floats(1, 0)}, "state.std: not positive everywhere"),
        ({**STATISTICS, "state.std": floats(1, -1)}, "state.std: not positive everywhere"),
        ({**STATISTICS, "action.mean": floats(1, np.nan)}, "action.mean: not finite"),
        ({**STATISTICS, "action.mean": floats(1)}, r"action.mean: shape \[1\] given, \[2\] needed"),
        ({**STATISTICS, "state.mean": np.zeros(2)}, "state.mean: dtype float64"),
        ({"state.mean": floats(1, 2)}, "no state.std among the statistics"),
        ({}, "no state.mean among the statistics"),
    ],
)
def test_unsound_statistics_are_refused(spec: PolicySpec, statistics: dict[str, Array], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Processors(spec, reader(statistics))


def test_an_unsound_tokenizer_is_refused(spec: PolicySpec, observation: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer file"):
        Processors(spec, reader(words=b"{}"))
    with pytest.raises(InputError, match=r"tokenizer\.json: gives 6 tokens, the policy takes 4"):
        Processors(spec, reader(words=tokenizer(6))).prepare(observation)
