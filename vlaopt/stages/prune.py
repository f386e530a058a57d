"""prune: a smaller policy by the recipe's method and scopes, taught again where the recipe asks, exported again."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from vlaopt import policies
from vlaopt.artifact.artifact import SPEC_PATH, Artifact, Draft
from vlaopt.artifact.manifest import component_path
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.memory import give_back
from vlaopt.policies import EagerPolicy
from vlaopt.policies.capturing import capture, preprocessed
from vlaopt.policies.portable import Inputs, export_components, first_inputs, open_compared
from vlaopt.progress import Progress
from vlaopt.pruning import ScopeAmount, prune_channels, prune_weights
from vlaopt.pruning.unstructured import Ranking, zeros_held
from vlaopt.recipe.model import Recipe, Recovery
from vlaopt.runtime.capture import Capture
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import Policy
from vlaopt.runtime.processors import Processors
from vlaopt.stages import golden_error
from vlaopt.training.imitation import Statistics, recover


@runtime_checkable
class Trainable(Protocol):
    """A policy whose network training can call: images, normalised state, tokens."""

    @property
    def statistics(self) -> Statistics:
        """What states and actions are normalised with."""
        ...

    def tokenize(self, instruction: str) -> list[int]:
        """Token ids of an instruction."""
        ...


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    assert source is not None
    if recipe.prune.method == "none":
        draft.carry(source, "component", "policy", "golden", "capture", "weights", "report")
        draft.metrics["prune"] = {"method": "none"}
        return
    before = Capture.of(source)
    observations = _captured_set(recipe, before)
    draft.carry(source, "policy", "golden", "report")
    eager = policies.load(recipe, source.path / "weights")
    pruned, metrics = _prune(recipe, eager, _inputs(eager, before, observations), progress)
    del eager
    give_back()
    draft.write_json(SPEC_PATH, pruned.spec, "policy")
    draft.write_folder("weights", pruned.save, "weights")
    captured = capture(
        pruned, observations, before.index, lambda path, data: draft.write(path, data, "capture"), progress
    )
    recorded = Capture.read(pruned.spec, draft.read)
    size = export_components(
        pruned,
        first_inputs(recorded, recorded.index.golden[0], captured.inputs[0]),
        lambda name, graph: draft.write_graph(component_path(name), graph, "component"),
        opset=recipe.export.opset,
        progress=progress,
    )
    del pruned
    give_back()  # its weights make room for the graphs'
    sessions, parity = open_compared(recorded, captured, lambda name: draft.graph(component_path(name)), progress)
    processors = Processors(recorded.spec, lambda asset: draft.read(f"policy/{asset}"))
    policy = Policy(recorded.spec, processors, sessions, backend="onnxruntime")
    error = golden_error(policy, Golden.of(source), progress, "verifying the pruned policy")
    draft.metrics["prune"] = {
        **metrics,
        "parity": {**captured.differences, **parity},
        "bytes": size,
        "action_error": error.to_json(),
    }
    draft.write_json("reports/prune.json", draft.metrics["prune"], "report")


def _captured_set(recipe: Recipe, before: Capture) -> CalibrationSet:
    """The set that the policy was captured on. Raises InputError when the recipe names another one, or none."""
    named = [recipe.calibration.path] if recipe.calibration else []
    for path in [*named, *([recipe.verify.observations] if recipe.verify.observations else [])]:
        found = CalibrationSet.open(recipe.locate(path))
        if found.digest == before.index.digest:
            return found
    raise InputError(
        "the pruned policy is captured on the observations of the export, and the recipe names another set",
        where=f"{recipe.path}:calibration",
        hint="name that set again (calibration.path), or export again",
    )


def _inputs(eager: EagerPolicy, before: Capture, observations: CalibrationSet) -> Inputs:
    """Example inputs of each component, by its name."""
    position = before.index.golden[0]
    processed = preprocessed(eager, observations.observation(before.index.rows[position]))
    return first_inputs(before, position, processed)


def _prune(
    recipe: Recipe, eager: EagerPolicy, inputs: Inputs, progress: Progress
) -> tuple[EagerPolicy, dict[str, Any]]:
    """The pruned policy, and what was removed from it and learnt again."""
    config = recipe.prune
    rules = [ScopeAmount(scope, config.amount) for scope in config.scopes]
    paths = {id(module): path for path, module in eager.module.named_modules()}
    parts = eager.components()
    # A component that wraps parts of the network is no module of it; it is called by its own name.
    wrappers = {name: module for name, module in parts.items() if id(module) not in paths}
    given = {paths.get(id(module), name): tuple(inputs[name].values()) for name, module in parts.items()}
    if wrappers and config.method == "channels":
        raise InputError(
            f"policy type {recipe.policy.type} cannot be pruned by channels yet: its component "
            f"{min(wrappers)} is no single module of the network",
            where=f"{recipe.path}:prune.method",
            hint="prune.method: l1-unstructured prunes any policy",
        )
    with progress.task("pruning"):
        if config.method == "channels":
            module, report = prune_channels(
                eager.module, rules, components=given, exclude=config.exclude, round_to=config.round_to
            )
        else:
            ranking: Ranking = "global" if config.global_ else "per-layer"
            module, report = prune_weights(
                eager.module, rules, components=given, wrappers=wrappers, exclude=config.exclude, ranking=ranking
            )
    pruned = eager.replace(module)
    metrics: dict[str, Any] = report.model_dump(mode="json")
    if config.recovery:
        metrics["recovery"] = _recover(recipe, config.recovery, pruned, eager, progress)
    return pruned, metrics


def _recover(
    recipe: Recipe, config: Recovery, pruned: EagerPolicy, teacher: EagerPolicy, progress: Progress
) -> dict[str, Any]:
    """Train the pruned policy toward the one it came from and the demonstrations' actions; zeros stay zeros."""
    if not isinstance(teacher, Trainable):
        raise InputError(
            f"policy type {recipe.policy.type} cannot be trained here", where=f"{recipe.path}:prune.recovery"
        )
    demonstrations = CalibrationSet.open(recipe.locate(config.demonstrations))
    with zeros_held(pruned.module):
        curve = recover(
            pruned.module,
            teacher.module,
            demonstrations,
            teacher.statistics,
            teacher.tokenize,
            steps=config.steps,
            lr=config.learning_rate,
            seed=config.seed,
            batch_size=config.batch_size,
            progress=progress,
        )
    return {"samples": len(demonstrations), "steps": list(curve.steps), "losses": list(curve.losses)}
