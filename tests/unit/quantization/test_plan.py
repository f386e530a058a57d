"""The plan says for every layer what it runs in and why; rules decide by scope, the last one that matches."""

from __future__ import annotations

import pytest
from onnx import ModelProto

from vlaopt.errors import InputError
from vlaopt.quantization.plan import (
    ComponentPlan,
    NodePlan,
    QuantizationPlan,
    Rules,
    calibrated_tensors,
    plan_nodes,
)


def planned(network: ModelProto, rules: Rules = (), scheme: str = "int8") -> dict[str, str]:
    nodes = plan_nodes({"vision": network}, scheme=scheme, rules=rules)["vision"]  # type: ignore[arg-type]
    return {name: node.scheme for name, node in nodes.items()}


def test_layers_too_small_to_gain_stay_fp32_and_say_so(network: ModelProto) -> None:
    nodes = plan_nodes({"vision": network}, scheme="int8")["vision"]
    assert nodes["block.depthwise/Conv"].scheme == "fp32"
    assert "too few, 8-bit pays from 32" in nodes["block.depthwise/Conv"].reason


def test_a_rule_covers_a_module_and_all_inside_and_the_last_one_wins(network: ModelProto) -> None:
    schemes = planned(network, [("vision", "int8"), ("vision.block*", "fp32"), ("vision.output", "int8-weights")])
    assert schemes == {
        "stem/Conv": "int8",
        "block.depthwise/Conv": "fp32",
        "project/Gemm": "int8",
        "output/MatMul": "int8-weights",
    }
    assert set(planned(network, [("vision.output", "fp32"), ("vision", "int8")]).values()) == {"int8"}


def test_a_rule_can_name_one_node(network: ModelProto) -> None:
    assert planned(network, [("vision.project/Gemm", "int8")])["project/Gemm"] == "int8"


def test_a_rule_that_matches_nothing_names_the_nearest_layer(network: ModelProto) -> None:
    with pytest.raises(InputError, match=r"scope 'vision.projct' matches no layer") as caught:
        planned(network, [("vision.projct", "fp32")])
    assert caught.value.hint == "the nearest layer is 'vision.project'"


def test_recurrent_cells_store_int8_only_when_asked(recurrent: ModelProto) -> None:
    assert set(planned(recurrent).values()) == {"fp32"}
    nodes = plan_nodes({"vision": recurrent}, scheme="int8", rules=[("vision", "int8")])["vision"]
    assert {node.scheme for node in nodes.values()} == {"int8-weights"}
    assert "only the weights of LSTM can be int8" in nodes["lstm/LSTM"].reason


def test_a_rule_that_no_layer_can_keep_is_refused(network: ModelProto, recurrent: ModelProto) -> None:
    with pytest.raises(InputError, match=r"nothing that scope 'vision.stem' matches can be int8-dynamic"):
        planned(network, [("vision.stem", "int8-dynamic")])
    with pytest.raises(InputError, match=r"can be int8-dynamic: only the weights of Gather"):
        planned(recurrent, [("vision", "int8-dynamic")])


def test_dynamic_int8_needs_no_ranges(network: ModelProto) -> None:
    nodes = plan_nodes({"vision": network}, scheme="int8-dynamic", rules=[("vision", "int8-dynamic")])["vision"]
    assert nodes["project/Gemm"].scheme == "int8-dynamic"
    assert nodes["stem/Conv"].scheme == "fp32"
    assert calibrated_tensors(network, nodes) == []


def test_inputs_of_layers_and_outputs_that_get_a_quantizer_are_calibrated(
    network: ModelProto, everything: dict[str, NodePlan]
) -> None:
    assert calibrated_tensors(network, everything) == ["image in", "c", "h", "r/🤖", "m", "q"]


def test_a_plan_survives_json_and_equal_plans_have_equal_bytes(plan: ComponentPlan) -> None:
    whole = QuantizationPlan(
        scheme="int8", calibrator="minmax", calibration_digest="0" * 64, samples=12, components={"vision": plan}
    )
    data = whole.to_json()
    again = QuantizationPlan.from_json(data, where="plan.json")
    assert again == whole
    assert again.to_json() == data
    assert b'"schema":"vlaopt.quantization/1"' in data


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"schema": "vlaopt.quantization/2"}'])
def test_what_is_not_a_plan_is_refused(data: bytes) -> None:
    with pytest.raises(InputError, match=r"plan\.json:.*not a quantization plan"):
        QuantizationPlan.from_json(data, where="plan.json")
