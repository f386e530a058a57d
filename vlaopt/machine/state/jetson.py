"""A Jetson by its files: power by rail, temperatures by zone, clocks of GPU and memory, why clocks are held down. Its
cores are read as on any Linux.

A reading of an AGX Orin takes 8 reads over I2C, 0.55 ms each, and about 30 of other files, up to 0.08 ms each: 6 ms,
nearly all of it waiting. Source: github.com/justincdavis/fastnvmetrics, docs/adding_a_board.md, step 7.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from vlaopt.machine.jetson import gpu_clocks, is_jetson
from vlaopt.machine.sources import Sources
from vlaopt.machine.state import Probe, State
from vlaopt.machine.state.jtop import open_jtop
from vlaopt.machine.state.rails import board_of, find_rails, read_watts
from vlaopt.machine.state.sysfs import monitors, read_number, read_numbers
from vlaopt.machine.system import read_text

_OFF_MILLI_C = -256_000
"""What a zone tells whose unit is off, where it does not refuse to be read. Source: lines of tegrastats."""

_SLOWS = re.compile(r"-throttle-alert$|^(thermal-)?(cpu|dev)freq-")
"""Cooling devices that take clocks away; `pwm-fan` and `hot-surface-alert` do not."""


def open_jetson(sources: Sources | None = None) -> Probe | None:
    """The probe of this Jetson: its files or, where these tell no power, jtop's service. None on other machines."""
    sources = sources or Sources()
    if not is_jetson(sources.root):
        return None
    probe = JetsonProbe(sources.root)
    return probe if probe.board else open_jtop(sources) or probe


class JetsonProbe:
    """The files below `root`; what there is of them is found once, when opened.

    Clocks are held where the GPU may run at one only, as jetson_clocks sets it, or its governor is `performance`, which
    keeps it at its highest. Throttling are cooling devices at work, and the alarms that came since the reading before,
    each of which takes clocks away for a moment: on Orin oc1 is low voltage, oc2 average and oc3 instantaneous
    over-current (Jetson Linux Developer Guide, Orin series).
    """

    name = "jetson"

    def __init__(self, root: Path) -> None:
        self._rails = find_rails(root)
        self._zones = {kind: folder / "temp" for kind, folder in _thermal(root, "thermal_zone")}
        self._cooling = {
            kind: folder / "cur_state" for kind, folder in _thermal(root, "cooling_device") if _SLOWS.search(kind)
        }
        self._alarms = _alarms(root)
        self._counts = read_numbers(self._alarms)
        self._gpus = gpu_clocks(root)
        memory = _memory_clock(root)
        self._clocks = {**{gpu.name: gpu / "cur_freq" for gpu in self._gpus}, **memory}
        self.board = board_of(self._rails) if read_watts(self._rails) else ()
        self.missing: Mapping[str, str] = {
            **({} if self.board else {"energy_j": "no power monitor (INA3221, INA238) that can be read"}),
            **({} if memory else {"clocks_mhz": "the clock of the memory (EMC) is for root alone to read"}),
        }

    def read(self) -> State:
        """The state now. A clock of zero is that of a GPU that is off, and left out."""
        zones = read_numbers(self._zones)
        return State(
            clocks_mhz={name: hertz / 1e6 for name, hertz in read_numbers(self._clocks).items() if hertz},
            temperatures_c={zone: milli_c / 1e3 for zone, milli_c in zones.items() if milli_c > _OFF_MILLI_C},
            power_w=read_watts(self._rails),
            throttling=(*self._hot(), *self._alarmed()),
            held=self._held(),
        )

    def close(self) -> None:
        """Nothing stays open between readings."""

    def _hot(self) -> Iterator[str]:
        return (f"temperature ({kind})" for kind, state in read_numbers(self._cooling).items() if state)

    def _alarmed(self) -> list[str]:
        counts, before = read_numbers(self._alarms), self._counts
        self._counts = {**before, **counts}
        return [f"electrical limit ({alarm})" for alarm, count in counts.items() if count > before.get(alarm, count)]

    def _held(self) -> bool | None:
        known = [held for gpu in self._gpus if (held := _is_held(gpu)) is not None]
        return all(known) if known else None


def _is_held(gpu: Path) -> bool | None:
    if read_text(gpu / "governor") == "performance":
        return True
    low, high = read_number(gpu / "min_freq"), read_number(gpu / "max_freq")
    return None if low is None or high is None else low == high


def _alarms(root: Path) -> dict[str, Path]:
    """Files that count alarms, of those that throttle. Source: driver of soctherm-oc-event in Jetson Linux."""
    return {
        file.name.removesuffix("_event_cnt"): file
        for monitor in monitors(root, "soctherm_oc")
        for file in sorted(monitor.glob("oc*_event_cnt"))
        if read_number(file.with_name(file.name.replace("event_cnt", "throt_en"))) != 0
    }


def _thermal(root: Path, prefix: str) -> Iterator[tuple[str, Path]]:
    """The kinds and folders of zones or of cooling devices."""
    for folder in sorted((root / "sys/class/thermal").glob(f"{prefix}[0-9]*")):
        if kind := read_text(folder / "type"):
            yield kind, folder


def _memory_clock(root: Path) -> dict[str, Path]:
    """Thor tells it to all, Orin to root alone."""
    for file in ("sys/class/devfreq/bwmgr/cur_freq", "sys/kernel/debug/bpmp/debug/clk/emc/rate"):
        if read_number(root / file) is not None:
            return {"emc": root / file}
    return {}
