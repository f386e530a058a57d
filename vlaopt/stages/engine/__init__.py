"""engine: what the target runs. Built by each backend that may, measured side by side, audited; the fastest is kept."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.artifact.manifest import (
    PLAN_PATH,
    EngineComponent,
    EngineEntry,
    Finish,
    component_path,
    placed_path,
    plain_path,
)
from vlaopt.backends import ONE_OF, Backend, EngineOptions
from vlaopt.backends.audit import Audit, audit, planned_precisions
from vlaopt.benchmark import environment
from vlaopt.benchmark.actions import ActionError
from vlaopt.benchmark.compare import interleave
from vlaopt.errors import EnvironmentProblem, InputError, StageError, VlaoptError
from vlaopt.files import read_file, remove_directory
from vlaopt.progress import Progress
from vlaopt.recipe.model import Recipe, TensorRt
from vlaopt.runtime.golden import Golden, of_sample
from vlaopt.runtime.policy import Policy, assemble
from vlaopt.stages import golden_error, hold, limits
from vlaopt.stages.engine.forms import Form, Workshop
from vlaopt.stages.engine.shipping import Built, Forms, Variant, decide, times_of, whole, with_threads
from vlaopt.target import Target

ROUNDS, ITERATIONS = 10, 10
SIZE_ONLY_SLOWEST = 0.9
"""A component that only stores int8 weights is there for its size; it may be this much as fast as the plain one."""
PREFERENCE = 1.02
"""A backend must be this many times as fast as those before it in the target's list: noise must decide nothing."""
RAISE = "`vlaopt diagnose RECIPE --backend B` names the layers that lose it; or name another engine.backend"


@dataclass(frozen=True)
class Candidate:
    """A whole policy on one backend."""

    backend: str
    options: EngineOptions
    components: Mapping[str, Built]
    policy: Policy
    error: ActionError
    thread_speedups: Mapping[int, float]


def run(recipe: Recipe, source: Artifact | None, draft: Draft, progress: Progress) -> None:
    assert source is not None
    draft.carry(source, "component", "policy", "golden", "report")
    target, wanted = recipe.target, recipe.backends()
    if target.engine_built_on == "target" and (reason := _why_elsewhere(target, wanted)):
        draft.carry(source, "plain", "placed")
        draft.finish = Finish(backend=wanted[0], command="vlaopt engine ARTIFACT", reason=reason)
        draft.metrics["engine"] = {"finish": draft.finish.model_dump()}
        return
    reasons = {name: _why_not_here(target, backends.get(name)) for name in _usable(wanted)}
    here = [name for name, reason in reasons.items() if reason is None]
    # One that gives no times is for machines where none that does can run.
    here = [name for name in here if backends.get(name).timed] or here
    compiled = draft.folder / "compiled"
    workshops = _Workshops(recipe, source, compiled, draft.unfinished_folder, draft.opened, progress)
    if here:
        chosen, others = _choose(recipe, source, here, workshops, progress)
        name, options, components = chosen.backend, chosen.options, chosen.components
    else:
        name = next(iter(reasons))
        workshop = workshops.on(name)
        options, components = workshop.options, _build_only(recipe, workshop, progress)
    _write(draft, name, machine_of(target, backends.get(name), components), options, components)
    _ship(source, draft, backends.get(name), components)
    audited = {
        component: built.form
        for component, built in components.items()
        if built.variant == "quantized" and not _untold(built.form, backends.get(name))
    }
    audits = {component: _audit(source, component, form).to_json() for component, form in audited.items()}
    draft.metrics["engine"]["audit"] = audits
    if here:
        draft.metrics["engine"] |= {**others, "action_error": chosen.error.to_json()}
    else:
        draft.metrics["engine"]["not_run"] = reasons[name]
    remove_directory(compiled)
    layers = {name: built.form.layers for name, built in components.items()}
    draft.write_json("reports/engine.json", {**draft.metrics["engine"], "layers": layers}, "report")


