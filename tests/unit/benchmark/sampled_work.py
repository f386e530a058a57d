"""Machines as tests have them read in another process: openers and probes that can be sent there."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from vlaopt.errors import EnvironmentProblem
from vlaopt.machine.state import Probe, Silent, State


class Told:
    """A probe that tells the process it is read in, and how often it was."""

    name = "told"
    board: tuple[str, ...] = ("rail",)
    missing: Mapping[str, str] = {"clocks_mhz": "no clocks"}

    def __init__(self) -> None:
        self.count = 0

    def read(self) -> State:
        self.count += 1
        return State(temperatures_c={"process": float(os.getpid())}, power_w={"rail": float(self.count)})

    def close(self) -> None: ...


class Dying(Told):
    """Its third reading ends the process."""

    def read(self) -> State:
        if self.count == 2:
            os._exit(7)
        return super().read()


class Hanging(Told):
    """Its third reading never ends."""

    def read(self) -> State:
        if self.count == 2:
            time.sleep(600)
        return super().read()


def told() -> list[Probe]:
    return [Told(), Silent("mute", {"energy_j": "no counter", "clocks_mhz": "none either"})]


def dying() -> list[Probe]:
    return [Dying()]


def hanging() -> list[Probe]:
    return [Hanging()]


def refused() -> list[Probe]:
    raise EnvironmentProblem("the driver is not loaded")


def niced() -> list[Probe]:
    """A probe named after the niceness of the process it is in."""
    probe = Told()
    probe.name = f"nice {os.nice(0)}"
    return [probe]
