"""The search behind `scheme: mixed`: the fastest plan within the limits, and of equally fast ones the most exact.

It starts from everything that pays in int8. Each group of nodes is tried in every other scheme it can run in. While a
limit is missed, what misses it most per millisecond is moved; then groups that gain no time but cost error are moved,
and groups that were moved too much are put back.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlaopt.benchmark.actions import ActionError, Limit
from vlaopt.quantization.evaluations import UNIFORM, Evaluation, Evaluations
from vlaopt.quantization.groups import Group, Node, grouped
from vlaopt.quantization.plan import NodeScheme
from vlaopt.quantization.trials import FP32

Gates = Callable[[ActionError], Sequence[Limit]]
"""The gates that an action error is held to."""
Schemes = Mapping[Node, NodeScheme]
"""What every node that is not FP32 runs in."""

SAME_WITHIN, NOISE_WITHIN = 0.01, 0.02
"""Times of a chunk that differ by less than the first fraction are equal. On a busy machine, where components that are
alike differ by more, that counts, up to the second fraction."""
FASTER = 2.0
"""A plan is faster when it is so by this many times what equal times may differ."""
SURVEYED = 0.6
"""The part of the evaluations that single moves may take; the rest is for plans made of several."""
PASSES, SPARED = 3, 0.25
"""Single moves are timed up to so often, while this part of the evaluations is left."""


@dataclass(frozen=True)
class Space:
    """What may be chosen: the schemes of a node, the one to start from first; and what is fixed by a rule."""

    options: Mapping[Node, tuple[NodeScheme, ...]]
    fixed: Schemes


@dataclass(frozen=True)
class Move:
    """One group in another scheme than it starts in (None: as it starts), and what that alone changed of the start."""

    group: Group
    scheme: NodeScheme | None
    lost_ms: float = 0.0
    error: float = 0.0
    """Change of the mean action error."""
    excess: float = 0.0
    """Change of what the limits are missed by."""


@dataclass(frozen=True)
class Plan:
    """Where the search is: the moves from the start, by scope, and what the policy is like with them."""

    moves: Mapping[str, Move]
    seen: Evaluation


@dataclass(frozen=True)
class Found:
    """The plan that was chosen, what it is like, why, and every trial on the way there."""

    schemes: Schemes
    evaluation: Evaluation
    inside: bool
    verdict: str
    reasons: Mapping[Node, str]
    trials: Sequence[Mapping[str, Any]]


def search(space: Space, evaluations: Evaluations, gates: Gates) -> Found:
    """The best plan of `space` that the budget of `evaluations` lets it find; equal measurements give an equal plan."""
    return _Search(space, evaluations, gates).run()


def choice_of(schemes: Schemes) -> dict[str, dict[str, NodeScheme]]:
    """The schemes as trials take them."""
    chosen: dict[str, dict[str, NodeScheme]] = {}
    for (component, node), scheme in schemes.items():
        chosen.setdefault(component, {})[node] = scheme
    return chosen


def start_of(space: Space) -> dict[Node, NodeScheme]:
    """Every node as it starts."""
    return {**space.fixed, **{node: schemes[0] for node, schemes in space.options.items()}}


class _Search:
    def __init__(self, space: Space, evaluations: Evaluations, gates: Gates) -> None:
        self._space, self._evaluations, self._gates = space, evaluations, gates
        self._trials: list[dict[str, Any]] = []
        others = max((len(options) - 1 for options in space.options.values()), default=1)
        self._groups = grouped(space.options, max(1, int(SURVEYED * evaluations.budget - 2) // others))
        self._moves: list[Move] = []
        self._tolerance_ms = self._fastest_ms = 0.0

    def run(self) -> Found:
        plain = {group.scope: Move(group, "fp32") for group in self._groups}
        base = self._evaluate(plain, "nothing but what rules fix")
        start = self._evaluate({}, "everything that pays, in int8")
        assert base and start, "a budget below two evaluations"
        reference = start.seen if start.seen.error else base.seen
        chunk_ms = sum(reference.times_ms.values())
        self._tolerance_ms = SAME_WITHIN * chunk_ms
        noise_ms = self._survey(start.seen)
        self._tolerance_ms = max(self._tolerance_ms, min(noise_ms, NOISE_WITHIN * chunk_ms))
        plan = start if self._inside(start.seen) else self._repair(base)
        plan = self._improve(plan)
        return Found(
            schemes=self._schemes(plan.moves),
            evaluation=plan.seen,
            inside=self._inside(plan.seen),
            verdict=self._verdict(start.seen, plan),
            reasons=self._reasons(plan),
            trials=self._trials,
        )

    def _schemes(self, moves: Mapping[str, Move]) -> dict[Node, NodeScheme]:
        """What every node runs in; one that cannot do what its group was moved to stays as it starts."""
        schemes = start_of(self._space)
        for move in moves.values():
            can = [node for node in move.group.nodes if move.scheme in self._space.options[node]]
            schemes |= {node: move.scheme for node in can if move.scheme is not None}
        return schemes

    def _evaluate(self, moves: Mapping[str, Move], why: str, repeat: int = 0) -> Plan | None:
        seen = self._evaluations.of(choice_of(self._schemes(moves)), repeat)
        if seen is None:
            return None
        self._trials.append(
            {
                "what": why,
                "moved": {scope: move.scheme for scope, move in moves.items() if move.scheme},
                "refused": seen.refused,
                "held": self._inside(seen),
                "error": seen.error.to_json() if seen.error else None,
                "against_uniform_ms": seen.beside(UNIFORM) if seen.error else None,
                "against_fp32_ms": seen.beside(FP32) if seen.error else None,
                "noise_ms": seen.noise_ms,
                "bytes": seen.size,
            }
        )
        return Plan(dict(moves), seen)

    def _survey(self, start: Evaluation) -> float:
        """Every group in every other scheme, the rest as at the start; gives the usual noise in milliseconds."""
        noise_ms = [0.0]
        for group in self._groups:
            for scheme in dict.fromkeys(scheme for node in group.nodes for scheme in self._space.options[node][1:]):
                tried = Move(group, scheme)
                plan = self._evaluate({group.scope: tried}, f"{group.scope} in {scheme}")
                if plan is None or plan.seen.error is None:
                    continue
                noise_ms.append(plan.seen.noise_ms)
                if start.error is None:  # the backend refuses the start, and this group is why
                    self._moves.append(replace(tried, excess=-math.inf))
                    continue
                self._moves.append(
                    Move(
                        group,
                        scheme,
                        lost_ms=plan.seen.beside(UNIFORM),
                        error=plan.seen.error.executed.mean - start.error.executed.mean,
                        excess=self._excess(plan.seen) - self._excess(start),
                    )
                )
        if start.error is not None:
            self._moves = self._timed_again(self._moves)
        return statistics.median(noise_ms)

    def _timed_again(self, moves: Sequence[Move]) -> list[Move]:
        """The moves, each with the median of what it lost in several measurements, as far as evaluations are left."""
        spared = SPARED * self._evaluations.budget
        times = {move: [move.lost_ms] for move in moves}
        for repeat in range(1, PASSES):
            if self._evaluations.left - len(moves) < spared:
                break
            for move in moves:
                plan = self._evaluate({move.group.scope: move}, f"{move.group.scope} in {move.scheme}, again", repeat)
                if plan and plan.seen.error:
                    times[move].append(plan.seen.beside(UNIFORM))
        return [replace(move, lost_ms=statistics.median(lost_ms)) for move, lost_ms in times.items()]

    def _repair(self, base: Plan) -> Plan:
        """From the start to within the limits: what helps most per millisecond first, ever more of it at a time.

        Where the evaluations end before, everything goes to FP32.
        """
        ranked = sorted(self._moves, key=self._worth, reverse=True)
        moves, step = dict[str, Move](), 1
        while ranked:
            batch, ranked = ranked[:step], ranked[step:]
            moves |= {m.group.scope: m for m in batch if m.group.scope not in moves or m.scheme == "fp32"}
            plan = self._evaluate(moves, f"within the limits: {len(moves)} groups moved")
            if plan is None:
                break
            if self._inside(plan.seen):
                return plan
            step *= 2
        return Plan({**base.moves, **{m.group.scope: m for m in self._moves if m.scheme == "fp32"}}, base.seen)

    def _worth(self, move: Move) -> tuple[float, float]:
        """Nearer the limits per millisecond, then less error per millisecond."""
        cost = max(move.lost_ms, self._tolerance_ms)
        return max(-move.excess, 0.0) / cost, -move.error / cost

    def _improve(self, plan: Plan) -> Plan:
        """Faster plans first; then more exact ones that are as fast: all that promise it together, then one by one."""
        for move in sorted(self._changes(plan), key=lambda move: move.lost_ms):
            if move.lost_ms < -FASTER * self._tolerance_ms:
                plan = self._try(plan, [move], faster=True)
        self._fastest_ms = _lost_ms(plan)
        exact = [move for move in self._changes(plan) if move.lost_ms <= self._tolerance_ms and move.error < 0]
        exact.sort(key=lambda move: move.error)
        best = {move.group.scope: move for move in reversed(exact)}
        together = self._try(plan, list(best.values()), faster=False)
        if together is not plan:
            return together
        for move in exact:
            plan = self._try(plan, [move], faster=False)
        return plan

    def _changes(self, plan: Plan) -> list[Move]:
        """Every other scheme of every group, with what it would change of the plan as far as single moves tell."""
        found = []
        for move in [*self._moves, *(Move(group, None) for group in self._groups)]:
            now = plan.moves.get(move.group.scope, Move(move.group, None))
            if move.scheme != now.scheme:
                found.append(replace(move, lost_ms=move.lost_ms - now.lost_ms, error=move.error - now.error))
        return found

    def _try(self, plan: Plan, changes: Sequence[Move], *, faster: bool) -> Plan:
        """The plan with these changes where it is better, else the one there is."""
        if not changes:
            return plan
        known = {(move.group.scope, move.scheme): move for move in self._moves}
        moves = dict(plan.moves)
        for change in changes:
            scope = change.group.scope
            moves[scope] = known.get((scope, change.scheme), Move(change.group, None))
        told = ", ".join(f"{change.group.scope} in {change.scheme or 'int8'}" for change in changes)
        other = self._evaluate(moves, f"{'faster' if faster else 'more exact'}: {told}")
        if other is None or other.seen.error is None or plan.seen.error is None or not self._inside(other.seen):
            return plan
        if faster:
            better = _lost_ms(other) - _lost_ms(plan) < -FASTER * self._tolerance_ms
        else:
            exacter = other.seen.error.executed.mean < plan.seen.error.executed.mean
            better = exacter and _lost_ms(other) - self._fastest_ms <= self._tolerance_ms
        return other if better else plan

    def _inside(self, seen: Evaluation) -> bool:
        return self._excess(seen) == 0.0

    def _excess(self, seen: Evaluation) -> float:
        """How far beyond the limits: the sum of the fractions by which each is missed."""
        if seen.error is None:
            return math.inf
        missed = [gate for gate in self._gates(seen.error) if not gate.held]
        return sum((gate.value - gate.limit) / max(gate.limit, 1e-6) for gate in missed)

    def _verdict(self, start: Evaluation, plan: Plan) -> str:
        made = f"{self._evaluations.spent} evaluations"
        if not self._inside(plan.seen):
            return f"nothing within the limits was found in {made}, not even without int8"
        if not any(move.scheme for move in plan.moves.values()):
            return f"uniform int8 is already best: none of {made} was within the limits and faster or more exact"
        if start.error is None or plan.seen.error is None:
            return f"the backend refuses uniform int8: {start.refused}"
        missed = "" if self._inside(start) else ", which misses a limit"
        return (
            f"mean action error {plan.seen.error.executed.mean:.4f} instead of {start.error.executed.mean:.4f} of "
            f"uniform int8{missed}; {plan.seen.beside(UNIFORM):+.3f} ms of a chunk against it; {made}"
        )

    def _reasons(self, plan: Plan) -> dict[Node, str]:
        """Why every node that could be chosen runs in what it does."""
        reasons: dict[Node, str] = {}
        for group in self._groups:
            now = plan.moves.get(group.scope, Move(group, None))
            if now.scheme:
                told = f"in {now.scheme} {_told(now, 'is', 'than in int8')}"
            else:
                others = [move for move in self._moves if move.group == group]
                told = "; ".join(f"in {move.scheme} {_told(move, 'would be', '')}" for move in others) or "not tried"
            reasons |= dict.fromkeys(group.nodes, f"search: {group.scope} {told}")
        return reasons


def _lost_ms(plan: Plan) -> float:
    """Milliseconds lost against the start, between what was measured now and what the moves alone promise."""
    return (plan.seen.beside(UNIFORM) + sum(move.lost_ms for move in plan.moves.values())) / 2


def _told(move: Move, verb: str, than: str) -> str:
    return f"the policy {verb} {move.lost_ms:+.3f} ms and {move.error:+.4f} in mean action error {than}".rstrip()
