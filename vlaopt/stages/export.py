"""export: a checkpoint becomes FP32 ONNX components, a PolicySpec and golden data, each compared with eager."""

from __future__ import annotations

import numpy as np

from vlaopt import policies
from vlaopt.artifact.artifact import SPEC_PATH, Artifact, Draft
from vlaopt.artifact.manifest import component_path
from vlaopt.calibration import CalibrationSet
from vlaopt.errors import InputError
from vlaopt.policies import EagerPolicy
from vlaopt.policies.portable import export_components, open_portable, record
from vlaopt.progress import Progress, track
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.golden import HELD_OUT, Golden
from vlaopt.runtime.loop import draw_noise
from vlaopt.stages import golden_error
from vlaopt.tensors import Array, pack

NOISE_SEED = 0


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    adapter = policies.get(recipe.policy.type)
    eager = adapter.load(recipe.locate(recipe.policy.checkpoint), recipe.policy.hub_overrides)
    golden, inputs = _record_golden(recipe, eager, progress)
    recordings = record(eager, golden.observations[0], None if golden.noise is None else golden.noise[0])
    graphs = export_components(eager, recordings, opset=recipe.export.opset, progress=progress)

    draft.write_json(SPEC_PATH, eager.spec, "policy")
    for name, data in eager.assets().items():
        draft.write(f"policy/{name}", data, "policy")
    for name, data in eager.checkpoint().items():
        draft.write(f"weights/{name}", data, "weights")
    for path, data in golden.files(inputs).items():
        draft.write(path, data, "golden")
    for name, graph in graphs.items():
        draft.write(component_path(name), graph, "component")
    if recipe.verify.observations:
        held_out = CalibrationSet.open(recipe.locate(recipe.verify.observations))
        draft.write(HELD_OUT, _record_held_out(held_out, recipe.verify.samples, eager, progress), "golden")

    policy, differences = open_portable(eager, graphs, recordings)
    error = golden_error(policy, golden, progress, "comparing with eager")
    # Of the normalised chunk, so that the limit does not depend on the robot's units.
    differences["policy"] = error.chunk.max
    draft.metrics["export"] = {
        "parity": differences,
        "bytes": sum(map(len, graphs.values())),
        "action_error": error.to_json(),
    }
    draft.write_json("reports/export.json", draft.metrics["export"], "report")


def _sets(recipe: Recipe) -> dict[str, str]:
    """The observation sets that export reads: golden observations come from the calibration set where there is one."""
    found = {}
    if recipe.calibration:
        found["calibration"] = recipe.calibration.path
    if recipe.verify.observations:
        found["held_out"] = recipe.verify.observations
    if not found:
        raise InputError(
            "no observations to record golden actions on",
            where=f"{recipe.path}:calibration",
            hint="name a calibration set (calibration.path) or held-out observations (verify.observations)",
        )
    return found


def _record_golden(recipe: Recipe, eager: EagerPolicy, progress: Progress) -> tuple[Golden, list[dict[str, Array]]]:
    path = next(iter(_sets(recipe).values()))
    observations = CalibrationSet.open(recipe.locate(path))
    rows = observations.subset(recipe.export.golden_samples, 0)
    generator = np.random.default_rng(NOISE_SEED)
    noises: list[Array | None] = [draw_noise(eager.spec, generator) for _ in rows]
    samples = [observations.observation(row) for row in rows]
    actions, inputs = [], []
    pairs = zip(samples, noises, strict=True)
    for sample, noise in track(progress, "recording golden actions", pairs, len(rows)):
        actions.append(eager.predict_chunk(sample, noise))
        inputs.append({name: value.numpy() for name, value in eager.preprocess(sample).items()})
    drawn = [noise for noise in noises if noise is not None]
    return Golden(tuple(samples), np.stack(actions), np.stack(drawn) if drawn else None), inputs


def _record_held_out(observations: CalibrationSet, samples: int, eager: EagerPolicy, progress: Progress) -> bytes:
    """Reference actions on held-out observations: rows of the set, and [rows, chunk, action_dim]."""
    rows = observations.subset(samples, 0)
    generator = np.random.default_rng(NOISE_SEED)
    actions = []
    recorded: dict[str, Array] = {"rows": np.asarray(rows, dtype=np.int64)}
    noises = [draw_noise(eager.spec, generator) for _ in rows]
    for row, noise in track(progress, "recording held-out actions", zip(rows, noises, strict=True), len(rows)):
        actions.append(eager.predict_chunk(observations.observation(row), noise))
    recorded["actions"] = np.stack(actions)
    if noises[0] is not None:
        recorded["noise"] = np.stack([noise for noise in noises if noise is not None])
    return pack(recorded)
