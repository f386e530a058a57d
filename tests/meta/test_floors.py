"""The floors of vlaopt/README.md hold, and a module that broke them would be found."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.meta.conftest import Run

LINT = ("-c", "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_logo=True))")

PLANTED = {
    "Floors": ("hashing.py", "from vlaopt.recipe import model"),
    "Backends never import each other": ("backends/onnxruntime/kernels.py", "from vlaopt.backends import openvino"),
    "Stages meet only through artifacts": ("stages/prune.py", "from vlaopt.stages import export"),
    "Measuring knows no artifact": ("benchmark/verdict.py", "from vlaopt.artifact import manifest"),
    "What runs on a robot needs neither torch nor onnx": ("runtime/loop.py", "import torch"),
}
"""One import per contract that it forbids."""


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    """The package and its contracts, to be spoilt."""
    shutil.copytree(root / "vlaopt", tmp_path / "vlaopt", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_floors_hold(python: Run) -> None:
    done = python(*LINT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_planted_import_breaks_its_contract(python: Run, copied: Path) -> None:
    for file, line in PLANTED.values():
        path = copied / "vlaopt" / file
        path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    done = python(*LINT, cwd=copied)
    assert done.returncode == 1, done.stdout + done.stderr
    for contract in PLANTED:
        assert f"{contract} BROKEN" in done.stdout


def test_a_room_without_a_floor_is_refused(python: Run, copied: Path) -> None:
    (copied / "vlaopt" / "attic.py").write_text('"""No floor."""\n', encoding="utf-8")
    done = python(*LINT, cwd=copied)
    assert done.returncode == 1
    assert "attic" in done.stdout
