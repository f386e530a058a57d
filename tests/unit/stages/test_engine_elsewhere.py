"""The promise: an engine is built on a machine of its target's class, and the others say why not."""

from __future__ import annotations

import platform

import pytest

from vlaopt import backends
from vlaopt.errors import InputError
from vlaopt.recipe.model import TensorRt
from vlaopt.stages import engine
from vlaopt.stages import get as stage
from vlaopt.target import Target, load_target


@pytest.fixture
def vnni(monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return load_target("cpu-x86-vnni")


def test_a_cpu_without_the_features_of_the_target_leaves_the_engine_to_one_that_has_them(
    vnni: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.environment, "cpu_features", lambda: frozenset({"avx2"}))
    reason = "cpu-x86-vnni needs a CPU with avx512_vnni or avx_vnni, which this one lacks"
    assert engine._why_elsewhere(vnni, vnni.backends) == reason
    assert engine._why_elsewhere(load_target("cpu-x86"), vnni.backends) is None


@pytest.mark.parametrize("feature", ["avx512_vnni", "avx_vnni"])
def test_a_cpu_with_one_of_them_builds_it(vnni: Target, feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.environment, "cpu_features", lambda: frozenset({feature}))
    assert engine._why_elsewhere(vnni, vnni.backends) is None


def test_another_architecture_is_named_first(vnni: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert engine._why_elsewhere(vnni, vnni.backends) == "cpu-x86-vnni is x86_64, this machine is aarch64"


def test_the_features_a_target_asks_for_are_part_of_the_key() -> None:
    assert "cpu_features" in stage("engine").target_values


def test_what_a_target_sets_is_for_the_backends_that_know_it() -> None:
    orin = load_target("jetson-orin")
    asked = TensorRt(workspace_mib=orin.defaults["engine"]["tensorrt"]["workspace_mib"])
    assert engine.settings_of(asked, backends.get("tensorrt"), orin)["workspace_mib"] == asked.workspace_mib
    assert "workspace_mib" not in engine.settings_of(asked, backends.get("onnxruntime"), orin)
    with pytest.raises(InputError, match="onnxruntime has no setting 'workspace_mib'"):
        engine.settings_of(TensorRt(workspace_mib=77), backends.get("onnxruntime"), orin)
