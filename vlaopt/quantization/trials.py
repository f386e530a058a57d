"""A policy with a chosen part of its plan in low precision and the rest in FP32: how far off, and how fast it is."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Mapping

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, Session
from vlaopt.benchmark.actions import ActionError, compare_actions
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.graph.external import decode, structure
from vlaopt.quantization.estimate import estimated_ms
from vlaopt.quantization.plan import ComponentPlan, NodeScheme, QuantizationPlan
from vlaopt.quantization.rounding import rounded
from vlaopt.quantization.writing import write
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import Policy, assemble
from vlaopt.runtime.timing import component_times
from vlaopt.target import Target

Nodes = Collection[str] | Mapping[str, NodeScheme]
"""The nodes of a component that run as the plan says; or every one's own scheme, in place of the plan's."""
Choice = Mapping[str, Nodes]
"""Nodes by component; those that are not named run in FP32."""
Chosen = tuple[tuple[str, frozenset[tuple[str, NodeScheme]]], ...]
"""A choice in one form: every component in the policy's order, with its nodes that do not run in FP32."""

FP32 = "fp32"
"""The label of everything in FP32."""
ROUNDS, ITERATIONS = 60, 5
QUIET = 0.25
"""A component's time is what a quarter of its calls stays below: what else the machine does only ever adds time."""
KEPT = 3
"""Forms of a component that stay open besides FP32: each holds the component's weights once more."""


class Trials:
    """Runs choices on golden data. Results are kept: equal choices are run once.

    `graphs` are the FP32 graphs that the plan was made for. A `backend` that is none of the target's stands in for one
    that does not run here: it runs that one's form of the graphs, and times are estimated. Raises EnvironmentProblem
    where `backend` cannot run here.
    """

    def __init__(
        self,
        source: Artifact,
        graphs: Mapping[str, Graph],
        plan: QuantizationPlan,
        target: Target,
        *,
        backend: str,
        golden: Golden,
        threads: int = 1,
    ) -> None:
        self.backend, self.measured = backend, backend in target.backends
        self._library = backends.get(backend)
        if reason := self._library.missing() or self._library.runnable():
            raise EnvironmentProblem(f"{backend} cannot run here: {reason}")
        self._source, self._graphs, self._plan, self._target = source, graphs, plan, target
        self._spec = source.spec()
        self._golden = golden
        self._options = EngineOptions(threads=threads, compute_capabilities=tuple(target.compute_capabilities))
        self._plain: dict[str, Session] = {}
        self._plain_ms: dict[str, float] = {}
        self._open: dict[str, OrderedDict[frozenset[tuple[str, NodeScheme]], Session]] = {}
        self._errors: dict[Chosen, ActionError] = {}
        self._placement = self._library.placement if self.measured else backends.placements(target.backends)[0]

    def error(self, chosen: Choice) -> ActionError:
        """The action error of a choice against the golden actions.

        Raises InputError for a node or component that the plan lacks, StageError when the backend refuses a graph.
        """
        key = self.normal(chosen)
        if key not in self._errors:
            policy = self._assembled(self._sessions(key))
            self._errors[key] = compare_actions(
                self._golden.run(policy.predict_chunk),
                self._golden.actions,
                std=policy.processors.action_std(),
                n_action_steps=self._spec.chunk.n_action_steps,
                gripper=self._spec.gripper,
            )
        return self._errors[key]

    def times_ms(self, choices: Mapping[str, Choice]) -> dict[str, dict[str, float]]:
        """Milliseconds that every component takes of a chunk, in each of the labelled choices, at the quantile QUIET.

        They are measured in turns in this process, inside the whole policy; all are open at once. Where they are not
        `measured` they are estimates from those of FP32 here. Raises as `error`.
        """
        if not self.measured:
            return self._estimated({label: self.normal(chosen) for label, chosen in choices.items()})
        variants = {label: self._sessions(self.normal(chosen)) for label, chosen in choices.items()}
        samples = self._golden.samples
        return component_times(variants, self._assembled, samples, rounds=ROUNDS, iterations=ITERATIONS, quantile=QUIET)

    def _estimated(self, choices: Mapping[str, Chosen]) -> dict[str, dict[str, float]]:
        if not self._plain_ms:
            plain = {FP32: self._sessions(self.normal({}))}
            measured = component_times(plain, self._assembled, self._golden.samples, rounds=ROUNDS, iterations=1)
            self._plain_ms = measured[FP32]
        models = {name: structure(decode(graph)) for name, graph in self._graphs.items()}
        return {
            label: {name: estimated_ms(models[name], dict(nodes), self._plain_ms[name]) for name, nodes in chosen}
            for label, chosen in choices.items()
        }

    def size(self, chosen: Choice) -> int:
        """Bytes of the portable graphs of a choice."""
        return sum(self._graph(name, nodes).size for name, nodes in self.normal(chosen))

    def normal(self, chosen: Choice) -> Chosen:
        """The choice in its one form. Raises InputError for a node or component that the plan lacks."""
        for name, nodes in chosen.items():
            known = self._plan.components[name].nodes if name in self._plan.components else {}
            if unknown := sorted(set(nodes) - set(known)):
                raise InputError(f"the plan of {name} has no node {unknown[0]!r}")
        return tuple((name, self._schemes(name, chosen.get(name, ()))) for name in self._spec.order())

    def _schemes(self, name: str, nodes: Nodes) -> frozenset[tuple[str, NodeScheme]]:
        if not nodes:
            return frozenset()
        planned = self._plan.components[name].nodes
        schemes = nodes if isinstance(nodes, Mapping) else {node: planned[node].scheme for node in nodes}
        return frozenset((node, scheme) for node, scheme in schemes.items() if scheme != "fp32")

    def _assembled(self, sessions: Mapping[str, Session]) -> Policy:
        return assemble(self._source, sessions, backend=self._library.name)

    def _sessions(self, chosen: Chosen) -> dict[str, Session]:
        return {name: self._session(name, nodes) for name, nodes in chosen}

    def _session(self, name: str, nodes: frozenset[tuple[str, NodeScheme]]) -> Session:
        if not nodes:
            if name not in self._plain:
                self._plain[name] = self._opened(self._graphs[name])
            return self._plain[name]
        kept = self._open.setdefault(name, OrderedDict())
        if nodes not in kept:
            kept[nodes] = self._opened(self._as_run(self._graph(name, nodes), name))
        kept.move_to_end(nodes)
        session = kept[nodes]
        while len(kept) > KEPT:
            kept.popitem(last=False)
        return session

    def _opened(self, graph: Graph) -> Session:
        return self._library.open(self._library.build(graph, self._options).files, self._options)

    def _as_run(self, graph: Graph, name: str) -> Graph:
        """A stand-in computes with the rounding of those it stands for."""
        return graph if self.measured else rounded(graph, name)

    def _graph(self, name: str, nodes: frozenset[tuple[str, NodeScheme]]) -> Graph:
        if not nodes:
            return self._graphs[name]
        component = with_schemes(self._plan.components[name], dict(nodes))
        return write(name, self._graphs[name], component, self._target, self._plan.weights, self._placement)


def with_schemes(
    component: ComponentPlan, schemes: Mapping[str, NodeScheme], reasons: Mapping[str, str] | None = None
) -> ComponentPlan:
    """The plan with these schemes by node, FP32 for all others; with other reasons where `reasons` has them."""
    told = reasons or {}
    nodes = {
        name: node.model_copy(update={"scheme": schemes.get(name, "fp32"), "reason": told.get(name, node.reason)})
        for name, node in component.nodes.items()
    }
    return component.model_copy(update={"nodes": nodes})
