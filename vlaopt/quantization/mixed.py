"""Scheme `mixed`: a plan made by the search, and the report of how."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaopt import backends
from vlaopt.errors import StageError
from vlaopt.graph.scopes import covers_node
from vlaopt.progress import Progress
from vlaopt.quantization.evaluations import UNIFORM, Evaluations, append, journal_lines
from vlaopt.quantization.groups import Node
from vlaopt.quantization.plan import NodePlan, NodeScheme, QuantizationPlan, Rules
from vlaopt.quantization.search import Found, Gates, Space, choice_of, search, start_of
from vlaopt.quantization.trials import FP32, Choice, Trials, with_schemes
from vlaopt.target import Target

FALLBACK = "onnxruntime"
"""Tells the action error where no backend of the target runs."""
PREFERENCE = 1.05
"""As in stage `engine`: noise must decide nothing."""


@dataclass(frozen=True)
class Mixed:
    """The plan, and its report as plain JSON values."""

    plan: QuantizationPlan
    report: dict[str, Any]


def backends_for(target: Target, wanted: str = "auto") -> list[str]:
    """The backends that trials for a target can run on: the one wanted, or all that run here, else ONNX Runtime."""
    names = target.backends if wanted == "auto" else (wanted,)
    known = [backends.get(name) for name in names if name in backends.names()]
    return [each.name for each in known if not (each.missing() or each.runnable())] or [FALLBACK]


def on_fastest(candidates: Sequence[Trials], uniform: Choice, journal: Path | None, progress: Progress) -> Trials:
    """The trials on the backend that runs the `uniform` plan fastest, an earlier one PREFERENCE times favoured.

    A search that was killed stays with the backend in its journal. Where all refuse the plan it is the first.
    """
    if len(candidates) == 1:
        return candidates[0]
    before = {line.get("backend") for line in journal_lines(journal)} if journal else set()
    if known := [trials for trials in candidates if trials.backend in before]:
        return known[0]
    chosen, least_ms = candidates[0], math.inf
    for trials in candidates:
        with progress.task(f"measuring uniform int8 on {trials.backend}"):
            try:
                ms = sum(trials.times_ms({UNIFORM: uniform})[UNIFORM].values())
            except StageError:
                continue
        if ms * PREFERENCE < least_ms or least_ms == math.inf:
            chosen, least_ms = trials, ms
    if journal:
        append(journal, {"backend": chosen.backend})
    return chosen


def space_of(plan: QuantizationPlan, others: Sequence[Mapping[str, Mapping[str, NodePlan]]], rules: Rules) -> Space:
    """What may be chosen: nodes that the plan has in int8 and no rule covers, as any of `others` has them, or in FP32.

    Everything else stays as the plan says.
    """
    options: dict[Node, tuple[NodeScheme, ...]] = {}
    fixed: dict[Node, NodeScheme] = {}
    for component, planned in plan.components.items():
        for name, node in planned.nodes.items():
            ruled = any(covers_node(glob, component, name) for glob, _ in rules)
            if node.scheme == "int8" and not ruled:
                besides = [other[component][name].scheme for other in others if name in other.get(component, {})]
                options[component, name] = tuple(dict.fromkeys(["int8", *besides, "fp32"]))
            elif node.scheme != "fp32":
                fixed[component, name] = node.scheme
    return Space(options, fixed)


def mix(
    trials: Trials,
    plan: QuantizationPlan,
    space: Space,
    gates: Gates,
    *,
    budget: int,
    journal: Path | None,
    progress: Progress,
) -> Mixed:
    """The best plan of `space` within `budget` evaluations; see `search`. Raises StageError when nothing can be chosen.

    `plan` is the uniform one, with the ranges that every plan of the space needs.
    """
    if not space.options:
        raise StageError(
            "there is nothing to search: no layer pays in int8 that no rule covers",
            hint="take quantize.scheme int8, or rules out",
        )
    start = choice_of(start_of(space))
    with progress.task("searching a mixed plan", budget) as task:
        evaluations = Evaluations(trials, budget=budget, uniform=start, task=task, journal=journal)
        found = search(space, evaluations, gates)
    with progress.task("measuring the plan found"):
        times = trials.times_ms({FP32: {}, UNIFORM: start, "mixed": choice_of(found.schemes)})
    components = {}
    for name, component in plan.components.items():
        schemes = {node: scheme for (owner, node), scheme in found.schemes.items() if owner == name}
        reasons = {node: reason for (owner, node), reason in found.reasons.items() if owner == name}
        components[name] = with_schemes(component, schemes, reasons)
    measured = "measured" if trials.measured else "estimated by multiply-adds"
    report = _report(found, evaluations, times) | {"backend": trials.backend, "times": measured}
    return Mixed(plan.model_copy(update={"scheme": "mixed", "components": components}), report)


def _report(found: Found, evaluations: Evaluations, times: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    return {
        "verdict": found.verdict,
        "held": found.inside,
        "evaluations": {
            "budget": evaluations.budget,
            "made": evaluations.spent,
            "of_earlier_processes": evaluations.resumed,
        },
        "times_ms": times,
        "trials": list(found.trials),
    }
