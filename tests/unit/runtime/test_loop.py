"""The promise: every loop runs as written, in float32, and components are called by the names they take."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vlaopt.artifact.policy_spec import AutoregressiveLoop, Component, DiffusionLoop, PolicySpec, TensorSpec
from vlaopt.backends import Euler, Link
from vlaopt.errors import InputError
from vlaopt.runtime.loop import check_noise, draw_noise, noise_shape, run_loop
from vlaopt.tensors import Array

OBSERVATION = {"joints": np.asarray([1, 2], np.float32)}
NOISE = np.asarray([[[1, -1], [0.5, 2]]], np.float32)


def test_a_constant_velocity_moves_by_the_whole_interval(flow: Any) -> None:
    policy, _ = flow(lambda x, t: np.full_like(x, 3), steps=10)
    assert policy.predict_chunk(OBSERVATION, NOISE) == pytest.approx(NOISE[0] + 3, abs=1e-6)


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.0), (0.25, 2.25)])
def test_growth_follows_its_closed_form_forward_and_backward(flow: Any, start: float, end: float) -> None:
    policy, _ = flow(lambda x, t: x, steps=8, start=start, end=end)
    expected = NOISE[0] * (1 + (end - start) / 8) ** 8
    assert policy.predict_chunk(OBSERVATION, NOISE) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("start", "end", "times"), [(0.0, 1.0, [0, 0.25, 0.5, 0.75]), (1.0, 0.0, [1, 0.75, 0.5, 0.25])]
)
def test_time_is_the_start_of_each_step(flow: Any, start: float, end: float, times: list[float]) -> None:
    policy, sessions = flow(lambda x, t: np.broadcast_to(t, x.shape).astype(np.float32), start=start, end=end)
    chunk = policy.predict_chunk(OBSERVATION, NOISE)
    seen = [call["t"] for call in sessions["aflow"].calls]
    assert [time.tolist() for time in seen] == [[time] for time in times]
    assert all((time.dtype, time.shape) == (np.float32, (1,)) for time in seen)
    assert chunk == pytest.approx(NOISE[0] + sum(times) * (end - start) / 4, abs=1e-6)


def test_time_is_rounded_once(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: x, steps=10)
    policy.predict_chunk(OBSERVATION, NOISE)
    assert [call["t"][0] for call in sessions["aflow"].calls] == [np.float32(k * 0.1) for k in range(10)]


def test_the_state_is_float32_whatever_the_step_computes_in(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: np.full(x.shape, 2**-10, np.float16), steps=64)
    chunk = policy.predict_chunk(OBSERVATION, np.full((1, 2, 2), 4, np.float32))
    # Steps of 2^-16 from 4: float16 would never leave it.
    assert chunk.tolist() == [[4 + 2**-10] * 2] * 2
    assert {call["x"].dtype for call in sessions["aflow"].calls} == {np.dtype(np.float32)}


def test_components_before_the_loop_run_once_and_meet_it_by_name(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: x)
    policy.predict_chunk(OBSERVATION, NOISE)
    assert len(sessions["eye"].calls) == 1
    assert len(sessions["aflow"].calls) == 4
    assert all(call["prefix"].tolist() == [[2, 4]] for call in sessions["aflow"].calls)
    assert sessions["eye"].calls[0].keys() == {"state"}


def test_the_tap_sees_every_call_in_order(flow: Any) -> None:
    policy, _ = flow(lambda x, t: x)
    seen: list[tuple[str, set[str], set[str]]] = []
    policy.predict_chunk(OBSERVATION, NOISE, tap=lambda name, i, o: seen.append((name, set(i), set(o))))
    assert seen == [("eye", {"state"}, {"prefix"})] + [("aflow", {"x", "t", "prefix"}, {"v"})] * 4


def test_given_tensors_and_noise_are_left_as_they_were(tiny_spec: PolicySpec, fake_session: Any, flow: Any) -> None:
    given = {"image": np.zeros((1, 3, 2, 2), np.float32), "state": np.zeros((1, 2), np.float32)}
    sessions = {
        "eye": fake_session(lambda image: {"feature": np.ones((1, 1), np.float32)}),
        "arm": fake_session(lambda state, feature: {"raw": state + feature}),
    }
    assert run_loop(tiny_spec, sessions, given, None).keys() == {"image", "state", "feature", "raw"}
    assert given.keys() == {"image", "state"}
    noise = NOISE.copy()
    flow(lambda x, t: x)[0].predict_chunk(OBSERVATION, noise)
    assert np.array_equal(noise, NOISE)


def test_an_euler_loop_without_noise_is_refused(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: x)
    with pytest.raises(InputError, match="starts from noise, and none was given"):
        run_loop(policy.spec, sessions, {"state": np.zeros((1, 2), np.float32)}, None)


def test_noise_follows_its_law(flow: Any) -> None:
    normal = flow(lambda x, t: x, shape=(200, 100))[0].spec
    drawn = draw_noise(normal, np.random.default_rng(0))
    assert drawn is not None
    assert (drawn.dtype, drawn.shape) == (np.float32, (200, 100))
    assert (drawn.mean(), drawn.std()) == (pytest.approx(0, abs=0.03), pytest.approx(1, abs=0.03))
    uniform = draw_noise(flow(lambda x, t: x, law="uniform", shape=(200, 100))[0].spec, np.random.default_rng(0))
    assert uniform is not None
    assert uniform.dtype == np.float32
    assert 0 <= uniform.min() < 0.001 < 0.999 < uniform.max() < 1
    wide = flow(lambda x, t: x, law="uniform", shape=(200, 100), low=-3, high=5)[0].spec
    assert draw_noise(wide, np.random.default_rng(0)) == pytest.approx(uniform * 8 - 3, abs=1e-5)


def test_a_policy_without_noise_draws_none_and_takes_none(tiny_spec: PolicySpec) -> None:
    assert draw_noise(tiny_spec, np.random.default_rng(0)) is None
    with pytest.raises(InputError, match="noise was given, and this policy takes none"):
        check_noise(tiny_spec, NOISE)


@pytest.mark.parametrize(
    ("noise", "reason"),
    [
        (NOISE.astype(np.float64), "noise: dtype float64 given, float32 needed"),
        (NOISE[0], r"noise: shape \[2, 2\] given, \[1, 2, 2\] needed"),
        (NOISE * np.float32(np.inf), "noise: not finite"),
        (NOISE.tolist(), "noise: list given"),
    ],
)
def test_noise_of_another_form_is_refused(flow: Any, noise: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        flow(lambda x, t: x)[0].predict_chunk(OBSERVATION, noise)


def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def diffusing(flow: Any, kind: str, *, steps: int = 3) -> PolicySpec:
    """The flow policy as a denoising one: x [1, 2, 2], t int64 [1] and prefix to e, six timesteps."""
    base: PolicySpec = flow(lambda x, t: x)[0].spec
    step = Component(
        kind="step",
        inputs=(tensor("x", 1, 2, 2), tensor("t", 1, dtype="int64"), tensor("prefix", 1, 2)),
        outputs=(tensor("e", 1, 2, 2),),
    )
    names = {"step": "aflow", "state_input": "x", "time_input": "t", "prediction_output": "e"}
    alphas = (0.95, 0.8, 0.6, 0.4, 0.2, 0.1)
    loop = DiffusionLoop(kind=kind, steps=steps, prediction="sample", alphas_cumprod=alphas, **names)
    return base.model_copy(update={"components": {**base.components, "aflow": step}, "loop": loop})


def denoising(fake_session: Any, spec: PolicySpec, clean: Array, noise: Array) -> tuple[Array, Any]:
    """The state after the loop where the network always predicts `clean`, and the session of the step."""
    sessions = {
        "eye": fake_session(lambda state: {"prefix": state * 2}),
        "aflow": fake_session(lambda x, t, prefix: {"e": clean}),
    }
    state = run_loop(spec, sessions, {"state": np.ones((1, 2), np.float32)}, noise)["x"]
    return state, sessions["aflow"]


def test_a_denoising_step_is_told_its_timestep_in_the_form_it_takes(flow: Any, fake_session: Any) -> None:
    state, session = denoising(fake_session, diffusing(flow, "ddim"), 3 * NOISE, NOISE)
    assert [call["t"].tolist() for call in session.calls] == [[4], [2], [0]]
    assert {call["t"].dtype for call in session.calls} == {np.dtype(np.int64)}
    assert np.array_equal(session.calls[0]["x"], NOISE)
    # The last step of ddim goes all the way to what the network says is clean.
    assert np.array_equal(state, 3 * NOISE)


def test_ddpm_takes_its_first_state_and_every_later_draw_from_the_noise(flow: Any, fake_session: Any) -> None:
    spec = diffusing(flow, "ddpm")
    noise = np.random.default_rng(0).standard_normal((3, 2, 2), dtype=np.float32)
    state, session = denoising(fake_session, spec, 3 * NOISE, noise)
    assert np.array_equal(session.calls[0]["x"], noise[:1])
    for row in range(3):
        changed = noise.copy()
        changed[row] += 1
        _, other = denoising(fake_session, spec, 3 * NOISE, changed)
        same = [np.array_equal(a["x"], b["x"]) for a, b in zip(session.calls, other.calls, strict=True)]
        assert same == [True] * row + [False] * (3 - row)
    assert state == pytest.approx(3 * NOISE, abs=1e-6)


@pytest.mark.parametrize(("kind", "rows"), [("ddim", 1), ("ddpm", 3)])
def test_noise_is_all_that_one_prediction_needs(flow: Any, kind: str, rows: int) -> None:
    spec = diffusing(flow, kind)
    assert noise_shape(spec) == (rows, 2, 2)
    drawn = draw_noise(spec, np.random.default_rng(0))
    assert drawn is not None
    assert check_noise(spec, drawn) is drawn
    for other in (rows - 1, rows + 1):
        with pytest.raises(InputError, match=rf"noise: shape \[{other}, 2, 2\] given, \[{rows}, 2, 2\] needed"):
            check_noise(spec, np.zeros((other, 2, 2), np.float32))


WORDS = 7
END = 6


def talking(*, max_length: int = 5) -> PolicySpec:
    """state → read → kv_0; step (token, position, kv_0) → logits, kv_1, which is the next kv_0; speak: tokens → raw."""
    ids = tensor("tokens", 1, max_length, dtype="int64")
    token, position = tensor("token", 1, 1, dtype="int64"), tensor("position", 1, dtype="int64")
    cache = tensor("kv_0", 1, 4)
    components = {
        "read": Component(kind="prefix", inputs=(tensor("state", 1, 2),), outputs=(cache,)),
        "word": Component(
            kind="decode",
            inputs=(token, position, cache),
            outputs=(tensor("logits", 1, WORDS), tensor("kv_1", 1, 4)),
        ),
        "aloud": Component(kind="head", inputs=(ids, tensor("state", 1, 2)), outputs=(tensor("raw", 1, 2, 2),)),
    }
    return PolicySpec.model_validate(
        {
            "type": "talking",
            "action_dim": 2,
            "components": components,
            "loop": AutoregressiveLoop(
                max_length=max_length,
                step="word",
                token_input="token",
                position_input="position",
                logits_output="logits",
                tokens_output="tokens",
                start_token=3,
                end_token=END,
                cache={"kv_1": "kv_0"},
            ),
            "chunk": {"size": 2, "n_action_steps": 2},
            "preprocess": [
                {"kind": "normalise", "input": "joints", "output": "state", "size": 2, "statistics": "unit"}
            ],
            "postprocess": {"input": "raw", "statistics": "unit"},
        }
    )


def words(fake_session: Any, sentence: list[int]) -> dict[str, Any]:
    """Sessions of `talking` that say `sentence`, and write every token into the cache at its position."""

    def word(token: Array, position: Array, kv_0: Array) -> dict[str, Array]:
        logits, cache = np.zeros((1, WORDS), np.float32), kv_0.copy()
        logits[0, sentence[int(position[0])]] = 1
        cache[0, int(position[0]) % 4] = float(token[0, 0])
        return {"logits": logits, "kv_1": cache}

    return {
        "read": fake_session(lambda state: {"kv_0": np.zeros((1, 4), np.float32)}),
        "word": fake_session(word),
        "aloud": fake_session(lambda tokens, state: {"raw": np.full((1, 2, 2), tokens.sum(), np.float32)}),
    }


@pytest.mark.parametrize(
    ("sentence", "said", "calls"),
    [([2, 4, END, 1, 1], [2, 4, END, END, END], 3), ([END], [END] * 5, 1), ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 5)],
)
def test_tokens_are_taken_greedily_until_the_end(
    fake_session: Any, sentence: list[int], said: list[int], calls: int
) -> None:
    spec, sessions = talking(), words(fake_session, sentence)
    assert spec.order() == ["read", "word", "aloud"]
    result = run_loop(spec, sessions, {"state": np.zeros((1, 2), np.float32)}, None)
    assert (result["tokens"].tolist(), result["tokens"].dtype) == ([said], np.int64)
    assert result["raw"][0, 0, 0] == sum(said)
    steps = sessions["word"].calls
    assert [call["token"].tolist() for call in steps] == [[[token]] for token in [3, *said][:calls]]
    assert [call["position"].tolist() for call in steps] == [[position] for position in range(calls)]
    assert len(sessions["read"].calls) == len(sessions["aloud"].calls) == 1


def test_the_cache_goes_round(fake_session: Any) -> None:
    sessions = words(fake_session, [1, 2, 4, END])
    run_loop(talking(), sessions, {"state": np.zeros((1, 2), np.float32)}, None)
    caches = [call["kv_0"][0].tolist() for call in sessions["word"].calls]
    assert caches == [[0, 0, 0, 0], [3, 0, 0, 0], [3, 1, 0, 0], [3, 1, 2, 0]]


def test_logits_that_are_not_finite_are_refused(fake_session: Any) -> None:
    sessions = words(fake_session, [1])
    sessions["word"].function = lambda token, position, kv_0: {
        "logits": np.full((1, WORDS), np.nan, np.float32),
        "kv_1": kv_0,
    }
    with pytest.raises(InputError, match="logits: not finite"):
        run_loop(talking(), sessions, {"state": np.zeros((1, 2), np.float32)}, None)


def test_what_only_components_take_may_stay_in_the_backend(flow: Any, fake_session: Any) -> None:
    policy, sessions = flow(lambda x, t: x)
    policy.predict_chunk(OBSERVATION, NOISE)
    assert (sessions["eye"].resident, sessions["aflow"].resident) == ({"prefix"}, set())
    spoken = words(fake_session, [1, END])
    run_loop(talking(), spoken, {"state": np.zeros((1, 2), np.float32)}, None)
    assert (spoken["read"].resident, spoken["word"].resident) == ({"kv_0"}, {"kv_1"})
    assert spoken["aloud"].resident == set()


def test_what_the_actions_are_made_from_stays_not_even_where_a_component_takes_it(
    tiny_spec: PolicySpec, fake_session: Any
) -> None:
    watch = Component(kind="single", inputs=(tensor("raw", 1, 3, 2),), outputs=(tensor("score", 1),))
    spec = tiny_spec.model_copy(update={"components": {**tiny_spec.components, "watch": watch}})
    sessions = {
        "eye": fake_session(lambda image: {"feature": np.ones((1, 1), np.float32)}),
        "arm": fake_session(lambda state, feature: {"raw": np.zeros((1, 3, 2), np.float32)}),
        "watch": fake_session(lambda raw: {"score": raw[0, 0, :1]}),
    }
    given = {"image": np.zeros((1, 3, 2, 2), np.float32), "state": np.zeros((1, 2), np.float32)}
    assert {"raw", "score"} <= run_loop(spec, sessions, given, None).keys()
    assert [sessions[name].resident for name in ("eye", "arm", "watch")] == [{"feature"}, set(), set()]


def test_nothing_stays_in_the_backend_that_a_tap_or_another_backend_sees(flow: Any, fake_session: Any) -> None:
    policy, sessions = flow(lambda x, t: x)
    policy.predict_chunk(OBSERVATION, NOISE, tap=lambda name, given, made: None)
    assert sessions["eye"].resident == set()

    class Another(fake_session):  # type: ignore[misc]
        pass

    mixed = {"eye": sessions["eye"], "aflow": Another(sessions["aflow"].function)}
    run_loop(policy.spec, mixed, {"state": np.zeros((1, 2), np.float32)}, NOISE)
    assert sessions["eye"].resident == set()


class Chains:
    """How a session runs a chain at once: it gives what it was made with, and remembers what it was asked."""

    def __init__(self, *given: Any) -> None:
        self.asked: list[Any] = []
        self.given = list(given)

    def __call__(self, links: Any, tensors: Any, noise: Any) -> Any:
        self.asked.append((links, dict(tensors), noise))
        return self.given.pop(0)


def test_sessions_that_chain_are_asked_once_with_all_that_they_need(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: x, steps=4, start=1.0, end=0.0)
    chain = sessions["eye"].chain = Chains({"x": np.full((1, 2, 2), 9, np.float32), "prefix": object()})
    assert policy.predict_chunk(OBSERVATION, NOISE).tolist() == [[9, 9], [9, 9]]
    [(links, tensors, noise)] = chain.asked
    euler = Euler("x", "t", "v", (1.0, 0.75, 0.5, 0.25), -0.25)
    assert links == (
        Link("eye", sessions["eye"], frozenset({"prefix"})),
        Link("aflow", sessions["aflow"], frozenset(), euler),
    )
    assert (tensors["state"].tolist(), noise.tolist()) == ([[1, 2]], NOISE.tolist())
    assert sessions["aflow"].calls == sessions["eye"].calls == []


def test_where_not_all_components_chain_the_loop_may_by_itself(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: x)
    sessions["eye"].chain = Chains(None)
    alone = sessions["aflow"].chain = Chains({"x": np.full((1, 2, 2), 9, np.float32)})
    assert policy.predict_chunk(OBSERVATION, NOISE).tolist() == [[9, 9], [9, 9]]
    [(links, tensors, noise)] = alone.asked
    assert ([link.name for link in links], noise.tolist()) == (["aflow"], NOISE.tolist())
    assert tensors["prefix"].tolist() == [[2, 4]]
    assert (len(sessions["eye"].calls), sessions["aflow"].calls) == (1, [])


def test_sessions_that_cannot_chain_are_run_one_by_one_and_step_by_step(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: np.full_like(x, 3))
    sessions["eye"].chain, sessions["aflow"].chain = Chains(None), Chains(None)
    assert policy.predict_chunk(OBSERVATION, NOISE) == pytest.approx(NOISE[0] + 3, abs=1e-6)
    assert (len(sessions["eye"].calls), len(sessions["aflow"].calls)) == (1, 4)


def test_components_of_one_pass_chain_too(tiny_spec: PolicySpec, fake_session: Any) -> None:
    given = {"image": np.zeros((1, 3, 2, 2), np.float32), "state": np.zeros((1, 2), np.float32)}
    sessions = {name: fake_session(lambda **_: {}) for name in ("eye", "arm")}
    sessions["eye"].chain = Chains({"raw": np.ones((1, 2), np.float32)})
    assert run_loop(tiny_spec, sessions, given, None).keys() == {"image", "state", "raw"}
    [(links, _, noise)] = sessions["eye"].chain.asked
    assert ([link.name for link in links], noise) == (["eye", "arm"], None)


def test_who_must_see_or_steer_the_steps_gets_them_one_by_one(flow: Any) -> None:
    policy, sessions = flow(lambda x, t: np.full_like(x, 3))
    sessions["eye"].chain, sessions["aflow"].chain = Chains(), Chains()
    policy.predict_chunk(OBSERVATION, NOISE, tap=lambda *_: None)
    given = policy.processors.prepare(OBSERVATION)
    run_loop(policy.spec, sessions, given, NOISE, steer=lambda state, velocity, time: velocity)
    assert len(sessions["aflow"].calls) == 8
    assert sessions["eye"].chain.asked == sessions["aflow"].chain.asked == []
