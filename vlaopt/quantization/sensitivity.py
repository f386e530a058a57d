"""What each component, block and node costs in action error and gains in time and size, alone in low precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlaopt.benchmark.actions import ActionError
from vlaopt.benchmark.compare import SAME_WITHIN
from vlaopt.quantization.evaluations import Evaluation, Evaluations
from vlaopt.quantization.groups import Group, Node, whole
from vlaopt.quantization.plan import QuantizationPlan
from vlaopt.quantization.search import Gates
from vlaopt.quantization.trials import FP32


@dataclass(frozen=True)
class Cost:
    """One group in low precision, the rest in FP32, held against all in FP32.

    `error`, `flips` and `jerk` are changes of the mean action error in standard deviations, of the fraction of flipped
    gripper commands and of the relative jerk; `gain_ms` is milliseconds of a chunk, `gain_bytes` of the graphs.
    `missed` names the gates that it misses alone; `refused` says why the backend does not take it, which leaves all
    figures at 0.
    """

    group: Group
    error: float = 0.0
    flips: float | None = None
    jerk: float = 0.0
    gain_ms: float = 0.0
    gain_bytes: int = 0
    missed: tuple[str, ...] = ()
    refused: str | None = None

    def per_ms(self, least_ms: float) -> float:
        """Error for each millisecond gained; without end where it gains less than `least_ms`, unless it costs none."""
        if self.refused:
            return math.inf
        if self.gain_ms >= least_ms:
            return self.error / self.gain_ms
        return math.inf if self.error > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**vars(self), "group": self.group.scope, "nodes": [".".join(node) for node in self.group.nodes]}


@dataclass(frozen=True)
class Sensitivity:
    """The costs, worst per millisecond first; the error and milliseconds of a chunk in FP32."""

    costs: tuple[Cost, ...]
    base: ActionError
    base_ms: float

    @property
    def least_ms(self) -> float:
        """Gains below this cannot be told from none."""
        return SAME_WITHIN * self.base_ms

    def finest(self) -> list[Cost]:
        """Those of which no part was measured."""
        owners = {cost.group.nodes for cost in self.costs}
        return [cost for cost in self.costs if not any(set(nodes) < set(cost.group.nodes) for nodes in owners)]


@dataclass(frozen=True)
class Suggestion:
    """A rule that one could add to the recipe, and why."""

    scope: str
    scheme: str
    why: str


def measure(plan: QuantizationPlan, evaluations: Evaluations, gates: Gates) -> Sensitivity:
    """The costs of what the plan has in low precision: components first, then parts of what costs most.

    All evaluations of the budget are used, or every node is measured by itself.
    """
    nodes: list[Node] = [
        (component, name)
        for component, part in plan.components.items()
        for name, node in part.nodes.items()
        if node.scheme != "fp32"
    ]
    base = evaluations.of({})
    assert base and base.error, "FP32 was refused"
    found: list[Cost] = []
    waiting = whole(nodes)
    while waiting and evaluations.left:
        for group in waiting:
            if seen := evaluations.of(_choice(group.nodes)):
                found.append(_cost(group, seen, base, gates))
        waiting = _next(found)
    base_ms = sum(base.times_ms.values())
    found.sort(key=lambda cost: (-cost.per_ms(SAME_WITHIN * base_ms), -cost.error, cost.group.scope))
    return Sensitivity(tuple(found), base.error, base_ms)


def suggestions(sensitivity: Sensitivity, used: Sequence[Node]) -> list[Suggestion]:
    """Rules for the finest groups. `used` is what the recipe's plan has in low precision.

    FP32 for what is used and gains no time or misses a gate alone; int8 for what is not used and would gain.
    """
    found = []
    for cost in sensitivity.finest():
        members = set(cost.group.nodes) & set(used)
        scope = cost.group.scope
        if cost.refused:
            found.append(Suggestion(scope, "fp32", f"the backend refuses it: {cost.refused}"))
        elif members and cost.missed:
            found.append(Suggestion(scope, "fp32", f"alone it misses {', '.join(cost.missed)}"))
        elif members and cost.gain_ms < sensitivity.least_ms and cost.error > 0:
            found.append(Suggestion(scope, "fp32", f"it gains no time and costs {cost.error:+.4f}"))
        elif not members and cost.gain_ms >= sensitivity.least_ms and not cost.missed:
            found.append(Suggestion(scope, "int8", f"it would gain {cost.gain_ms:.3f} ms for {cost.error:+.4f}"))
    return found


def _choice(nodes: Sequence[Node]) -> dict[str, list[str]]:
    chosen: dict[str, list[str]] = {}
    for component, name in nodes:
        chosen.setdefault(component, []).append(name)
    return chosen


def _next(found: Sequence[Cost]) -> list[Group]:
    """The parts of the group that costs most of those of which no part was measured yet; a refused one comes first."""
    measured = {cost.group.nodes for cost in found}
    open_ = [cost for cost in found if len(cost.group.nodes) > 1 and cost.group.split()[0].nodes not in measured]
    if not open_:
        return []
    worst = max(open_, key=lambda cost: (cost.refused is not None, cost.error, len(cost.group.nodes)))
    return worst.group.split()


def _cost(group: Group, seen: Evaluation, base: Evaluation, gates: Gates) -> Cost:
    if seen.error is None or base.error is None:
        return Cost(group, refused=seen.refused)
    flips = None
    if seen.error.gripper_flips is not None and base.error.gripper_flips is not None:
        flips = seen.error.gripper_flips - base.error.gripper_flips
    return Cost(
        group,
        error=seen.error.executed.mean - base.error.executed.mean,
        flips=flips,
        jerk=seen.error.jerk - base.error.jerk,
        gain_ms=-seen.beside(FP32),
        gain_bytes=base.size - seen.size,
        missed=tuple(gate.name for gate in gates(seen.error) if not gate.held),
    )
