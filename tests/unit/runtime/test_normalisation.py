"""The promise: every mode normalises as LeRobot does, undoes itself, and refuses statistics it cannot be made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vlaopt.artifact.policy_spec import Mode
from vlaopt.errors import InputError
from vlaopt.runtime.normalisation import Statistics
from vlaopt.tensors import Array

SIZE = 4
MODES = [mode for mode in get_args(Mode) if mode != "identity"]
KEYS = {
    "mean-std": ("mean", "std"),
    "min-max": ("min", "max"),
    "quantiles": ("q01", "q99"),
    "quantiles-10": ("q10", "q90"),
}


def made(seed: int = 0, **changed: Any) -> dict[str, Array]:
    """Sound statistics of `x`, except for what is `changed` (None: left out)."""
    samples = np.random.default_rng(seed).standard_normal((500, SIZE)) * [1, 10, 0.1, 3] + [0, -5, 2, 100]
    found = {
        "mean": samples.mean(0),
        "std": samples.std(0),
        "min": samples.min(0),
        "max": samples.max(0),
        **{f"q{q:02d}": np.percentile(samples, q, axis=0) for q in (1, 10, 90, 99)},
        **changed,
    }
    return {f"x.{key}": np.asarray(value, np.float32) for key, value in found.items() if value is not None}


def statistics(tensors: Mapping[str, Array]) -> Statistics:
    return Statistics(tensors, where="statistics.safetensors")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", [False, True])
def test_a_mode_is_lerobots(mode: Any, constant: bool) -> None:
    pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
    import torch
    from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature
    from lerobot.processor.normalize_processor import NormalizerProcessorStep, UnnormalizerProcessorStep

    low, high = KEYS[mode]
    tensors = made()
    if constant:  # the last value never changed
        tensors[f"x.{high}"][3] = 0 if mode == "mean-std" else tensors[f"x.{low}"][3]
    theirs = NormalizationMode({"quantiles-10": "QUANTILE10"}.get(mode, mode.replace("-", "_").upper()))
    features = {"x": PolicyFeature(type=FeatureType.STATE, shape=(SIZE,))}
    stats = {"x": {key.split(".")[1]: value for key, value in tensors.items()}}
    values = np.random.default_rng(1).standard_normal((6, SIZE)).astype(np.float32) * 3
    values[:, 3] = tensors[f"x.{low}"][3]
    args = {"features": features, "norm_map": {FeatureType.STATE: theirs}, "stats": stats, "eps": 1e-8}
    there = NormalizerProcessorStep(**args)._apply_transform(torch.from_numpy(values), "x", FeatureType.STATE)
    back = UnnormalizerProcessorStep(**args)._apply_transform(there, "x", FeatureType.STATE, inverse=True)

    law = statistics(tensors).input("x", mode, 1e-8, SIZE)
    assert law is not None
    mine = law.apply(values.copy())
    assert mine.dtype == np.float32
    assert mine == pytest.approx(there.numpy(), rel=1e-6, abs=1e-6)
    assert law.undo(mine) == pytest.approx(back.numpy(), rel=1e-6, abs=1e-6)


@settings(max_examples=60)
@given(
    mode=st.sampled_from(MODES),
    values=arrays(np.float32, (3, SIZE), elements=st.floats(-50, 50, width=32)),
    seed=st.integers(0, 50),
)
def test_what_is_undone_comes_back(mode: Any, values: Array, seed: int) -> None:
    for law in (f("x", mode, 1e-8, SIZE) for f in (statistics(made(seed)).input, statistics(made(seed)).action)):
        assert law is not None
        kept = values.copy()
        assert law.apply(law.undo(values)) == pytest.approx(values, abs=2e-3)
        assert np.array_equal(values, kept)


@pytest.mark.parametrize("mode", MODES[1:])
def test_the_ends_become_minus_one_and_one(mode: Any) -> None:
    low, high = (made()[f"x.{key}"] for key in KEYS[mode])
    law = statistics(made()).input("x", mode, 0.0, SIZE)
    assert law is not None
    assert law.apply(np.stack([low, high])) == pytest.approx(np.asarray([[-1] * SIZE, [1] * SIZE]), abs=1e-6)


def test_identity_needs_no_statistics() -> None:
    assert statistics({}).input("x", "identity", 0.0, SIZE) is None
    assert statistics({}).action("x", "identity", 0.0, SIZE) is None


@pytest.mark.parametrize("mode", MODES)
def test_an_action_that_never_changed_is_what_it_always_was(mode: Any) -> None:
    low, high = KEYS[mode]
    still = {high: np.zeros(SIZE)} if mode == "mean-std" else {high: made()[f"x.{low}"]}
    law = statistics(made(**still)).action("x", mode, 0.0, SIZE)
    assert law is not None
    always = made()[f"x.{low}"]
    assert np.array_equal(law.undo(np.ones((2, SIZE), np.float32)), np.stack([always, always]))
    assert np.isfinite(law.apply(always.copy())).all()


@pytest.mark.parametrize(
    ("mode", "changed", "reason"),
    [
        ("mean-std", {"std": [1, 0, 1, 1]}, "x.std: nothing to divide by at 1"),
        ("mean-std", {"std": [1, 1, -1, 1]}, "x.std: negative at 2"),
        ("mean-std", {"mean": None}, "no x.mean among the statistics"),
        ("mean-std", {"std": None}, "no x.std among the statistics"),
        ("mean-std", {"std": [1, 1]}, r"x.std: shape \[2\] given, \[4\] needed"),
        ("min-max", {"max": None}, "no x.max among the statistics"),
        ("min-max", {"min": [0] * 4, "max": [1, 1, -1, 1]}, "x.max: below x.min at 2"),
        ("min-max", {"min": [0] * 4, "max": [1, 1, 1, 0]}, "x.max: nothing to divide by at 3"),
        ("min-max", {"min": [0, np.inf, 0, 0]}, r"x.min: not finite at \[1\]"),
        ("quantiles", {"q01": None}, "no x.q01 among the statistics"),
        ("quantiles", {"q99": [np.nan] * 4}, "x.q99: not finite"),
        ("quantiles-10", {"q90": None}, "no x.q90 among the statistics"),
    ],
)
def test_unsound_statistics_are_refused_by_name(mode: Any, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        statistics(made(**changed)).input("x", mode, 0.0, SIZE)


@pytest.mark.parametrize("mode", MODES)
def test_a_span_of_nothing_is_divided_by_eps_where_there_is_one(mode: Any) -> None:
    low, high = KEYS[mode]
    still = {high: np.zeros(SIZE)} if mode == "mean-std" else {high: made()[f"x.{low}"]}
    law = statistics(made(**still)).input("x", mode, 1e-8, SIZE)
    assert law is not None
    assert law.apply(made()[f"x.{low}"].copy()).tolist() == [0.0 if mode == "mean-std" else -1.0] * SIZE
