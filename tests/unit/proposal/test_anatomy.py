"""What a component costs is counted from what it really uses."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn

from tests import toy_flow
from vlaopt.errors import StageError
from vlaopt.policies.edge_vla.adapter import ADAPTER
from vlaopt.proposal.anatomy import Anatomy, examine

CHECKPOINT = Path(__file__).parents[3] / "recipes/edge-vla/checkpoint"


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> toy_flow.EagerToyFlow:
    """A flow policy of three components with five steps, some of whose weights nothing uses."""
    folder = tmp_path_factory.mktemp("toy")
    toy_flow.make(folder)
    policy = toy_flow.ToyFlowAdapter().load(folder / "checkpoint", {}, {})
    policy.module.dead = nn.Linear(7, 11)
    return policy


@pytest.fixture(scope="module")
def flow(eager: toy_flow.EagerToyFlow) -> tuple[dict[str, Anatomy], int]:
    components, unused = examine(eager)
    return {component.name: component for component in components}, unused


def test_every_component_is_there_in_the_order_it_runs() -> None:
    eager = ADAPTER.load(CHECKPOINT, {}, {})
    components, unused = examine(eager)
    assert [component.name for component in components] == eager.spec.order()
    assert sum(component.parameters for component in components) == sum(p.numel() for p in eager.module.parameters())
    assert unused == 0


def test_products_are_counted_and_lookups_are_not() -> None:
    components, _ = examine(ADAPTER.load(CHECKPOINT, {}, {}))
    head = next(component for component in components if component.name == "head")
    language = next(component for component in components if component.name == "language")
    assert head.layers == ("layers.0", "layers.2", "output")
    module = ADAPTER.load(CHECKPOINT, {}, {}).module
    assert head.macs == sum(module.head.get_submodule(path).weight.numel() for path in head.layers)
    assert language.layers == ()
    assert language.macs > 0


def test_only_the_loops_step_is_called_more_than_once(flow: tuple[dict[str, Anatomy], int]) -> None:
    components, _ = flow
    assert {name: component.calls for name, component in components.items()} == {
        name: toy_flow.STEPS if name == "step" else 1 for name in toy_flow.spec().components
    }
    assert components["step"].macs_per_chunk == toy_flow.STEPS * components["step"].macs


def test_weights_that_no_component_uses_are_found(flow: tuple[dict[str, Anatomy], int]) -> None:
    assert flow[1] >= 7 * 11 + 11


def test_a_component_that_cannot_run_is_an_error(eager: toy_flow.EagerToyFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = {**eager.components(), "vision": nn.Linear(3, 3)}
    monkeypatch.setattr(eager, "components", lambda: broken)
    with pytest.raises(StageError, match="component 'Linear' cannot run"):
        examine(eager)


def test_nothing_is_left_hooked(eager: toy_flow.EagerToyFlow, flow: tuple[dict[str, Anatomy], int]) -> None:
    assert [hook for module in eager.module.modules() for hook in module._forward_hooks.values()] == []
