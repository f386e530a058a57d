"""onnx: the final portable graphs. Simplified, the plan written in as Q/DQ for each kind of backend, checked.

For targets of TensorRT by NVIDIA's own parser and builder too, where they are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import PLAN_PATH, cache_path, component_path, placed_path, plain_path
from vlaopt.backends import EngineOptions
from vlaopt.backends.tensorrt import calibration_cache
from vlaopt.benchmark.actions import ActionError
from vlaopt.graph.check import load
from vlaopt.graph.external import encode
from vlaopt.graph.simplify import simplify
from vlaopt.progress import Progress
from vlaopt.quantization.graph_check import check_builds, check_rules
from vlaopt.quantization.plan import ComponentPlan, QuantizationPlan
from vlaopt.quantization.rounding import rounded
from vlaopt.quantization.smoothing import smooth
from vlaopt.quantization.writing import write
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import assemble
from vlaopt.runtime.processors import Processors
from vlaopt.stages import error_of, golden_actions
from vlaopt.tensors import Array


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    assert source is not None
    draft.carry(source, "policy", "golden", "report")
    plan = QuantizationPlan.from_json(source.read(PLAN_PATH), where=PLAN_PATH) if source.has(PLAN_PATH) else None
    order = source.spec().order()
    wanted = backends.placements(recipe.target.backends)
    size = plain_size = 0
    rewritten = False
    on_cpu: list[str] = []
    with progress.task("writing graphs", len(order)) as task:
        for name in order:  # one at a time: they may be large
            given = source.graph(component_path(name))
            component = plan.components.get(name) if plan else None
            plain = _plain(given, name, recipe, component)
            rewritten = rewritten or plain != given
            final = plain
            if plan and component and component.changed():
                final, *others = (write(name, plain, component, recipe.target, plan.weights, kind) for kind in wanted)
                draft.write_graph(plain_path(name), plain, "plain")
                for kind, other in zip(wanted[1:], others, strict=True):
                    if other != final:
                        draft.write_graph(placed_path(kind, name), other, "placed")
            draft.write_graph(component_path(name), final, "component")
            if "tensorrt" in wanted:
                check_rules(name, draft.graph(_for_tensorrt(draft, name)))
                if component and component.named("int8"):
                    draft.write(cache_path(name), calibration_cache.encode(component.ranges), "policy")
            if rounded(final, name) != final:
                on_cpu.append(name)
            size, plain_size = size + final.size, plain_size + plain.size
            task.advance()
    checked = {}
    if "tensorrt" in wanted:
        paths = {name: draft.folder / _for_tensorrt(draft, name) for name in order}
        checked = {"graph_check": check_builds(paths, recipe.target, recipe.engine.tensorrt.profiles, progress)}
    drift, error = _measure(source, draft, rewritten, progress)
    draft.metrics["onnx"] = {
        "bytes": size,
        "plain_bytes": plain_size,
        "layers": {name: plan.components[name].counts() if plan else {} for name in order},
        "quantized_nodes": sum(len(component.changed()) for component in plan.components.values()) if plan else 0,
        "rounded": on_cpu,
        "parity": {"simplified graphs": drift},
        "action_error": error.to_json(),
        **checked,
    }
    draft.write_json("reports/onnx.json", draft.metrics["onnx"], "report")


def _plain(graph: Graph, name: str, recipe: Recipe, component: ComponentPlan | None) -> Graph:
    """The FP32 graph of a component as it ships, its scales where the plan has moved them."""
    model = load(graph, where=component_path(name))
    if recipe.onnx.simplify:
        model = simplify(model, graph.data)
    if component and component.smoothing:
        model = smooth(model, component.smoothing)
    return encode(model, name, graph.data)


def _for_tensorrt(draft: Draft, name: str) -> str:
    """Where the graph of a component lies that backends of TensorRT build."""
    placed = placed_path("tensorrt", name)
    return placed if draft.has(placed) else component_path(name)


def _measure(source: Artifact, draft: Draft, rewritten: bool, progress: Progress) -> tuple[float, ActionError]:
    """How far simplification moved the normalised actions at most, and the action error of the final graphs.

    One form is open at a time, and one that equals another is not run again. What a CPU would compute more exactly than
    the target is run in the form that `rounded` gives it.
    """
    golden, spec = Golden.of(source), source.spec()
    std = Processors(spec, lambda asset: source.read(f"policy/{asset}")).action_std()
    final = {name: component_path(name) for name in spec.order()}
    plain = {name: plain_path(name) if draft.has(plain_path(name)) else path for name, path in final.items()}

    def actions(read: Callable[[str], Graph], paths: Mapping[str, str]) -> Array:
        library, options = backends.get("onnxruntime"), EngineOptions(threads=1)
        sessions = {
            name: library.open(rounded(read(path), name).files("model.onnx"), options) for name, path in paths.items()
        }
        policy = assemble(source, sessions, backend="onnxruntime")
        return golden_actions(policy, golden, progress, "verifying the graphs")

    after = actions(draft.graph, plain)
    before = actions(source.graph, final) if rewritten else after
    last = after if plain == final else actions(draft.graph, final)
    return float((np.abs(before - after) / std).max()), error_of(spec, std, last, golden.actions)
