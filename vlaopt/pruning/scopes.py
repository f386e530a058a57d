"""Which layers a pruning is asked to touch, and by how much: globs over module paths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vlaopt.errors import InputError
from vlaopt.scopes import covers, nearest


@dataclass(frozen=True)
class ScopeAmount:
    """Prune the layers that `scope` matches by `amount`, a fraction in [0, 1).

    A scope is a glob over module paths in which `*` crosses dots: `vision.blocks.*`, `*.se`. A module it matches
    brings everything inside along, so `head` is all of the head. Raises InputError for an amount outside [0, 1).
    """

    scope: str
    amount: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.amount < 1.0:  # NaN fails every comparison, so it ends here too
            raise InputError(
                f"prune amount {self.amount} of scope '{self.scope}' is not in [0, 1)",
                hint="an amount is the fraction to remove: 0.25 removes a quarter",
            )


def select(paths: Sequence[str], rules: Sequence[ScopeAmount], exclude: Sequence[str]) -> dict[str, float]:
    """The amount asked of each path, in the order given; the last rule that covers a path decides.

    Paths that no rule covers, or that an `exclude` glob covers, are left out. Raises InputError where there is no rule
    and where a glob covers no path: a misspelt scope must not silently prune nothing, nor protect nothing.
    """
    if not rules:
        raise InputError("pruning was given no scope", hint="scopes: ['*'] means every layer")
    for scope in (*(rule.scope for rule in rules), *exclude):
        _must_cover(scope, paths)
    asked: dict[str, float] = {}
    for path in paths:
        amounts = [rule.amount for rule in rules if covers(rule.scope, path)]
        if amounts and not any(covers(scope, path) for scope in exclude):
            asked[path] = amounts[-1]
    if not asked:
        raise InputError(
            f"every layer in scope is excluded: {_quoted(exclude)}", hint="exclude less, or name more scopes"
        )
    return asked


def _must_cover(scope: str, paths: Sequence[str]) -> None:
    if any(covers(scope, path) for path in paths):
        return
    near = nearest(scope, paths)
    raise InputError(
        f"scope '{scope}' matches no layer that can be pruned",
        hint=f"the nearest layer is '{near}'" if near else "this policy holds no layer of a kind that can be pruned",
    )


def _quoted(scopes: Iterable[str]) -> str:
    return ", ".join(f"'{scope}'" for scope in scopes)
