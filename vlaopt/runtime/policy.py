"""An opened artifact: `predict` runs processors, components and loop on whatever backend the engine was built for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import EngineEntry, component_path
from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.artifact.store import Store
from vlaopt.backends import EngineOptions, Session
from vlaopt.benchmark import environment
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.runtime import finished
from vlaopt.runtime.adjust import adjusted
from vlaopt.runtime.guidance import Guidance, check_guidance, steer
from vlaopt.runtime.loop import Tap, check_noise, draw_noise, run_loop
from vlaopt.runtime.observations import Observation, batch_size, check_names
from vlaopt.runtime.processors import Processors
from vlaopt.runtime.stepping import Stepper
from vlaopt.target import cpu_lacks
from vlaopt.tensors import Array

EXACT_EVERYWHERE = ("onnxruntime", "reference")
"""Backends whose 8-bit products are right whatever features the CPU has: they run portable graphs on any machine."""


class Policy:
    """A runnable policy. Not for use by several threads at once.

    `sessions` are those of its components, in the order in which these run.
    """

    def __init__(
        self, spec: PolicySpec, processors: Processors, sessions: Mapping[str, Session], *, backend: str, seed: int = 0
    ) -> None:
        self.spec = spec
        self.backend = backend
        self.processors = processors
        missing = [name for name in spec.order() if name not in sessions]
        if missing:
            raise InputError(f"there is no engine for component {missing[0]!r}")
        self.sessions: Mapping[str, Session] = {name: sessions[name] for name in spec.order()}
        self._seed = seed
        self._stepper = Stepper(spec, self._predict_one)
        self.reset()

    @property
    def needs_observation(self) -> bool:
        """Whether the next `predict` looks at its observation; between, it steps through the chunk it has."""
        return self._stepper.needs_observation

    def told(self) -> dict[str, tuple[str, ...]]:
        """What its components' sessions say of how they ran, such as whether as a CUDA graph; most say nothing."""
        return {name: said for name, session in self.sessions.items() if (said := backends.told(session))}

    def reset(self) -> None:
        """Start a new episode: forget what `predict` remembers and start the noise again from the seed."""
        self._stepper.reset()
        self._generator = np.random.default_rng(self._seed)

    def predict(self, observation: Observation) -> Array:
        """The next action, float32 [action_dim], in the robot's units; a new chunk every `n_action_steps` calls.

        `observation` holds numpy arrays by the policy's own names: images uint8 HWC or float32 CHW in 0–1, vectors
        float32, the task a str; one time step, no batch dimension. A policy with a history remembers those before.
        Raises InputError naming what is wrong with it.
        """
        return self._stepper.predict(observation)

    def predict_chunk(
        self,
        observation: Observation,
        noise: Array | None = None,
        *,
        guidance: Guidance | None = None,
        tap: Tap | None = None,
    ) -> Array:
        """A whole chunk, float32 [chunk_size, action_dim], in the robot's units.

        `noise` replaces the noise drawn by the policy's law (float32 of `vlaopt.runtime.loop.noise_shape`). Where the
        policy has a history, `observation` has a time dimension, the newest last, or is one time step that stands for
        all. With a batch dimension in front of every part (the task a sequence of str) the result has it too; a given
        `noise` is then that of every row. `guidance` draws one chunk towards the rest of the one before, `tap` sees
        every component's call. Raises InputError naming what is wrong with an argument.
        """
        check_names(self.spec, observation)
        size = batch_size(self.spec, observation)
        if size is None:
            return self._predict_one(observation, noise, guidance, tap)
        if guidance is not None:
            raise InputError("guidance is for one observation, and a batch was given")
        rows = [{name: value[row] for name, value in observation.items()} for row in range(size)]
        return np.stack([self._predict_one(row, noise, None, tap) for row in rows])

    def _predict_one(
        self,
        observation: Observation,
        noise: Array | None = None,
        guidance: Guidance | None = None,
        tap: Tap | None = None,
    ) -> Array:
        tensors = self.processors.prepare(observation)
        if noise is not None:
            check_noise(self.spec, noise)
        elif self.spec.noise.law != "none":
            if self.spec.noise.seed == "fixed":
                self._generator = np.random.default_rng(self._seed)
            noise = draw_noise(self.spec, self._generator)
        steered = None
        if guidance is not None:
            check_guidance(self.spec, guidance)
            if guidance.left_over is not None:
                steered = steer(self.spec, guidance, self.processors.in_policy_units(guidance.left_over))
        return self.processors.actions(run_loop(self.spec, self.sessions, tensors, noise, tap, steer=steered))


def open(
    path: str | Path,
    *,
    backend: str | None = None,
    threads: int | None = None,
    steps: int | None = None,
    n_action_steps: int | None = None,
    trust: bool = False,
) -> Policy:
    """The policy in the artifact at `path`, ready to run here, without torch or onnx.

    Its engine is used, or the one that this machine finished for it; an artifact without one (of a stage before
    `engine`, or to be finished on its target) runs its portable graphs on `backend`. Naming a backend other than the
    engine's runs the portable graphs on it. `steps` and `n_action_steps` replace the number of its loop's steps and of
    the actions it executes of a chunk. An engine of native code that this machine did not build opens only with
    `trust`: opening it runs that code.
    Raises InputError for an unsound or untrusted artifact or a number it cannot take, EnvironmentProblem when this
    machine cannot run its engine.
    """
    return open_artifact(
        Artifact.open(path),
        backend=backend,
        threads=threads,
        steps=steps,
        n_action_steps=n_action_steps,
        trust=trust,
    )


