"""A Jetson by what jtop's service tells, where its own files cannot be read, as in some containers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlaopt.machine.sources import Sources
from vlaopt.machine.state import Probe, State
from vlaopt.machine.state.rails import board_of

PERIOD_S = 0.5
"""How often the service is asked to read; a reading between two of its own is the one before."""


def open_jtop(sources: Sources) -> Probe | None:
    """Through jetson-stats, where this Python has it, the service answers and is of the same version."""
    library = sources.load("jtop")
    if library is None:
        return None
    try:
        client = library.jtop(interval=PERIOD_S)
        client.start()
        if "tot" in client.power:
            return JtopProbe(client)
        client.close()
    except Exception:  # of many types: the connection's, the service's, the library's own
        pass
    return None


class JtopProbe:
    """A client of jetson-stats, started. It tells powers in mW and clocks in kHz, and a rail that is the total apart.
    Its clock of the memory is left out: where it cannot read one it tells 1 kHz.

    Source: jetson-stats 7.2, jtop/jtop.py, jtop/core/power.py and gpu.py.
    """

    name = "jtop"
    missing: Mapping[str, str] = {"throttling": "jtop does not tell why clocks are held down"}

    def __init__(self, client: Any) -> None:
        self._client = client
        total = client.power["tot"].get("name")
        self.board: tuple[str, ...] = (total,) if total else board_of(client.power["rail"])

    def read(self) -> State:
        """The state that the service read last. Raises what the client does when the service is gone."""
        client = self._client
        client.ok(spin=True)
        clocks = {name: gpu["freq"].get("cur") for name, gpu in client.gpu.items()}
        zones = client.temperature.items()
        return State(
            clocks_mhz={name: kilohertz / 1e3 for name, kilohertz in clocks.items() if kilohertz},
            temperatures_c={name: float(zone["temp"]) for name, zone in zones if zone["online"]},
            power_w=_watts(client.power),
            held=None if client.jetson_clocks is None else bool(client.jetson_clocks),
        )

    def close(self) -> None:
        self._client.close()


def _watts(power: Mapping[str, Any]) -> dict[str, float]:
    total = power["tot"]
    rails = {**power["rail"], **({total["name"]: total} if "name" in total else {})}
    return {name: rail["power"] / 1e3 for name, rail in rails.items()}
