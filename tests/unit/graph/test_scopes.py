"""A glob means a module and everything inside it, or one node by its full name."""

from __future__ import annotations

import pytest

from vlaopt.graph.scopes import covers_node, node_path
from vlaopt.scopes import nearest


@pytest.mark.parametrize(
    "glob,covered",
    [
        ("*", True),
        ("vision", True),
        ("vision.*", True),
        ("vision.blocks.3", True),
        ("vision.blocks.*", True),
        ("*.conv", True),
        ("vision.blocks.3.conv/Conv", True),
        ("vision.block", False),
        ("vision.blocks.3.conv/Gemm", False),
        ("head.*", False),
    ],
)
def test_a_glob_covers_a_module_and_all_inside(glob: str, covered: bool) -> None:
    assert covers_node(glob, "vision", "blocks.3.conv/Conv") is covered


def test_a_node_of_the_component_itself_is_covered_by_the_component_or_its_own_name() -> None:
    assert node_path("vision", "Mul_2") == "vision"
    assert covers_node("vision", "vision", "Mul_2")
    assert covers_node("vision.Mul_2", "vision", "Mul_2")
    assert not covers_node("vision.blocks.*", "vision", "Mul_2")


def test_the_nearest_path_may_be_a_module_above_a_layer() -> None:
    assert nearest("vision.blcks.*", ["vision.blocks.3.conv", "head.output"]) == "vision.blocks"
    assert nearest("vision", []) is None
