"""Whether this machine is one of a target's class: builds its engines, runs them; else what is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from vlaopt.doctor.checks import Check, Verdict, blocked
from vlaopt.doctor.probe import State, state_of
from vlaopt.machine import Machine
from vlaopt.machine.packages import numbers
from vlaopt.target import Target

KEPT_BACK = 0.88
"""Share of a machine's memory that its system counts at least: firmware and carve-outs take the rest.

An Orin Nano with 8192 MiB counts 7620, an AGX Orin with 65536 counts 62841, a Thor with 131072 counts 125772.
"""

BRINGS = {
    "onnxruntime": "pip install onnxruntime",
    "onnxruntime-cuda": "pip install 'vlaopt[gpu]'",
    "onnxruntime-tensorrt": "pip install 'vlaopt[gpu]'",
    "openvino": "pip install 'vlaopt[cpu]'",
    "tensorrt": "pip install 'vlaopt[tensorrt]'",
    "tensorrt-rtx": "pip install 'vlaopt[rtx]'",
}
BRINGS_ON_JETSON = {
    "tensorrt": "sudo apt-get install python3-libnvinfer, and a virtual environment with --system-site-packages",
    "trtexec": "sudo apt-get install libnvinfer-bin",
}
SENTENCES = {
    (True, True): "this machine builds its engines and runs them",
    (True, False): "this machine builds its engines, and does not run them",
    (False, True): "this machine runs its engines, and does not build them",
    (False, False): "this machine neither builds its engines nor runs them",
}
BUILD_LIBRARIES = ("torch", "onnx")
"""Without them `vlaopt build` cannot start from a checkpoint."""


class TargetState(BaseModel):
    """What this machine does for one target, and why not more."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    finishes: bool
    runs: bool
    checks: tuple[Check, ...]


def builds_recipes(machine: Machine) -> str | None:
    """None where `vlaopt build` has what it needs to start from a checkpoint, else what is missing."""
    absent = [name for name in BUILD_LIBRARIES if name not in machine.libraries]
    return f"{' and '.join(absent)} not installed: pip install 'vlaopt[build]'" if absent else None


def examine(target: Target, machine: Machine, states: Mapping[str, State]) -> TargetState:
    """The checks of a target, and what follows."""
    checks = check_target(target, machine, states)
    return TargetState(
        target=target.name,
        finishes=not blocked(checks, "finish"),
        runs=not blocked(checks, "run"),
        checks=checks,
    )


def judge(target: Target, machine: Machine, states: Mapping[str, State]) -> Verdict:
    """Whether this machine runs engines of the target."""
    found = examine(target, machine, states)
    return Verdict(
        about=f"{target.name}: {target.description or 'a target'}",
        will=found.runs,
        sentence=SENTENCES[found.finishes, found.runs],
        checks=found.checks,
        notes=notes(target, machine, states) if found.runs else (),
    )


def notes(target: Target, machine: Machine, states: Mapping[str, State]) -> tuple[str, ...]:
    """What decides nothing but should be known before a measurement."""
    found = []
    working = [state for state in (state_of(name, states) for name in target.backends) if state.problem is None]
    if working and not any(state.timed for state in working):
        names = " and ".join(state.name for state in working)
        found.append(f"{names} gives actions alone: nothing can be measured without another of the target's backends")
    if machine.power_mode and target.power_modes and machine.power_mode != target.power_modes[-1]:
        highest = target.power_modes[-1]
        mode = next((f" -m {number}" for number, name in machine.power_modes.items() if name == highest), "")
        found.append(f"the power mode is {machine.power_mode}; the highest is {highest}: sudo nvpmodel{mode}")
    return tuple(found)


def check_target(
    target: Target, machine: Machine, states: Mapping[str, State], wanted: Sequence[str] | None = None
) -> tuple[Check, ...]:
    """Every check of a target; `wanted` are its backends that may be used, by default all."""
    names = tuple(wanted or target.backends)
    checks = [_architecture(target, machine)]
    if target.cpu_features:
        lacks = target.cpu_lacks(machine.cpu_features) is not None
        checks.append(
            Check(
                what="CPU features",
                have="not there" if lacks else "there",
                need=" and ".join(target.cpu_features).replace("|", "or"),
                holds=not lacks,
                mend="take target cpu-x86, for CPUs without them" if lacks else None,
            )
        )
    if target.kind != "cpu":
        checks.append(_gpu(target, machine, states, names))
    checks.append(_library(target, machine, states, names))
    if target.kind != "cpu":
        checks.append(_driver(target, machine, states, names))
    if target.tensorrt:
        checks.append(_tensorrt(target, machine, states, names))
    if target.memory_mib:
        checks.append(_memory(target, machine))
    elsewhere = target.engine_built_on == "target" and any(check.mend == _elsewhere(target) for check in checks)
    return tuple(_without_mending(check, target) if elsewhere else check for check in checks)


def _elsewhere(target: Target) -> str:
    return f"run vlaopt on a machine of the class: {target.description or target.name}"


def _without_mending(check: Check, target: Target) -> Check:
    """Nothing that is installed makes another machine of this one."""
    return check if check.mend == _elsewhere(target) else check.model_copy(update={"mend": None})


