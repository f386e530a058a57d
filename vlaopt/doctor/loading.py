"""What opening an engine asks of this machine, beside what is here. No engine is opened to find out."""

from __future__ import annotations

from collections.abc import Mapping

from vlaopt.artifact.manifest import EngineEntry
from vlaopt.backends import misfits
from vlaopt.doctor.checks import Check
from vlaopt.doctor.probe import State, state_of
from vlaopt.doctor.targets import check_target
from vlaopt.machine import Machine
from vlaopt.target import Target

_OF_TARGET = ("architecture", "CPU features", "backend", "GPU")
_MIB = 1 << 20


def check_loading(
    engine: EngineEntry,
    target: Target | None,
    machine: Machine,
    states: Mapping[str, State],
    *,
    mend: str | None = None,
) -> tuple[Check, ...]:
    """Its target's machines, its backend, the needs of its components, its memory.

    `mend` is what helps where a need is not met. `target` is None where the manifest's recipe is of another vlaopt: the
    needs say enough to refuse.
    """
    state = state_of(engine.backend, states)
    asked = check_target(target, machine, states, (engine.backend,)) if target else ()
    checks = [check for check in asked if check.what in _OF_TARGET]
    if target is None or state.missing is None:
        works = f"{engine.backend} works"
        driver = next((check.mend for check in asked if check.what == "driver"), None)
        fault = state.problem
        checks.append(
            Check(what="runs", have=fault or works, need=works, holds=fault is None, mend=driver if fault else None)
        )
    checks += check_needs(engine, state, mend)
    if memory := check_memory(engine, machine, of_its_own=target is not None and target.kind == "gpu"):
        checks.append(memory)
    return tuple(check.model_copy(update={"tasks": ("run",)}) for check in checks)


def check_needs(engine: EngineEntry, state: State, mend: str | None) -> list[Check]:
    """Each need of any component once, beside what the backend says that this machine has."""
    needs: dict[tuple[str, str], None] = {}
    for component in engine.components.values():
        needs |= dict.fromkeys(component.needs.items())
    checks = []
    for what, needed in needs:
        missed = misfits({what: needed}, state.machine)
        have = state.machine.get(what, "not known")
        mended = mend if missed else None
        checks.append(Check(what=f"engine: {what}", have=have, need=needed, holds=not missed, mend=mended))
    return checks


def check_memory(engine: EngineEntry, machine: Machine, of_its_own: bool) -> Check | None:
    """Whether weights and activations fit into what is free; None where the engine does not tell what it takes.

    `of_its_own`: in the GPU's memory, where that is known.
    """
    facts = [component.facts for component in engine.components.values()]
    taken = sum(fact.get(name) or 0 for fact in facts for name in ("weights_bytes", "activation_bytes"))
    if not taken:
        return None
    own = machine.gpu.free_mib if machine.gpu and of_its_own else None
    free = machine.available_mib if own is None else own
    need = -(-int(taken) // _MIB)
    return Check(
        what="free memory",
        have="not available" if free is None else f"{free} MiB",
        need=f"{need} MiB for weights and activations",
        holds=None if free is None else free >= need,
        mend="end programs that hold memory" if free is not None and free < need else None,
    )
