"""Stages: export, prune, quantize, onnx, engine, verify, bench. Each takes an artifact and gives one.

This module holds what a stage is and what several share; the stages themselves never import each other.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.benchmark.actions import ActionError, Limit, compare_actions
from vlaopt.errors import GateError, InputError
from vlaopt.optional import installed_version
from vlaopt.progress import Progress, track
from vlaopt.recipe.model import Accept, Recipe
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import Policy

ORDER = ("export", "prune", "quantize", "onnx", "engine", "verify", "bench")


class Stage(ABC):
    """One step of the chain. The class says what its result depends on; `run` makes it."""

    name: ClassVar[str]
    version: ClassVar[int]
    sections: ClassVar[tuple[str, ...]]
    """Sections of the recipe the result depends on."""
    target_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of the target the result depends on."""
    tools: ClassVar[tuple[str, ...]] = ()
    """Distributions whose versions the result depends on."""

    def outside(self, recipe: Recipe) -> dict[str, str]:
        """Digests of what is read from outside the artifact, by name: a checkpoint, a calibration set."""
        return {}

    def machine(self) -> str | None:
        """The key of this machine, for a stage whose result depends on it."""
        return None

    def key_parts(self, recipe: Recipe, source: Artifact | None) -> dict[str, Any]:
        """Everything the result depends on, as plain JSON values."""
        resolved = recipe.resolved()
        return {
            "stage": self.name,
            "stage_version": self.version,
            "input": source.manifest.content_digest() if source else None,
            "recipe": {section: resolved[section] for section in self.sections},
            "target": {name: resolved["target"][name] for name in self.target_fields},
            "outside": self.outside(recipe),
            "machine": self.machine(),
            "tools": self.tool_versions(),
        }

    def tool_versions(self) -> dict[str, str]:
        """The versions of `tools` that are installed here."""
        versions = {tool: installed_version(tool) for tool in self.tools}
        return {tool: version for tool, version in versions.items() if version}

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

    @abstractmethod
    def run(self, recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
        """Write the result's files, metrics and reports into `draft`.

        Raises InputError, EnvironmentProblem, StageError or GateError; nothing is stored then.
        """


def get(name: str) -> Stage:
    """The stage called `name`; imports only that stage's libraries."""
    stage: Stage = importlib.import_module(f"vlaopt.stages.{name}").STAGE
    return stage


def golden_error(policy: Policy, golden: Golden, progress: Progress, label: str) -> ActionError:
    """The action error of `policy` on golden data."""
    with progress.task(label, len(golden.observations)) as task:

        def predict(observation: Mapping[str, Any], noise: Any) -> Any:
            task.advance()
            return policy.predict_chunk(observation, noise)

        actions = golden.run(predict)
    return error_of(policy, actions, golden.actions)


def error_of(policy: Policy, actions: Any, reference: Any) -> ActionError:
    """The action error of chunks that `policy` gave."""
    spec = policy.spec
    return compare_actions(
        actions,
        reference,
        std=policy.processors.action_std(),
        n_action_steps=spec.chunk.n_action_steps,
        gripper=spec.gripper,
    )


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


def hold(gates: list[Limit], *, what: str, hint: str) -> None:
    """Raises GateError naming every missed gate."""
    missed = [str(gate) for gate in gates if not gate.held]
    if missed:
        raise GateError(f"{what}: {', '.join(missed)}", hint=hint)


__all__ = ["ORDER", "Stage", "error_of", "get", "golden_error", "hold", "limits", "track"]
