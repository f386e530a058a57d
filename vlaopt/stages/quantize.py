"""quantize: scales from the capture, and which node runs in which precision and why. A plan, no graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from onnx import ModelProto

from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import PLAN_PATH, component_path
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.graph.check import load
from vlaopt.graph.external import decode, encode, structure
from vlaopt.graph.simplify import simplify
from vlaopt.graph.topology import consumers
from vlaopt.progress import Progress
from vlaopt.quantization import calibrators
from vlaopt.quantization.collect import channel_maxima, channel_means, collect
from vlaopt.quantization.fit import REPORT, CalibrationReport, TensorFit, fits_of
from vlaopt.quantization.halves import HALVES, probed_tensors, settled_halves, wanted_halves, with_halves
from vlaopt.quantization.mixed import backends_for, mix, on_fastest, space_of
from vlaopt.quantization.plan import (
    ComponentPlan,
    NodePlan,
    NodeScheme,
    PlanScheme,
    QuantizationPlan,
    Rules,
    calibrated_tensors,
    component_plan,
    corrected_tensors,
    plan_nodes,
)
from vlaopt.quantization.probe import largest_values
from vlaopt.quantization.search import choice_of, start_of
from vlaopt.quantization.smoothing import Smoothing, sites, smooth, smoothing
from vlaopt.quantization.trials import Trials
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.capture import Capture, processed_names
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.processors import Processors
from vlaopt.stages import limits
from vlaopt.tensors import Array


@dataclass(frozen=True)
class Calibration:
    """A calibration set, the capture of the policy on it, and what gives the tensors that the capture leaves out."""

    observations: CalibrationSet
    capture: Capture
    processors: Processors

    def feeds(self, component: str) -> Iterator[tuple[str, Mapping[str, Array]]]:
        """What the component got in every call on every sample, with the sample's row; one sample is in memory."""
        takes = {tensor.name for tensor in self.capture.spec.components[component].inputs}
        processed: Mapping[str, Array] = {}
        for position, row in enumerate(self.capture.index.rows):
            if takes & processed_names(self.capture.spec):
                processed = self.processors.prepare(self.observations.observation(row))
            for call in self.capture.calls(position, component, processed):
                yield str(row), call.inputs


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    assert source is not None
    draft.carry(source, "component", "policy", "golden", "report")
    scheme = recipe.quantize.scheme
    if scheme == "none":
        draft.metrics["quantize"] = {"scheme": "none"}
        return
    rules = [(rule.scope, rule.scheme) for rule in recipe.quantize.rules]
    made = planned(recipe, source, scheme, rules, progress)
    plan, report = made.plan, dict[str, Any]()
    if scheme == "mixed":
        plan, report["search"] = _searched(recipe, source, made, rules, draft.unfinished, progress)
    plan.must_change_something(where=f"{recipe.path}:quantize")
    draft.write(PLAN_PATH, plan.to_json(), "policy")
    counts = {name: component.counts() for name, component in plan.components.items()}
    draft.metrics["quantize"] = {"scheme": scheme, "samples": plan.samples, "layers": counts}
    report["components"] = {name: part.model_dump(mode="json") for name, part in plan.components.items()}
    draft.write_json("reports/quantize.json", report, "report")
    if made.fit:
        draft.write_json(REPORT, made.fit, "report")


@dataclass(frozen=True)
class Planned:
    """A plan by rules, the simplified FP32 graphs that it is of, and how well 8 bits hold what was calibrated."""

    graphs: Mapping[str, Graph]
    models: Mapping[str, ModelProto]
    plan: QuantizationPlan
    fit: CalibrationReport | None


def planned(recipe: Recipe, source: Artifact, scheme: PlanScheme, rules: Rules, progress: Progress) -> Planned:
    """The plan of a scheme by these rules, calibrated as the recipe says; for `mixed` the uniform one in int8."""
    base: NodeScheme = "int8" if scheme == "mixed" else scheme
    order = source.spec().order()
    with progress.task("simplifying", len(order)) as task:
        graphs: dict[str, Graph] = {}
        for name in order:
            given = source.graph(component_path(name))
            model = simplify(load(given, where=component_path(name)), given.data)
            graphs[name] = encode(model, name, given.data)
            task.advance()
    models = {name: structure(decode(graph)) for name, graph in graphs.items()}
    floating: NodeScheme = base if base in HALVES else recipe.quantize.floats
    nodes = plan_nodes(models, scheme=base, rules=rules, floats=floating)
    halves = {name: wanted_halves(name, model, floating, rules) for name, model in models.items()}
    calibration = _calibration(recipe, source) if _needs_data(nodes) or _needs_data(halves) else None
    floats = {name: _settled(graphs[name], name, halves[name], calibration, progress) for name in order}
    nodes = {name: with_halves(nodes[name], floats[name]) for name in order}
    moved = {name: _smoothed(recipe, graphs, name, nodes[name], calibration, progress) for name in order}
    models = {name: structure(decode(graph)) for name, graph in graphs.items()} if any(moved.values()) else models
    components, fits = _components(recipe, graphs, models, nodes, floats, moved, calibration, progress)
    plan = QuantizationPlan(
        scheme=scheme,
        weights=recipe.quantize.weights,
        calibrator=recipe.quantize.calibrator if calibration else None,
        steps=recipe.quantize.steps,
        calibration_digest=calibration.observations.digest if calibration else None,
        samples=len(calibration.capture) if calibration else 0,
        components=components,
    )
    fit = CalibrationReport(
        calibrator=recipe.quantize.calibrator, steps=recipe.quantize.steps, samples=plan.samples, components=fits
    )
    return Planned(graphs, models, plan, fit if calibration else None)


