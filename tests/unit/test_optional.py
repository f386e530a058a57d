"""The promise: a library that is not there is named with the extra that brings it; a plug-in's code can be found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlaopt.errors import EnvironmentProblem
from vlaopt.optional import installed_version, plugin_sources, require


def test_a_library_that_is_there_is_given() -> None:
    assert require("json", "build") is json


def test_a_missing_library_is_refused_with_its_extra() -> None:
    with pytest.raises(EnvironmentProblem, match="no_such_library cannot be imported") as caught:
        require("no_such_library", "rtx")
    assert caught.value.hint == "pip install 'vlaopt[rtx]'"


def test_a_library_without_its_driver_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_a_library.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentProblem, match=r"half_a_library cannot be imported: libcuda\.so\.1"):
        require("half_a_library", "tensorrt")


def test_versions_are_found_without_importing() -> None:
    assert installed_version("numpy")
    assert installed_version("no-such-distribution") is None


def installed(folder: Path, module: str) -> None:
    """An entry point `mine` of the group `vlaopt.policies` that names `module`, as an installer writes it."""
    info = folder / "mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vlaopt.policies]\nmine = {module}:ADAPTER\n")


@pytest.mark.parametrize("whole", [True, False], ids=["a package", "a folder without __init__"])
def test_the_code_of_a_plugged_in_package_is_found_without_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = f"mine_{'whole' if whole else 'bare'}"
    installed(tmp_path, f"{package}.deep.adapter")
    files = ["deep/adapter.py", *(["__init__.py"] if whole else [])]
    for name in files:
        (tmp_path / package / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / package / name).write_text("raise RuntimeError('imported')")
    assert plugin_sources("vlaopt.policies", "mine") == {name: tmp_path / package / name for name in files}


def test_the_code_of_a_plugged_in_module_is_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    installed(tmp_path, "mine_alone")
    (tmp_path / "mine_alone.py").write_text("raise RuntimeError('imported')")
    assert plugin_sources("vlaopt.policies", "mine") == {"mine_alone": tmp_path / "mine_alone.py"}


def test_what_nobody_plugged_in_has_no_code() -> None:
    assert plugin_sources("vlaopt.policies", "no-such-policy") == {}