def machine_of(target: Target, library: Backend, components: Mapping[str, Built]) -> str:
    """The class of machines an engine is for, as a folder's name: the architecture; for GPUs their compute capabilities
    and the library with its version too."""
    if target.kind == "cpu":
        return f"cpu-{target.arch}"
    needed = next(
        (built.form.needs["sm"].split(ONE_OF) for built in components.values() if "sm" in built.form.needs), None
    )
    capabilities = [f"sm{sm.replace('.', '')}" for sm in needed or target.compute_capabilities]
    return re.sub(
        r"[^A-Za-z0-9._+-]", "-", "-".join(["gpu", target.arch, *capabilities, library.name, library.version()])
    )


def _why_elsewhere(target: Target, wanted: Sequence[str]) -> str | None:
    """Why this machine is not of the target's class, as far as building its engine goes, or None."""
    if platform.machine() != target.arch:
        return f"{target.name} is {target.arch}, this machine is {platform.machine()}"
    if target.kind == "cpu":
        return target.cpu_lacks(environment.cpu_features())
    reasons = {}
    for name in wanted:
        known = name in backends.names()
        reason = _why_not_here(target, backends.get(name)) if known else "not in this version of vlaopt"
        if reason is None:
            return None
        reasons[name] = reason
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _why_not_here(target: Target, library: Backend) -> str | None:
    """Why a backend's engines cannot run here, or this machine's GPU or TensorRT is not of the class, or None."""
    if reason := library.missing() or library.runnable():
        return reason
    if target.kind == "cpu":
        return None
    had = library.machine()
    if "sm" in had and had["sm"] not in target.compute_capabilities:
        return f"{target.name} is SM {', '.join(target.compute_capabilities)}, the GPU here is {had['sm']}"
    if "tensorrt" in had and not target.takes_tensorrt(had["tensorrt"]):
        return f"{target.name} takes TensorRT {target.tensorrt}, here is {had['tensorrt']}"
    return None


def _usable(names: Sequence[str]) -> list[str]:
    reasons = {name: backends.get(name).missing() for name in names}
    usable = [name for name, reason in reasons.items() if reason is None]
    if not usable:
        raise EnvironmentProblem(
            "no backend of the target is installed: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())
        )
    return usable


@dataclass(frozen=True)
class _Workshops:
    """A workshop for each backend, beside each other."""

    recipe: Recipe
    source: Artifact
    folder: Path
    unfinished: Path | None
    opened: Path | None
    progress: Progress

    def on(self, name: str) -> Workshop:
        """Raises InputError when the recipe asks the backend for what it does not know."""
        library, engine, target = backends.get(name), self.recipe.engine, self.recipe.target
        options = EngineOptions(
            threads=0 if engine.threads == "auto" else engine.threads,
            compute_capabilities=tuple(target.compute_capabilities),
            settings=settings_of(engine.tensorrt, library, target),
            cache=self.opened / name if self.opened and target.kind != "cpu" else None,
        )
        kept = self.unfinished or self.folder / "kept"
        return Workshop(self.source, library, options, self.folder / name, kept / name, self.progress)


def settings_of(asked: TensorRt, library: Backend, target: Target) -> dict[str, Any]:
    """Those of the recipe's settings that the backend knows. Raises InputError for one that was set and it does not.

    What the target sets for those of its backends that know it, nobody asked this one for.
    """
    of_target = target.defaults.get("engine", {}).get("tensorrt", {})
    values, usual = asked.model_dump(mode="json"), {**TensorRt().model_dump(mode="json"), **of_target}
    unknown = [key for key in values if key not in library.settings and values[key] != usual[key]]
    if unknown:
        raise InputError(
            f"{library.name} has no setting {unknown[0]!r}", where=f"engine.tensorrt.{unknown[0]}", hint="leave it out"
        )
    return {key: value for key, value in values.items() if key in library.settings}


