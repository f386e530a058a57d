"""engine: what the target runs. Built by each backend that may, measured side by side, audited; the fastest is kept."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vlaopt import backends
from vlaopt.artifact.artifact import Artifact, Draft
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import (
    PLAN_PATH,
    EngineComponent,
    EngineEntry,
    Finish,
    component_path,
    placed_path,
    plain_path,
)
from vlaopt.backends import Backend, EngineOptions, Session
from vlaopt.backends.audit import Audit, audit, planned_precisions
from vlaopt.benchmark import environment
from vlaopt.benchmark.actions import ActionError
from vlaopt.benchmark.compare import interleave
from vlaopt.benchmark.threads import choose_threads
from vlaopt.errors import EnvironmentProblem, StageError, VlaoptError
from vlaopt.files import read_file, remove_directory, write_file
from vlaopt.progress import Progress
from vlaopt.recipe.model import Recipe
from vlaopt.runtime.golden import Golden, Sample, of_sample
from vlaopt.runtime.policy import Policy, assemble
from vlaopt.runtime.timing import component_times
from vlaopt.stages import golden_error, hold, limits
from vlaopt.target import Target

Variant = Literal["plain", "quantized"]
ROUNDS, ITERATIONS = 10, 10
SIZE_ONLY_SLOWEST = 0.9
"""A component that only stores int8 weights is there for its size; it may be this much as fast as the plain one."""
PREFERENCE = 1.05
"""A backend must be this many times as fast as those before it in the target's list: noise must decide nothing."""
RAISE = "`vlaopt diagnose RECIPE --backend B` names the layers that lose it; or name another engine.backend"


@dataclass(frozen=True)
class Form:
    """One component compiled in one form; no session where it cannot run here.

    Its files lie on the disk: those of every form on every backend may not fit into memory.
    """

    files: Mapping[str, Path]
    size: int
    precisions: Mapping[str, int]
    notes: tuple[str, ...]
    layers: Mapping[str, str]
    session: Session | None = None


@dataclass(frozen=True)
class Built:
    """One component in the form that ships."""

    variant: Variant
    reason: str
    form: Form


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
    target = recipe.target
    wanted = target.backends if recipe.engine.backend == "auto" else (recipe.engine.backend,)
    if target.engine_built_on == "target" and (reason := _why_elsewhere(target, wanted)):
        draft.carry(source, "plain", "placed")
        draft.finish = Finish(backend=wanted[0], command="vlaopt engine ARTIFACT", reason=reason)
        draft.metrics["engine"] = {"finish": draft.finish.model_dump()}
        return
    threads = 0 if recipe.engine.threads == "auto" else recipe.engine.threads
    options = EngineOptions(threads=threads, compute_capabilities=tuple(target.compute_capabilities))
    usable = _usable(wanted)
    here = [name for name in usable if backends.get(name).runnable() is None]
    compiled = draft.folder / "compiled"
    if here:
        chosen, others = _choose(recipe, source, here, options, compiled, progress)
        components = chosen.components
        _write(draft, chosen.backend, machine_of(target), chosen.options, components)
        _ship(source, draft, backends.get(chosen.backend), components)
        kept = {name: built for name, built in chosen.components.items() if built.variant == "quantized"}
        audits = {name: _audit(source, name, built.form).to_json() for name, built in kept.items()}
        draft.metrics["engine"] |= {**others, "action_error": chosen.error.to_json(), "audit": audits}
    else:
        components = _build_only(source, backends.get(usable[0]), options, compiled, progress)
        _write(draft, usable[0], machine_of(target), options, components)
        _ship(source, draft, backends.get(usable[0]), components)
        draft.metrics["engine"]["not_run"] = backends.get(usable[0]).runnable()
    remove_directory(compiled)
    layers = {name: built.form.layers for name, built in components.items()}
    draft.write_json("reports/engine.json", {**draft.metrics["engine"], "layers": layers}, "report")


def machine_of(target: Target) -> str:
    """The class of machines an engine is for: the architecture, or the compute capabilities of its GPUs."""
    if target.kind == "cpu":
        return f"cpu-{target.arch}"
    return "-".join(["gpu", target.arch, *(f"sm{sm.replace('.', '')}" for sm in target.compute_capabilities)])


