"""The power rails of a Jetson: the files that measure each, and which of them together are the board."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from vlaopt.machine.state.sysfs import monitors, read_number
from vlaopt.machine.system import read_text

TOTALS = ("VIN", "VDD_IN")
"""Rails that feed all others: the carrier's on Thor, the module's on Orin NX and Nano.

Source: Jetson Linux Developer Guide, "Software-Based Power Consumption Modeling".
"""

FED_BY_ANOTHER = ("VDDQ_VDD2_1V8AO",)
"""The memory of an AGX Orin hangs on VIN_SYS_5V0, which counts it. Source: the same."""

Rails = dict[str, tuple[Path, ...]]
"""By a rail's label, the files whose numbers multiplied are its power in µW: mV and mA, or µW alone."""


def find_rails(root: Path) -> Rails:
    """The rails that are measured.

    Channels 1 to 3 of an INA3221 are rails, unless they are off or not connected; 4 to 7 are voltages of its shunts
    and their sum. An INA238 has one, and multiplies itself. Source: Documentation/hwmon/ina3221 and ina238 of Linux.
    """
    rails: Rails = {}
    for monitor in monitors(root, "ina3221"):
        for channel in (1, 2, 3):
            label = read_text(monitor / f"in{channel}_label")
            if label and label != "NC" and read_number(monitor / f"in{channel}_enable") != 0:
                rails[label] = (monitor / f"in{channel}_input", monitor / f"curr{channel}_input")
    for monitor in monitors(root, "ina238"):
        if label := read_text(monitor / "label"):
            rails[label] = (monitor / "power1_input",)
    return rails


def board_of(labels: Iterable[str]) -> tuple[str, ...]:
    """Of these rails, those that together are the board: the one that feeds all, else each that no other feeds."""
    labels = tuple(labels)
    total = tuple(rail for rail in TOTALS if rail in labels)[:1]
    return total or tuple(rail for rail in labels if rail not in FED_BY_ANOTHER)


def read_watts(rails: Rails) -> dict[str, float]:
    """The power of each rail now, in W, without those that cannot be read this time."""
    watts = {label: _watts(files) for label, files in rails.items()}
    return {label: value for label, value in watts.items() if value is not None}


def _watts(files: Sequence[Path]) -> float | None:
    microwatts = 1
    for file in files:
        number = read_number(file)
        if number is None:
            return None
        microwatts *= number
    return microwatts / 1e6
