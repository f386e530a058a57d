"""Stages: export, prune, quantize, onnx, engine, verify, bench. Each takes an artifact and gives one.

This module holds what a stage is and what several share; the stages themselves never import each other.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.benchmark.actions import ActionError, Limit, compare_actions
from vlaopt.benchmark.environment import machine_key
from vlaopt.calibration import CalibrationSet
from vlaopt.calibration.card import CARD
from vlaopt.errors import GateError, InputError
from vlaopt.hashing import digest_file, digest_json, digest_tree
from vlaopt.optional import installed_version, plugin_sources
from vlaopt.progress import Progress
from vlaopt.recipe.model import Accept, Recipe
from vlaopt.runtime import finished
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import Policy
from vlaopt.tensors import Array


@dataclass(frozen=True)
class Besides:
    """What the result of a stage depends on besides for the recipes that ask for more of it.

    Where that is to measure, it depends `on_this_machine` too.
    """

    asked: Callable[[Recipe], bool]
    values: tuple[str, ...] = ()
    target_values: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    on_this_machine: bool = False


@dataclass(frozen=True)
class Stage:
    """One step of the chain: what its result depends on. `run` is the function of that name in the stage's module.

    The recipe's `values` and the target's, the files that the recipe names at `paths`, the versions of the
    distributions `tools`, and whether the result depends on this machine. Keys are dotted; a section means all in it.
    """

    name: str
    version: int
    values: tuple[str, ...]
    target_values: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()
    on_this_machine: bool = False
    besides: Besides | None = None

    def key_parts(self, recipe: Recipe, source: Artifact | None) -> dict[str, Any]:
        """Everything the result depends on, as plain JSON values."""
        if self.besides and self.besides.asked(recipe):
            return self._asked_for(self.besides).key_parts(recipe, source)
        resolved = recipe.resolved()
        versions = {tool: installed_version(tool) for tool in self.tools}
        return {
            "stage": self.name,
            "stage_version": self.version,
            "input": source.manifest.content_digest() if source else None,
            "recipe": _picked(resolved, self.values),
            "target": _picked(resolved["target"], self.target_values),
            "outside": self.outside(recipe),
            **(_machine(recipe) if self.on_this_machine else {"machine": None}),
            "tools": {tool: version for tool, version in versions.items() if version},
        }

    def _asked_for(self, more: Besides) -> Stage:
        return replace(
            self,
            values=self.values + more.values,
            target_values=self.target_values + more.target_values,
            tools=self.tools + more.tools,
            on_this_machine=self.on_this_machine or more.on_this_machine,
            besides=None,
        )

    def outside(self, recipe: Recipe) -> dict[str, str]:
        """The digests of what is read from outside the artifact, by the key that names it in the recipe.

        The code of an adapter that another package brings is among it: whoever writes one changes it often.
        """
        found = {}
        for place in self.paths:
            section, _, key = place.rpartition(".")
            holder = operator.attrgetter(section)(recipe)
            value = getattr(holder, key) if holder is not None else None
            paths = (
                {f"{place}.{name}": path for name, path in value.items()} if isinstance(value, dict) else {place: value}
            )
            for name, path in paths.items():
                if path is not None:
                    located = recipe.locate(path)
                    is_set = (located / CARD).is_file()
                    found[name] = CalibrationSet.open(located).digest if is_set else digest_tree(located)
        adapter = plugin_sources("vlaopt.policies", recipe.policy.type) if "policy" in self.values else {}
        if adapter:
            found["policy.type"] = digest_json({name: digest_file(path)[1] for name, path in adapter.items()})
        return found

    def requires(self, source: Artifact | None) -> None:
        """Raises InputError when `source` is not what the stage takes: the result of the stage before it."""
        before = ORDER.index(self.name) - 1
        if before < 0:
            if source is not None:
                raise InputError(f"{self.name} takes a recipe, not an artifact", where=str(source.path))
        elif source is None:
            raise InputError(f"{self.name} takes an artifact")
        elif source.manifest.stage != ORDER[before]:
            raise InputError(
                f"{self.name} takes the artifact of {ORDER[before]}, this one is of {source.manifest.stage}",
                where=str(source.path),
                hint=f"the order of the stages is {' → '.join(ORDER)}",
            )

    def run(self, recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
        """Write the result's files, metrics and reports into `draft`; imports what the stage works with.

        Raises InputError, EnvironmentProblem, StageError or GateError; nothing is stored then.
        """
        module = importlib.import_module(f"vlaopt.stages.{self.name}")
        module.run(recipe, source, draft, progress)


STAGES = (
    Stage(
        "export",
        version=2,
        values=("policy", "export", "calibration", "verify.observations", "verify.samples"),
        paths=("policy.checkpoint", "policy.hub_overrides", "calibration.path", "verify.observations"),
        tools=("torch", "lerobot", "transformers", "diffusers", "onnx", "onnxscript", "onnxruntime", "numpy"),
    ),
    Stage(
        "prune",
        version=2,
        values=("policy", "export", "prune"),
        paths=("policy.hub_overrides", "calibration.path", "verify.observations", "prune.recovery.demonstrations"),
        tools=(
            "torch",
            "torch-pruning",
            "lerobot",
            "transformers",
            "diffusers",
            "onnx",
            "onnxscript",
            "onnxruntime",
            "numpy",
        ),
    ),
    Stage(
        "quantize",
        version=8,
        values=("quantize", "calibration"),
        paths=("calibration.path",),
        tools=("onnx", "onnxsim", "onnxruntime", "numpy"),
        besides=Besides(
            lambda recipe: recipe.quantize.scheme == "mixed",
            values=("accept", "engine.backend", "engine.threads"),
            target_values=("kind", "arch", "backends", "reduce_range"),
            tools=("openvino",),
            on_this_machine=True,
        ),
    ),
    Stage(
        "onnx",
        version=5,
        values=("onnx",),
        target_values=("backends", "reduce_range"),
        tools=("onnx", "onnxsim", "onnxruntime", "numpy"),
        besides=Besides(
            lambda recipe: "tensorrt" in backends.placements(recipe.target.backends),
            values=("engine.tensorrt.profiles",),
            target_values=("compute_capabilities",),
            tools=("tensorrt-rtx-cu13-libs",),
        ),
    ),
    Stage(
        "engine",
        version=6,
        values=("engine", "accept"),
        target_values=(
            *("name", "kind", "arch", "backends", "cpu_features", "compute_capabilities", "tensorrt"),
            "engine_built_on",
        ),
        tools=("onnxruntime", "openvino", "tensorrt-rtx-cu13-libs", "tensorrt", "numpy"),
        on_this_machine=True,
    ),
    Stage(
        "verify",
        version=3,
        values=("verify", "accept"),
        paths=("verify.observations",),
        tools=("onnxruntime", "openvino", "numpy", "metaworld"),
        on_this_machine=True,
    ),
    Stage(
        "bench",
        version=2,
        values=("bench", "accept"),
        tools=("onnxruntime", "openvino", "numpy"),
        on_this_machine=True,
    ),
)
JUDGED = {
    "export": "run with another export.opset, or report it: the exported graph computes something else than eager",
    "prune": "prune less (prune.amount), leave scopes out (prune.exclude), or ask for recovery (prune.recovery)",
    "onnx": "`vlaopt diagnose RECIPE` names the layers that lose it, and recipe lines that help",
}
"""Stages whose result is held to the limits whenever it is used, and what helps when one is missed.