def _why_elsewhere(target: Target, wanted: Sequence[str]) -> str | None:
    """Why this machine is not of the target's class, as far as building its engine goes, or None."""
    if platform.machine() != target.arch:
        return f"{target.name} is {target.arch}, this machine is {platform.machine()}"
    if target.kind == "cpu":
        return target.cpu_lacks(environment.cpu_features())
    reasons = {}
    for name in wanted:
        if name not in backends.names():
            reasons[name] = "not in this version of vlaopt"
        elif reason := backends.get(name).missing() or backends.get(name).runnable():
            reasons[name] = reason
        else:
            return None
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _usable(names: Sequence[str]) -> list[str]:
    reasons = {name: backends.get(name).missing() for name in names}
    usable = [name for name, reason in reasons.items() if reason is None]
    if not usable:
        raise EnvironmentProblem(
            "no backend of the target is installed: " + "; ".join(f"{name}: {why}" for name, why in reasons.items())
        )
    return usable


def _choose(
    recipe: Recipe, source: Artifact, names: list[str], options: EngineOptions, folder: Path, progress: Progress
) -> tuple[Candidate, dict[str, Any]]:
    """The fastest candidate whose gates hold, and what became of every candidate."""
    golden = Golden.of(source)
    candidates: list[Candidate] = []
    refused: dict[str, str] = {}
    for name in names:
        try:
            candidates.append(_candidate(recipe, source, name, options, folder / name, progress))
        except VlaoptError as error:
            if len(names) == 1:
                raise
            refused[name] = error.lines()[0]
    good = [candidate for candidate in candidates if all(gate.held for gate in limits(candidate.error, recipe.accept))]
    if candidates and not good:
        hold(
            limits(candidates[0].error, recipe.accept),
            what="the engine's actions are too far from the reference",
            hint=RAISE,
        )
    if not good:
        raise StageError("no backend built an engine: " + "; ".join(f"{name}: {why}" for name, why in refused.items()))
    turns = interleave(
        {candidate.backend: of_sample(candidate.policy.predict_chunk) for candidate in good},
        golden.samples,
        rounds=ROUNDS,
        iterations_per_round=ITERATIONS,
    )
    latencies = {candidate.backend: turns.median_ms(candidate.backend) for candidate in good}
    chosen = good[0]
    for candidate in good[1:]:
        if latencies[chosen.backend] > PREFERENCE * latencies[candidate.backend]:
            chosen = candidate
    missed = {c.backend: "a gate was missed" for c in candidates if c not in good}
    threads = {c.backend: {str(count): speedup for count, speedup in c.thread_speedups.items()} for c in good}
    return chosen, {"candidates_p50_ms": latencies, "refused": {**refused, **missed}, "thread_speedups": threads}


def _candidate(
    recipe: Recipe,
    source: Artifact,
    name: str,
    options: EngineOptions,
    folder: Path,
    progress: Progress,
) -> Candidate:
    """The policy on one backend, each component in the form that the measurement speaks for."""
    library, golden = backends.get(name), Golden.of(source)
    spec = source.spec()
    forms: dict[str, dict[Variant, Form]] = {}
    with progress.task(f"building on {name}", len(spec.components)) as task:
        for component in spec.order():
            forms[component] = _forms(recipe, source, component, library, options, folder / component)
            task.advance()
    speedups: Mapping[int, float] = {}
    if recipe.engine.threads == "auto" and recipe.target.kind == "cpu":
        with progress.task(f"finding the threads that pay on {name}"):
            options, speedups = _with_threads(source, forms, library, options, golden)
            forms = {component: _reopened(found, library, options) for component, found in forms.items()}
    times: Mapping[str, Mapping[Variant, float]] = {}
    if any("quantized" in found for found in forms.values()):
        with progress.task(f"measuring components on {name}"):
            times = _component_times(source, forms, name, golden)
    components = {}
    for component, found in forms.items():
        needed = recipe.engine.minimum_speedup if _planned(source, component) else SIZE_ONLY_SLOWEST
        components[component] = _decide(found, times.get(component, {}), needed)
    sessions = {key: built.form.session for key, built in components.items() if built.form.session}
    policy = assemble(source, sessions, backend=name)
    error = golden_error(policy, golden, progress, f"verifying on {name}")
    return Candidate(name, options, components, policy, error, speedups)


def _with_threads(
    source: Artifact,
    forms: Mapping[str, Mapping[Variant, Form]],
    library: Backend,
    options: EngineOptions,
    golden: Golden,
) -> tuple[EngineOptions, Mapping[int, float]]:
    """`options` with the number of threads that pays for the policy in low precision, and what was measured."""
    wanted = {name: found.get("quantized", found["plain"]) for name, found in forms.items()}

    def opened(threads: int) -> Callable[[Sample], object]:
        sessions = {name: _open(form, library, replace(options, threads=threads)) for name, form in wanted.items()}
        return of_sample(assemble(source, sessions, backend=library.name).predict_chunk)

    choice = choose_threads(
        opened,
        golden.samples,
        cores=environment.usable_cores(),
        rounds=ROUNDS,
        iterations_per_round=ITERATIONS,
    )
    return replace(options, threads=choice.threads), choice.speedups


