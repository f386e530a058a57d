"""prune: a smaller policy by the recipe's method and scopes, taught again where the recipe asks, exported again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from vlaopt import policies
from vlaopt.artifact.artifact import SPEC_PATH, Artifact, Draft
from vlaopt.artifact.manifest import component_path
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError, StageError
from vlaopt.policies import EagerPolicy
from vlaopt.policies.portable import Recording, export_components, open_portable, record
from vlaopt.progress import Progress
from vlaopt.pruning import ScopeAmount, prune_channels, prune_weights
from vlaopt.pruning.unstructured import Ranking, zeros_held
from vlaopt.recipe.model import Recipe, Recovery
from vlaopt.runtime.golden import Golden
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
    draft.carry(source, "component", "policy", "golden", "weights", "report")
    if recipe.prune.method == "none":
        draft.metrics["prune"] = {"method": "none"}
        return
    golden = Golden.of(source)
    eager = policies.get(recipe.policy.type).load(source.path / "weights", recipe.policy.hub_overrides)
    noise = None if golden.noise is None else golden.noise[0]
    pruned, metrics = _prune(recipe, eager, record(eager, golden.observations[0], noise), progress)
    recordings = record(pruned, golden.observations[0], noise)
    graphs = export_components(pruned, recordings, opset=recipe.export.opset, progress=progress)
    policy, differences = open_portable(pruned, graphs, recordings)

    draft.write_json(SPEC_PATH, pruned.spec, "policy")
    for name, data in pruned.checkpoint().items():
        draft.write(f"weights/{name}", data, "weights")
    for name, graph in graphs.items():
        draft.write(component_path(name), graph, "component")
    error = golden_error(policy, golden, progress, "verifying the pruned policy")
    draft.metrics["prune"] = {
        **metrics,
        "parity": differences,
        "bytes": sum(map(len, graphs.values())),
        "action_error": error.to_json(),
    }
    draft.write_json("reports/prune.json", draft.metrics["prune"], "report")


def _prune(
    recipe: Recipe, eager: EagerPolicy, recordings: Mapping[str, Recording], progress: Progress
) -> tuple[EagerPolicy, dict[str, Any]]:
    """The pruned policy, and what was removed from it and learnt again."""
    config = recipe.prune
    rules = [ScopeAmount(scope, config.amount) for scope in config.scopes]
    paths = {id(module): path for path, module in eager.module.named_modules()}
    components = {}
    for name, module in eager.components().items():
        if id(module) not in paths:
            raise StageError(f"component {name} is no module of the policy's network, so it cannot be pruned")
        components[paths[id(module)]] = tuple(recordings[name].inputs.values())
    with progress.task("pruning"):
        if config.method == "channels":
            module, report = prune_channels(
                eager.module, rules, components=components, exclude=config.exclude, round_to=config.round_to
            )
        else:
            ranking: Ranking = "global" if config.global_ else "per-layer"
            module, report = prune_weights(
                eager.module, rules, components=components, exclude=config.exclude, ranking=ranking
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