def open_artifact(
    artifact: Artifact,
    *,
    backend: str | None = None,
    threads: int | None = None,
    steps: int | None = None,
    n_action_steps: int | None = None,
    trust: bool = False,
) -> Policy:
    """As `open`, for an artifact that is open already."""
    spec = adjusted(artifact.spec(), steps=steps, n_action_steps=n_action_steps)
    if artifact.manifest.finish and backend is None:
        artifact = finished.find(artifact) or artifact
    engine = artifact.manifest.engine
    if engine and backend in (None, engine.backend):
        _check_fit(artifact, engine)
        if not trust:
            finished.check_trust(artifact)
        return assemble(artifact, _open_engine(artifact, engine, threads), backend=engine.backend, spec=spec)
    unfinished = artifact.manifest.finish
    if unfinished and backend is None:
        raise EnvironmentProblem(
            f"the engine for {artifact.manifest.target} is not built yet",
            where=str(artifact.path),
            hint=f"on the target: {unfinished.command}; here --backend onnxruntime runs the portable graphs",
        )
    backend = backend or "onnxruntime"
    return assemble(artifact, _open_portable(artifact, backend, threads), backend=backend, spec=spec)


def why_not_here(artifact: Artifact) -> str | None:
    """Why the artifact's engine cannot run on this machine, or None. One without an engine runs its portable graphs."""
    if artifact.manifest.finish:
        return f"the engine is finished on the target: {artifact.manifest.finish.command}"
    if artifact.manifest.engine is None:
        return None
    return _why_not(artifact, artifact.manifest.engine)


def _why_not(artifact: Artifact, engine: EngineEntry) -> str | None:
    library = backends.get(engine.backend)
    return library.missing() or library.runnable() or _cpu_lacks(artifact) or _lacking(engine)


def _lacking(engine: EngineEntry) -> str | None:
    """What the engine's components need that this machine has not, or None."""
    had = backends.get(engine.backend).machine()
    misfits = [
        str(misfit) for component in engine.components.values() for misfit in backends.misfits(component.needs, had)
    ]
    return "; ".join(dict.fromkeys(misfits)) or None


def _check_fit(artifact: Artifact, engine: EngineEntry) -> None:
    """Raise EnvironmentProblem when this machine cannot run the engine, before a byte of it is looked at."""
    reason = _why_not(artifact, engine)
    if reason is None:
        return
    parent = artifact.manifest.parent
    rebuild = (
        f"here, from the artifact {parent[:12]} that it was made of: vlaopt engine ARTIFACT"
        if parent
        else "by its recipe: vlaopt build RECIPE"
    )
    raise EnvironmentProblem(
        f"the engine is for {engine.backend} on {engine.machine}, and this machine cannot run it: {reason}",
        where=str(artifact.path),
        hint=f"run it on its target, build it anew ({rebuild}), or name another backend (--backend onnxruntime runs "
        "the portable graphs)",
    )


def _cpu_lacks(artifact: Artifact) -> str | None:
    return cpu_lacks(artifact.manifest.target, artifact.cpu_features(), environment.cpu_features())


def _open_engine(artifact: Artifact, engine: EngineEntry, threads: int | None) -> dict[str, Session]:
    library = backends.get(engine.backend)
    chosen = engine.threads if threads is None else threads
    options = EngineOptions(threads=chosen, settings=engine.settings, cache=_cache(engine.backend))
    return {
        name: library.open({Path(file).name: artifact.read(file) for file in component.files}, options)
        for name, component in engine.components.items()
    }


def _cache(backend: str) -> Path | None:
    """Where this machine keeps what a backend compiles as it opens engines; None for a user without a home."""
    try:
        return Store.default().opened / backend
    except EnvironmentProblem:
        return None


def _open_portable(artifact: Artifact, backend: str, threads: int | None) -> dict[str, Session]:
    library = backends.get(backend)
    reason = library.missing() or library.runnable()
    if backend not in EXACT_EVERYWHERE:
        reason = reason or _cpu_lacks(artifact)
    if reason:
        raise EnvironmentProblem(f"{backend} cannot run here: {reason}", where=str(artifact.path))
    options = EngineOptions(threads=threads or 0)
    return {
        name: library.open(library.build(artifact.graph(component_path(name)), options).files, options)
        for name in artifact.spec().components
    }


def assemble(
    artifact: Artifact, sessions: Mapping[str, Session], *, backend: str, spec: PolicySpec | None = None
) -> Policy:
    """A policy of `artifact`'s processors over sessions that are open already, by its own spec or an adjusted one."""
    spec = spec or artifact.spec()
    processors = Processors(spec, lambda asset: artifact.read(f"policy/{asset}"))
    return Policy(spec, processors, sessions, backend=backend)
