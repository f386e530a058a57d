"""A capture gives back what was recorded, call by call, and holds nothing twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.conftest import publish_files
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.policy_spec import (
    AutoregressiveLoop,
    Chunk,
    Component,
    EulerLoop,
    Loop,
    Noise,
    NormaliseProcessor,
    PolicySpec,
    SingleLoop,
    TensorSpec,
    Unnormalise,
)
from vlaopt.errors import InputError, StageError
from vlaopt.runtime.capture import INDEX, Calls, Capture, CaptureIndex, Recorder, pack_sample, sample_path
from vlaopt.tensors import Array, unpack

ENTRY = CaptureIndex(digest="0" * 64, rows=(3, 5), golden=(1,))


def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def policy(components: dict[str, Component], loop: Loop, result: str, noise: Noise | None = None) -> PolicySpec:
    return PolicySpec(
        type="test",
        action_dim=2,
        components=components,
        loop=loop,
        noise=noise or Noise(),
        chunk=Chunk(size=3, n_action_steps=3),
        preprocess=(NormaliseProcessor(input="joints", output="state", size=2, mode="identity"),),
        postprocess=Unnormalise(input=result, statistics="action"),
    )


KEY, STATE = tensor("key", 1, 4), tensor("state", 1, 2)
FLOW = policy(
    {
        "prefix": Component(kind="prefix", inputs=(STATE,), outputs=(KEY,)),
        "step": Component(
            kind="step",
            inputs=(KEY, STATE, tensor("x", 1, 3, 2), tensor("time", 1)),
            outputs=(tensor("velocity", 1, 3, 2),),
        ),
    },
    EulerLoop(steps=3, start=1, end=0, step="step", state_input="x", time_input="time", velocity_output="velocity"),
    "x",
    Noise(law="normal", shape=(1, 3, 2)),
)
TALK = policy(
    {
        "prefix": Component(kind="prefix", inputs=(STATE,), outputs=(KEY,)),
        "step": Component(
            kind="step",
            inputs=(tensor("token", 1, 1, dtype="int64"), tensor("position", 1, dtype="int64"), KEY),
            outputs=(tensor("logits", 1, 5), tensor("next_key", 1, 4)),
        ),
        "decode": Component(
            kind="decode", inputs=(tensor("tokens", 1, 6, dtype="int64"),), outputs=(tensor("actions", 1, 3, 2),)
        ),
    },
    AutoregressiveLoop(
        max_length=6,
        step="step",
        token_input="token",
        position_input="position",
        logits_output="logits",
        tokens_output="tokens",
        start_token=0,
        end_token=4,
        cache={"next_key": "key"},
    ),
    "actions",
)


def values(seed: int, what: TensorSpec) -> Array:
    random = np.random.default_rng(seed)
    if what.dtype == "int64":
        return random.integers(0, 5, what.shape)
    return random.standard_normal(what.shape, dtype=np.float32)


def recorded(spec: PolicySpec, steps: int, seed: int = 0) -> tuple[Calls, dict[str, Array]]:
    """A prediction with random tensors, each component given what the one before it gave; and the processors' part."""
    processed = {"state": values(seed, STATE)}
    known, recorder, cache = dict(processed), Recorder(spec), getattr(spec.loop, "cache", {})
    for name in spec.order():
        component = spec.components[name]
        for call in range(steps if name == spec.step() else 1):
            seed += 1
            given_here = {t.name for t in component.inputs} - known.keys()
            inputs = {t.name: known.get(t.name, values(seed, t)).copy() for t in component.inputs}
            assert not given_here & processed.keys(), call
            outputs = {t.name: values(seed + 1000, t) for t in component.outputs}
            recorder.tap(name, inputs, {key: value.copy() for key, value in outputs.items()})
            known |= {key: value for key, value in outputs.items() if key not in cache}
            known |= {taken: outputs[given_name] for given_name, taken in cache.items() if given_name in outputs}
    return recorder.calls(), processed


def opened(spec: PolicySpec, data: bytes) -> Capture:
    files = {INDEX: ENTRY.model_dump_json(by_alias=True).encode(), sample_path(0): data, sample_path(1): data}
    return Capture.read(spec, files.__getitem__)


@pytest.mark.parametrize("spec", [FLOW, TALK], ids=["euler", "autoregressive"])
@given(steps=st.integers(1, 6), seed=st.integers(0, 99))
def test_reading_gives_every_call_as_it_was_recorded(spec: PolicySpec, steps: int, seed: int) -> None:
    calls, processed = recorded(spec, steps, seed)
    capture = opened(spec, pack_sample(spec, calls, None))
    for name in spec.components:
        back = capture.calls(0, name, processed)
        assert len(back) == len(calls[name])
        for mine, theirs in zip(back, calls[name], strict=True):
            for left, right in ((mine.inputs, theirs.inputs), (mine.outputs, theirs.outputs)):
                assert list(left) == list(right)
                assert all(np.array_equal(left[key], right[key]) for key in left)


