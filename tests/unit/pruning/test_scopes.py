"""A scope says which layers pruning may touch, and a wrong one is refused before anything happens."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.errors import InputError
from vlaopt.pruning.scopes import ScopeAmount, select
from vlaopt.scopes import covers

PATHS = ["vision.stem.0", "vision.blocks.1.expand.0", "vision.blocks.10.expand.0", "head.layers.0", "head.output"]


@pytest.mark.parametrize("amount", [1.0, -0.1, 1.5, math.nan, math.inf, -math.inf])
def test_an_amount_outside_zero_to_one_is_refused(amount: float) -> None:
    with pytest.raises(InputError, match=r"prune amount .* of scope 'head' is not in \[0, 1\)"):
        ScopeAmount("head", amount)


def test_a_star_crosses_dots_and_a_module_brings_its_layers() -> None:
    assert covers("vision.*", "vision.blocks.1.expand.0")
    assert covers("vision.blocks.1", "vision.blocks.1.expand.0")
    assert covers("*.expand", "vision.blocks.1.expand.0")


def test_a_module_is_not_a_prefix_of_letters() -> None:
    assert not covers("vision.blocks.1", "vision.blocks.10.expand.0")


def test_the_last_rule_that_covers_a_layer_decides() -> None:
    asked = select(PATHS, [ScopeAmount("*", 0.5), ScopeAmount("head", 0.25)], [])
    assert asked["vision.stem.0"] == 0.5
    assert asked["head.output"] == 0.25


def test_excluded_layers_are_not_asked_for() -> None:
    assert list(select(PATHS, [ScopeAmount("head", 0.5)], ["head.output"])) == ["head.layers.0"]


@pytest.mark.parametrize(
    ("scope", "near"),
    [("vision.block.*", "vision.blocks"), ("heads", "head"), ("head.layer.0", "head.layers.0"), ("*", None)],
)
def test_a_scope_that_matches_nothing_names_the_nearest_layer(scope: str, near: str | None) -> None:
    paths = PATHS if near else []
    with pytest.raises(InputError, match="matches no layer that can be pruned") as caught:
        select(paths, [ScopeAmount(scope, 0.5)], [])
    assert caught.value.hint is not None
    assert f"'{near}'" in caught.value.hint if near else "no layer of a kind" in caught.value.hint


def test_an_exclusion_that_matches_nothing_is_refused_like_a_scope() -> None:
    with pytest.raises(InputError, match=r"scope 'haed\.\*' matches no layer"):
        select(PATHS, [ScopeAmount("*", 0.5)], ["haed.*"])


def test_excluding_all_that_is_in_scope_is_refused() -> None:
    with pytest.raises(InputError, match="every layer in scope is excluded"):
        select(PATHS, [ScopeAmount("head", 0.5)], ["*"])


def test_no_scope_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="no scope"):
        select(PATHS, [], [])


@given(st.sampled_from(PATHS))
def test_a_layers_own_path_always_covers_it(path: str) -> None:
    assert select(PATHS, [ScopeAmount(path, 0.5)], []) == {path: 0.5}
