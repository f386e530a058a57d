"""The promise: a policy whose parts do not fit together is refused before anything runs."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from vlaopt.artifact.policy_spec import PolicySpec


def tensor(name: str) -> dict[str, Any]:
    return {"name": name, "dtype": "float32", "shape": [1, 2]}


def component(inputs: list[str], outputs: list[str], kind: str = "single") -> dict[str, Any]:
    return {"kind": kind, "inputs": [*map(tensor, inputs)], "outputs": [*map(tensor, outputs)]}


def single(**fields: Any) -> dict[str, Any]:
    base = {
        "type": "tiny",
        "action_dim": 2,
        "control_hz": 10,
        "components": {"policy": component(["state"], ["raw"])},
        "loop": {"kind": "single"},
        "chunk": {"size": 4, "n_action_steps": 2},
        "preprocess": [{"kind": "normalise", "input": "joints", "output": "state", "size": 2, "statistics": "state"}],
        "postprocess": {"input": "raw", "statistics": "action"},
    }
    return {**base, **fields}


def euler(**fields: Any) -> dict[str, Any]:
    loop = {"kind": "euler", "steps": 4, "start": 0, "end": 1, "step": "flow"}
    names = {"state_input": "x", "time_input": "t", "velocity_output": "v"}
    base = single(
        components={"flow": component(["x", "t", "prefix"], ["v"], "step"), "seen": component(["state"], ["prefix"])},
        loop={**loop, **names},
        noise={"law": "normal", "shape": [1, 4, 2]},
        postprocess={"input": "x", "statistics": "action"},
    )
    return {**base, **fields}


def spoken(**fields: Any) -> dict[str, Any]:
    """read → cache; word (token, position, cache) → logits, more; aloud: tokens → raw."""
    base = single(
        components={
            "aloud": component(["tokens"], ["raw"], "head"),
            "read": component(["state"], ["cache"], "prefix"),
            "word": component(["token", "position", "cache"], ["logits", "more"], "decode"),
        },
        loop={
            "kind": "autoregressive",
            "max_length": 4,
            "step": "word",
            "token_input": "token",
            "position_input": "position",
            "logits_output": "logits",
            "tokens_output": "tokens",
            "start_token": 0,
            "end_token": 1,
            "cache": {"more": "cache"},
        },
    )
    return {**base, **fields}


def test_what_takes_the_tokens_runs_after_the_loop() -> None:
    spec = PolicySpec.model_validate(spoken())
    assert spec.order() == ["read", "word", "aloud"]
    assert spec.after_loop() == ["aloud"]
    assert PolicySpec.model_validate_json(spec.model_dump_json(by_alias=True)) == spec


def denoised(kind: str, shape: list[int]) -> dict[str, Any]:
    names = {"step": "flow", "state_input": "x", "time_input": "t", "prediction_output": "v"}
    loop = {"kind": kind, "steps": 2, "prediction": "epsilon", "alphas_cumprod": [0.9, 0.5], **names}
    return euler(loop=loop, noise={"law": "normal", "shape": shape})


def test_a_loop_reads_what_it_says_of_its_step() -> None:
    reads = [PolicySpec.model_validate(f).read_by_loop() for f in (single(), euler(), spoken())]
    assert reads == [[], ["v"], ["logits"]]
    assert PolicySpec.model_validate(denoised("ddim", [2, 4, 2])).read_by_loop() == ["v"]


def test_sound_policies_are_accepted_and_come_back_from_json() -> None:
    for fields in (single(), euler()):
        spec = PolicySpec.model_validate(fields)
        assert PolicySpec.model_validate_json(spec.model_dump_json(by_alias=True)) == spec


def test_components_run_after_those_they_take_from() -> None:
    chain = {"a": component(["c1"], ["raw"]), "b": component(["state"], ["b1"]), "c": component(["b1"], ["c1"])}
    assert PolicySpec.model_validate(single(components=chain)).order() == ["b", "c", "a"]
    assert PolicySpec.model_validate(euler()).order() == ["seen", "flow"]


def test_an_observation_has_each_name_once_in_the_order_of_the_processors() -> None:
    twice = [
        {"kind": "normalise", "input": "joints", "output": o, "size": 2, "statistics": "s"} for o in ("state", "b")
    ]
    image = {"kind": "image", "input": "camera", "output": "image", "height": 2, "width": 2}
    spec = PolicySpec.model_validate(single(preprocess=[image, *twice]))
    assert spec.observation_names() == ["camera", "joints"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (single(components={"policy": component(["depth"], ["raw"])}), "'policy': nothing gives its input 'depth'"),
        (
            single(components={"a": component(["raw"], ["b1"]), "b": component(["b1"], ["raw"])}),
            "'a': nothing gives its input 'raw'",
        ),
        (single(postprocess={"input": "grasp", "statistics": "action"}), "nothing gives 'grasp'"),
        (single(components={}), "nothing gives 'raw'"),
        (
            single(components={"a": component(["state"], ["raw"]), "b": component(["state"], ["raw"])}),
            "tensor 'raw' is given twice",
        ),
        (single(components={"a": component(["state"], ["state", "raw"])}), "tensor 'state' is given twice"),
        (single(chunk={"size": 2, "n_action_steps": 3}), "n_action_steps 3 is more than the chunk's 2"),
        (single(chunk={"size": 2, "n_action_steps": 0}), "greater than or equal to 1"),
        (single(action_dim=0), "greater than or equal to 1"),
        (single(control_hz=0), "greater than 0"),
        (single(control_hz=float("nan")), "finite number"),
        (single(gripper=2), "gripper 2 is not one of the 2 actions"),
        (single(gripper=-1), "greater than or equal to 0"),
        (single(colour="red"), "Extra inputs are not permitted"),
        (single(schema="vlaopt.policy/2"), "vlaopt.policy/1"),
        (single(loop={"kind": "consistency"}), "does not match any of the expected tags"),
        (single(noise={"law": "cauchy"}), "'none', 'normal' or 'uniform'"),
        (single(preprocess=[{"kind": "crop", "input": "a", "output": "state"}]), "does not match any of the expected"),
        (
            single(postprocess={"input": "raw", "statistics": "action", "low": 1, "high": -1}),
            "low 1 is not below high -1",
        ),
        (euler(components={"seen": component(["state"], ["prefix"])}), "step 'flow' is not a component"),
        (euler(noise={"law": "none"}), "the noise law is none"),
        (
            euler(components={"flow": component(["x", "t"], ["u"], "step")}),
            "step 'flow' does not give 'v'",
        ),
        (
            euler(
                components={"flow": component(["x", "t"], ["v"], "step"), "after": component(["v"], ["w"], "decode")}
            ),
            "component 'after' takes 'v', which only the loop has",
        ),
        (
            euler(components={"flow": component(["x"], ["v"], "step"), "other": component(["t"], ["w"])}),
            "component 'other' takes 't', which only the loop has",
        ),
        (denoised("ddpm", [2, 4, 2]), r"ddpm loop's noise has a shape \[1, …\], not \[2, 4, 2\]"),
        (
            spoken(loop={**spoken()["loop"], "cache": {"more": "state"}}),
            "step 'word' does not take 'state' of its cache",
        ),
        (spoken(loop={**spoken()["loop"], "cache": {"less": "cache"}}), "step 'word' does not give 'less'"),
        (
            spoken(components={**spoken()["components"], "late": component(["logits"], ["w"])}),
            "component 'late' takes 'logits', which only the loop has",
        ),
        (euler(loop={**euler()["loop"], "steps": 0}), "greater than or equal to 1"),
        (euler(loop={**euler()["loop"], "end": float("inf")}), "finite number"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        PolicySpec.model_validate(fields)


def test_a_policy_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        PolicySpec.model_validate(single()).type = "other"
