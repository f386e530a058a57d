"""What doctor found, as lines of a width."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

from vlaopt.doctor.checks import Check, Verdict
from vlaopt.doctor.probe import State
from vlaopt.doctor.targets import TargetState, builds_recipes
from vlaopt.machine import Machine
from vlaopt.machine.libraries import DISTRIBUTIONS

YES, NO, UNKNOWN = "✓", "✗", "?"
ABSENT = "not available"
_INDENT = "  "


def show_machine(
    machine: Machine, states: Mapping[str, State], targets: Sequence[TargetState], width: int
) -> list[str]:
    """This machine, the backends on it, and what it does for each target."""
    title = machine.board or f"{machine.cpu or 'a machine'}{f' with {machine.gpu.name}' if machine.gpu else ''}"
    lines = [title, "", *_columns(_facts(machine, states), width), "", "backends"]
    lines += _columns([_backend(state) for state in states.values()], width)
    lines += ["", *_targets(targets, width), ""]
    missing = builds_recipes(machine)
    lines += _filled(
        f"{NO if missing else YES} vlaopt build, from a checkpoint{f': {missing}' if missing else ''}", width
    )
    return [line.rstrip() for line in lines]


def show_verdict(verdict: Verdict, width: int) -> list[str]:
    """One sentence, then what is needed beside what is here."""
    lines = [*_filled(verdict.about, width), *_filled(f"{YES if verdict.will else NO} {verdict.sentence}", width), ""]
    name = max((len(check.what) for check in verdict.checks), default=0)
    for check in verdict.checks:
        lines += _check(check, name, width)
    if verdict.notes:
        lines += ["", *(line for note in verdict.notes for line in _filled(f"note: {note}", width))]
    return [line.rstrip() for line in lines]


def _facts(machine: Machine, states: Mapping[str, State]) -> list[tuple[str, str]]:
    rows = [
        ("system", _joined([machine.os or machine.system, f"kernel {machine.kernel}" if machine.kernel else None])),
        ("architecture", machine.architecture),
        ("Python", machine.python),
        ("CPU", _joined([None if machine.cpu == machine.board else machine.cpu, f"{machine.logical_cores} threads"])),
        ("memory", _memory(machine)),
    ]
    if machine.container:
        rows.insert(1, ("container", machine.container))
    if machine.is_jetson:
        rows.append(("JetPack", f"{machine.jetpack or ABSENT} (Jetson Linux {machine.l4t or ABSENT})"))
        modes = f", of {', '.join(machine.power_modes.values())}" if machine.power_modes else ""
        rows.append(("power mode", f"{machine.power_mode or ABSENT}{modes}"))
    driver = machine.driver
    rows.append(("GPU", _gpus(machine, states)))
    rows.append(("driver", _joined([driver.version, driver.cuda and f"takes CUDA up to {driver.cuda}"]) or ABSENT))
    rows.append(("CUDA", machine.cuda or ABSENT))
    rows.append(("TensorRT", _tensorrt(machine) or ABSENT))
    found = [_library(machine, name) for name in DISTRIBUTIONS if name in machine.libraries]
    rows.append(("libraries", ", ".join(found) or ABSENT))
    absent = [name for name in DISTRIBUTIONS if name not in machine.libraries]
    if absent:
        rows.append(("not installed", ", ".join(absent)))
    return rows


def _memory(machine: Machine) -> str:
    free = None if machine.available_mib is None else f"{_gib(machine.available_mib)} available"
    return _joined([_gib(machine.memory_mib), free]) or ABSENT


def _gpus(machine: Machine, states: Mapping[str, State]) -> str:
    """Each kind of GPU once; where only CUDA tells of one, as a backend asked it, that."""
    found = machine.driver.gpus
    kinds = list(dict.fromkeys(_gpu(gpu.name, gpu.sm, gpu.memory_mib) for gpu in found))
    if kinds:
        return "; ".join(kinds) + (f", {len(found)} of them" if len(found) > 1 else "")
    told = next((state.machine for state in states.values() if "gpu" in state.machine), None)
    return f"{told['gpu']}, SM {told.get('sm', ABSENT)}" if told else ABSENT


def _gpu(name: str, sm: str | None, memory_mib: int | None) -> str:
    memory = _gib(memory_mib) or "shares the machine's memory"
    return _joined([name, f"SM {sm}" if sm else "SM not available", memory])


def _gib(mib: int | None) -> str | None:
    return None if mib is None else f"{mib / 1024:.1f} GiB"


def _tensorrt(machine: Machine) -> str:
    here = machine.tensorrt
    place = f"at {here.trtexec}" if "/" in (here.trtexec or "") else "on the path"
    program = here.trtexec and _joined(["trtexec", here.trtexec_version, place], " ")
    return _joined(
        [
            here.system and f"{here.system} in the system",
            here.python and f"{here.python} in Python",
            here.rtx and f"for RTX {here.rtx}",
            program,
        ]
    )


def _library(machine: Machine, name: str) -> str:
    providers = [provider.removesuffix("ExecutionProvider") for provider in machine.providers]
    told = f" ({', '.join(providers)})" if name == "onnxruntime" and providers else ""
    return f"{name} {machine.libraries[name]}{told}"


def _backend(state: State) -> tuple[str, str]:
    """Whether it builds and runs here; the reason where not."""
    if state.missing:
        return f"{NO} {state.name}", state.missing
    if state.problem:
        return f"{NO} {state.name}", _joined([state.version, f"builds, does not run: {state.problem}"])
    return f"{YES} {state.name}", state.version or ""


def _targets(targets: Sequence[TargetState], width: int) -> list[str]:
    names = max((len(found.target) for found in targets), default=0) + 2
    lines = [f"{'targets':<{names}}  engine  run"]
    for found in targets:
        head = f"{_INDENT}{found.target:<{names - 2}}  {_mark(found.finishes):^6}  {_mark(found.runs):^3}"
        first = next((check for check in found.checks if check.holds is False), None)
        lines += _hanging(f"{head}  ", first.short if first else "", width)
    return lines


def _check(check: Check, name: int, width: int) -> list[str]:
    head = f"{_INDENT}{_mark(check.holds)} {check.what:<{name}}  "
    if check.holds:
        told = f"{head}{check.have} (need {check.need})"
        return [told] if check.have != check.need and len(told) <= width else _hanging(head, check.have, width)
    rows = [("have", check.have), ("need", check.need), *([("mend", check.mend)] if check.mend else [])]
    blank = " " * len(head)
    return [
        line
        for index, (word, text) in enumerate(rows)
        for line in _hanging(f"{blank if index else head}{word}  ", text, width)
    ]


def _mark(holds: bool | None) -> str:
    return UNKNOWN if holds is None else YES if holds else NO


def _joined(parts: Iterable[str | None], between: str = ", ") -> str:
    return between.join(part for part in parts if part)


def _columns(rows: Sequence[tuple[str, str]], width: int) -> list[str]:
    label = max((len(name) for name, _ in rows), default=0)
    return [line for name, text in rows for line in _hanging(f"{_INDENT}{name:<{label}}  ", text, width)]


def _hanging(head: str, text: str, width: int) -> list[str]:
    """`text` behind `head`, its further lines indented as far."""
    room = max(width, len(head) + 24)
    return textwrap.wrap(
        text,
        room,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [head]


def _filled(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, subsequent_indent=_INDENT, break_long_words=False, break_on_hyphens=False)
