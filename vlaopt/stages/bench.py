"""bench: latency as the robot meets it, on an artifact whose gates held."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.benchmark.environment import read_environment
from vlaopt.benchmark.measure import Difference, measure
from vlaopt.benchmark.record import BenchRecord, BenchSettings, ColdStart, Curve, Memory, Subject
from vlaopt.benchmark.sampling import Sampler
from vlaopt.hashing import digest_bytes
from vlaopt.progress import Progress
from vlaopt.recipe.model import Bench, Recipe
from vlaopt.runtime.adjust import adjusted
from vlaopt.runtime.breakdown import break_down
from vlaopt.runtime.curves import cost_over_batch, cost_over_steps
from vlaopt.runtime.golden import ACTIONS, Golden, of_sample
from vlaopt.runtime.launch import launch
from vlaopt.runtime.policy import Policy, open_artifact, why_not_here
from vlaopt.tensors import Array

REPORT = "reports/bench.json"
FRESH_CALLS = 3
"""Calls of the fresh process, so that its memory is that of a policy at work."""
CURVES: Mapping[str, Callable[..., Curve]] = {"steps": cost_over_steps, "batch": cost_over_batch}
"""What latency is measured over, where that is asked for."""
Sweep = Mapping[str, Sequence[int]]
"""Values by key of CURVES; none are measured for a key that is not there or has none."""
Say = Callable[[str], None]


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    assert source is not None
    draft.carry(source, "component", "plain", "policy", "golden", "engine", "report")
    reason = why_not_measured(source)
    if reason:
        draft.metrics["bench"] = {"not_measured": reason}
        return
    record = bench_artifact(
        source,
        settings_of(recipe.bench),
        progress,
        tolerance=recipe.accept.action_error.max,
        trust=True,
        sweep=sweep_of(recipe.bench),
    )
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


def settings_of(bench: Bench) -> BenchSettings:
    """How a recipe asks to measure."""
    return BenchSettings(hz=bench.hz, duration_s=bench.duration_s, back_to_back_s=bench.back_to_back_s, load=bench.load)


def sweep_of(bench: Bench) -> dict[str, tuple[int, ...]]:
    """What a recipe asks to measure over."""
    return {over: getattr(bench.sweep, over) for over in CURVES}


def bench_artifact(
    artifact: Artifact,
    settings: BenchSettings,
    progress: Progress,
    *,
    tolerance: float | None = None,
    backend: str | None = None,
    trust: bool = False,
    sweep: Sweep | None = None,
    on_tick: Callable[[int], None] | None = None,
    locked: Sequence[str] = (),
) -> BenchRecord:
    """Measure the artifact on its golden observations and noise, its actions checked while the clock runs.

    `tolerance` is the largest error of one action, in standard deviations; without one, a chunk may be off by twice
    the worst error found by `verify`, or by `engine` on the target, or by 1e-3. `on_tick` is told the latency in ns of
    each paced tick, `locked` says which clocks the caller holds. The cold start is that of a fresh process; the
    breakdown, and each curve that `sweep` asks for, take about as long as the back-to-back run and have no load. Raises
    InputError for numbers of steps that the loop cannot take, before anything is measured.
    """
    wanted = {over: values for over, values in (sweep or {}).items() if values}
    for steps in wanted.get("steps", ()):
        adjusted(artifact.spec(), steps=steps)
    golden = Golden.of(artifact)
    with progress.still() as say:
        say("starting a fresh process: cold start and memory")
        fresh = launch(artifact.path, backend=backend, trust=trust, calls=FRESH_CALLS, warmup=0)
        policy = open_artifact(artifact, backend=backend, trust=trust)
        difference = _difference(policy, tolerance if tolerance is not None else _worst(artifact))
        record = _measured(artifact, policy, golden, settings, difference, on_tick, locked, say)
        told = policy.told()
        say("taking the chunk apart")
        breakdown = break_down(policy, golden.samples, seconds=settings.back_to_back_s)
        curves = []
        for over, values in wanted.items():
            say(f"{over}: {', '.join(map(str, values))}")
            curves.append(CURVES[over](policy, golden, values, seconds=settings.back_to_back_s))
    return record.model_copy(
        update={
            "cold_start": ColdStart(import_ms=fresh.import_ms, open_ms=fresh.open_ms, first_ms=fresh.first_ms),
            "memory": Memory(host_mib=fresh.host_mib, device_mib=fresh.device_mib),
            "breakdown": breakdown,
            "curves": tuple(curves),
            "told": told,
        }
    )


def _measured(
    artifact: Artifact,
    policy: Policy,
    golden: Golden,
    settings: BenchSettings,
    difference: Difference,
    on_tick: Callable[[int], None] | None,
    locked: Sequence[str],
    say: Say,
) -> BenchRecord:
    library = backends.get(policy.backend)
    phases = {
        "warm-up": "warming up",
        "back-to-back": f"back-to-back for {settings.back_to_back_s:g} s",
        "paced": f"paced at {settings.hz:g} Hz for {settings.duration_s:g} s",
    }
    with Sampler() as sampler:
        if sampler.board:  # where nothing tells energy, the machine is not read at rest
            phases["idle"] = "reading the machine at rest"
        sampler.read()
        machine = read_environment(
            libraries={policy.backend: library.version()},
            gpu=library.machine().get("gpu"),
            state=sampler.states[-1][1] if sampler.states else None,
            locked=locked,
        )
        return measure(
            of_sample(policy.predict_chunk),
            golden.samples,
            settings=settings,
            expected=list(golden.actions),
            tolerance=difference,
            subject=Subject(artifact=artifact.id, policy=digest_bytes(artifact.read(ACTIONS))),
            machine=machine,
            sampler=sampler,
            on_tick=on_tick,
            on_progress=lambda phase: say(phases[phase]) if phase in phases else None,
        )


def _difference(policy: Policy, limit: float) -> Difference:
    """The worst error of the executed actions of a chunk in units of `limit`, which is in standard deviations."""
    std = policy.processors.action_std()
    steps = policy.spec.chunk.n_action_steps

    def difference(actions: Array, expected: Array) -> float:
        return float((np.abs(actions - expected)[:steps] / std).max()) / limit

    return difference


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
        "cold_start_ms": record.cold_start.total_ms if record.cold_start else None,
        "host_mib": record.memory.host_mib,
        "device_mib": record.memory.device_mib,
        "energy_j": record.energy.joules,
        **({"told": {name: list(said) for name, said in record.told.items()}} if record.told else {}),
    }
