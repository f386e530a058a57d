"""NVIDIA's builder is asked once for every graph, for the RTX card nearest to the target; its words become a place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from vlaopt import isolated
from vlaopt.backends import get
from vlaopt.backends.tensorrt import rtx
from vlaopt.backends.tensorrt.building import Refusal
from vlaopt.errors import InputError, StageError
from vlaopt.graph import external
from vlaopt.graph.external import encode
from vlaopt.progress import Silent
from vlaopt.quantization.graph_check import capability_of, check_builds, check_rules
from vlaopt.target import list_targets, load_target

ORIN = load_target("jetson-orin")
with_builder = pytest.mark.skipif(
    get("tensorrt-rtx").missing() is not None, reason="TensorRT for RTX is not installed here"
)


def product(rows: int | str = 1, operator: str = "MatMul") -> ModelProto:
    """x [rows, 8] by a matrix."""
    weight = numpy_helper.from_array(np.ones((8, 8), np.float32), "weight")
    body = helper.make_graph(
        [helper.make_node(operator, ["x", "weight"], ["y"], name="layers.0.linear/MatMul")],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (rows, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (rows, 8))],
        [weight],
    )
    return helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """A builder that takes everything: what it was asked, as graph and compute capability."""
    calls: list[tuple[str, str]] = []

    def run(function: object, path: Path, capability: str, profiles: object, *, what: str) -> tuple[Refusal, ...]:
        calls.append((path.name, capability))
        return ()

    monkeypatch.setattr(isolated, "run", run)
    monkeypatch.setattr(type(get("tensorrt-rtx")), "missing", lambda self: None)
    monkeypatch.setattr(type(get("tensorrt-rtx")), "version", lambda self: "1.7")
    return calls


@pytest.fixture
def written(tmp_path: Path) -> Callable[[Mapping[str, ModelProto]], dict[str, Path]]:
    def write(models: Mapping[str, ModelProto]) -> dict[str, Path]:
        for name, model in models.items():
            for file, data in encode(model, name).files(f"{name}.onnx").items():
                (tmp_path / file).write_bytes(data)
        return {name: tmp_path / f"{name}.onnx" for name in models}

    return write


@pytest.mark.parametrize(
    ("capabilities", "lowest", "card"),
    [
        (("8.7",), "8.7", "8.6"),
        (("9.0",), "9.0", "8.9"),
        (("11.0",), "11.0", "12.0"),
        (("12.0", "10.0"), "10.0", "12.0"),
        (("8.9", "8.0"), "8.0", "8.6"),
        (("7.5",), "7.5", "7.5"),
        (("7.2",), "7.2", None),
    ],
)
def test_a_target_is_tried_as_the_card_with_its_precisions(
    capabilities: tuple[str, ...], lowest: str, card: str | None
) -> None:
    assert capability_of(ORIN.model_copy(update={"compute_capabilities": capabilities})) == (lowest, card)


@with_builder
@pytest.mark.parametrize("name", [name for name in list_targets() if load_target(name).compute_capabilities])
def test_the_builder_knows_the_card_of_every_shipped_target(name: str) -> None:
    _, card = capability_of(load_target(name))
    assert card is not None
    assert rtx.check(encode(product(), "head"), card) == ()


def test_equal_graphs_are_built_once(
    asked: list[tuple[str, str]], written: Callable[[Mapping[str, ModelProto]], dict[str, Path]]
) -> None:
    files = written({"left": product(), "right": product(), "head": product(rows=2)})
    told = check_builds(files, ORIN, {}, Silent())
    assert asked == [("left.onnx", "8.6"), ("head.onnx", "8.6")]
    assert told == (
        "tensorrt-rtx 1.7 built 3 of 3 components for compute capability 8.6, which has the precisions of 8.7"
    )


@with_builder
def test_weights_outside_the_graph_are_found(
    written: Callable[[Mapping[str, ModelProto]], dict[str, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "LIMIT", 0)
    monkeypatch.setattr(external, "SMALLEST", 64)
    files = written({"head": product()})
    assert files["head"].with_name("head.onnx.data").is_file()
    assert "built 1 of 1" in check_builds(files, ORIN, {}, Silent())


@with_builder
def test_dynamic_dimensions_are_built_with_the_recipes_profiles(
    written: Callable[[Mapping[str, ModelProto]], dict[str, Path]],
) -> None:
    files = written({"head": product(rows="rows")})
    assert "built 1 of 1" in check_builds(files, ORIN, {"rows": (1, 2, 4)}, Silent())
    with pytest.raises(InputError, match="dimension 'rows' of input 'x' is dynamic and has no profile"):
        check_builds(files, ORIN, {}, Silent())


def test_what_the_builder_refuses_is_told_with_its_module_and_recipe_lines(
    written: Callable[[Mapping[str, ModelProto]], dict[str, Path]], asked: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = (
        Refusal("layers.0.linear/MatMul", "MatMul", "no such product"),
        Refusal("", "", "and the device is odd"),
    )
    monkeypatch.setattr(isolated, "run", lambda *_, **__: refusals)
    with pytest.raises(StageError) as caught:
        check_builds(written({"head": product()}), ORIN, {}, Silent())
    assert caught.value.lines() == [
        "onnx/head.onnx: head is not built by NVIDIA's builder (tensorrt-rtx): MatMul 'layers.0.linear/MatMul' is "
        "refused: no such product (module head.layers.0.linear); and the device is odd",
        'hint: keep the place in FP32, quantize.rules: [{scope: "head.layers.0.linear", scheme: fp32}]; write the '
        "module with other operators, or export with another export.opset",
    ]


def test_many_faults_are_counted() -> None:
    model = product(operator="Det")
    for number in range(4):
        model.graph.node.add().CopyFrom(helper.make_node("Det", ["x"], [f"d{number}"], name=f"layers.{number}/Det"))
    with pytest.raises(StageError, match=r"layers\.1/Det.*; and 2 more$"):
        check_rules("head", encode(model, "head"))