def _reopened(forms: Mapping[Variant, Form], library: Backend, options: EngineOptions) -> dict[Variant, Form]:
    return {variant: replace(form, session=_open(form, library, options)) for variant, form in forms.items()}


def _open(form: Form, library: Backend, options: EngineOptions) -> Session:
    return library.open({name: read_file(path) for name, path in form.files.items()}, options)


def _forms(
    recipe: Recipe, source: Artifact, component: str, library: Backend, options: EngineOptions, folder: Path
) -> dict[Variant, Form]:
    """A component compiled as it may ship. Raises StageError when the backend ignores the planned precision."""
    if not source.has(plain_path(component)):
        return {"plain": _compile(library, source.graph(component_path(component)), options, folder / "plain")}
    main = _compile(library, source.graph(_graph_path(source, component, library)), options, folder / "quantized")
    found = _audit(source, component, main)
    if len(found.others) > len(found.planned) * recipe.engine.allow_shortfall:
        raise StageError(
            found.told(library.name, component),
            hint="name another engine.backend, keep the layers in fp32 (quantize.rules), or allow it "
            "(engine.allow_shortfall)",
        )
    plain = _compile(library, source.graph(plain_path(component)), options, folder / "plain")
    return {"plain": plain, "quantized": main}


def _audit(source: Artifact, component: str, form: Form) -> Audit:
    return audit(_planned(source, component), form.layers, form.precisions)


def _planned(source: Artifact, component: str) -> dict[str, str]:
    """The precision of every layer of a component that the plan lets compute in a lower one, by node."""
    if not source.has(PLAN_PATH):
        return {}
    return planned_precisions(json.loads(source.read(PLAN_PATH))["components"][component]["nodes"])


def _compile(library: Backend, graph: Graph, options: EngineOptions, folder: Path) -> Form:
    """One form of a component, its files written to `folder`; opened where the backend runs."""
    engine = library.build(graph, options)
    files = {name: folder / name for name in engine.files}
    for name, data in engine.files.items():
        write_file(files[name], data)
    session = library.open(engine.files, options) if library.runnable() is None else None
    return Form(files, sum(map(len, engine.files.values())), engine.precisions, engine.notes, engine.layers, session)


def _component_times(
    source: Artifact, forms: Mapping[str, Mapping[Variant, Form]], backend: str, golden: Golden
) -> dict[str, dict[Variant, float]]:
    """Milliseconds that every component takes of a chunk in both forms, inside the whole policy."""
    variants: tuple[Variant, ...] = ("plain", "quantized")
    sessions: dict[str, dict[str, Session]] = {
        variant: {
            name: session for name, found in forms.items() if (session := found.get(variant, found["plain"]).session)
        }
        for variant in variants
    }
    assembled = partial(assemble, source, backend=backend)
    times = component_times(sessions, assembled, golden.samples, rounds=ROUNDS, iterations=ITERATIONS)
    return {name: {variant: times[variant][name] for variant in variants} for name in forms}


def _decide(forms: Mapping[Variant, Form], times: Mapping[Variant, float], needed: float) -> Built:
    """The quantized form when it is as fast as needed, else the plain one, with the measurement as the reason."""
    plain = forms["plain"]
    if "quantized" not in forms:
        return Built("plain", "nothing in it is quantized", plain)
    quantized = forms["quantized"]
    speedup = times["plain"] / times["quantized"]
    facts = (
        f"{speedup:.2f}× as fast as plain ({times['quantized']:.3f} ms), {quantized.size / plain.size:.0%} of its size"
    )
    if speedup >= needed:
        return Built("quantized", facts, quantized)
    return Built("plain", f"quantized it would be {facts}; {needed:g}× as fast was needed", plain)


def _build_only(
    source: Artifact, library: Backend, options: EngineOptions, folder: Path, progress: Progress
) -> dict[str, Built]:
    """Engines for machines other than this one: built from the final graphs, not run."""
    components = {}
    names = source.spec().components
    with progress.task(f"building for {library.name}", len(names)) as task:
        for name in names:
            form = _compile(library, source.graph(_graph_path(source, name, library)), options, folder / name)
            if source.has(plain_path(name)):
                components[name] = Built("quantized", "not run here: its speed is measured on the target", form)
            else:
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
            variant=built.variant, reason=built.reason, files=tuple(paths), precisions=dict(built.form.precisions)
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
