"""The noise a policy draws is held against its spec: the right law passes always, a wrong one never."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import toy_flow
from vlaopt.artifact.policy_spec import Noise
from vlaopt.errors import StageError
from vlaopt.policies.noise_law import UNLIKELY, check_law, unlikeliness

NORMAL, UNIFORM = Noise(law="normal", shape=(1,)), Noise(law="uniform", shape=(1,), low=-2.0, high=1.0)


@given(seed=st.integers(0, 10_000), count=st.sampled_from([64, 500, 4096]))
@settings(max_examples=60)
def test_draws_of_the_law_itself_pass(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    assert unlikeliness(random.standard_normal(count, dtype=np.float32), NORMAL) < UNLIKELY
    assert unlikeliness(random.uniform(-2, 1, count).astype(np.float32), UNIFORM) < UNLIKELY


@pytest.mark.parametrize(
    "drawn",
    [
        lambda random: random.uniform(-1.0, 1.0, 4096),
        lambda random: random.uniform(-math.sqrt(3), math.sqrt(3), 4096),  # mean and deviation of the normal law
        lambda random: random.normal(0.0, 1.2, 4096),
        lambda random: random.normal(0.15, 1.0, 4096),
        lambda random: random.normal(0.0, 0.8, 4096),
        lambda random: random.laplace(0.0, math.sqrt(0.5), 4096),
        lambda random: np.zeros(4096),
    ],
    ids=["uniform", "uniform of deviation 1", "wider", "shifted", "narrower", "laplace", "none"],
)
def test_draws_of_another_law_fail(drawn: object) -> None:
    for seed in range(20):
        assert unlikeliness(drawn(np.random.default_rng(seed)), NORMAL) > UNLIKELY  # type: ignore[operator]


def test_the_probability_is_that_of_the_kolmogorov_smirnov_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    for seed, wide in enumerate((1.0, 1.02, 1.05, 1.1, 1.2, 1.5)):
        values = np.random.default_rng(seed).normal(0, wide, 2000)
        expected = -math.log10(stats.kstest(values, "norm").pvalue)
        assert unlikeliness(values, NORMAL) == pytest.approx(expected, rel=0.05, abs=0.05)


@pytest.mark.parametrize("mistake", [None, "uniform noise"])
def test_a_policys_own_draws_are_held_against_its_spec(mistake: str | None, tmp_path: Path) -> None:
    eager = toy(tmp_path, mistake)
    found = check_law(eager, toy_flow.observation(0))
    assert found is not None
    assert (found.component, found.drawn) == ("step", "normal")
    assert found.spec == ("uniform from 0 to 1" if mistake else "normal")
    assert (found.unlikeliness > UNLIKELY) == bool(mistake)
    assert found == check_law(eager, toy_flow.observation(0))


def test_a_policy_that_draws_the_same_noise_again_and_again_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    eager = toy(tmp_path)
    kept = torch.randn(1, toy_flow.CHUNK, toy_flow.ACTIONS)
    monkeypatch.setattr(toy_flow.torch, "randn", lambda *shape: kept)
    found = check_law(eager, toy_flow.observation(0))
    assert found is not None
    assert found.unlikeliness > UNLIKELY
    assert found.drawn.endswith("the same at every call")


def test_noise_of_another_shape_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = toy(tmp_path)
    spec = eager.spec
    noise = spec.noise.model_copy(update={"shape": (1, toy_flow.CHUNK, 7)})
    monkeypatch.setattr(type(eager), "spec", spec.model_copy(update={"noise": noise}))
    with pytest.raises(StageError, match=r"component step: the policy draws noise of shape \[1, 8, 3\], its spec says"):
        check_law(eager, toy_flow.observation(0))


def test_the_policys_own_random_numbers_go_on_as_if_nothing_was_drawn(tmp_path: Path) -> None:
    import torch

    eager = toy(tmp_path)
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    check_law(eager, toy_flow.observation(0))
    assert torch.equal(torch.randn(3), expected)


def toy(folder: Path, mistake: str | None = None) -> toy_flow.EagerToyFlow:
    toy_flow.make(folder, mistake)
    return toy_flow.ADAPTER.load(folder / "checkpoint", {}, {})