The limits are no part of their keys: another limit needs no new training. `engine` and `verify` hold to them inside.
"""
ORDER = tuple(stage.name for stage in STAGES)


def _machine(recipe: Recipe) -> dict[str, Any]:
    """What a result that depends on this machine depends on: for a GPU also what each backend finds here."""
    return {"machine": machine_key()} if recipe.target.kind == "cpu" else finished.machine(recipe)


def _picked(tree: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """The part of `tree` at these dotted keys."""
    found: dict[str, Any] = {}
    for key in keys:
        branch, place, (*above, last) = tree, found, key.split(".")
        for part in above:
            branch, place = branch[part], place.setdefault(part, {})
        place[last] = branch[last]
    return found


def get(name: str) -> Stage:
    """The stage called `name`."""
    return STAGES[ORDER.index(name)]


def golden_error(policy: Policy, golden: Golden, progress: Progress, label: str) -> ActionError:
    """The action error of `policy` on golden data."""
    actions = golden_actions(policy, golden, progress, label)
    return error_of(policy.spec, policy.processors.action_std(), actions, golden.actions)


def golden_actions(policy: Policy, golden: Golden, progress: Progress, label: str) -> Array:
    """What `policy` does on golden data, [samples, chunk, action_dim]."""
    with progress.task(label, len(golden.observations)) as task:

        def predict(observation: Mapping[str, Any], noise: Any) -> Any:
            task.advance()
            return policy.predict_chunk(observation, noise)

        return golden.run(predict)


def error_of(spec: PolicySpec, std: Array, actions: Array, reference: Array) -> ActionError:
    """The action error of chunks, in units of `std`, the standard deviations of each action."""
    return compare_actions(actions, reference, std=std, n_action_steps=spec.chunk.n_action_steps, gripper=spec.gripper)


def limits(error: ActionError, accept: Accept) -> list[Limit]:
    """The gates that the recipe's `accept:` sets on an action error."""
    wanted = accept.action_error
    found = [
        ("mean action error", error.executed.mean, wanted.mean),
        ("p95 action error", error.executed.p95, wanted.p95),
        ("max action error", error.executed.max, wanted.max),
        ("gripper flips", error.gripper_flips, accept.gripper_flips),
        ("jerk increase", error.jerk, accept.jerk),
    ]
    return [Limit(name, value, limit) for name, value, limit in found if value is not None and limit is not None]


def judge(artifact: Artifact, accept: Accept) -> None:
    """Raises GateError when the result of a stage in JUDGED is beyond the limits, by the metrics it holds."""
    stage = artifact.manifest.stage
    metrics = artifact.manifest.metrics.get(stage, {})
    if stage not in JUDGED or "parity" not in metrics:
        return
    gates = [Limit(f"parity of {name}", value, accept.parity) for name, value in metrics["parity"].items()]
    if stage != "export":
        gates += limits(ActionError.from_json(metrics["action_error"]), accept)
    report = artifact.path / "reports" / f"{stage}.json"
    hold(gates, what=f"the result of {stage} is beyond its limits", hint=f"{JUDGED[stage]}; its report: {report}")


def hold(gates: list[Limit], *, what: str, hint: str) -> None:
    """Raises GateError naming every missed gate."""
    missed = [str(gate) for gate in gates if not gate.held]
    if missed:
        raise GateError(f"{what}: {', '.join(missed)}", hint=hint)
