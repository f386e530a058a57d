"""Where a Jetson's own files tell no power, jtop's service does. Its client here has what jetson-stats 7.2 has."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.machine.sampled import sample
from vlaopt.machine import Sources
from vlaopt.machine.state import Probe
from vlaopt.machine.state.jetson import open_jetson

ORIN_NX = {
    "rail": {
        "VDD_CPU_GPU_CV": {"volt": 5008, "curr": 496, "power": 2483, "online": True, "avg": 2483, "type": "INA3221"},
        "VDD_SOC": {"volt": 5008, "curr": 480, "power": 2403, "online": True, "avg": 2403, "type": "INA3221"},
    },
    "tot": {"volt": 5016, "curr": 2400, "power": 12038, "online": True, "avg": 12038, "name": "VDD_IN"},
}
AGX_ORIN = {
    "rail": {
        "VDD_CPU_CV": {"volt": 12008, "curr": 40, "power": 480, "online": True},
        "VDD_GPU_SOC": {"volt": 12008, "curr": 280, "power": 3362, "online": True},
        "VDDQ_VDD2_1V8AO": {"volt": 4968, "curr": 80, "power": 397, "online": True},
        "VIN_SYS_5V0": {"volt": 4968, "curr": 980, "power": 4868, "online": True},
    },
    "tot": {"power": 9107, "avg": 9107},
}


class Client:
    """As jtop.jtop: nothing is there before it is started, and errors of its thread come out of `ok`."""

    power: Mapping[str, Any] = ORIN_NX
    refused: Exception | None = None

    def __init__(self, interval: float = 1.0) -> None:
        self.closed = False
        self.error: Exception | None = None

    def start(self) -> None:
        if self.refused:
            raise self.refused
        self.temperature = {"tj": {"temp": 55.1, "online": True}, "cv0": {"temp": -256, "online": False}}
        self.gpu = {"gpu": {"type": "integrated", "freq": {"cur": 1_020_000, "min": 306_000, "max": 1_020_000}}}
        self.jetson_clocks: Any = False

    def ok(self, spin: bool = False) -> bool:
        assert spin, "without it the call waits for the next reading of the service"
        if self.error:
            raise self.error
        return not self.closed

    def close(self) -> None:
        self.closed = True


def test_power_is_in_watts_with_the_total_among_its_rails() -> None:
    probe = _opened(Client)
    state = probe.read()
    assert probe.board == ("VDD_IN",)
    assert state.power_w == {"VDD_IN": 12.038, "VDD_CPU_GPU_CV": 2.483, "VDD_SOC": 2.403}
    assert state.clocks_mhz == {"gpu": 1020.0}
    assert state.temperatures_c == {"tj": 55.1}, "a zone that is off is left out"
    assert state.held is False


def test_a_sum_that_counts_a_rail_twice_is_not_taken() -> None:
    class Agx(Client):
        power = AGX_ORIN

    probe = _opened(Agx)
    assert probe.board == ("VDD_CPU_CV", "VDD_GPU_SOC", "VIN_SYS_5V0")
    assert sum(probe.read().power_w[rail] for rail in probe.board) == pytest.approx(8.710)


def test_a_service_that_goes_away_is_told_by_reading() -> None:
    probe = _opened(Client)
    client: Client = probe._client  # type: ignore[attr-defined]
    client.error = ConnectionResetError("Lost connection with jtop server")
    with pytest.raises(ConnectionResetError, match="Lost connection"):
        probe.read()
    probe.close()
    assert client.closed


@pytest.mark.parametrize("refused", [PermissionError(13, "jtop.sock"), RuntimeError("Mismatch version jtop service")])
def test_a_service_that_does_not_answer_leaves_the_files(refused: Exception) -> None:
    class Refusing(Client):
        pass

    Refusing.refused = refused
    probe = _opened(Refusing)
    assert probe.name == "jetson"
    assert "INA3221" in probe.missing["energy_j"]


def test_files_that_tell_power_are_preferred() -> None:
    sources = sample("thor").sources
    probe = open_jetson(Sources(root=sources.root, load=_library(Client)))
    assert probe is not None
    assert probe.name == "jetson"


def _opened(client: type[Client]) -> Probe:
    probe = open_jetson(Sources(root=sample("orin-jetpack7").sources.root, load=_library(client)))
    assert probe is not None
    return probe


def _library(client: type[Client]) -> Any:
    return {"jtop": SimpleNamespace(jtop=client)}.get
