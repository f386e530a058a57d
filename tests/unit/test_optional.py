"""The promise: a library that is not there is named with the extra that brings it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlaopt.errors import EnvironmentProblem
from vlaopt.optional import installed_version, require


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
