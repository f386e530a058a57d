"""A quantized policy taken apart: its FP32 graphs, its plan, and observations with the reference's actions on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import PLAN_PATH, component_path, placed_path, plain_path
from vlaopt.artifact.store import Store
from vlaopt.backends import EngineOptions
from vlaopt.backends.audit import Audit, audit, planned_precisions
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.quantization.plan import QuantizationPlan
from vlaopt.quantization.trials import Trials
from vlaopt.runtime.golden import HELD_OUT, Golden
from vlaopt.target import Target
from vlaopt.tensors import unpack


@dataclass(frozen=True)
class Case:
    """What is diagnosed. `graphs` are the FP32 graphs that `plan` was made for, `source` has the processors."""

    source: Artifact
    graphs: Mapping[str, Graph]
    plan: QuantizationPlan
    target: Target

    @classmethod
    def of(cls, written: Artifact) -> Case:
        """The case of a result of stage `onnx`. Raises InputError when nothing in it is quantized."""
        if not written.has(PLAN_PATH):
            raise InputError(
                "nothing in it is quantized, so quantization loses nothing",
                where=str(written.path),
                hint="ask for it by quantize.scheme",
            )
        names = written.spec().components
        twins = {name: plain_path(name) if written.has(plain_path(name)) else component_path(name) for name in names}
        graphs = {name: written.graph(path) for name, path in twins.items()}
        plan = QuantizationPlan.from_json(written.read(PLAN_PATH), where=PLAN_PATH)
        return cls(written, graphs, plan, written.recipe().target)

    def trials(self, golden: Golden, backend: str, plan: QuantizationPlan | None = None) -> Trials:
        """Trials of the plan, or of another one for the same graphs."""
        return Trials(self.source, self.graphs, plan or self.plan, self.target, backend=backend, golden=golden)

    def quantized(self) -> dict[str, tuple[str, ...]]:
        """The nodes that are not planned in FP32, by component; components without any are left out."""
        found = {
            name: tuple(node for node, planned in component.nodes.items() if planned.scheme != "fp32")
            for name, component in self.plan.components.items()
        }
        return {name: nodes for name, nodes in found.items() if nodes}

    def audits(self, backend: str) -> dict[str, Audit]:
        """What `backend` really runs the portable graphs of quantized components in, held against the plan.

        Empty for a backend that the target does not have: the graphs are not made for it.
        """
        if backend not in self.target.backends:
            return {}
        library, options = backends.get(backend), EngineOptions(threads=1)
        found = {}
        for name in self.quantized():
            path = placed_path(library.placement, name)
            graph = self.source.graph(path if self.source.has(path) else component_path(name))
            engine = library.build(graph, options)
            nodes = self.plan.components[name].model_dump(mode="json")["nodes"]
            found[name] = audit(planned_precisions(nodes), engine.layers, engine.precisions)
        return found


def written_graphs(artifact: Artifact, store: Store) -> Artifact:
    """The result of stage `onnx` that an artifact came from: itself, or the one in the store by its lineage.

    Raises InputError when it is of an earlier stage, or when the store no longer has that result.
    """
    if artifact.manifest.stage == "onnx":
        return artifact
    step = next((step for step in artifact.manifest.lineage if step.stage == "onnx"), None)
    if step is None:
        raise InputError(
            f"it is of stage {artifact.manifest.stage}, before anything is quantized", where=str(artifact.path)
        )
    found = store.find("onnx", step.key)
    if found is None:
        raise InputError(
            "the store does not have the FP32 graphs that it was quantized from",
            where=str(artifact.path),
            hint="diagnose it where it was built, or by its recipe: vlaopt diagnose RECIPE",
        )
    return found


def held_out(artifact: Artifact, observations: CalibrationSet, most: int) -> Golden:
    """The held-out observations of an artifact with the reference's actions, at most `most` of them, evenly chosen.

    Raises InputError when the artifact has none, or was recorded on a larger set.
    """
    if not artifact.has(HELD_OUT):
        raise InputError("it has no reference actions on held-out observations", where=str(artifact.path))
    recorded = unpack(artifact.read(HELD_OUT), where=HELD_OUT)
    rows = recorded["rows"].tolist()
    if rows and max(rows) >= len(observations):
        raise InputError(f"the set has {len(observations)} samples, not {max(rows) + 1}", where=str(observations.path))
    chosen = [place * len(rows) // min(most, len(rows)) for place in range(min(most, len(rows)))]
    noise = recorded["noise"][chosen] if "noise" in recorded else None
    seen = tuple(observations.observation(rows[place]) for place in chosen)
    return Golden(seen, recorded["actions"][chosen], noise)
