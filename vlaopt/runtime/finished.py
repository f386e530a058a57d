"""What a machine adds to artifacts: engines it finished, kept in its store, and a note of native code it built."""

from __future__ import annotations

from typing import Any

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import EngineEntry
from vlaopt.artifact.store import Store, key_of
from vlaopt.benchmark import environment
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.recipe.model import Recipe

FINISHED = "finished"
"""The store's folder of artifacts whose engine was left to this machine."""
_NATIVE = "native"


def machine(recipe: Recipe) -> dict[str, Any]:
    """What an engine of this recipe depends on here: the machine's key, and what each backend that can run has."""
    had: dict[str, dict[str, str]] = {}
    for name in recipe.backends():
        if name in backends.names():
            library = backends.get(name)
            if not (library.missing() or library.runnable()):
                had[name] = {**library.machine(), "version": library.version()}
    gpu = next((facts["gpu"] for facts in had.values() if "gpu" in facts), None)
    return {"machine": environment.machine_key(gpu=gpu), "backends": had}


def key(artifact: Artifact) -> str:
    """The key under which this machine keeps the artifact with its engine: the artifact's id and the machine."""
    return key_of({"artifact": artifact.id, **machine(artifact.recipe())})


def find(artifact: Artifact) -> Artifact | None:
    """The artifact with the engine that this machine built for it before, or None.

    One whose engine is there already, or that this machine never finished, has none.
    """
    store = _store()
    if store is None or artifact.manifest.finish is None:
        return None
    try:
        wanted = key(artifact)
    except InputError:  # without a sound recipe nobody can have finished it
        return None
    return store.find(FINISHED, wanted)


def vouch(artifact: Artifact, store: Store) -> None:
    """Note in the store that this machine built the artifact's engine, where that is native code."""
    engine = artifact.manifest.engine
    if engine and backends.get(engine.backend).native:
        for digest in _digests(artifact, engine):
            store.remember(_NATIVE, digest, {"artifact": artifact.manifest.name, "backend": engine.backend})


def check_trust(artifact: Artifact, *stores: Store) -> None:
    """Raise InputError when the engine is native code that this machine did not build.

    Whoever loads an engine of TensorRT runs the code in it. What this machine built is known by its digests, in one
    of `stores` or in the user's.
    """
    engine = artifact.manifest.engine
    if engine is None or not backends.get(engine.backend).native:
        return
    own = _store()
    known = [*stores, *([own] if own else [])]
    if all(any(store.recall(_NATIVE, digest) for store in known) for digest in _digests(artifact, engine)):
        return
    raise InputError(
        f"its {engine.backend} engine is native code that this machine did not build",
        where=str(artifact.path),
        hint="when you trust whoever built it: --trust, or vlaopt.open(path, trust=True); otherwise build it here, or "
        "run the portable graphs: --backend onnxruntime",
    )


def _digests(artifact: Artifact, engine: EngineEntry) -> list[str]:
    return [artifact.entry(file).sha256 for component in engine.components.values() for file in component.files]


def _store() -> Store | None:
    """The user's store; None for a user without a home."""
    try:
        return Store.default()
    except EnvironmentProblem:
        return None
