"""Whether an artifact's engine loads on this machine, or can be built here; no engine is opened to find out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import PLAN_PATH, EngineEntry, Manifest
from vlaopt.backends import misfits
from vlaopt.backends.audit import planned_precisions
from vlaopt.doctor.checks import Check, Verdict, blocked
from vlaopt.doctor.probe import State
from vlaopt.doctor.targets import check_target, notes, sm_here
from vlaopt.machine import Machine
from vlaopt.machine.packages import numbers
from vlaopt.target import MINIMUM_COMPUTE_CAPABILITY, Target

PORTABLE = "onnxruntime"
"""What runs portable graphs, on any machine."""
_MIB = 1 << 20


def judge_artifact(artifact: Artifact, machine: Machine, states: Mapping[str, State]) -> Verdict:
    """Whether the engine loads or, where there is none that does, can be built.

    Raises InputError where a file is damaged or the manifest holds no sound recipe.
    """
    artifact.check()
    return judge(artifact.manifest, artifact.recipe().target, precisions_of(artifact), machine, states)


def precisions_of(artifact: Artifact) -> tuple[str, ...]:
    """The low precisions that the artifact's layers are planned to compute in."""
    if not artifact.has(PLAN_PATH):
        return ()
    components = json.loads(artifact.read(PLAN_PATH))["components"].values()
    return tuple(sorted({kind for component in components for kind in planned_precisions(component["nodes"]).values()}))


def judge(
    manifest: Manifest, target: Target, precisions: Collection[str], machine: Machine, states: Mapping[str, State]
) -> Verdict:
    """As `judge_artifact`, from a manifest, its target and the low precisions of its plan."""
    building = check_target(target, machine, states, (manifest.finish.backend,) if manifest.finish else None)
    building += _precisions(precisions, machine, states)
    about = f"{manifest.name} {manifest.version} for {manifest.target}"
    told = notes(target, machine)
    if manifest.engine is None and manifest.finish is None:
        return _portable(about, manifest, states)
    if manifest.engine is None:
        builds = not blocked(building, "finish")
        sentence = (
            "its engine can be built here: vlaopt engine ARTIFACT"
            if builds
            else "its engine is not built yet, and cannot be built here"
        )
        return Verdict(about=about, will=builds, sentence=sentence, checks=building, notes=told)
    loading = _loading(manifest, manifest.engine, target, machine, states)
    if not blocked(loading, "run"):
        return Verdict(about=about, will=True, sentence="its engine loads here", checks=loading, notes=told)
    if not blocked(building, "finish") and not blocked(building, "run"):
        sentence = f"its engine does not load here, but one for this machine can be built: {_rebuild(manifest)}"
        return Verdict(about=about, will=False, sentence=sentence, checks=loading, notes=told)
    sentence = "its engine does not load here"
    known = {check.what for check in loading}
    checks = loading + tuple(check for check in building if check.what not in known)
    return Verdict(about=about, will=False, sentence=sentence, checks=checks, notes=told)


def _portable(about: str, manifest: Manifest, states: Mapping[str, State]) -> Verdict:
    """Of an artifact of a stage before `engine`: its graphs run wherever ONNX Runtime does."""
    state = states.get(PORTABLE) or State(name=PORTABLE, missing="not in this vlaopt", problem="not in this vlaopt")
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


def _rebuild(manifest: Manifest) -> str:
    """The command that gives another machine an engine of its own."""
    if manifest.parent:
        return f"vlaopt engine on the artifact {manifest.parent[:12]}, which it was finished from"
    return "vlaopt build RECIPE"


def _loading(
    manifest: Manifest, engine: EngineEntry, target: Target, machine: Machine, states: Mapping[str, State]
) -> tuple[Check, ...]:
    """What opening the engine asks of this machine: its backend, its needs, its target's CPU, its memory."""
    state = states.get(engine.backend) or State(
        name=engine.backend, missing="not in this vlaopt", problem="not in this vlaopt"
    )
    asked = check_target(target, machine, states, (engine.backend,))
    checks = [check for check in asked if check.what in ("architecture", "CPU features", "backend", "GPU")]
    if state.missing is None:
        checks.append(
            Check(
                what="runs here",
                have=state.problem or "yes",
                need=f"{engine.backend} finds all it runs on",
                holds=state.problem is None,
                mend=_mend_of(asked, "driver") if state.problem else None,
                tasks=("run",),
            )
        )
    checks += _needs(engine, state, _rebuild(manifest))
    if memory := _memory(engine, target, machine):
        checks.append(memory)
    return tuple(check.model_copy(update={"tasks": ("run",)}) for check in checks)


def _needs(engine: EngineEntry, state: State, rebuild: str) -> list[Check]:
    """Each need of any component once, beside what the backend says that this machine has."""
    needs: dict[tuple[str, str], None] = {}
    for component in engine.components.values():
        needs |= dict.fromkeys(component.needs.items())
    checks = []
    for what, needed in needs:
        missed = misfits({what: needed}, state.machine)
        checks.append(
            Check(
                what=what,
                have=state.machine.get(what, "not known"),
                need=needed,
                holds=not missed,
                mend=f"{rebuild}, here" if missed else None,
                tasks=("run",),
            )
        )
    return checks


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


def _memory(engine: EngineEntry, target: Target, machine: Machine) -> Check | None:
    """Whether weights and activations fit into what is free; None where the engine does not tell what it takes."""
    facts = [component.facts for component in engine.components.values()]
    taken = sum(fact.get(name, 0) for fact in facts for name in ("weights_bytes", "activation_bytes"))
    if not taken:
        return None
    own = machine.gpu.free_mib if machine.gpu and target.kind == "gpu" else None
    free = machine.available_mib if own is None else own
    need = -(-int(taken) // _MIB)
    return Check(
        what="free memory",
        have="not available" if free is None else f"{free} MiB",
        need=f"{need} MiB for weights and activations",
        holds=None if free is None else free >= need,
        mend="end programs that hold memory" if free is not None and free < need else None,
    )


def _mend_of(checks: Sequence[Check], what: str) -> str | None:
    return next((check.mend for check in checks if check.what == what), None)