def _choose(
    recipe: Recipe, source: Artifact, names: list[str], workshops: _Workshops, progress: Progress
) -> tuple[Candidate, dict[str, Any]]:
    """The fastest candidate whose gates hold, and what became of every candidate."""
    golden = Golden.of(source)
    candidates: list[Candidate] = []
    refused: dict[str, str] = {}
    for name in names:
        try:
            candidates.append(_candidate(recipe, workshops.on(name), progress))
        except VlaoptError as error:
            if len(names) == 1:
                raise
            refused[name] = error.lines()[0]
    good = [candidate for candidate in candidates if all(gate.held for gate in limits(candidate.error, recipe.accept))]
    for candidate in candidates:
        if candidate not in good:
            workshops.on(candidate.backend).forget()
    if candidates and not good:
        hold(
            limits(candidates[0].error, recipe.accept),
            what="the engine's actions are too far from the reference",
            hint=RAISE,
        )
    if not good:
        raise StageError("no backend built an engine: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))
    latencies: dict[str, float] = {}
    timed = {c.backend: of_sample(c.policy.predict_chunk) for c in good if backends.get(c.backend).timed}
    if timed:
        turns = interleave(timed, golden.samples, rounds=ROUNDS, iterations_per_round=ITERATIONS)
        latencies = {name: turns.median_ms(name) for name in timed}
    chosen = good[0]
    for candidate in good[1:] if timed else ():
        if latencies[chosen.backend] > PREFERENCE * latencies[candidate.backend]:
            chosen = candidate
    missed = {c.backend: "a gate was missed" for c in candidates if c not in good}
    threads = {c.backend: {str(count): speedup for count, speedup in c.thread_speedups.items()} for c in good}
    return chosen, {"candidates_p50_ms": latencies, "refused": {**refused, **missed}, "thread_speedups": threads}


def _candidate(recipe: Recipe, workshop: Workshop, progress: Progress) -> Candidate:
    """The policy on one backend, each component in the form that the measurement speaks for."""
    source, library = workshop.source, workshop.library
    name, golden = library.name, Golden.of(source)
    spec = source.spec()
    forms: dict[str, dict[Variant, Form]] = {}
    with progress.task(f"building on {name}", len(spec.components)) as task:
        for component in spec.order():
            forms[component] = _forms(recipe, workshop, component)
            task.advance()
    try:
        return _measured(recipe, workshop, forms, golden, progress)
    except VlaoptError:
        workshop.forget()  # the next run is not to take up what cannot run
        raise


def _measured(recipe: Recipe, workshop: Workshop, forms: Forms, golden: Golden, progress: Progress) -> Candidate:
    source, library = workshop.source, workshop.library
    name = library.name
    variants: list[Variant] = (
        ["plain", "quantized"] if any("quantized" in found for found in forms.values()) else ["plain"]
    )
    workshop.try_out({variant: whole(forms, variant) for variant in variants})
    speedups: Mapping[int, float] = {}
    if recipe.engine.threads == "auto" and recipe.target.kind == "cpu":
        with progress.task(f"finding the threads that pay on {name}"):
            options, speedups = with_threads(workshop, forms, golden, rounds=ROUNDS, iterations=ITERATIONS)
            workshop = replace(workshop, options=options)
    forms = {
        component: {variant: workshop.opened(form) for variant, form in found.items()}
        for component, found in forms.items()
    }
    times: Mapping[str, Mapping[Variant, float]] = {}
    if "quantized" in variants and library.timed:
        with progress.task(f"measuring components on {name}"):
            times = times_of(source, forms, name, golden, rounds=ROUNDS, iterations=ITERATIONS)
    components = {}
    for component, found in forms.items():
        needed = recipe.engine.minimum_speedup if _planned(source, component) else SIZE_ONLY_SLOWEST
        components[component] = decide(found, times.get(component, {}), needed)
    sessions = {key: built.form.session for key, built in components.items() if built.form.session}
    policy = assemble(source, sessions, backend=name)
    error = golden_error(policy, golden, progress, f"verifying on {name}")
    return Candidate(name, workshop.options, components, policy, error, speedups)


def _forms(recipe: Recipe, workshop: Workshop, component: str) -> dict[Variant, Form]:
    """A component compiled as it may ship. Raises StageError when the backend ignores the planned precision."""
    source = workshop.source
    if not source.has(plain_path(component)):
        return {"plain": workshop.form(component, "plain", component_path(component))}
    main = _quantized(recipe, workshop, component)
    return {"plain": workshop.form(component, "plain", plain_path(component)), "quantized": main}


def _quantized(recipe: Recipe, workshop: Workshop, component: str) -> Form:
    """The form of a component that is to run in low precision. Raises StageError when the backend ignores the plan."""
    source, library = workshop.source, workshop.library
    form = workshop.form(component, "quantized", _graph_path(source, component, library))
    found = _audit(source, component, form)
    if len(found.others) > len(found.planned) * recipe.engine.allow_shortfall and not _untold(form, library):
        workshop.forget(component, "quantized")
        raise StageError(
            found.told(library.name, component),
            hint="name another engine.backend, keep the layers in fp32 (quantize.rules), or allow it "
            "(engine.allow_shortfall)",
        )
    return form


def _untold(form: Form, library: Backend) -> bool:
    """Whether a backend that cannot run here told nothing of an engine's layers: the target is to audit them then."""
    return not form.precisions and library.runnable() is not None


def _audit(source: Artifact, component: str, form: Form) -> Audit:
    return audit(_planned(source, component), form.layers, form.precisions)


def _planned(source: Artifact, component: str) -> dict[str, str]:
    """The precision of every layer of a component that the plan lets compute in a lower one, by node."""
    if not source.has(PLAN_PATH):
        return {}
    return planned_precisions(json.loads(source.read(PLAN_PATH))["components"][component]["nodes"])


def _build_only(recipe: Recipe, workshop: Workshop, progress: Progress) -> dict[str, Built]:
    """Engines for machines other than this one: built from the final graphs, audited where they tell, not run.

    Raises StageError when the backend ignores the planned precision.
    """
    components = {}
    source, library = workshop.source, workshop.library
    names = source.spec().components
    with progress.task(f"building for {library.name}", len(names)) as task:
        for name in names:
            if source.has(plain_path(name)):
                reason = "not run here: its speed is measured on the target"
                components[name] = Built("quantized", reason, _quantized(recipe, workshop, name))
            else:
                form = workshop.form(name, "plain", component_path(name))
                components[name] = Built("plain", "nothing in it is quantized", form)
            task.advance()
    return components


def _graph_path(source: Artifact, component: str, library: Backend, variant: Variant = "quantized") -> str:
    """Where the graph lies that a backend takes for a component in this form."""
    path = plain_path(component) if variant == "plain" else placed_path(library.placement, component)
    return path if source.has(path) else component_path(component)


def _ship(source: Artifact, draft: Draft, library: Backend, components: Mapping[str, Built]) -> None:
    """Let the portable graphs be those that the engine was made of."""
    for name, built in components.items():
        path = _graph_path(source, name, library, built.variant)
        if path != component_path(name):
            draft.write_graph(component_path(name), source.graph(path), "component")


def _write(draft: Draft, backend: str, machine: str, options: EngineOptions, components: Mapping[str, Built]) -> None:
    entries = {}
    for name, built in components.items():
        paths = []
        for file, compiled in built.form.files.items():
            path = f"engines/{machine}/{name}/{file}"
            draft.write(path, read_file(compiled), "engine")
            paths.append(path)
        entries[name] = EngineComponent(
            variant=built.variant,
            reason=built.reason,
            files=tuple(paths),
            precisions=dict(built.form.precisions),
            needs=dict(built.form.needs),
            facts=dict(built.form.facts),
        )
    draft.engine = EngineEntry(
        machine=machine,
        backend=backend,
        backend_version=backends.get(backend).version(),
        threads=options.threads,
        settings=dict(options.settings),
        components=entries,
    )
    total: dict[str, int] = {}
    for entry in entries.values():
        for precision, count in entry.precisions.items():
            total[precision] = total.get(precision, 0) + count
    draft.metrics["engine"] = {
        "backend": backend,
        "precisions": total,
        "kept_plain": {name: built.reason for name, built in components.items() if built.variant == "plain"},
        "components": {name: entry.model_dump(mode="json", exclude={"files"}) for name, entry in entries.items()},
        "notes": {name: list(built.form.notes) for name, built in components.items() if built.form.notes},
    }
