"""An opened artifact: `predict` runs processors, components and loop on whatever backend the engine was built for."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import EngineEntry, component_path
from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.backends import EngineOptions, Session
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.runtime.loop import Tap, check_noise, draw_noise, run_loop
from vlaopt.runtime.processors import Observation, Processors
from vlaopt.tensors import Array


class Policy:
    """A runnable policy. Not for use by several threads at once."""

    def __init__(
        self, spec: PolicySpec, processors: Processors, sessions: Mapping[str, Session], *, backend: str, seed: int = 0
    ) -> None:
        self.spec = spec
        self.backend = backend
        self.processors = processors
        missing = [name for name in spec.order() if name not in sessions]
        if missing:
            raise InputError(f"there is no engine for component {missing[0]!r}")
        self._sessions = {name: sessions[name] for name in spec.order()}
        self._seed = seed
        self.reset()

    @property
    def needs_observation(self) -> bool:
        """Whether the next `predict` looks at its observation; between, it steps through the chunk it has."""
        return not self._queue

    def reset(self) -> None:
        """Start a new episode: forget the rest of the chunk and start the noise again from the seed."""
        self._queue: deque[Array] = deque()
        self._generator = np.random.default_rng(self._seed)

    def predict(self, observation: Observation) -> Array:
        """The next action, float32 [action_dim], in the robot's units; a new chunk every `n_action_steps` calls.

        `observation` holds numpy arrays by the policy's own names: images uint8 HWC or float32 CHW in 0–1, vectors
        float32, the task a str; one time step, no batch dimension. Raises InputError naming what is wrong with it.
        """
        if not self._queue:
            self._queue.extend(self._predict_one(observation, None, None)[: self.spec.chunk.n_action_steps])
        return self._queue.popleft()

    def predict_chunk(self, observation: Observation, noise: Array | None = None, *, tap: Tap | None = None) -> Array:
        """A whole chunk, float32 [chunk_size, action_dim], in the robot's units.

        `noise` replaces the noise drawn by the policy's law (float32 of the spec's shape). With a batch dimension in
        front of every part (the task a sequence of str) the result has it too; a given `noise` is then that of every
        row. `tap` sees every component's call. Raises InputError naming what is wrong with an argument.
        """
        self.processors.check_names(observation)
        size = self._batch_size(observation)
        if size is None:
            return self._predict_one(observation, noise, tap)
        rows = [{name: value[row] for name, value in observation.items()} for row in range(size)]
        return np.stack([self._predict_one(row, noise, tap) for row in rows])

    def _predict_one(self, observation: Observation, noise: Array | None, tap: Tap | None) -> Array:
        tensors = self.processors.prepare(observation)
        if noise is not None:
            check_noise(self.spec, noise)
        elif self.spec.noise.law != "none":
            if self.spec.noise.seed == "fixed":
                self._generator = np.random.default_rng(self._seed)
            noise = draw_noise(self.spec, self._generator)
        return self.processors.actions(run_loop(self.spec, self._sessions, tensors, noise, tap))

    def _batch_size(self, observation: Observation) -> int | None:
        """The length of the batch dimension, None without one. Raises InputError when parts disagree."""
        sizes: dict[str, int | None] = {}
        for step in self.spec.preprocess:
            value = observation.get(step.input)
            rank = {"image": 3, "normalise": 1}.get(step.kind)
            if isinstance(value, np.ndarray) and rank is not None:
                sizes[step.input] = len(value) if value.ndim == rank + 1 else None
            elif isinstance(value, (list, tuple)):
                sizes[step.input] = len(value)
            elif isinstance(value, str):
                sizes[step.input] = None
        if len(set(sizes.values())) > 1:
            raise InputError(f"the observation's parts differ in their batch dimension: {sizes}")
        size = next(iter(sizes.values()), None)
        if size == 0:
            raise InputError("the observation's batch is empty")
        return size


def open(path: str | Path, *, backend: str | None = None, threads: int | None = None) -> Policy:
    """The policy in the artifact at `path`, ready to run here, without torch or onnx.

    Its engine is used; an artifact without one (of a stage before `engine`, or to be finished on its target) runs its
    portable graphs on `backend`. Naming a backend other than the engine's runs the portable graphs on it.
    Raises InputError for an unsound artifact, EnvironmentProblem when this machine cannot run its engine.
    """
    return open_artifact(Artifact.open(path), backend=backend, threads=threads)


def open_artifact(artifact: Artifact, *, backend: str | None = None, threads: int | None = None) -> Policy:
    """As `open`, for an artifact that is open already."""
    engine = artifact.manifest.engine
    if engine and backend in (None, engine.backend):
        return _open_engine(artifact, engine, threads)
    unfinished = artifact.manifest.finish
    if unfinished and backend is None:
        raise EnvironmentProblem(
            f"the engine for {artifact.manifest.target} is not built yet",
            where=str(artifact.path),
            hint=f"on the target: {unfinished.command}; here --backend onnxruntime runs the portable graphs",
        )
    return _open_portable(artifact, backend or "onnxruntime", threads)


def why_not_here(artifact: Artifact) -> str | None:
    """Why the artifact's engine cannot run on this machine, or None. One without an engine runs its portable graphs."""
    if artifact.manifest.finish:
        return f"the engine is finished on the target: {artifact.manifest.finish.command}"
    if artifact.manifest.engine is None:
        return None
    library = backends.get(artifact.manifest.engine.backend)
    return library.missing() or library.runnable()


def _open_engine(artifact: Artifact, engine: EngineEntry, threads: int | None) -> Policy:
    library = backends.get(engine.backend)
    if reason := library.missing() or library.runnable():
        raise EnvironmentProblem(
            f"the engine is for {engine.backend} on {engine.machine}, and this machine cannot run it: {reason}",
            where=str(artifact.path),
            hint="run it on its target, or name another backend (--backend onnxruntime runs the portable graphs)",
        )
    options = EngineOptions(threads=engine.threads if threads is None else threads, settings=engine.settings)
    sessions = {
        name: library.open({Path(file).name: artifact.read(file) for file in component.files}, options)
        for name, component in engine.components.items()
    }
    return assemble(artifact, sessions, backend=engine.backend)


def _open_portable(artifact: Artifact, backend: str, threads: int | None) -> Policy:
    library = backends.get(backend)
    if reason := library.missing() or library.runnable():
        raise EnvironmentProblem(f"{backend} cannot run here: {reason}", where=str(artifact.path))
    options = EngineOptions(threads=threads or 0)
    sessions = {
        name: library.open(library.build(artifact.read(component_path(name)), options).files, options)
        for name in artifact.spec().components
    }
    return assemble(artifact, sessions, backend=backend)


def assemble(artifact: Artifact, sessions: Mapping[str, Session], *, backend: str) -> Policy:
    """A policy of `artifact`'s spec and processors over sessions that are open already."""
    spec = artifact.spec()
    processors = Processors(spec, lambda asset: artifact.read(f"policy/{asset}"))
    return Policy(spec, processors, sessions, backend=backend)
