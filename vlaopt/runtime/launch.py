"""A policy in a fresh process: what its cold start takes, what it holds of memory, how fast it then is.

Each launch lays out its memory anew, so launches of one policy differ by more than calls within one do: to compare
two, both are launched many times, in turns (Kalibera and Jones 2013, "Rigorous benchmarking in reasonable time").
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlaopt import backends, isolated
from vlaopt.artifact.artifact import Artifact
from vlaopt.benchmark.compare import FEWEST
from vlaopt.benchmark.environment import peak_memory_mib
from vlaopt.benchmark.sides import BACK_TO_BACK, Side, typical
from vlaopt.benchmark.statistics import median
from vlaopt.machine.gpu import process_memory_mib
from vlaopt.machine.sources import Sources
from vlaopt.progress import Progress, track
from vlaopt.runtime import finished
from vlaopt.runtime.golden import Golden, Sample, of_sample
from vlaopt.runtime.policy import open_artifact

CALLS_S = 1.0
"""About what the measured calls of one launch take, from FEWEST_CALLS to MOST_CALLS of them: long beside the turns that
other programs get on a core, so that these do not decide what a launch counts as."""
FEWEST_CALLS, MOST_CALLS = 3, 2000
WARMUP_SHARE = 4
"""One call in so many more runs before the measured ones, beside the first."""
SAY_EVERY_S = 10.0


@dataclass(frozen=True)
class Launch:
    """One process. `import_ms`: from its start until the backend's library is imported; `open_ms`: opening the policy.

    `first_ms` is the first call, `latencies_ms` are the calls after the warm-up, each from host memory to host memory.
    Memory is the largest resident size, and what the process holds on GPUs at its end, in MiB; None: not available.
    """

    import_ms: float
    open_ms: float
    first_ms: float
    latencies_ms: tuple[float, ...]
    host_mib: float | None
    device_mib: float | None

    @property
    def cold_start_ms(self) -> float:
        """From the start of the process to its first action."""
        return self.import_ms + self.open_ms + self.first_ms

    @property
    def median_ms(self) -> float:
        """The one latency that this launch counts as."""
        return median(self.latencies_ms)


@dataclass(frozen=True)
class Plan:
    """How policies are launched in turns: so many launches of each, and calls in each launch."""

    runs: int
    calls: int
    warmup: int
    seconds: float
    """What all of it will take, about."""


def launch(
    path: Path, *, backend: str | None = None, trust: bool = False, calls: int, warmup: int, seed: int = 0
) -> Launch:
    """Start a process that opens the artifact at `path` as `runtime.policy.open` does, and call it on golden samples.

    `calls` are timed, after the first and `warmup` more; `seed` draws the order of the samples. Raises what opening
    raises, and StageError when the process dies.
    """
    artifact = Artifact.open(path)
    if artifact.manifest.finish and backend is None:
        artifact = finished.find(artifact) or artifact
    engine = artifact.manifest.engine
    library = backends.LIBRARIES.get(backend or (engine.backend if engine else "onnxruntime"))
    started_ns = time.monotonic_ns()  # one clock for all processes of a machine
    return isolated.run(
        _act, started_ns, library, artifact.path, backend, trust, calls, warmup, seed, what=f"running {path}"
    )


def plan(
    paths: Sequence[Path], *, runs: int, seconds: float, backend: str | None, trust: bool, progress: Progress
) -> Plan:
    """As many of `runs` launches of each as fit into `seconds`, never fewer than FEWEST; found by launching each once.

    Those first launches also bring every file into the system's cache; they are not counted.
    """
    calls_s, around_s = [], 0.0
    for path in track(progress, "launching each once", paths, len(paths)):
        started = time.monotonic()
        found = launch(path, backend=backend, trust=trust, calls=FEWEST_CALLS, warmup=1)
        calls_s.append(found.median_ms / 1e3)
        around_s += max(0.0, time.monotonic() - started - (FEWEST_CALLS + 1) * calls_s[-1])
    calls = min(MOST_CALLS, max(FEWEST_CALLS, int(CALLS_S / max(calls_s))))
    warmup = max(1, calls // WARMUP_SHARE)
    round_s = around_s + (calls + warmup) * sum(calls_s)
    affordable = max(FEWEST, min(runs, int(seconds / round_s)))
    return Plan(affordable, calls, warmup, affordable * round_s)


def in_turns(
    paths: Sequence[Path], plan: Plan, *, backend: str | None, trust: bool, progress: Progress, seed: int = 0
) -> list[list[Launch]]:
    """The launches of each path. Every round launches all of them once, in an order drawn anew, on the same samples.

    Nothing is drawn meanwhile; what is left is said between launches.
    """
    rng = np.random.default_rng(seed)
    turns = [(round_, int(place)) for round_ in range(plan.runs) for place in rng.permutation(len(paths))]
    launches: list[list[Launch]] = [[] for _ in paths]
    with progress.still() as say:
        say(f"{plan.runs} launches of each in turns: about {plan.seconds:.0f} s")
        started = said = time.monotonic()
        for done, (round_, place) in enumerate(turns):
            now = time.monotonic()
            if now - said > SAY_EVERY_S:
                say(f"{done} of {len(turns)} launches, about {(now - started) * (len(turns) / done - 1):.0f} s left")
                said = now
            found = launch(
                paths[place],
                backend=backend,
                trust=trust,
                calls=plan.calls,
                warmup=plan.warmup,
                seed=seed + round_,
            )
            launches[place].append(found)
    return launches


def side(artifact: Artifact, launches: Sequence[Launch], backend: str | None) -> Side:
    """What launches of an artifact on `backend` say, for `benchmark.sides.hold`.

    The action error is what `verify` found of its engine: not known of the portable graphs on another backend.
    """
    engine = artifact.manifest.engine
    as_built = engine is not None and backend in (None, engine.backend)
    verified = artifact.manifest.metrics.get("verify", {}).get("golden", {}) if as_built else {}
    return Side(
        source=str(artifact.path),
        unit="launches in turns",
        latencies_ms={BACK_TO_BACK: np.asarray([launch.median_ms for launch in launches], np.float64)},
        figures={
            "cold_start_ms": median([launch.cold_start_ms for launch in launches]),
            "host_mib": typical([launch.host_mib for launch in launches]),
            "device_mib": typical([launch.device_mib for launch in launches]),
            "size_mb": artifact.size("engine" if as_built else "component") / 1e6,
            "action_error_mean": verified.get("executed", {}).get("mean"),
        },
    )


def _act(
    tell: isolated.Tell,
    started_ns: int,
    library: str | None,
    path: Path,
    backend: str | None,
    trust: bool,
    calls: int,
    warmup: int,
    seed: int,
) -> Launch:
    """What the new process does."""
    if library:
        with suppress(ImportError, OSError):  # opening says better what is missing
            importlib.import_module(library)
    imported_ns = time.monotonic_ns()
    artifact = Artifact.open(path)
    policy = open_artifact(artifact, backend=backend, trust=trust)
    open_ms = _ms_since(imported_ns)
    samples = Golden.of(artifact).samples
    order = np.random.default_rng(seed).permutation(len(samples))
    call = of_sample(policy.predict_chunk)
    latencies_ms = [_timed_ms(call, samples[order[turn % len(order)]]) for turn in range(1 + warmup + calls)]
    return Launch(
        import_ms=round((imported_ns - started_ns) / 1e6, 3),
        open_ms=open_ms,
        first_ms=latencies_ms[0],
        latencies_ms=tuple(latencies_ms[1 + warmup :]),
        host_mib=peak_memory_mib(),
        device_mib=process_memory_mib(os.getpid(), Sources()),
    )


def _timed_ms(call: Callable[[Sample], object], sample: Sample) -> float:
    started_ns = time.perf_counter_ns()
    call(sample)
    return round((time.perf_counter_ns() - started_ns) / 1e6, 4)


def _ms_since(moment_ns: int) -> float:
    return round((time.monotonic_ns() - moment_ns) / 1e6, 3)