def _architecture(target: Target, machine: Machine) -> Check:
    same = machine.architecture == target.arch
    return Check(
        what="architecture",
        have=machine.architecture,
        need=target.arch,
        holds=same,
        mend=None if same else _elsewhere(target),
        tasks=("run",) if target.engine_built_on == "any" else ("finish", "run"),
    )


def _library(target: Target, machine: Machine, states: Mapping[str, State], names: Sequence[str]) -> Check:
    """One of the backends is installed and, where it needs no GPU, runs."""
    asked = [state_of(name, states) for name in names]
    faults = [state.missing or (state.problem if target.kind == "cpu" else None) for state in asked]
    here = [state for state, fault in zip(asked, faults, strict=True) if fault is None]
    others = f"; no {' or '.join(names[1:])} either" if names[1:] else ""
    needed = ", ".join(names[:-1]) + " or " + names[-1] if names[1:] else names[0]
    return Check(
        what="backend",
        have=", ".join(f"{state.name} {state.version or ''}".strip() for state in here) or f"{faults[0]}{others}",
        need=needed,
        holds=bool(here),
        mend=None if here else _brings(target, machine, names),
        brief=None if here else f"backend: none; needed: {needed}",
    )


def _brings(target: Target, machine: Machine, names: Sequence[str]) -> str | None:
    first = names[0]
    if target.kind != "jetson":
        return BRINGS.get(first)
    if first == "tensorrt" and machine.tensorrt.system and machine.architecture == target.arch:
        return "a virtual environment with --system-site-packages: TensorRT is in the system already"
    return BRINGS_ON_JETSON.get(first, BRINGS.get(first))


def sm_here(machine: Machine, states: Mapping[str, State], names: Sequence[str] = ()) -> str | None:
    """Compute capability of the GPU, from the driver or a backend that asked CUDA."""
    told = (states[name].machine.get("sm") for name in (*names, *states) if name in states)
    return (machine.gpu.sm if machine.gpu else None) or next(filter(None, told), None)


def _gpu(target: Target, machine: Machine, states: Mapping[str, State], names: Sequence[str]) -> Check:
    sm = sm_here(machine, states, names)
    told_by_cuda = next((state.machine["gpu"] for state in states.values() if "gpu" in state.machine), None)
    name = machine.gpu.name if machine.gpu else told_by_cuda
    fits = sm in target.compute_capabilities if sm else (None if name else False)
    told = f"SM {sm}" if sm else "SM not known"
    have = f"{name}, {told}" if name else (told if sm else "none of NVIDIA's is seen")
    return Check(
        what="GPU",
        have=have,
        need=f"SM {', '.join(target.compute_capabilities)}",
        holds=fits,
        mend=_elsewhere(target) if sm and not fits else None,
        tasks=("run",) if target.engine_built_on == "any" else ("finish", "run"),
    )


def _driver(target: Target, machine: Machine, states: Mapping[str, State], names: Sequence[str]) -> Check:
    """One of the installed backends finds what it needs to run; and the target's driver, where it names one."""
    installed = [state for state in (state_of(name, states) for name in names) if state.missing is None]
    version = machine.driver.version
    problem = next((state.problem for state in installed if state.problem), None)
    works = any(state.problem is None for state in installed)
    new_enough = not target.driver or (version is not None and numbers(version) >= numbers(target.driver))
    if not works and not installed:
        works = version is not None  # nothing installed could ask it: its own file says that it is there
    have = version or ("works" if works else "none found")
    return Check(
        what="driver",
        have=have if works or not problem else f"{have}: {problem}" if version else problem,
        need=f"NVIDIA's, {target.driver} or newer" if target.driver else "NVIDIA's, and a GPU that it shows",
        holds=works and new_enough,
        mend=None if works and new_enough else "install NVIDIA's driver, then look whether `nvidia-smi` lists the GPU",
        tasks=("run",) if target.engine_built_on == "any" else ("finish", "run"),
    )


def _tensorrt(target: Target, machine: Machine, states: Mapping[str, State], names: Sequence[str]) -> Check:
    """A backend drives one of the target's range; no matter where one that works drives none."""
    asked = [state_of(name, states) for name in names]
    told = [state.machine["tensorrt"] for state in asked if "tensorrt" in state.machine]
    found = [*told, *filter(None, (machine.tensorrt.python, machine.tensorrt.system))]
    fitting = next((version for version in told or found if target.takes_tensorrt(version)), None)
    spared = any(state.problem is None and "tensorrt" not in state.machine for state in asked)
    mend = f"pip install 'tensorrt{target.tensorrt}'"
    if target.kind == "jetson":
        mend = f"install JetPack {target.jetpack or 'of the target'}, which brings it"
    return Check(
        what="TensorRT",
        have=fitting or next(iter(found), "none found"),
        need=str(target.tensorrt),
        holds=True if fitting else None if spared else False,
        mend=None if fitting else mend,
    )


def _memory(target: Target, machine: Machine) -> Check:
    """The machine's on a Jetson and a CPU, else the GPU's own."""
    shared = target.kind != "gpu" or machine.is_jetson
    have = machine.memory_mib if shared else (machine.gpu.memory_mib if machine.gpu else None)
    need = target.memory_mib or 0
    return Check(
        what="memory",
        have="not available" if have is None else f"{have} MiB",
        need=f"{need} MiB, less what the system keeps",
        holds=None if have is None else have >= KEPT_BACK * need,
    )