def test_a_file_holds_nothing_that_follows_from_the_observation_or_stands_there_already() -> None:
    noise = np.ones((1, 3, 2), np.float32)
    stored = unpack(pack_sample(FLOW, recorded(FLOW, 3)[0], noise), where="sample")
    assert {name: value.shape for name, value in stored.items()} == {
        "noise": (1, 3, 2),
        "inputs/x": (3, 1, 3, 2),
        "inputs/time": (3, 1),
        "outputs/key": (1, 1, 4),
        "outputs/velocity": (3, 1, 3, 2),
    }


def test_what_every_step_takes_is_in_memory_once() -> None:
    calls, _ = recorded(FLOW, 5)
    assert len({id(call.inputs["key"]) for call in calls["step"]} | {id(calls["prefix"][0].outputs["key"])}) == 1


def test_an_input_that_is_not_what_was_given_before_is_kept_as_it_is() -> None:
    """The comparison with the runtime's own wiring must see it."""
    recorder = Recorder(FLOW)
    tap_prefix(recorder)
    other = np.full((1, 4), 7, np.float32)
    recorder.tap("step", {**step_inputs(), "key": other}, {"velocity": np.zeros((1, 3, 2), np.float32)})
    assert np.array_equal(recorder.calls()["step"][0].inputs["key"], other)


def test_a_component_that_was_not_called_is_named() -> None:
    recorder = Recorder(FLOW)
    tap_prefix(recorder)
    with pytest.raises(StageError, match="component step was not called by the eager policy"):
        recorder.calls()


def test_a_component_outside_the_loop_is_called_once() -> None:
    recorder = Recorder(FLOW)
    tap_prefix(recorder)
    tap_prefix(recorder)
    recorder.tap("step", step_inputs(), {"velocity": np.zeros((1, 3, 2), np.float32)})
    with pytest.raises(StageError, match="component prefix was called 2 times by the eager policy, not once"):
        recorder.calls()


@pytest.mark.parametrize(
    ("key", "told"),
    [
        (np.zeros((1, 5), np.float32), r"component prefix: key is float32 \[1, 5\], its spec says float32 \[1, 4\]"),
        (np.zeros((1, 4)), r"component prefix: key is float64 \[1, 4\], its spec says float32 \[1, 4\]"),
        (np.zeros(4, np.float32), r"component prefix: key is float32 \[4\]"),
    ],
)
def test_a_tensor_of_another_form_than_the_spec_says_is_named(key: Array, told: str) -> None:
    with pytest.raises(StageError, match=told):
        Recorder(FLOW).tap("prefix", {"state": np.zeros((1, 2), np.float32)}, {"key": key})


def test_a_sample_that_lacks_a_tensor_is_refused_by_name() -> None:
    single = policy(
        {"all": Component(kind="single", inputs=(STATE,), outputs=(tensor("actions", 1, 3, 2),))},
        SingleLoop(),
        "actions",
    )
    capture = opened(FLOW, pack_sample(single, recorded(single, 1)[0], None))
    with pytest.raises(InputError, match=r"capture/00000\.safetensors has no tensor 'outputs/key'"):
        capture.calls(0, "prefix", {"state": np.zeros((1, 2), np.float32)})


def test_an_artifact_without_a_capture_says_so(tiny_artifact: Artifact) -> None:
    with pytest.raises(InputError, match="the artifact holds no capture") as caught:
        Capture.of(tiny_artifact)
    assert "vlaopt export" in str(caught.value.hint)


@pytest.mark.parametrize("index", [b"{}", b"[", ENTRY.model_dump_json(by_alias=True).replace("[1]", "[2]").encode()])
def test_an_unsound_index_is_refused(index: bytes) -> None:
    with pytest.raises(InputError, match=r"digest|JSON|golden") as caught:
        Capture.read(FLOW, {INDEX: index}.__getitem__)
    assert caught.value.where == INDEX


def test_a_capture_in_an_artifact_knows_its_samples_and_their_noise(tmp_path: Path) -> None:
    noise = np.arange(6, dtype=np.float32).reshape(1, 3, 2)
    data = pack_sample(FLOW, recorded(FLOW, 3)[0], noise)
    index = ENTRY.model_dump_json(by_alias=True).encode()
    spec = FLOW.model_dump_json(by_alias=True).encode()
    files = {sample_path(row): ("capture", data) for row in range(2)}
    artifact = publish_files(
        tmp_path / "artifact", {INDEX: ("capture", index), "policy/spec.json": ("policy", spec), **files}
    )
    capture = Capture.of(artifact)
    assert len(capture) == 2
    assert capture.index == ENTRY
    found = capture.noise(1)
    assert found is not None
    assert np.array_equal(found, noise)


def tap_prefix(recorder: Recorder) -> None:
    recorder.tap("prefix", {"state": np.zeros((1, 2), np.float32)}, {"key": np.zeros((1, 4), np.float32)})


def step_inputs() -> dict[str, Array]:
    return {t.name: np.zeros(t.shape, t.dtype) for t in FLOW.components["step"].inputs}
