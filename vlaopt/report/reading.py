"""Facts from an artifact, a record and this machine's store. What is not there is said in words, never guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import component_path, data_path, plain_path
from vlaopt.artifact.policy_spec import AutoregressiveLoop, PolicySpec, SingleLoop
from vlaopt.artifact.store import Store
from vlaopt.benchmark.actions import ActionError
from vlaopt.errors import InputError
from vlaopt.recipe.model import SCHEMA as RECIPE_SCHEMA
from vlaopt.recipe.model import Recipe
from vlaopt.report.facts import ComponentFacts, Example, Facts, Fit, Form, Gate, Layer, Trial
from vlaopt.report.records import Found
from vlaopt.runtime.golden import Golden
from vlaopt.runtime.processors import Processors
from vlaopt.summary import remembered, verified_on

NOISIEST = 12
"""Tensors that are told of how 8 bits hold them: the worst."""
_STAGES = {"FP32 ONNX": "export", "pruned": "prune", "quantized": "onnx", "engine": "engine"}
"""The stage that gives a form, by the form's name in a build's summary."""


def read_facts(artifact: Artifact, found: Found, store: Store) -> Facts:
    """What a report of `artifact` tells, with the record that was found of it.

    Raises InputError for damaged files, and for metrics and reports of another form than this vlaopt writes.
    """
    try:
        return _facts(artifact, found, store)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"its metrics or reports are not as this vlaopt writes them ({type(error).__name__}: {error})",
            where=str(artifact.path),
            hint="use the vlaopt that wrote it, or build the artifact again",
        ) from error


def _facts(artifact: Artifact, found: Found, store: Store) -> Facts:
    manifest, spec = artifact.manifest, artifact.spec()
    metrics, missing = manifest.metrics, dict[str, str]()
    verified = metrics.get("verify", {})
    forms, how = _forms(artifact, store, missing)
    examples = _examples(artifact, missing)
    error = verified.get("golden") or metrics.get("engine", {}).get("action_error")
    if not verified:
        missing["gates"] = "stage verify has not run on this artifact"
    if error is None:
        missing["error"] = "no stage has run the form that ships; `vlaopt verify ARTIFACT` measures it"
    if found.reason:
        missing["record"] = found.reason
    if found.record and manifest.engine and manifest.engine.backend not in found.record.environment.libraries:
        measured = ", ".join(sorted(found.record.environment.libraries)) or "a backend that it does not name"
        missing["engine_record"] = f"measured on {measured}, not the engine on {manifest.engine.backend}"
    inputs = _inputs(artifact, store)
    if not inputs:
        missing["inputs"] = "known to the store of the machine that built it"
    return Facts(
        id=artifact.id,
        version=artifact.version,
        manifest=manifest,
        spec=spec,
        record=found.record,
        record_from=found.where,
        forms=forms,
        forms_how=how,
        components=tuple(_components(artifact, spec)),
        gates=tuple(Gate(**gate) for gate in verified.get("gates", ())),
        verified_on=verified_on(verified) if verified else None,
        error=ActionError.from_json(error) if error else None,
        held_out=ActionError.from_json(verified["held_out"]) if "held_out" in verified else None,
        deviations=tuple(Processors(spec, lambda name: artifact.read(f"policy/{name}")).action_std().tolist()),
        examples=examples,
        trials=_trials(artifact, missing),
        fits=_fits(artifact, missing),
        inputs=inputs,
        recipe_text=_recipe_text(artifact),
        missing=missing,
    )


def _report(artifact: Artifact, stage: str) -> dict[str, Any]:
    """What a stage reported, empty where the artifact does not hold it."""
    path = f"reports/{stage}.json"
    value = json.loads(artifact.read(path)) if artifact.has(path) else {}
    return value if isinstance(value, dict) else {}


def _forms(artifact: Artifact, store: Store, missing: dict[str, str]) -> tuple[tuple[Form, ...], str | None]:
    metrics = artifact.manifest.metrics
    if measured := remembered(artifact, store):
        if measured.busy:
            missing["forms_quiet"] = f"the machine was busy meanwhile: {measured.busy}"
        rows = [(row.form, row.backend, row.bytes, row.latency_ms) for row in measured.rows]
    else:
        missing["forms_how"] = "the forms were not measured side by side on this machine, which did not build them"
        rows = list(_forms_of_metrics(artifact))
    errors = {form: metrics.get(stage, {}).get("action_error") for form, stage in _STAGES.items()}
    forms = tuple(
        Form(
            name=name,
            stage=_STAGES.get(name, "reference"),
            backend=backend,
            bytes=size,
            latency_ms=latency_ms,
            error=ActionError.from_json(error) if (error := errors.get(name)) else None,
        )
        for name, backend, size, latency_ms in rows
    )
    return forms, measured.how if measured else None


def _forms_of_metrics(artifact: Artifact) -> Iterator[tuple[str, str, int, float | None]]:
    """Name, backend, bytes and no latency of the forms that the stages told of."""
    metrics = artifact.manifest.metrics
    for name, stage in (("FP32 ONNX", "export"), ("pruned", "prune"), ("quantized", "onnx")):
        told = metrics.get(stage, {})
        changed = stage != "onnx" or told.get("quantized_nodes")
        if changed and "bytes" in told:
            yield name, "onnxruntime", told["bytes"], None
    if engine := artifact.manifest.engine:
        yield "engine", engine.backend, artifact.size("engine"), None


def _components(artifact: Artifact, spec: PolicySpec) -> Iterator[ComponentFacts]:
    sizes = {entry.path: entry.size for entry in artifact.manifest.files}
    plans, ran = _report(artifact, "quantize").get("components", {}), _report(artifact, "engine").get("layers", {})
    engine = artifact.manifest.engine
    for name in spec.order():
        graph, plain = component_path(name), plain_path(name)
        built = engine.components.get(name) if engine else None
        files = built.files if built else (graph, data_path(graph))
        layers = tuple(_layers(plans.get(name, {}).get("nodes", {}), ran.get(name, {})))
        yield ComponentFacts(
            name=name,
            kind=spec.components[name].kind,
            calls=_calls(spec, name),
            in_loop=name == spec.step(),
            variant=built.variant if built else None,
            reason=built.reason if built else None,
            bytes=sum(sizes.get(path, 0) for path in files),
            plain_bytes=sizes[plain] + sizes.get(data_path(plain), 0) if plain in sizes else None,
            precisions=(built.precisions if built else None) or _counted(layers),
            layers=layers,
        )


def _calls(spec: PolicySpec, component: str) -> int:
    """How often a component runs for one chunk, at most."""
    loop = spec.loop
    if isinstance(loop, SingleLoop) or component != loop.step:
        return 1
    return loop.max_length if isinstance(loop, AutoregressiveLoop) else loop.steps


def _layers(planned: Mapping[str, Mapping[str, Any]], ran: Mapping[str, str]) -> Iterator[Layer]:
    """The layers that were planned or that run, numbers in their names in order."""
    for name in sorted(planned.keys() | ran.keys(), key=_in_order):
        plan = planned.get(name, {})
        yield Layer(name, plan.get("operator"), plan.get("scheme"), plan.get("reason"), ran.get(name))


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"([0-9]+)", name)]


def _counted(layers: Sequence[Layer]) -> dict[str, int]:
    schemes = [layer.scheme for layer in layers if layer.scheme]
    return {scheme: schemes.count(scheme) for scheme in sorted(set(schemes))}


def _examples(artifact: Artifact, missing: dict[str, str]) -> tuple[Example, ...]:
    told = _report(artifact, "verify").get("examples", ())
    if not told:
        missing["examples"] = "stage verify kept no trajectories in this artifact"
        return ()
    reference = Golden.of(artifact).actions
    return tuple(
        Example(one["sample"], one["error"], np.asarray(one["actions"], np.float32), reference[one["sample"]])
        for one in told
    )


def _trials(artifact: Artifact, missing: dict[str, str]) -> tuple[Trial, ...]:
    told = _report(artifact, "quantize").get("search", {}).get("trials", ())
    if not told:
        missing["trials"] = (
            "this build searched no mixed plan; `vlaopt sensitivity RECIPE` measures what each part costs and gains"
        )
    return tuple(
        Trial(
            what=one["what"],
            moved=one["moved"],
            error=one["error"]["executed"]["mean"] if one["error"] else None,
            against_uniform_ms=one["against_uniform_ms"],
            bytes=one["bytes"],
            held=one["held"],
            refused=one["refused"],
        )
        for one in told
    )


def _fits(artifact: Artifact, missing: dict[str, str]) -> tuple[Fit, ...]:
    """The tensors that 8 bits hold worst, the worst first."""
    told = _report(artifact, "calibration").get("components", {})
    fits = [
        Fit(component, tensor, one["noise"], one["outliers"], one["saturated"])
        for component, tensors in told.items()
        for tensor, one in tensors.items()
    ]
    if not fits:
        missing["fits"] = "no activation of this artifact was calibrated"
    return tuple(sorted(fits, key=lambda fit: (-fit.noise, fit.component, fit.tensor))[:NOISIEST])


def _inputs(artifact: Artifact, store: Store) -> dict[str, str]:
    """Digests of what the stages took from outside, by recipe key, where this machine's journal still has them."""
    keys = {step.key for step in artifact.manifest.lineage}
    found: dict[str, str] = {}
    for record in store.records():
        if record.key in keys:
            found |= record.parts.get("outside", {})
    return dict(sorted(found.items()))


def _recipe_text(artifact: Artifact) -> str:
    """The recipe as YAML, every default written out; the target by its name."""
    manifest = artifact.manifest
    named = {"schema": RECIPE_SCHEMA, "name": manifest.name, "version": manifest.version, "target": manifest.target}
    whole = {**manifest.recipe, **named}
    order = list(dict.fromkeys([*named, *(key for key in Recipe.model_fields if key in whole), *sorted(whole)]))
    text: str = yaml.safe_dump({key: whole[key] for key in order}, sort_keys=False, allow_unicode=True, width=100)
    return text
