"""Which precision is proposed for which layers: by what the target has, the component's kind and the layers' names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.proposal.anatomy import Anatomy
from vlaopt.scopes import covers
from vlaopt.target import Target


@dataclass(frozen=True)
class Rule:
    """Layers that get another scheme than the policy's, and why."""

    scope: str
    scheme: str
    why: str


@dataclass(frozen=True)
class _Habit:
    """Layers that lose more than others in 8 bit, known by a module's name on their path."""

    name: re.Pattern[str]
    in_loop_only: bool
    why: str


_TIME = _Habit(
    re.compile(r"time|timestep|step_enc|step_emb"), True, "the time of the loop: rounded, it bends every step"
)
_ATTENTION = _Habit(re.compile(r"attn|attention"), True, "attention within the loop: try int8 once all else holds")
_ENDS = _Habit(re.compile(r"(action|state)(_in|_out)?_proj"), False, "where state and actions come in and go out")
_FEED_FORWARD = re.compile(r"mlp|ffn|feed_forward|(fc|linear)_?[0-9]")

_EIGHT_BIT_KINDS = ("prefix", "decode", "single", "head")
"""Kinds of component whose matrix products are large and lose little in 8 bit. Vision stays in FP16: its convolutions
are fast there, and its norms are delicate; of a loop's step the feed-forward products alone, as its errors add up."""


def scheme_of(target: Target) -> str:
    """The policy's scheme: int8 on a CPU; on a GPU FP16, between which single layers have 8 bits."""
    wanted = ("int8",) if target.kind == "cpu" else ("fp16", "int8")
    return next((scheme for scheme in wanted if scheme in target.precisions), "none")


def rules_of(spec: PolicySpec, components: Sequence[Anatomy], target: Target) -> tuple[Rule, ...]:
    """What the rules say: 8 bits within FP16 where that pays, then what stays in FP32, the last layer among it."""
    paths = [f"{component.name}.{layer}" for component in components for layer in component.layers]
    halves = scheme_of(target) == "fp16"
    eight = next((scheme for scheme in ("fp8", "int8") if scheme in target.precisions), None)
    # Attention within a loop has FP16 there without a rule, which is what research proposes for it.
    habits = (_TIME, _ENDS) if halves else (_TIME, _ATTENTION, _ENDS)
    kept = [Rule(scope, "fp32", why) for scope, why in (*_by_habit(spec, components, habits), *_last(spec, components))]
    free = {path for path in paths if not any(covers(rule.scope, path) for rule in kept)}
    proposed = [*_in_eight_bits(spec, components, eight, free)] if halves and eight else []
    return (*_that_tell(proposed, paths), *_that_tell(kept, paths))


def _that_tell(rules: Sequence[Rule], paths: Sequence[str]) -> Iterator[Rule]:
    """Those that cover a layer that none before them does."""
    done: set[str] = set()
    for rule in rules:
        covered = {path for path in paths if covers(rule.scope, path)}
        if not covered <= done:
            yield rule
        done |= covered


def _in_eight_bits(
    spec: PolicySpec, components: Sequence[Anatomy], eight: str, free: Collection[str]
) -> Iterator[Rule]:
    """Scopes of what is `free` to have 8 bits."""
    for component in components:
        layers = tuple(layer for layer in component.layers if f"{component.name}.{layer}" in free)
        component = replace(component, layers=layers)
        if component.name == spec.step():
            why = "feed-forward products within the loop: the rest of it stays in FP16, its errors add up"
            yield from (Rule(scope, eight, why) for scope in _scopes(component, _FEED_FORWARD))
        elif component.kind in _EIGHT_BIT_KINDS and component.layers:
            yield Rule(f"{component.name}.*", eight, "large matrix products, which lose little in 8 bit")


def _by_habit(spec: PolicySpec, components: Sequence[Anatomy], habits: Sequence[_Habit]) -> Iterator[tuple[str, str]]:
    for habit in habits:
        for component in components:
            if habit.in_loop_only and component.name != spec.step():
                continue
            yield from ((scope, habit.why) for scope in _scopes(component, habit.name))


def _scopes(component: Anatomy, name: re.Pattern[str]) -> Iterator[str]:
    """Scopes for the layers below modules of such names, each name once."""
    found: dict[str, set[str]] = {}
    for layer in component.layers:
        above, module = _named(layer, name)
        if module:
            found.setdefault(module, set()).add(above)
    for module, places in found.items():
        place = next(iter(places)) if len(places) == 1 else "*."
        yield f"{component.name}.{place}{module}"


def _named(layer: str, pattern: re.Pattern[str]) -> tuple[str, str]:
    """The first module on the path to a layer that has such a name, split into what is above it and the name."""
    parts = layer.split(".")
    for at, part in enumerate(parts):
        if pattern.search(part):
            return "".join(f"{above}." for above in parts[:at]), part
    return "", ""


def _last(spec: PolicySpec, components: Sequence[Anatomy]) -> Iterator[tuple[str, str]]:
    giving = {*spec.read_by_loop(), spec.postprocess.input}
    for component in components:
        outputs = {tensor.name for tensor in spec.components[component.name].outputs}
        if component.layers and outputs & giving:
            yield f"{component.name}.{component.layers[-1]}", "the last layer, which gives the actions"
