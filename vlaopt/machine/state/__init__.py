"""What a machine does at the moment: clocks, temperatures, power, throttling. One interface for every probe.

A probe reads one source, such as NVML or the files of a Jetson. What is missing is absent from a `State`, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class State:
    """One reading. Names are the source's own, such as `cpu-thermal` or `VDD_IN`; a probe's names are no other's.

    `power_w` are rails or cards that tell their power of the moment, `energy_j` counters that only grow (wraps are
    the probe's to undo). `throttling` are the reasons why clocks are held down now, as words; those of a graphics card
    begin with `GPU`. `held` is whether the clocks are locked (None: not known). `gpu_processes` are other programs on
    the GPU, `gpu_memory_mib` what is used of its memory by all.
    """

    clocks_mhz: Mapping[str, float] = field(default_factory=dict)
    temperatures_c: Mapping[str, float] = field(default_factory=dict)
    power_w: Mapping[str, float] = field(default_factory=dict)
    energy_j: Mapping[str, float] = field(default_factory=dict)
    throttling: tuple[str, ...] = ()
    held: bool | None = None
    gpu_processes: int | None = None
    gpu_memory_mib: float | None = None


class Probe(Protocol):
    """One source of states. Opened when made, read as often as wanted, closed once."""

    name: str
    board: tuple[str, ...]
    """Of `power_w` or `energy_j`, the names that together are what this source counts of the machine, each part once:
    a Jetson's VDD_IN, or the sum of its rails where there is none; the packages of RAPL. Empty: it tells no energy."""
    missing: Mapping[str, str]
    """What this source has and does not tell, by the field of `State`, with the reason in words:
    `{"energy_j": "RAPL counters cannot be read: Permission denied"}`. Known when the probe is opened."""

    def read(self) -> State:
        """The state now. What cannot be read this time is left out."""
        ...

    def close(self) -> None: ...


@dataclass
class Silent:
    """A source that is there and tells nothing, and why."""

    name: str
    missing: Mapping[str, str]
    board: tuple[str, ...] = ()

    def read(self) -> State:
        return State()

    def close(self) -> None:
        """Nothing is open."""
