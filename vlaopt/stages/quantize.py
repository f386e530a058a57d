"""quantize: scales from the calibration set, and which node runs in which precision and why. A plan, no graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnx import ModelProto

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.artifact.manifest import component_path
from vlaopt.artifact.policy_spec import ImageProcessor, NormaliseProcessor, PolicySpec
from vlaopt.backends import EngineOptions
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.graph.check import load
from vlaopt.graph.simplify import simplify
from vlaopt.progress import Progress
from vlaopt.quantization import calibrators
from vlaopt.quantization.collect import collect_ranges
from vlaopt.quantization.plan import (
    ComponentPlan,
    NodePlan,
    QuantizationPlan,
    calibrated_tensors,
    component_plan,
    plan_nodes,
)
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.policy import Policy, assemble
from vlaopt.tensors import Array

PLAN = "policy/quantization.json"


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    assert source is not None
    draft.carry(source, "component", "policy", "golden", "report")
    scheme = recipe.quantize.scheme
    if scheme == "none":
        draft.metrics["quantize"] = {"scheme": "none"}
        return
    if scheme not in ("int8", "int8-dynamic"):
        raise InputError(f"scheme {scheme} is not written by this version", where=f"{recipe.path}:quantize.scheme")
    order = source.spec().order()
    with progress.task("simplifying", len(order)) as task:
        models: dict[str, ModelProto] = {}
        for name in order:
            models[name] = simplify(load(source.read(component_path(name)), where=component_path(name)))
            task.advance()
    rules = [(rule.scope, rule.scheme) for rule in recipe.quantize.rules]
    nodes = plan_nodes(models, scheme=scheme, rules=rules)
    calibration = _calibration(recipe, source.spec()) if _needs_data(nodes) else None
    components = _components(recipe, source, models, nodes, calibration, progress)
    plan = QuantizationPlan(
        scheme=scheme,
        weights=recipe.quantize.weights,
        calibrator=recipe.quantize.calibrator if calibration else None,
        calibration_digest=calibration[0].digest if calibration else None,
        samples=len(calibration[1]) if calibration else 0,
        components=components,
    )
    draft.write(PLAN, plan.to_json(), "policy")
    draft.metrics["quantize"] = {"scheme": scheme, "samples": plan.samples, "layers": _counts(plan)}
    report = {name: component.model_dump(mode="json") for name, component in components.items()}
    draft.write_json("reports/quantize.json", report, "report")


def _needs_data(nodes: Mapping[str, Mapping[str, NodePlan]]) -> bool:
    return any(node.scheme == "int8" for component in nodes.values() for node in component.values())


def _calibration(recipe: Recipe, spec: PolicySpec) -> tuple[CalibrationSet, Sequence[int]]:
    """The calibration set, checked against what the policy takes, and the samples of it to use."""
    if recipe.calibration is None:
        raise InputError("int8 needs a calibration set", where=f"{recipe.path}:calibration")
    found = CalibrationSet.open(recipe.locate(recipe.calibration.path))
    found.check(_expected(spec))
    return found, found.subset(recipe.calibration.samples, 0)


def _expected(spec: PolicySpec) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every part of an observation as a calibration set holds it."""
    expected: dict[str, tuple[str, tuple[int, ...]]] = {}
    for step in spec.preprocess:
        if isinstance(step, ImageProcessor):
            expected[step.input] = ("uint8", (step.height, step.width, 3))
        elif isinstance(step, NormaliseProcessor):
            expected[step.input] = ("float32", (step.size,))
        else:
            expected[step.input] = ("string", ())
    return expected


def _components(
    recipe: Recipe,
    source: Artifact,
    models: Mapping[str, ModelProto],
    nodes: Mapping[str, Mapping[str, NodePlan]],
    calibration: tuple[CalibrationSet, Sequence[int]] | None,
    progress: Progress,
) -> dict[str, ComponentPlan]:
    calibrator = calibrators.get(recipe.quantize.calibrator, percentile=recipe.quantize.percentile)
    graphs = {name: model.SerializeToString(deterministic=True) for name, model in models.items()}
    plans = {}
    for name, model in models.items():
        tensors = calibrated_tensors(model, nodes[name])
        ranges = {}
        if tensors and calibration:
            feeds = _Feeds(_open(source, graphs), name, *calibration)
            ranges = collect_ranges(graphs[name], feeds, tensors, calibrator, progress)
        plans[name] = component_plan(graphs[name], nodes[name], ranges)
    if calibration:
        calibration[0].check_unchanged()
    return plans


def _open(source: Artifact, graphs: Mapping[str, bytes]) -> Policy:
    library, options = backends.get("onnxruntime"), EngineOptions(threads=1)
    sessions = {name: library.open({"model.onnx": graph}, options) for name, graph in graphs.items()}
    return assemble(source, sessions, backend="onnxruntime")


class _Feeds:
    """What one component gets while the FP32 policy predicts on the calibration samples; nothing is kept in memory."""

    def __init__(self, policy: Policy, component: str, calibration: CalibrationSet, rows: Sequence[int]) -> None:
        self._policy = policy
        self._component = component
        self._calibration = calibration
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __call__(self) -> Iterator[dict[str, Array]]:
        self._policy.reset()
        for row in self._rows:
            seen: list[dict[str, Array]] = []

            def tap(name: str, inputs: dict[str, Array], outputs: dict[str, Array], seen: Any = seen) -> None:
                if name == self._component:
                    seen.append(dict(inputs))

            self._policy.predict_chunk(self._calibration.observation(row), tap=tap)
            yield from seen


def _counts(plan: QuantizationPlan) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for name, component in plan.components.items():
        counts[name] = {}
        for node in component.nodes.values():
            counts[name][node.scheme] = counts[name].get(node.scheme, 0) + 1
    return counts
