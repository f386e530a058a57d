"""verify: the gates. Action error on golden and held-out observations, success where a simulator is named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.artifact.manifest import component_path
from vlaopt.backends import EngineOptions
from vlaopt.benchmark.actions import ActionError, Limit, executed_errors
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.optional import require
from vlaopt.progress import Progress
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.golden import HELD_OUT, Golden
from vlaopt.runtime.policy import Policy, assemble, open_artifact, why_not_here
from vlaopt.runtime.stepping import Stepper
from vlaopt.stages import error_of, golden_actions, hold, limits
from vlaopt.tensors import Array, unpack

LOCATE = (
    "`vlaopt diagnose RECIPE` names the layers where quantization loses it, and recipe lines that help; or prune less"
)


@dataclass(frozen=True)
class Result:
    """What was measured, which gates it was held to, and two golden samples to look at.

    `examples` are the sample with the largest executed error and the one with the median: its number, its mean absolute
    error in standard deviations, and its actions [chunk, action_dim] in the robot's units. The reference's are golden.
    """

    metrics: dict[str, Any]
    gates: list[Limit]
    examples: list[dict[str, Any]]


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    assert source is not None
    draft.carry(source, "component", "plain", "policy", "golden", "engine", "report")
    path = recipe.verify.observations
    held_out = CalibrationSet.open(recipe.locate(path)) if path else None
    result = measure(source, recipe, held_out, progress, trust=True)
    draft.metrics["verify"] = result.metrics
    draft.write_json("reports/verify.json", {**result.metrics, "examples": result.examples}, "report")
    hold(result.gates, what="gates missed", hint=LOCATE)


def measure(
    artifact: Artifact,
    recipe: Recipe,
    held_out: CalibrationSet | None,
    progress: Progress,
    *,
    backend: str | None = None,
    trust: bool = False,
) -> Result:
    """Run the artifact against its recorded references, and in closed loop where the recipe names a simulator.

    The references on held-out observations are used when `held_out`, the set they were recorded on, is at hand. An
    artifact whose engine cannot run here is verified by its portable graphs on ONNX Runtime, and its metrics say so.
    """
    elsewhere = why_not_here(artifact)
    policy = _open(artifact, backend or ("onnxruntime" if elsewhere else None), trust)
    golden, std = Golden.of(artifact), policy.processors.action_std()
    actions = golden_actions(policy, golden, progress, "verifying on golden observations")
    errors = {"golden": error_of(policy.spec, std, actions, golden.actions)}
    if held_out is not None:
        errors["held_out"] = _held_out_error(artifact, held_out, policy, progress)
    gates = [
        Limit(f"{name}: {gate.name}", gate.value, gate.limit)
        for name, error in errors.items()
        for gate in limits(error, recipe.accept)
    ]
    metrics: dict[str, Any] = {"backend": policy.backend, "engine_not_run": elsewhere}
    metrics |= {name: error.to_json() for name, error in errors.items()}
    if recipe.verify.closed_loop:
        metrics["closed_loop"], more = _closed_loop(recipe, policy, progress)
        gates += more
    metrics["gates"] = [
        {"name": gate.name, "value": gate.value, "limit": gate.limit, "held": gate.held} for gate in gates
    ]
    by_sample = executed_errors(actions, golden.actions, std=std, n_action_steps=policy.spec.chunk.n_action_steps)
    return Result(metrics, gates, _examples(actions, by_sample))


def _examples(actions: Array, errors: Array) -> list[dict[str, Any]]:
    """The worst sample, then the median one where that is another; six digits show all that a plot can."""
    ascending = np.argsort(errors, kind="stable")
    chosen = dict.fromkeys((int(ascending[-1]), int(ascending[(len(errors) - 1) // 2])))
    return [
        {
            "sample": sample,
            "error": _rounded(errors[sample]),
            "actions": [[_rounded(value) for value in step] for step in actions[sample]],
        }
        for sample in chosen
    ]


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _open(artifact: Artifact, backend: str | None, trust: bool) -> Policy:
    """The policy, its portable graphs with the target's rounding where ONNX Runtime would compute more exactly."""
    if backend != "onnxruntime" or not artifact.manifest.metrics.get("onnx", {}).get("rounded"):
        return open_artifact(artifact, backend=backend, trust=trust)
    require("onnx", "build")
    from vlaopt.quantization.rounding import rounded

    library = backends.get(backend)
    graphs = {name: rounded(artifact.graph(component_path(name)), name) for name in artifact.spec().components}
    sessions = {name: library.open(graph.files("model.onnx"), EngineOptions()) for name, graph in graphs.items()}
    return assemble(artifact, sessions, backend=backend)


def _held_out_error(
    artifact: Artifact, observations: CalibrationSet, policy: Policy, progress: Progress
) -> ActionError:
    recorded = unpack(artifact.read(HELD_OUT), where=HELD_OUT)
    rows = recorded["rows"].tolist()
    if rows and max(rows) >= len(observations):
        raise InputError(
            f"the set has {len(observations)} samples, sample {max(rows)} was verified", where=str(observations.path)
        )
    noises = recorded["noise"] if "noise" in recorded else [None] * len(rows)
    actions = []
    with progress.task("verifying on held-out observations", len(rows)) as task:
        for row, noise in zip(rows, noises, strict=True):
            actions.append(policy.predict_chunk(observations.observation(row), noise))
            task.advance()
    return error_of(policy.spec, policy.processors.action_std(), np.stack(actions), recorded["actions"])


def _closed_loop(recipe: Recipe, policy: Policy, progress: Progress) -> tuple[dict[str, Any], list[Limit]]:
    """Success in the simulator, and the gates on it. A limit on the drop has the eager policy run the same episodes."""
    from vlaopt.sim import EvaluationRecord, Predictor, evaluate

    wanted = recipe.verify.closed_loop
    assert wanted is not None
    tasks, episodes, seed = wanted.tasks or None, wanted.episodes, wanted.seed

    def run(predictor: Predictor) -> EvaluationRecord:
        return evaluate(predictor, tasks=tasks, episodes=episodes, seed=seed, progress=progress)

    result = run(policy)
    metrics = result.model_dump(mode="json")
    gates = []
    if recipe.accept.success is not None:
        gates.append(Limit("failure rate in closed loop", 1 - result.success_rate, 1 - recipe.accept.success))
    if recipe.accept.success_drop is not None:
        from vlaopt import policies

        eager = policies.load(recipe)
        reference = run(Stepper(eager.spec, eager.predict_chunk))
        metrics["reference"] = reference.model_dump(mode="json")
        drop = reference.success_rate - result.success_rate
        gates.append(Limit("drop of the success rate", drop, recipe.accept.success_drop))
    return metrics, gates
