"""What a build gained and what it cost, stage by stage, measured side by side in one process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.benchmark.compare import Turns, interleave
from vlaopt.benchmark.environment import Activity, peak_memory_mib, read_activity
from vlaopt.benchmark.verdict import BUSY_SHARE
from vlaopt.chain import Build
from vlaopt.hashing import digest_json
from vlaopt.progress import Progress
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.golden import Golden, Sample, of_sample
from vlaopt.runtime.policy import open_artifact
from vlaopt.stages.bench import why_not_measured

if TYPE_CHECKING:
    from vlaopt.policies import EagerPolicy

ROUNDS, ITERATIONS = 12, 16
"""Of each form; fewer where one of them is slow, see `interleave`."""
EAGER = "eager"
TOGETHER, TURNS_APART = 1 << 30, 2
"""Bytes of FP32 components up to which all forms are open at once, and the turns of larger ones."""
KEPT = 3
"""Raised when what the store keeps of a summary changes."""

Call = Callable[[Sample], object]


class Frozen(BaseModel):
    """Common rules."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Row(Frozen):
    """One form of the policy. `latency_ms` is the p50 of a whole chunk at batch 1; errors are of executed actions."""

    form: str
    backend: str
    bytes: int
    latency_ms: float | None
    action_error_mean: float | None
    action_error_max: float | None


class Forms(Frozen):
    """The rows of a build, how their latencies were measured, and what kept the machine busy meanwhile."""

    rows: tuple[Row, ...]
    how: str
    busy: str | None


class Summary(Frozen):
    """A build in one table: see `show_summary` for how it is told."""

    name: str
    version: str
    target: str
    path: str
    rows: tuple[Row, ...]
    components: dict[str, tuple[str, str]]
    """Variant (plain or quantized) of every component in the engine, and why."""
    candidates_ms: dict[str, float]
    refused: dict[str, str]
    precisions: dict[str, int]
    gates: list[dict[str, Any]]
    verified_on: str
    graph_check: str | None
    """What NVIDIA's builder said of the graphs, or why it was not asked; None where the target is not TensorRT's."""
    success: dict[str, Any] | None
    bench: dict[str, Any] | None
    finish: dict[str, str] | None
    ran: tuple[str, ...]
    seconds: float
    """Of the whole build, this measurement included."""
    peak_memory_mib: float | None
    """The largest resident size of the process that built."""
    how: str
    busy: str | None


def summarise(result: Build, store: Store, progress: Progress) -> Summary:
    """The summary of a build; its latencies are measured once for each artifact, then remembered.

    A machine that was busy meanwhile is remembered with them.
    """
    started = time.monotonic()
    artifact = result.artifact
    forms = remembered(artifact, store)
    if forms is None:
        before = read_activity()
        rows, how = _rows(result, progress)
        forms = Forms(rows=tuple(rows), how=how, busy=_busy_since(before))
        store.remember("summaries", _key(artifact), forms.model_dump(mode="json"))
    metrics = artifact.manifest.metrics
    engine, verified = metrics.get("engine", {}), metrics.get("verify", {})
    return Summary(
        name=artifact.manifest.name,
        version=artifact.version,
        target=artifact.manifest.target,
        path=str(artifact.path),
        rows=forms.rows,
        components={name: (part["variant"], part["reason"]) for name, part in engine.get("components", {}).items()},
        candidates_ms=engine.get("candidates_p50_ms", {}),
        refused=engine.get("refused", {}),
        precisions=engine.get("precisions", {}),
        gates=verified.get("gates", []),
        verified_on=verified_on(verified),
        graph_check=metrics.get("onnx", {}).get("graph_check"),
        success=verified.get("closed_loop"),
        bench=metrics.get("bench"),
        finish=artifact.manifest.finish.model_dump() if artifact.manifest.finish else None,
        ran=tuple(outcome.stage for outcome in result.outcomes if not outcome.cached),
        seconds=result.seconds + time.monotonic() - started,
        peak_memory_mib=peak_memory_mib(),
        how=forms.how,
        busy=forms.busy,
    )


def remembered(artifact: Artifact, store: Store) -> Forms | None:
    """What this machine measured of the forms that a build's artifact took, or None where it was not built here."""
    kept = store.recall("summaries", _key(artifact))
    try:
        return Forms.model_validate(kept) if kept else None
    except ValidationError:  # damaged; measured again
        return None


def verified_on(verified: Mapping[str, Any]) -> str:
    """What stage `verify` ran to get to its metrics `verified`, in words."""
    elsewhere = verified.get("engine_not_run")
    if not elsewhere:
        return f"verified: the engine itself, on {verified['backend']}"
    return f"verified: the portable graphs on {verified['backend']}; not the engine: {elsewhere}"


