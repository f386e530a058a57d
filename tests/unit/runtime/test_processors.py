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
    known = {"[PAD]": 0, "push": 1, "the": 2, "button": 3, "?": 4, "!": 5}
    words = tokenizers.Tokenizer(WordLevel(known, unk_token="?"))
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


@pytest.mark.parametrize("mode", ["mean-std", "min-max", "quantiles", "quantiles-10"])
def test_both_forms_of_a_frame_are_normalised_per_channel_and_left_as_they_were(
    spec: PolicySpec, observation: dict[str, Any], mode: Any
) -> None:
    image = spec.preprocess[0].model_copy(update={"mode": mode, "statistics": "camera"})
    normalised = spec.model_copy(update={"preprocess": (image, *spec.preprocess[1:])})
    one, two = np.asarray([0.1, 0.2, 0.3], np.float32), np.asarray([0.5, 0.9, 1.3], np.float32)
    ends = {"min-max": ("min", "max"), "quantiles": ("q01", "q99"), "quantiles-10": ("q10", "q90")}
    first, second = ends.get(mode, ("mean", "std"))
    processors = Processors(normalised, reader({**STATISTICS, f"camera.{first}": one, f"camera.{second}": two}))
    frame = np.arange(12, dtype=np.uint8).reshape(2, 2, 3) * 20
    pixels = frame.transpose(2, 0, 1) / np.float64(255)
    low, high = one[:, None, None].astype(np.float64), two[:, None, None].astype(np.float64)
    expected = (pixels - low) / high if mode == "mean-std" else 2 * (pixels - low) / (high - low) - 1
    for camera in (frame, pixels.astype(np.float32)):
        kept = camera.copy()
        tensor = processors.prepare({**observation, "camera": camera})["image"]
        assert (tensor.dtype, tensor.shape, tensor.flags["C_CONTIGUOUS"]) == (np.float32, (1, 3, 2, 2), True)
        assert tensor[0] == pytest.approx(expected, abs=1e-6)
        assert np.array_equal(camera, kept)


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


def test_a_suffix_is_put_behind_a_sentence_once_and_the_mask_marks_what_is_no_padding(
    tiny_spec: PolicySpec, observation: dict[str, Any]
) -> None:
    words = TokeniseProcessor(
        input="task", output="tokens", max_length=4, asset="tokenizer.json", suffix=" !", mask="token_mask"
    )
    masked = tiny_spec.model_copy(update={"preprocess": (*tiny_spec.preprocess, words)})
    processors = Processors(masked, reader())
    for task in ("push", "push !"):
        tensors = processors.prepare({**observation, "task": task})
        assert tensors["tokens"].tolist() == [[1, 5, 0, 0]]
        assert tensors["token_mask"].tolist() == [[True, True, False, False]]
        assert (tensors["token_mask"].dtype, tensors["token_mask"].shape) == (np.bool_, (1, 4))


def test_a_history_is_processed_step_by_step(spec: PolicySpec, observation: dict[str, Any]) -> None:
    one, three = Processors(spec, reader()), Processors(spec.model_copy(update={"history": 3}), reader())
    frames = np.random.default_rng(0).integers(0, 256, (3, 2, 2, 3), dtype=np.uint8)
    joints = np.arange(6, dtype=np.float32).reshape(3, 2)
    past = three.prepare({**observation, "camera": frames, "joints": joints})
    assert (past["image"].shape, past["state"].shape) == ((1, 3, 3, 2, 2), (1, 3, 2))
    assert past["tokens"].tolist() == [[1, 2, 3, 0]]
    for step in range(3):
        now = one.prepare({**observation, "camera": frames[step], "joints": joints[step]})
        assert np.array_equal(past["image"][:, step], now["image"])
        assert np.array_equal(past["state"][:, step], now["state"])


