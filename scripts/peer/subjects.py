"""What is measured: a whole policy or one component, with its graphs, samples and reference; written once, then read.

The FP32 graphs and the recorded samples are those of vlaopt's own export, so that every row computes the same thing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import component_path
from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.backends import EngineOptions, Session
from vlaopt.benchmark.actions import compare_actions
from vlaopt.benchmark.environment import cpu_features
from vlaopt.calibration import CalibrationSet
from vlaopt.runtime.capture import Capture
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.policy import assemble, open_artifact
from vlaopt.runtime.processors import Processors
from vlaopt.target import load_target
from vlaopt.tensors import Array

ROOT = Path(__file__).parents[2]
POLICIES = ("edge-vla", "act", "smolvla")
# What random weights do to an action says nothing of the limits of a recipe: they are lifted and the error is shown.
NO_LIMITS = ("accept.action_error.mean=100", "accept.jerk=1e6")
BRIEF = ("bench.duration_s=1", "bench.back_to_back_s=0.3")
OF_A_LOOP = 3
"""Calls of a loop's step per sample that peers are calibrated on, other ones each time: all ten take far longer."""
RECORDED = {"act": (16, 8), "smolvla": (8, 4)}
"""Calibration samples and golden samples of the policies that are made here."""


@dataclass(frozen=True)
class Subject:
    """A policy, or one `component` of it alone. Paths are absolute; `macs` are multiply-adds of one call."""

    title: str
    policy: str
    component: str | None
    export: str
    """The artifact of stage export: FP32 graphs, capture, golden data."""
    artifact: str
    """What vlaopt built."""
    calibration: str
    modules: str
    """A folder of the eager components, pickled, each with all that it refers to."""
    parameters: dict[str, int]
    """Of each component, those that it uses."""
    macs: int
    artifact_macs: int
    """Of the artifact's own graphs: fewer where it was pruned."""
    built_s: float
    trained: bool

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> Subject:
        return cls(**json.loads(path.read_text()))

    @cached_property
    def source(self) -> Artifact:
        """The opened artifact of stage export."""
        return Artifact.open(self.export)

    @cached_property
    def spec(self) -> PolicySpec:
        return self.source.spec()

    @cached_property
    def processors(self) -> Processors:
        return Processors(self.spec, lambda asset: self.source.read(f"policy/{asset}"))

    @property
    def components(self) -> tuple[str, ...]:
        """What a row builds and runs."""
        return tuple(self.spec.order()) if self.component is None else (self.component,)

    def graph(self, component: str) -> Graph:
        """The FP32 graph of a component as it was exported."""
        return self.source.graph(component_path(component))

    @property
    def bytes(self) -> int:
        """Of the FP32 graphs."""
        return sum(self.graph(name).size for name in self.components)

    def feeds(self, component: str) -> Iterator[dict[str, Array]]:
        """What the component got in its calls on every calibration sample, `OF_A_LOOP` of them spread over a loop."""
        observations, capture = CalibrationSet.open(Path(self.calibration)), Capture.of(self.source)
        for position, row in enumerate(capture.index.rows):
            processed = self.processors.prepare(observations.observation(row))
            calls = capture.calls(position, component, processed)
            for call in calls[position % max(1, len(calls) // OF_A_LOOP) :: max(1, len(calls) // OF_A_LOOP)]:
                yield dict(call.inputs)

    def size(self) -> int:
        """Bytes of what vlaopt built for it."""
        artifact = Artifact.open(self.artifact)
        engine = artifact.manifest.engine
        assert engine is not None
        files = {file for name in self.components for file in engine.components[name].files}
        return sum(artifact.entry(file).size for file in files)

    def with_sessions(self, sessions: Mapping[str, Session]) -> Calls:
        """The subject on a row's sessions. A policy runs them between vlaopt's processors and in its loop."""
        if self.component is not None:
            return _ComponentCalls(self, sessions[self.component])
        return _PolicyCalls(self, assemble(self.source, sessions, backend="peer"))

    def with_artifact(self, threads: int) -> Calls:
        """The subject as vlaopt built it."""
        artifact = Artifact.open(self.artifact)
        if self.component is None:
            return _PolicyCalls(self, open_artifact(artifact, threads=threads))
        engine = artifact.manifest.engine
        assert engine is not None
        files = {Path(file).name: artifact.read(file) for file in engine.components[self.component].files}
        options = EngineOptions(threads=threads, settings=engine.settings)
        return _ComponentCalls(self, backends.get(engine.backend).open(files, options))


class Calls:
    """Something to call with sample i, and how far what it gives is from the reference."""

    count: int

    def call(self, sample: int) -> Any:
        """One chunk, or one call of a component."""
        raise NotImplementedError

    def error(self) -> dict[str, Any]:
        """Over all samples: `mean` and `max` in standard deviations, and what else there is to say."""
        raise NotImplementedError


class _PolicyCalls(Calls):
    def __init__(self, subject: Subject, policy: Any) -> None:
        self._policy, self._golden = policy, Golden.of(subject.source)
        self._std, self._spec = subject.processors.action_std(), subject.spec
        self.count = len(self._golden.samples)

    def call(self, sample: int) -> Array:
        observation, noise = self._golden.samples[sample % self.count]
        chunk: Array = self._policy.predict_chunk(observation, noise)
        return chunk

    def error(self) -> dict[str, Any]:
        chunks = np.stack([self.call(sample) for sample in range(self.count)])
        steps, gripper = self._spec.chunk.n_action_steps, self._spec.gripper
        found = compare_actions(chunks, self._golden.actions, std=self._std, n_action_steps=steps, gripper=gripper)
        return {
            "mean": found.executed.mean,
            "max": found.executed.max,
            "per_action": [joint.mean for joint in found.per_action],
            "gripper_flips": found.gripper_flips,
        }


class _ComponentCalls(Calls):
    """Every golden sample once; of a loop's step, calls spread over the loop."""

    def __init__(self, subject: Subject, session: Session) -> None:
        assert subject.component is not None
        self._session, capture = session, Capture.of(subject.source)
        golden = Golden.of(subject.source)
        self._calls = []
        for place, position in enumerate(capture.index.golden):
            processed = subject.processors.prepare(golden.observations[place])
            made = capture.calls(position, subject.component, processed)
            self._calls.append(made[place * len(made) // len(capture.index.golden)])
        self.count = len(self._calls)

    def call(self, sample: int) -> dict[str, Any]:
        found: dict[str, Any] = self._session.run(self._calls[sample % self.count].inputs)
        return found

    def error(self) -> dict[str, Any]:
        apart = []
        for sample, call in enumerate(self._calls):
            given = self.call(sample)
            for name, wanted in call.outputs.items():
                if wanted.dtype.kind == "f":
                    apart.append((np.abs(np.asarray(given[name], np.float64) - wanted) / wanted.std()).ravel())
        errors = np.concatenate(apart)
        if not np.isfinite(errors).all():
            raise ValueError("an output is not finite")
        return {"mean": float(errors.mean()), "max": float(errors.max())}


def prepare(policy: str, folder: Path, size: str, overrides: Sequence[str], tell: Callable[[str], None]) -> list[Path]:
    """Build `policy` with vlaopt and write what the rows need to `folder`; the files of its subjects.

    `size` (full or tiny) is of the checkpoints that are made here; `overrides` are of the shipped recipe, as `vlaopt
    build --set` takes them. Runs in a process of its own, as it holds the eager policy. What was built before comes
    from the store.
    """
    import torch

    from vlaopt import policies
    from vlaopt.artifact.store import Store
    from vlaopt.chain import build
    from vlaopt.proposal.anatomy import examine
    from vlaopt.recipe.load import load_recipe

    folder.mkdir(parents=True, exist_ok=True)
    values = [*BRIEF, *_checkpoint(policy, folder, size, tell), *overrides]
    recipe = load_recipe(ROOT / f"recipes/{policy}/{_fitting()}.yaml", overrides=values)
    made = build(recipe, output=folder / "artifacts", store=Store.default())
    times = folder / "built.json"
    took = json.loads(times.read_text()) if times.is_file() else {}
    took |= {outcome.artifact.id: outcome.seconds for outcome in made.outcomes if not outcome.cached}
    times.write_text(json.dumps(took))
    judging = ("verify", "bench")
    built_s = sum(took.get(o.artifact.id, 0.0) for o in made.outcomes if o.stage not in judging)

    eager = policies.load(recipe)
    modules = folder / "modules"
    modules.mkdir(exist_ok=True)
    for name, module in eager.components().items():
        torch.save(module, modules / f"{name}.pt")
    anatomies, _ = examine(eager)
    macs = {part.name: (part.macs, part.macs_per_chunk) for part in anatomies}
    parameters = {part.name: part.parameters for part in anatomies}
    by_stage = {outcome.stage: outcome.artifact for outcome in made.outcomes}
    pruned = by_stage["prune"].manifest.metrics["prune"]
    whole = sum(chunk for _, chunk in macs.values())
    common: dict[str, Any] = {
        "policy": policy,
        "export": str(by_stage["export"].path),
        "artifact": str(made.artifact.path),
        "calibration": str(recipe.locate(recipe.calibration.path)) if recipe.calibration else "",
        "modules": str(modules),
        "parameters": parameters,
        "built_s": round(built_s, 1),
        "trained": policy == "edge-vla",
    }
    parts = [None] if policy != "smolvla" else list(macs)
    found = []
    for part in parts:
        count = whole if part is None else macs[part][0]
        left = pruned.get("macs_after", count) if part is None else count
        title = policy if part is None else f"{policy} {part}"
        subject = Subject(title=title, component=part, macs=count, artifact_macs=left, **common)
        path = folder / f"{part or 'policy'}.json"
        subject.save(path)
        found.append(path)
    return found


def _fitting() -> str:
    """The shipped recipe of the narrowest class of CPU that this machine is of."""
    lacking = load_target("cpu-x86-bf16").cpu_lacks(cpu_features())
    return "cpu" if lacking else "cpu-bf16"


def _checkpoint(policy: str, folder: Path, size: str, tell: Callable[[str], None]) -> list[str]:
    """The overrides of the shipped recipe; for those that need a checkpoint, one with random weights is made."""
    if policy == "edge-vla":
        return []
    samples, golden = RECORDED[policy]
    checkpoint, observed, vlm = folder / "checkpoint", folder / "set", folder / "vlm"
    if not observed.is_dir():
        tell("making its checkpoint with random weights")
        kind = f"{policy}-full" if size == "full" else policy
        command = [ROOT / "tests/support_lerobot.py", kind, checkpoint, "--calibration", observed]
        # It declares torchvision's operators itself, which may not be done twice.
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, *command, "--samples", str(samples)], env=environment, check=True)
    given = [
        f"policy.checkpoint={checkpoint}",
        f"calibration.path={observed}",
        f"calibration.samples={samples}",
        f"export.golden_samples={golden}",
        *NO_LIMITS,
    ]
    return [*given, f"policy.hub_overrides={{vlm_model_name: {vlm}}}"] if policy == "smolvla" else given
