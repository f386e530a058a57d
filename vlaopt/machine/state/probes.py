"""All probes that work on this machine, and their states as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeVar

from vlaopt.machine.sources import Sources
from vlaopt.machine.state import Probe, Silent, State
from vlaopt.machine.state.cpu import open_cpu
from vlaopt.machine.state.jetson import open_jetson
from vlaopt.machine.state.nvml import open_nvml

Value = TypeVar("Value")


def open_probes(sources: Sources | None = None) -> list[Probe]:
    """The probes of this machine; close each. One that cannot be opened says why, and no error ends the others."""
    sources = sources or Sources()
    openers = {"jetson": open_jetson, "cpu": open_cpu, "nvml": open_nvml}
    probes = (_opened(name, opener, sources) for name, opener in openers.items())
    return [probe for probe in probes if probe is not None]


def merged(probes: Sequence[Probe]) -> State:
    """What the probes read now, as one state; what one could not read is left out.

    Clocks are held where all that can tell say so, and not where one says no.
    """
    states = [_read(probe) for probe in probes]
    held = [state.held for state in states if state.held is not None]
    return State(
        clocks_mhz=_union(state.clocks_mhz for state in states),
        temperatures_c=_union(state.temperatures_c for state in states),
        power_w=_union(state.power_w for state in states),
        energy_j=_union(state.energy_j for state in states),
        throttling=tuple(chain.from_iterable(state.throttling for state in states)),
        held=all(held) if held else None,
        gpu_processes=_first(state.gpu_processes for state in states),
        gpu_memory_mib=_first(state.gpu_memory_mib for state in states),
    )


def missing(probes: Sequence[Probe]) -> dict[str, str]:
    """Why fields of `State` are not told, by their names; reasons of several probes one after the other."""
    reasons: dict[str, list[str]] = {}
    for name, reason in (pair for probe in probes for pair in probe.missing.items()):
        reasons.setdefault(name, []).append(reason)
    return {name: "; ".join(told) for name, told in reasons.items()}


def _opened(name: str, opener: Callable[[Sources], Probe | None], sources: Sources) -> Probe | None:
    try:
        return opener(sources)
    except Exception as error:  # whatever a driver's library raises, the other probes work
        return Silent(name, {"energy_j": f"{name} cannot be asked: {error}"})


def _read(probe: Probe) -> State:
    try:
        return probe.read()
    except Exception:  # a measurement goes on without this reading
        return State()


def _union(mappings: Iterable[Mapping[str, Value]]) -> dict[str, Value]:
    return {name: value for mapping in mappings for name, value in mapping.items()}


def _first(values: Iterable[Value | None]) -> Value | None:
    return next((value for value in values if value is not None), None)