def test_one_time_step_stands_for_the_whole_history(spec: PolicySpec, observation: dict[str, Any]) -> None:
    processors = Processors(spec.model_copy(update={"history": 2}), reader())
    twice = {name: np.stack([value] * 2) for name, value in observation.items() if name != "task"}
    once, full = processors.prepare(observation), processors.prepare({**observation, **twice})
    assert once.keys() == full.keys()
    assert all(np.array_equal(once[name], full[name]) for name in full)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"joints": np.zeros((2, 2), np.float32)}, "differ in their time dimension: camera without"),
        (
            {"camera": np.zeros((3, 2, 2, 3), np.uint8), "joints": np.zeros((3, 2), np.float32)},
            r"camera: shape \[3, 2, 2, 3\] given, \[2, 2, 2, 3\] needed",
        ),
        ({"camera": None}, "camera: NoneType given"),
        ({"joints": np.zeros(3, np.float32)}, r"joints: shape \[2, 3\] given, \[2, 2\] needed"),
    ],
)
def test_a_wrong_history_is_refused_by_name(
    spec: PolicySpec, observation: dict[str, Any], changed: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        Processors(spec.model_copy(update={"history": 2}), reader()).prepare({**observation, **changed})


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


def test_rows_of_the_past_and_columns_of_padding_are_left_out(tiny_spec: PolicySpec) -> None:
    later = tiny_spec.model_copy(update={"chunk": tiny_spec.chunk.model_copy(update={"start": 2})})
    raw = np.full((1, 7, 4), np.nan, np.float32)
    raw[0, 2:5, :2] = [[0, 0], [1, 1], [2, 2]]
    actions = Processors(later, reader()).actions({"raw": raw})
    assert actions.tolist() == [[10, 20], [11, 20.5], [12, 21]]
    with pytest.raises(InputError, match=r"raw: the components gave shape \[1, 4, 4\], \[1, 5, 2\] needed"):
        Processors(later, reader()).actions({"raw": raw[:, :4]})


@pytest.mark.parametrize("mode", ["identity", "mean-std", "min-max", "quantiles", "quantiles-10"])
def test_actions_come_back_to_the_policys_units(tiny_spec: PolicySpec, mode: Any) -> None:
    ends = {f"action.{key}": floats(*values) for key, values in (("min", (-1, 2)), ("max", (3, 9)))}
    quantiles = {f"action.{key}": floats(v, 2 * v) for key, v in (("q01", 1), ("q10", 2), ("q90", 3), ("q99", 4))}
    post = Unnormalise(input="raw", statistics="action", mode=mode, eps=1e-8)
    processors = Processors(
        tiny_spec.model_copy(update={"postprocess": post}), reader({**STATISTICS, **ends, **quantiles})
    )
    raw = np.random.default_rng(0).standard_normal((1, 3, 2), dtype=np.float32)
    actions = processors.actions({"raw": raw})
    kept = actions.copy()
    assert processors.in_policy_units(actions) == pytest.approx(raw[0], abs=1e-5)
    assert np.array_equal(actions, kept)
    assert (mode == "identity") == np.array_equal(actions, raw[0])


def test_the_unit_of_errors_is_the_deviation_or_one_where_an_action_never_changed(tiny_spec: PolicySpec) -> None:
    assert Processors(tiny_spec, reader()).action_std().tolist() == [1, 0.5]
    still = Processors(tiny_spec, reader({**STATISTICS, "action.std": floats(0, 0.5)}))
    assert still.action_std().tolist() == [1, 0.5]
    assert still.actions({"raw": np.ones((1, 3, 2), np.float32)}).tolist() == [[10, 20.5]] * 3
    free = tiny_spec.model_copy(update={"postprocess": Unnormalise(input="raw", statistics="action", mode="identity")})
    with pytest.raises(InputError, match=r"no action\.std among the statistics"):
        Processors(free, reader({k: v for k, v in STATISTICS.items() if k != "action.std"}))


@pytest.mark.parametrize("shape", [(1, 3, 1), (1, 2, 2), (3, 2), (2, 3, 2)])
def test_actions_of_another_shape_are_refused(tiny_spec: PolicySpec, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"raw: the components gave shape .*, \[1, 3, 2\] needed"):
        Processors(tiny_spec, reader()).actions({"raw": np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("statistics", "reason"),
    [
        ({**STATISTICS, "state.std": floats(1, 0)}, "state.std: nothing to divide by at 1"),
        ({**STATISTICS, "state.std": floats(1, -1)}, "state.std: negative at 1"),
        ({**STATISTICS, "action.mean": floats(1, np.nan)}, "action.mean: not finite"),
        ({**STATISTICS, "action.mean": floats(1)}, r"action.mean: shape \[1\] given, \[2\] needed"),
        ({**STATISTICS, "state.mean": np.zeros(2)}, "state.mean: dtype float64"),
        ({**STATISTICS, "action.std": floats(1, -1)}, "action.std: negative at 1"),
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