def trials_of(recipe: Recipe, source: Artifact, made: Planned) -> list[Trials]:
    """Trials of parts of a plan on each backend that the recipe's engine may be of and that runs here."""
    threads = recipe.engine.threads
    return [
        Trials(
            source,
            made.graphs,
            made.plan,
            recipe.target,
            backend=backend,
            golden=Golden.of(source),
            threads=threads if isinstance(threads, int) else 1,
        )
        for backend in backends_for(recipe.target, recipe.engine.backend)
    ]


def _searched(
    recipe: Recipe, source: Artifact, made: Planned, rules: Rules, journal: Path | None, progress: Progress
) -> tuple[QuantizationPlan, dict[str, Any]]:
    """The plan that the search finds within the recipe's limits, and its report; it starts from the one made."""
    space = space_of(made.plan, [], rules)
    trials = on_fastest(trials_of(recipe, source, made), choice_of(start_of(space)), journal, progress)
    dynamic = trials.measured and trials.backend == "onnxruntime"  # the one that computes its products in integers
    others = [plan_nodes(made.models, scheme="int8-dynamic", rules=rules)] if dynamic else []
    found = mix(
        trials,
        made.plan,
        space_of(made.plan, others, rules),
        lambda error: limits(error, recipe.accept),
        budget=recipe.quantize.evaluations,
        journal=journal,
        progress=progress,
    )
    return found.plan, found.report


def _takers(model: ModelProto) -> dict[str, list[str]]:
    """By tensor, the nodes that take it."""
    return {tensor: [node.name for node in nodes] for tensor, nodes in consumers(model.graph).items()}


def _needs_data(nodes: Mapping[str, Mapping[str, NodePlan]]) -> bool:
    return any(node.scheme in ("int8", "fp8", "fp16") for component in nodes.values() for node in component.values())


def _calibration(recipe: Recipe, source: Artifact) -> Calibration:
    """The calibration set, checked against what the policy takes, and the capture that was made of it."""
    if recipe.calibration is None:
        raise InputError("int8, fp8 and fp16 need a calibration set", where=f"{recipe.path}:calibration")
    found, capture = CalibrationSet.open(recipe.locate(recipe.calibration.path)), Capture.of(source)
    found.check(capture.spec.observation_layout())
    again = "run the export again: its capture is what quantize works on"
    if capture.index.digest != found.digest:
        raise InputError("the policy was captured on another set", where=f"{recipe.path}:calibration.path", hint=again)
    if capture.index.rows != found.subset(recipe.calibration.samples, 0):
        raise InputError(
            f"the policy was captured on {len(capture)} samples, {recipe.calibration.samples} are asked for",
            where=f"{recipe.path}:calibration.samples",
            hint=again,
        )
    processors = Processors(capture.spec, lambda asset: source.read(f"policy/{asset}"))
    return Calibration(found, capture, processors)


def _settled(
    graph: Graph,
    component: str,
    wanted: Mapping[str, NodePlan],
    calibration: Calibration | None,
    progress: Progress,
) -> dict[str, NodePlan]:
    """What each node computes in, with what the calibration data would overflow in FP16 left in FP32."""
    model = decode(graph)
    tensors, largest = probed_tensors(model, wanted), {}
    if tensors and calibration:
        largest = largest_values(graph, partial(calibration.feeds, component), tensors, progress)
    return settled_halves(model, wanted, largest, graph.data)


def _smoothed(
    recipe: Recipe,
    graphs: dict[str, Graph],
    name: str,
    nodes: Mapping[str, NodePlan],
    calibration: Calibration | None,
    progress: Progress,
) -> Smoothing:
    """The scales that move into weights of a component; its graph becomes the one in which they have moved."""
    if recipe.quantize.smooth is None or calibration is None:
        return {}
    model = decode(graphs[name])
    found = sites(model, [node for node, plan in nodes.items() if plan.scheme == "int8"])
    feeds = partial(calibration.feeds, name)
    amax = channel_maxima(graphs[name], feeds, dict.fromkeys(found, -1), progress)
    moved = smoothing(model, found, amax, recipe.quantize.smooth)
    graphs[name] = encode(smooth(model, moved), name, graphs[name].data)
    return moved


def _components(
    recipe: Recipe,
    graphs: Mapping[str, Graph],
    models: Mapping[str, ModelProto],
    nodes: Mapping[str, Mapping[str, NodePlan]],
    floats: Mapping[str, Mapping[str, NodePlan]],
    moved: Mapping[str, Smoothing],
    calibration: Calibration | None,
    progress: Progress,
) -> tuple[dict[str, ComponentPlan], dict[str, dict[str, TensorFit]]]:
    calibrator = calibrators.get(recipe.quantize.calibrator, percentile=recipe.quantize.percentile)
    plans, fits = {}, {}
    for name, model in models.items():
        tensors = calibrated_tensors(model, nodes[name])
        found = {}
        if tensors and calibration:
            feeds = partial(calibration.feeds, name)
            found = collect(graphs[name], feeds, tensors, calibrator, progress, recipe.quantize.steps)
        ranges = {tensor: of.range for tensor, of in found.items()}
        means = {}
        if calibration and recipe.quantize.bias_correction:
            axes = corrected_tensors(model, nodes[name])
            means = channel_means(graphs[name], partial(calibration.feeds, name), axes, progress)
        plans[name] = component_plan(graphs[name], nodes[name], ranges, floats[name], means, moved[name])
        fits[name] = fits_of(found, _takers(models[name]))
    if calibration:
        calibration.observations.check_unchanged()
    return plans, fits
