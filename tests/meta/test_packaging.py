"""What pip gets: one version, extras that bring what the code asks for, a wheel with the targets in it."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import vlaopt

ROOT = Path(__file__).resolve().parents[2]
BUILD_ONLY = {"torch", "onnx", "onnxscript", "onnxsim", "torch-pruning"}
OTHER_NAMES = {
    "cuda": "cuda-python",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "tensorrt_rtx": "tensorrt-rtx-cu13-bindings",
    "mujoco": "metaworld",
    "gymnasium": "metaworld",
    "google": "onnx",
    "markupsafe": "jinja2",
    "pydantic_core": "pydantic",
}
"""Modules whose distribution has another name, or that come with another one."""


def project() -> dict[str, Any]:
    """The `[project]` table."""
    toml = pytest.importorskip("tomllib", reason="reading TOML needs Python 3.11")
    table: dict[str, Any] = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def imported() -> dict[str, set[str]]:
    """Top-level modules from outside that the package imports, by file; also those it asks `require` for."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "vlaopt").rglob("*.py"):
        modules: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                modules |= {str(arg.value).split(".")[0] for arg in node.args[:1] if isinstance(arg, ast.Constant)}
        found[str(path.relative_to(ROOT))] = modules - set(sys.stdlib_module_names) - {"vlaopt", "__future__"}
    return found


def test_the_version_is_said_once() -> None:
    assert "version" in project()["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", vlaopt.__version__)
    assert importlib.metadata.version("vlaopt") == vlaopt.__version__


def test_the_changelog_ends_with_this_version() -> None:
    versions = re.findall(r"^## \[(\d[^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == vlaopt.__version__


def test_a_plain_install_brings_nothing_that_only_builds() -> None:
    assert names(project()["dependencies"]).isdisjoint(BUILD_ONLY)
    assert names(project()["optional-dependencies"]["build"]) >= BUILD_ONLY


def test_the_documents_name_every_extra_and_no_other() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {extra for group in re.findall(r"vlaopt\[([\w,]+)\]", text) for extra in group.split(",")}
    assert named == set(project()["optional-dependencies"]) - {"dev"}


def test_every_import_is_declared() -> None:
    table = project()
    declared = names([*table["dependencies"], *(r for extra in table["optional-dependencies"].values() for r in extra)])
    missing = {
        f"{file}: {module}"
        for file, modules in imported().items()
        for module in modules
        if OTHER_NAMES.get(module, module.replace("_", "-")).lower() not in declared
    }
    assert missing == set()


def test_the_extras_that_errors_name_exist() -> None:
    extras = set(project()["optional-dependencies"])
    for path in (ROOT / "vlaopt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "require":
                second = node.args[1]
                assert not isinstance(second, ast.Constant) or second.value in extras, path


def test_the_wheel_holds_the_targets_and_nothing_but_the_package(tmp_path: Path) -> None:
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("hatchling is not installed, and without it a wheel can only be built with a network")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(ROOT)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("vlaopt-*.whl"))) as wheel:
        inside = set(wheel.namelist())
        entry_points = wheel.read(f"vlaopt-{vlaopt.__version__}.dist-info/entry_points.txt").decode()
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vlaopt").rglob("*.py")}
    targets = {f"vlaopt/_targets/{path.name}" for path in (ROOT / "recipes/targets").glob("*.yaml")}
    assert targets and targets <= inside
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "vlaopt/report/templates").iterdir()}
    assert modules <= inside
    assert templates and templates <= inside
    assert "vlaopt = vlaopt.cli:main" in entry_points
    assert {name.partition("/")[0] for name in inside} == {"vlaopt", f"vlaopt-{vlaopt.__version__}.dist-info"}
