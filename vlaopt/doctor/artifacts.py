"""Whether an artifact's engine loads on this machine, or can be built here."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import PLAN_PATH, Manifest, data_path
from vlaopt.backends.audit import planned_precisions
from vlaopt.doctor.checks import Check, Verdict, blocked
from vlaopt.doctor.loading import check_loading
from vlaopt.doctor.probe import State, state_of
from vlaopt.doctor.targets import check_target, notes, sm_here
from vlaopt.errors import InputError
from vlaopt.machine import Machine
from vlaopt.machine.packages import numbers
from vlaopt.runtime import finished
from vlaopt.stages.engine.forms import needed_mib
from vlaopt.target import MINIMUM_COMPUTE_CAPABILITY, Target

STRANGE = Check(
    what="built by",
    have="another machine, as native code",
    need="this machine",
    holds=None,
    mend="--trust opens it, where you trust whoever built it",
    tasks=("run",),
)
MORE_MEMORY = "close what else needs memory (the desktop, other programs), or add swap"
PORTABLE = "onnxruntime"
"""What runs portable graphs, on any machine."""


@dataclass(frozen=True)
class Wanted:
    """What building an engine asks for: one of the backends, the precisions of the plan, MiB of free memory."""

    backends: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    memory_mib: int = 0


def judge_artifact(artifact: Artifact, machine: Machine, states: Mapping[str, State]) -> Verdict:
    """Whether the engine loads or, where there is none that does, can be built.

    Raises InputError where a file is damaged, or the engine is not built yet and the manifest's recipe is not sound.
    """
    artifact.check()
    here = finished.find(artifact) or artifact
    trusted = _trusted(here)
    try:
        recipe = here.recipe()
    except InputError:
        if here.manifest.engine is None:
            raise
        return judge(here.manifest, None, Wanted(), machine, states, trusted=trusted)
    memory = needed_mib(_largest_graph(artifact.manifest), recipe.engine.tensorrt.workspace_mib)
    wanted = Wanted(recipe.backends(), precisions_of(artifact), memory)
    return judge(here.manifest, recipe.target, wanted, machine, states, trusted=trusted)


def precisions_of(artifact: Artifact) -> tuple[str, ...]:
    """The low precisions that the artifact's layers are planned to compute in."""
    if not artifact.has(PLAN_PATH):
        return ()
    components = json.loads(artifact.read(PLAN_PATH))["components"].values()
    return tuple(sorted({kind for component in components for kind in planned_precisions(component["nodes"]).values()}))


def judge(
    manifest: Manifest,
    target: Target | None,
    wanted: Wanted,
    machine: Machine,
    states: Mapping[str, State],
    *,
    trusted: bool = True,
) -> Verdict:
    """As `judge_artifact`, from a manifest, its target and what building asks for.

    `trusted`: this machine built the engine, or it is no native code.
    """
    about = f"{manifest.name} {manifest.version} for {manifest.target}"
    building = check_building(target, wanted, machine, states) if target else ()
    builds = target is not None and not blocked(building, "finish")
    told = notes(target, machine, states) if target else ()
    if manifest.engine is not None:
        anew = _rebuild(manifest) if builds and not blocked(building, "run") else None
        loading = check_loading(manifest.engine, target, machine, states, mend=anew)
        loading += () if trusted else (STRANGE,)
        if not blocked(loading, "run"):
            return Verdict(about=about, will=True, sentence="its engine loads here", checks=loading, notes=told)
        sentence = "its engine does not load here"
        if anew:
            sentence += f", but one for this machine can be built: {anew}"
        return Verdict(about=about, will=False, sentence=sentence, checks=loading)
    if manifest.finish is None:
        return _portable(about, manifest, states)
    if builds:
        sentence = "its engine can be built here: vlaopt engine ARTIFACT"
        return Verdict(about=about, will=True, sentence=sentence, checks=building, notes=told)
    sentence = "its engine is not built yet, and cannot be built here"
    return Verdict(about=about, will=False, sentence=sentence, checks=building)


def check_building(
    target: Target,
    wanted: Wanted,
    machine: Machine,
    states: Mapping[str, State],
) -> tuple[Check, ...]:
    """The checks of the target, with those backends, of the precisions of the plan, and of the memory to build in."""
    checks = check_target(target, machine, states, wanted.backends or None)
    checks += _precisions(wanted.precisions, machine, states)
    return checks + _building_memory(wanted.memory_mib, target, machine)


def _rebuild(manifest: Manifest) -> str:
    """The command that gives another machine an engine of its own."""
    if manifest.parent:
        return f"vlaopt engine on the artifact {manifest.parent[:12]}, which it was finished from"
    return "vlaopt build RECIPE"


def _building_memory(need: int, target: Target, machine: Machine) -> tuple[Check, ...]:
    """Of the host, and of a GPU that has its own, as stage engine asks before it builds."""
    if not need or target.kind == "cpu":
        return ()
    own = machine.gpu.free_mib if machine.gpu else None
    had = [("free memory", machine.available_mib), *([("free on the GPU", own)] if own is not None else [])]
    return tuple(
        Check(
            what=what,
            have="not available" if free is None else f"{free} MiB",
            need=f"{need} MiB to build the largest component",
            holds=None if free is None else free >= need,
            mend=None if free is None or free >= need else MORE_MEMORY,
            tasks=("finish",),
        )
        for what, free in had
    )


def _largest_graph(manifest: Manifest) -> int:
    """Bytes of the largest graph with its data."""
    sizes = {entry.path: entry.size for entry in manifest.by_role("component", "plain", "placed")}
    return max((size + sizes.get(data_path(path), 0) for path, size in sizes.items()), default=0)


def _trusted(artifact: Artifact) -> bool:
    try:
        finished.check_trust(artifact)
    except InputError:
        return False
    return True


def _portable(about: str, manifest: Manifest, states: Mapping[str, State]) -> Verdict:
    """Of an artifact of a stage before `engine`: its graphs run wherever ONNX Runtime does."""
    state = state_of(PORTABLE, states)
    runs = Check(
        what="backend",
        have=state.problem or f"{PORTABLE} {state.version or ''}".strip(),
        need=PORTABLE,
        holds=state.problem is None,
        mend=f"pip install {PORTABLE}" if state.problem else None,
    )
    sentence = f"it has no engine, being of stage {manifest.stage}; its portable graphs "
    sentence += "run here" if runs.holds else "do not run here"
    return Verdict(about=about, will=state.problem is None, sentence=sentence, checks=(runs,))


def _precisions(wanted: Collection[str], machine: Machine, states: Mapping[str, State]) -> tuple[Check, ...]:
    """Whether this GPU computes in the precisions of the plan; nothing to say where there is none to ask."""
    sm = sm_here(machine, states)
    found: Sequence[tuple[str, tuple[int, int]]] = [
        (name, least) for name, least in MINIMUM_COMPUTE_CAPABILITY.items() if name in wanted
    ]
    if sm is None or not found:
        return ()
    short = [name for name, least in found if numbers(sm) < least]
    return (
        Check(
            what="precisions",
            have=f"SM {sm}, without {', '.join(short)}" if short else f"SM {sm}",
            need=", ".join(name for name, _ in found),
            holds=not short,
            mend="vlaopt build RECIPE with another quantize.scheme" if short else None,
        ),
    )
