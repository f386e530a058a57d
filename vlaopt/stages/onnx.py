"""onnx: the final portable graphs. Simplified, the plan written in as Q/DQ, checked; one for each component."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.artifact.manifest import component_path, plain_path
from vlaopt.backends import EngineOptions
from vlaopt.benchmark.actions import ActionError
from vlaopt.errors import StageError
from vlaopt.graph.check import check, load
from vlaopt.graph.simplify import simplify
from vlaopt.hashing import digest_bytes
from vlaopt.progress import Progress
from vlaopt.quantization.dynamic import write_dynamic
from vlaopt.quantization.placement import Activations, write_qdq
from vlaopt.quantization.plan import ComponentPlan, QuantizationPlan, WeightScales
from vlaopt.quantization.structure import structural_check
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import assemble
from vlaopt.stages import golden_error

PLAN = "policy/quantization.json"


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    assert source is not None
    draft.carry(source, "policy", "golden", "report")
    plan = QuantizationPlan.from_json(source.read(PLAN), where=PLAN) if source.has(PLAN) else None
    order = source.spec().order()
    plain: dict[str, bytes] = {}
    final: dict[str, bytes] = {}
    with progress.task("writing graphs", len(order)) as task:
        for name in order:
            model = load(source.read(component_path(name)), where=component_path(name))
            if recipe.onnx.simplify:
                model = simplify(model)
            plain[name] = model.SerializeToString(deterministic=True)
            component = plan.components.get(name) if plan else None
            final[name] = plain[name]
            if plan and component and _quantized(component):
                final[name] = _write(name, model, plain[name], component, recipe.target.activations, plan.weights)
            task.advance()
    planned = {name: _int8_layers(plan.components[name]) if plan else 0 for name in order}
    for name in order:
        draft.write(component_path(name), final[name], "component")
        if final[name] != plain[name]:
            draft.write(plain_path(name), plain[name], "plain")
    drift, error = _measure(source, plain, final, progress)
    draft.metrics["onnx"] = {
        "bytes": sum(map(len, final.values())),
        "plain_bytes": sum(map(len, plain.values())),
        "int8_layers": planned,
        "quantized_nodes": sum(len(_quantized(component)) for component in plan.components.values()) if plan else 0,
        "parity": {"simplified graphs": drift},
        "action_error": error.to_json(),
    }
    draft.write_json("reports/onnx.json", draft.metrics["onnx"], "report")


def _quantized(component: ComponentPlan) -> list[str]:
    return [name for name, node in component.nodes.items() if node.scheme != "fp32"]


def _int8_layers(component: ComponentPlan) -> int:
    """How many layers are planned to compute in int8; those that only store it do not count."""
    return len(component.named("int8")) + len(component.named("int8-dynamic"))


def _write(
    name: str,
    model: ModelProto,
    plain: bytes,
    component: ComponentPlan,
    activations: Activations,
    weights: WeightScales,
) -> bytes:
    """The quantized graph. Raises StageError when the plan is of another graph or nothing came of it."""
    if digest_bytes(plain) != component.graph_digest:
        raise StageError(f"the quantization plan of {name} was made for another graph", hint="run quantize again")
    model = write_qdq(model, component, activations=activations, weights=weights)
    if component.named("int8-dynamic"):
        model = write_dynamic(model, component, weights=weights)
    check(model, where=component_path(name))
    structural_check(model, activations)
    written: bytes = model.SerializeToString(deterministic=True)
    if written == plain:
        raise StageError(f"{name} was to be quantized, but its graph did not change")
    return written


def _measure(
    source: Artifact, plain: dict[str, bytes], final: dict[str, bytes], progress: Progress
) -> tuple[float, ActionError]:
    """How far simplification moved the normalised actions at most, and the action error of the final graphs."""
    library, options = backends.get("onnxruntime"), EngineOptions(threads=1)
    policies = [
        assemble(
            source,
            {name: library.open({"model.onnx": graph}, options) for name, graph in graphs.items()},
            backend="onnxruntime",
        )
        for graphs in ({name: source.read(component_path(name)) for name in plain}, plain, final)
    ]
    golden = Golden.of(source)
    before, after = (golden.run(policy.predict_chunk) for policy in policies[:2])
    drift = float((np.abs(before - after) / policies[0].processors.action_std()).max())
    return drift, golden_error(policies[2], golden, progress, "verifying the final graphs")
