"""bench: latency as the robot meets it, on an artifact whose gates held."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.benchmark.environment import read_environment
from vlaopt.benchmark.measure import measure
from vlaopt.benchmark.record import BenchRecord, BenchSettings, Subject
from vlaopt.hashing import digest_bytes
from vlaopt.progress import Progress
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.golden import ACTIONS, Golden, of_sample
from vlaopt.runtime.policy import open_artifact, why_not_here
from vlaopt.tensors import Array

REPORT = "reports/bench.json"


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    assert source is not None
    draft.carry(source, "component", "plain", "policy", "golden", "engine", "report")
    reason = why_not_measured(source)
    if reason:
        draft.metrics["bench"] = {"not_measured": reason}
        return
    settings = BenchSettings(
        hz=recipe.bench.hz, duration_s=recipe.bench.duration_s, back_to_back_s=recipe.bench.back_to_back_s
    )
    record = bench_artifact(source, settings, progress, tolerance=recipe.accept.action_error.max, trust=True)
    draft.metrics["bench"] = metrics(record)
    draft.write(REPORT, record.to_json().encode(), "report")


def why_not_measured(artifact: Artifact) -> str | None:
    """Why the speed of the artifact's engine cannot be measured on this machine, or None."""
    return why_not_timed(artifact) or why_not_here(artifact)


def why_not_timed(artifact: Artifact) -> str | None:
    """Why no machine can measure the speed of the artifact's engine by its sessions, or None."""
    engine = artifact.manifest.engine
    if engine and not backends.get(engine.backend).timed:
        return f"sessions of {engine.backend} give actions, their time says nothing of the engine's"
    return None


def bench_artifact(
    artifact: Artifact,
    settings: BenchSettings,
    progress: Progress,
    *,
    tolerance: float | None = None,
    backend: str | None = None,
    trust: bool = False,
) -> BenchRecord:
    """Measure the artifact on its golden observations and noise, its actions checked while the clock runs.

    `tolerance` is the largest error of one action, in standard deviations; without one, a chunk may be off by twice
    the worst error found by `verify`, or by `engine` on the target, or by 1e-3.
    """
    golden = Golden.of(artifact)
    started = time.perf_counter()
    policy = open_artifact(artifact, backend=backend, trust=trust)
    policy.predict_chunk(*golden.samples[0])
    cold_start_ms = (time.perf_counter() - started) * 1e3
    limit = tolerance if tolerance is not None else _worst(artifact)
    std = policy.processors.action_std()
    steps = policy.spec.chunk.n_action_steps

    def difference(actions: Array, expected: Array) -> float:
        return float((np.abs(actions - expected)[:steps] / std).max()) / limit

    library = backends.get(policy.backend)
    libraries, gpu = {policy.backend: library.version()}, library.machine().get("gpu")
    with progress.task(f"measuring at {settings.hz:g} Hz for {settings.duration_s:g} s, then back-to-back"):
        record = measure(
            of_sample(policy.predict_chunk),
            golden.samples,
            settings=settings,
            expected=list(golden.actions),
            tolerance=difference,
            subject=Subject(artifact=artifact.id, policy=digest_bytes(artifact.read(ACTIONS))),
            machine=read_environment(libraries=libraries, gpu=gpu),
            cold_start_ms=round(cold_start_ms, 3),
        )
    return record.model_copy(update={"told": policy.told()})


def _worst(artifact: Artifact) -> float:
    """The tolerance from what the golden observations gave in `verify`, or in `engine` where that finished it."""
    metrics = artifact.manifest.metrics
    found = metrics.get("verify", {}).get("golden") or metrics.get("engine", {}).get("action_error", {})
    return max(2 * float(found.get("executed", {}).get("max", 0.0)), 1e-3)


def metrics(record: BenchRecord) -> dict[str, Any]:
    """The figures of a record that summaries show."""
    paced, burst = record.paced, record.back_to_back
    return {
        "verdict": record.verdict,
        "reasons": list(record.reasons),
        "hz": record.settings.hz,
        "paced_p50_ms": paced.latency_ms.p50.value,
        "paced_p99_ms": paced.latency_ms.p99.value,
        "paced_max_ms": paced.latency_ms.max,
        "miss_rate": paced.miss_rate,
        "back_to_back_p50_ms": burst.latency_ms.p50.value,
        "back_to_back_p99_ms": burst.latency_ms.p99.value,
        "throughput_hz": burst.throughput_hz,
        "cold_start_ms": record.cold_start_ms,
        "peak_memory_mib": record.peak_memory_mib,
        **({"told": {name: list(said) for name, said in record.told.items()}} if record.told else {}),
    }
