"""Sessions that compute what a function says, and a flow-matching policy over them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import pytest

from tests.unit.benchmark.conftest import FakeClock
from vlaopt.artifact.policy_spec import (
    Chunk,
    Component,
    EulerLoop,
    Noise,
    NormaliseProcessor,
    PolicySpec,
    TensorSpec,
    Unnormalise,
)
from vlaopt.runtime.policy import Policy
from vlaopt.runtime.processors import Processors
from vlaopt.tensors import Array, pack


class FakeSession:
    """A session that computes `function(**feeds)`; remembers the feeds of every call, and what may stay in it."""

    inputs = ()
    outputs = ()

    def __init__(self, function: Callable[..., dict[str, Array]]) -> None:
        self.function = function
        self.calls: list[dict[str, Array]] = []

    def run(self, feeds: Mapping[str, Array], resident: Collection[str] = ()) -> dict[str, Array]:
        self.resident = set(resident)
        self.calls.append({name: value.copy() for name, value in feeds.items()})
        return self.function(**feeds)


class WorkingSession(FakeSession):
    """One whose calls take `ms` of a clock that moves only when somebody works."""

    def __init__(self, clock: FakeClock, ms: float, function: Callable[..., dict[str, Array]]) -> None:
        super().__init__(function)
        self.clock, self.ms = clock, ms

    def run(self, feeds: Mapping[str, Array], resident: Collection[str] = ()) -> dict[str, Array]:
        self.clock.work(self.ms)
        return super().run(feeds, resident)


def flow_spec(*, steps: int = 4, start: float = 0.0, end: float = 1.0, **noise: Any) -> PolicySpec:
    """joints → eye → prefix → flow (x, t, prefix → v); two two-dof actions; statistics that change nothing."""

    def tensor(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=shape)

    x, t, prefix = tensor("x", 1, 2, 2), tensor("t", 1), tensor("prefix", 1, 2)
    return PolicySpec(
        type="flow",
        action_dim=2,
        control_hz=10,
        components={
            "aflow": Component(kind="step", inputs=(x, t, prefix), outputs=(tensor("v", 1, 2, 2),)),
            "eye": Component(kind="prefix", inputs=(tensor("state", 1, 2),), outputs=(prefix,)),
        },
        loop=EulerLoop(
            steps=steps, start=start, end=end, step="aflow", state_input="x", time_input="t", velocity_output="v"
        ),
        noise=Noise(**{"law": "normal", "shape": (1, 2, 2), **noise}),
        chunk=Chunk(size=2, n_action_steps=2),
        preprocess=(NormaliseProcessor(input="joints", output="state", size=2, statistics="unit"),),
        postprocess=Unnormalise(input="x", statistics="unit"),
    )


def unit_statistics(name: str) -> bytes:
    """Statistics that change nothing, for any asset name."""
    return pack({"unit.mean": np.zeros(2, np.float32), "unit.std": np.ones(2, np.float32)})


Velocity = Callable[[Array, Array], Array]


def flow_policy(spec: PolicySpec, velocity: Velocity) -> tuple[Policy, dict[str, FakeSession]]:
    """A policy of `flow_spec` whose velocity is `velocity(x, t)`, and its sessions."""
    sessions = {
        "aflow": FakeSession(lambda x, t, prefix: {"v": velocity(x, t)}),
        "eye": FakeSession(lambda state: {"prefix": state * 2}),
    }
    return Policy(spec, Processors(spec, unit_statistics), sessions, backend="fake", seed=7), sessions


@pytest.fixture(scope="session")
def flow() -> Any:
    """Makes a policy of the flow-matching kind: `flow(velocity, steps=…, start=…, end=…, law=…, seed=…)`."""
    return lambda velocity, **fields: flow_policy(flow_spec(**fields), velocity)


@pytest.fixture(scope="session")
def fake_session() -> type[FakeSession]:
    return FakeSession
