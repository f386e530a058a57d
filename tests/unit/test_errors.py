"""The promise: every kind of error has its exit code, and says what, where and how to mend it."""

from __future__ import annotations

import pytest

from vlaopt.errors import (
    EnvironmentProblem,
    GateError,
    InputError,
    RecipeError,
    StageError,
    VlaoptError,
)


@pytest.mark.parametrize(
    ("kind", "code"),
    [(InputError, 2), (EnvironmentProblem, 3), (StageError, 4), (GateError, 5)],
)
def test_each_kind_ends_with_its_own_exit_code(kind: type[VlaoptError], code: int) -> None:
    assert kind("x").exit_code == code
    assert RecipeError([]).exit_code == 2


def test_an_error_says_where_what_and_how_to_mend_it() -> None:
    error = InputError("no such key", where="recipe.yaml:3:quantise", hint="did you mean quantize?")
    assert error.lines() == ["recipe.yaml:3:quantise: no such key", "hint: did you mean quantize?"]


def test_an_error_without_a_place_or_hint_is_one_line() -> None:
    assert StageError("the builder returned nothing").lines() == ["the builder returned nothing"]


def test_a_recipe_error_prints_every_problem_with_its_hint() -> None:
    error = RecipeError([InputError("a", where="r:1", hint="h"), InputError("b", where="r:2")])
    assert error.lines() == ["r:1: a", "hint: h", "r:2: b"]
    assert str(error) == "r:1: a; r:2: b"
    assert error.message == "2 problems in the recipe"
