"""export: a checkpoint becomes FP32 ONNX components, a PolicySpec, a capture and golden data, compared with eager."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from vlaopt import policies
from vlaopt.artifact.artifact import SPEC_PATH, Artifact, Draft
from vlaopt.artifact.manifest import component_path
from vlaopt.benchmark.actions import Limit
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.memory import give_back
from vlaopt.policies import EagerPolicy
from vlaopt.policies.capturing import capture, draw_noises
from vlaopt.policies.noise_law import UNLIKELY, LawCheck, check_law
from vlaopt.policies.portable import export_components, first_inputs, open_compared
from vlaopt.progress import Progress, track
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.capture import Capture, CaptureIndex
from vlaopt.runtime.golden import HELD_OUT
from vlaopt.runtime.policy import Policy
from vlaopt.runtime.processors import Processors
from vlaopt.stages import golden_error, hold
from vlaopt.tensors import pack

REPORT = "reports/export.json"


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    eager = policies.load(recipe)
    spec = eager.spec
    observations, index = _wanted(recipe)
    law = check_law(eager, observations.observation(index.rows[0]))
    if law:
        _hold_law(law, draft)
    draft.write_json(SPEC_PATH, spec, "policy")
    for name, data in eager.assets().items():
        draft.write(f"policy/{name}", data, "policy")
    draft.write_folder("weights", eager.save, "weights")
    captured = capture(eager, observations, index, lambda path, data: draft.write(path, data, "capture"), progress)
    recorded = Capture.read(spec, draft.read)
    for path, data in captured.golden.files(captured.inputs).items():
        draft.write(path, data, "golden")
    if recipe.verify.observations:
        held_out = CalibrationSet.open(recipe.locate(recipe.verify.observations))
        draft.write(HELD_OUT, _record_held_out(held_out, recipe.verify.samples, eager, progress), "golden")

    size = export_components(
        eager,
        first_inputs(recorded, index.golden[0], captured.inputs[0]),
        lambda name, graph: draft.write_graph(component_path(name), graph, "component"),
        opset=recipe.export.opset,
        progress=progress,
    )
    del eager
    give_back()  # its weights make room for the graphs'
    sessions, parity = open_compared(recorded, captured, lambda name: draft.graph(component_path(name)), progress)
    processors = Processors(spec, lambda asset: draft.read(f"policy/{asset}"))
    policy = Policy(spec, processors, sessions, backend="onnxruntime")
    error = golden_error(policy, captured.golden, progress, "comparing with eager")
    # Of the normalised chunk, so that the limit does not depend on the robot's units.
    parity["policy"] = error.chunk.max
    draft.metrics["export"] = {
        "parity": {**captured.differences, **parity},
        "noise": dataclasses.asdict(law) if law else None,
        "captured": len(index.rows),
        "bytes": size,
        "action_error": error.to_json(),
    }
    draft.write_json(REPORT, draft.metrics["export"], "report")


def _wanted(recipe: Recipe) -> tuple[CalibrationSet, CaptureIndex]:
    """What is captured: the samples that calibrate, or without a calibration set as many of the held-out as golden."""
    if recipe.calibration:
        path, count = recipe.calibration.path, recipe.calibration.samples
    elif recipe.verify.observations:
        path, count = recipe.verify.observations, recipe.export.golden_samples
    else:
        raise InputError(
            "no observations to record golden actions on",
            where=f"{recipe.path}:calibration",
            hint="name a calibration set (calibration.path) or held-out observations (verify.observations)",
        )
    observations = CalibrationSet.open(recipe.locate(path))
    rows = observations.subset(count, 0)
    golden = min(recipe.export.golden_samples, len(rows))
    places = tuple(place * len(rows) // golden for place in range(golden))
    return observations, CaptureIndex(digest=observations.digest, rows=rows, golden=places)


def _hold_law(law: LawCheck, draft: Draft) -> None:
    """Raises GateError for noise that is not of the spec's law, before anything long is done; its report is kept."""
    draft.write_json(REPORT, {"noise": dataclasses.asdict(law)}, "report")
    gate = Limit("unlikeliness (−log10 p)", law.unlikeliness, UNLIKELY)
    hold(
        [gate],
        what=f"noise law of {law.component}: the spec says {law.spec}, the policy draws {law.drawn}",
        hint="correct the law in the adapter's PolicySpec: with the wrong one the policy fails silently on the robot",
    )


def _record_held_out(observations: CalibrationSet, samples: int, eager: EagerPolicy, progress: Progress) -> bytes:
    """Reference actions on held-out observations: rows of the set, and [rows, chunk, action_dim]."""
    rows = observations.subset(samples, 0)
    actions = []
    recorded: dict[str, Any] = {"rows": np.asarray(rows, dtype=np.int64)}
    noises = draw_noises(eager.spec, len(rows))
    for row, noise in track(progress, "recording held-out actions", zip(rows, noises, strict=True), len(rows)):
        actions.append(eager.predict_chunk(observations.observation(row), noise))
    recorded["actions"] = np.stack(actions)
    if noises[0] is not None:
        recorded["noise"] = np.stack([noise for noise in noises if noise is not None])
    return pack(recorded)