def _key(artifact: Artifact) -> str:
    """The artifact's id stands for those of all stages before it: its lineage names them."""
    return digest_json({"kept": KEPT, "of": artifact.id})


def _busy_since(before: Activity | None) -> str | None:
    """Why latencies measured since `before` flatter or wrong some form, or None: the longest ones suffer most."""
    after = read_activity()
    others = after.others_since(before) if after and before else None
    return f"others took {others:.0%} of the CPU time" if others is not None and others > BUSY_SHARE else None


def _rows(result: Build, progress: Progress) -> tuple[list[Row], str]:
    """One row per form the policy took: eager, the FP32 export, the pruned one, the final graphs, the engine.

    And how their latencies were measured.
    """
    by_stage = {outcome.stage: outcome.artifact for outcome in result.outcomes}
    forms = [("FP32 ONNX", by_stage["export"])]
    if by_stage["prune"].manifest.metrics["prune"]["method"] != "none":
        forms.append(("pruned", by_stage["prune"]))
    if by_stage["onnx"].manifest.metrics["onnx"]["quantized_nodes"]:
        forms.append(("quantized", by_stage["onnx"]))
    turns = _measure(result.recipe, dict(forms), by_stage["engine"], progress)
    latencies = {form: turns.median_ms(form) for form in turns.samples_ms}
    rows = [_row(EAGER, "torch", by_stage["export"].size("weights"), latencies, None)]
    stage_of = {"FP32 ONNX": "export", "pruned": "prune", "quantized": "onnx"}
    for form, artifact in forms:
        error = artifact.manifest.metrics[stage_of[form]].get("action_error")
        rows.append(_row(form, "onnxruntime", artifact.size("component"), latencies, error))
    engine = by_stage["engine"]
    if engine.manifest.engine:
        error = engine.manifest.metrics["engine"].get("action_error")
        rows.append(_row("engine", engine.manifest.engine.backend, engine.size("engine"), latencies, error))
    how = f"p50 of {turns.count} chunks, batch 1, host to host, all rows in {turns.rounds} turns in one process"
    return rows, how


def _row(form: str, backend: str, size: int, latencies: Mapping[str, float], error: Mapping[str, Any] | None) -> Row:
    executed = error["executed"] if error else {}
    return Row(
        form=form,
        backend=backend,
        bytes=size,
        latency_ms=latencies.get(form),
        action_error_mean=executed.get("mean"),
        action_error_max=executed.get("max"),
    )


def _rounded(artifact: Artifact) -> bool:
    return bool(artifact.manifest.metrics.get("onnx", {}).get("rounded"))


def _measure(recipe: Recipe, forms: Mapping[str, Artifact], engine: Artifact, progress: Progress) -> Turns:
    """One chunk of each form that runs on this machine, measured in turns.

    Forms too large to be open together are opened one after the other, in every turn anew.
    """
    threads = engine.manifest.engine.threads if engine.manifest.engine else 0

    def portable(artifact: Artifact) -> Call:
        return of_sample(open_artifact(artifact, backend="onnxruntime", threads=threads).predict_chunk)

    openers: dict[str, Callable[[], Call]] = {EAGER: lambda: of_sample(_eager(recipe, threads).predict_chunk)}
    # A CPU's time for what it has no fast form of says nothing of the target.
    openers |= {form: partial(portable, artifact) for form, artifact in forms.items() if not _rounded(artifact)}
    built = engine.manifest.engine
    if built and why_not_measured(engine) is None:
        openers["engine"] = lambda: of_sample(open_artifact(engine, trust=True).predict_chunk)
    samples = Golden.of(engine).samples
    with progress.task("measuring all forms side by side"):
        if forms["FP32 ONNX"].size("component") <= TOGETHER:
            calls = {form: opened() for form, opened in openers.items()}
            return interleave(calls, samples, rounds=ROUNDS, iterations_per_round=ITERATIONS)
        latencies: dict[str, list[np.ndarray]] = {form: [] for form in openers}
        for turn in range(TURNS_APART):
            # There and back again, so that a drift of the machine favours none.
            for form in list(openers)[:: -1 if turn % 2 else 1]:
                once = interleave({form: openers[form]()}, samples, rounds=1, iterations_per_round=2)
                latencies[form].append(once.samples_ms[form])
                gc.collect()
    found = {form: np.concatenate(times) for form, times in latencies.items()}
    return Turns(found, TURNS_APART, 2, dict.fromkeys(found, 2))


def _eager(recipe: Recipe, threads: int) -> EagerPolicy:
    """The eager policy, on as many threads as the engine has."""
    import torch

    from vlaopt import policies

    if threads:
        torch.set_num_threads(threads)
    return policies.load(recipe)
