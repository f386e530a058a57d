"""The promise: an artifact runs on its engine, or on what was asked for, or says what to do; on nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vlaopt
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.graph import Graph
from vlaopt.artifact.manifest import EngineComponent, EngineEntry, Finish, component_path
from vlaopt.backends import EngineOptions, Session
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.runtime import policy as runtime
from vlaopt.runtime.policy import open_artifact, why_not_here
from vlaopt.tensors import Array

Publish = Callable[..., Artifact]
Files = Mapping[str, Any]
UNFINISHED = Finish(backend="tensorrt", command="vlaopt engine ARTIFACT", reason="another machine")


def test_an_artifact_opens_by_its_path(
    tiny_artifact: Artifact, tiny_observation: dict[str, Any], tiny_chunk: Array
) -> None:
    policy = vlaopt.open(tiny_artifact.path)
    assert policy.backend == "onnxruntime"
    assert policy.predict(tiny_observation) == pytest.approx(tiny_chunk[0], abs=1e-6)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "reference"])
def test_portable_graphs_run_on_the_backend_asked_for(
    tiny_artifact: Artifact, tiny_observation: dict[str, Any], tiny_chunk: Array, backend: str
) -> None:
    policy = open_artifact(tiny_artifact, backend=backend, threads=1)
    assert policy.backend == backend
    assert policy.predict_chunk(tiny_observation) == pytest.approx(tiny_chunk, abs=1e-4)


@pytest.fixture
def built(tmp_path: Path, publish: Publish, tiny_files: Files, tiny_engine: tuple[EngineEntry, Files]) -> Artifact:
    """The tiny policy with an engine; its portable graphs are no graphs, so that only the engine can run."""
    entry, files = tiny_engine
    broken = {path: (role, b"" if role == "component" else data) for path, (role, data) in tiny_files.items()}
    return publish(tmp_path / "built", {**broken, **files}, engine=entry)


def test_an_engine_is_used_as_it_was_built(
    built: Artifact, tiny_observation: dict[str, Any], tiny_chunk: Array
) -> None:
    for backend in (None, "onnxruntime"):
        assert open_artifact(built, backend=backend).predict_chunk(tiny_observation) == pytest.approx(tiny_chunk)


def test_an_engine_is_opened_with_its_own_options_unless_told(built: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    library = runtime.backends.get("onnxruntime")
    real = library.open

    def watched(files: Mapping[str, bytes], options: EngineOptions) -> Session:
        asked.append(options.threads)
        return real(files, options)

    monkeypatch.setattr(library, "open", watched)
    open_artifact(built)
    open_artifact(built, threads=2)
    assert asked == [1, 1, 2, 2]


def test_an_engine_this_machine_cannot_run_is_refused_with_the_reason(
    built: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.backends.get("onnxruntime"), "runnable", lambda: "no such processor")
    with pytest.raises(
        EnvironmentProblem, match="onnxruntime on here, and this machine cannot run it: no such proc"
    ) as caught:
        open_artifact(built)
    assert "--backend onnxruntime runs the portable graphs" in str(caught.value.hint)


@pytest.fixture
def for_vnni(tmp_path: Path, publish: Publish, tiny_files: Files, tiny_engine: tuple[EngineEntry, Files]) -> Artifact:
    """The tiny policy with an engine, for a target whose CPUs have VNNI."""
    entry, files = tiny_engine
    target = {"cpu_features": ["avx512_vnni | avx_vnni"]}
    return publish(tmp_path / "vnni", {**tiny_files, **files}, engine=entry, recipe={"target": target})


def test_an_engine_opens_only_on_a_cpu_with_the_features_of_its_target(
    for_vnni: Artifact, tiny_observation: dict[str, Any], tiny_chunk: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.environment, "cpu_features", lambda: frozenset({"avx2", "avx_vnni"}))
    assert open_artifact(for_vnni).predict_chunk(tiny_observation) == pytest.approx(tiny_chunk)
    assert why_not_here(for_vnni) is None
    monkeypatch.setattr(runtime.environment, "cpu_features", lambda: frozenset({"avx2", "avx512f"}))
    assert why_not_here(for_vnni) == "cpu needs a CPU with avx512_vnni or avx_vnni, which this one lacks"
    with pytest.raises(EnvironmentProblem, match="cannot run it: cpu needs a CPU with avx512_vnni or avx_vnni, which"):
        open_artifact(for_vnni)


def test_without_those_features_only_a_backend_that_is_exact_without_them_runs_the_portable_graphs(
    for_vnni: Artifact, tiny_observation: dict[str, Any], tiny_chunk: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.environment, "cpu_features", frozenset)
    with pytest.raises(EnvironmentProblem, match="openvino cannot run here: cpu needs a CPU with avx512_vnni or avx_"):
        open_artifact(for_vnni, backend="openvino")
    policy = open_artifact(for_vnni, backend="reference")
    assert policy.predict_chunk(tiny_observation) == pytest.approx(tiny_chunk, abs=1e-4)


def test_what_opening_keeps_lies_in_this_machines_store_and_never_in_the_artifact(
    tmp_path: Path,
    publish: Publish,
    tiny_files: Files,
    tiny_graphs: dict[str, bytes],
    tiny_observation: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLAOPT_STORE", str(tmp_path / "store"))
    library, files, components = runtime.backends.get("openvino"), {}, {}
    for name, graph in tiny_graphs.items():
        built = library.build(Graph(graph), EngineOptions(threads=1)).files
        paths = {f"engines/here/{name}/{file}": ("engine", data) for file, data in built.items()}
        files |= paths
        components[name] = EngineComponent(variant="plain", reason="a test", files=tuple(paths), precisions={})
    entry = EngineEntry(
        machine="here", backend="openvino", backend_version="1", threads=1, settings={}, components=components
    )
    artifact = publish(tmp_path / "artifact", {**tiny_files, **files}, engine=entry)
    before = {path: path.stat().st_mtime_ns for path in [artifact.path, *artifact.path.rglob("*")]}
    first = open_artifact(artifact).predict_chunk(tiny_observation)
    assert len(list(tmp_path.glob("store/opened/openvino/*"))) == len(components)
    assert np.array_equal(open_artifact(artifact).predict_chunk(tiny_observation), first)
    assert {path: path.stat().st_mtime_ns for path in [artifact.path, *artifact.path.rglob("*")]} == before


def test_features_that_are_no_names_are_refused(
    tmp_path: Path, publish: Publish, tiny_files: Files, tiny_engine: tuple[EngineEntry, Files]
) -> None:
    entry, files = tiny_engine
    odd = publish(tmp_path / "odd", {**tiny_files, **files}, engine=entry, recipe={"target": {"cpu_features": [5]}})
    with pytest.raises(InputError, match=r"manifest\.json: target: cpu_features is not a list of names"):
        open_artifact(odd)


def test_an_engine_of_a_backend_that_is_not_there_is_refused(
    tmp_path: Path, publish: Publish, tiny_files: Files, tiny_engine: tuple[EngineEntry, Files]
) -> None:
    entry, files = tiny_engine
    stranger = entry.model_copy(update={"backend": "tpu"})
    artifact = publish(tmp_path / "stranger", {**tiny_files, **files}, engine=stranger)
    with pytest.raises(InputError, match="unknown backend 'tpu'"):
        open_artifact(artifact)
    assert open_artifact(artifact, backend="onnxruntime").backend == "onnxruntime"


def test_a_backend_that_cannot_run_here_is_refused(tiny_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime.backends.get("openvino"), "missing", lambda: "openvino is not installed")
    with pytest.raises(EnvironmentProblem, match="openvino cannot run here: openvino is not installed"):
        open_artifact(tiny_artifact, backend="openvino")


def test_an_unfinished_engine_is_refused_with_the_command_that_finishes_it(
    tmp_path: Path, publish: Publish, tiny_files: Files, tiny_observation: dict[str, Any], tiny_chunk: Array
) -> None:
    artifact = publish(tmp_path / "unfinished", tiny_files, unfinished=UNFINISHED)
    with pytest.raises(EnvironmentProblem, match="the engine for cpu is not built yet") as caught:
        open_artifact(artifact)
    assert "on the target: vlaopt engine ARTIFACT" in str(caught.value.hint)
    policy = open_artifact(artifact, backend="onnxruntime")
    assert policy.predict_chunk(tiny_observation) == pytest.approx(tiny_chunk)


def test_an_engine_that_lacks_a_component_is_refused(
    tmp_path: Path, publish: Publish, tiny_files: Files, tiny_engine: tuple[EngineEntry, Files]
) -> None:
    entry, files = tiny_engine
    half = entry.model_copy(update={"components": {"arm": entry.components["arm"]}})
    with pytest.raises(InputError, match="there is no engine for component 'eye'"):
        open_artifact(publish(tmp_path / "half", {**tiny_files, **files}, engine=half))


def test_an_engine_whose_file_is_not_listed_is_refused(
    tmp_path: Path, publish: Publish, tiny_files: Files, tiny_engine: tuple[EngineEntry, Files]
) -> None:
    entry, _ = tiny_engine
    with pytest.raises(InputError, match=r"the artifact has no engines/here/arm/model\.onnx"):
        open_artifact(publish(tmp_path / "empty", tiny_files, engine=entry))


def test_a_flipped_bit_of_an_engine_never_runs(built: Artifact) -> None:
    path = built.path / "engines/here/eye/model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="its digest differs"):
        vlaopt.open(built.path)


def test_an_artifact_without_graphs_is_refused(tmp_path: Path, publish: Publish, tiny_files: Files) -> None:
    kept = {path: value for path, value in tiny_files.items() if path != component_path("eye")}
    with pytest.raises(InputError, match=r"the artifact has no onnx/eye\.onnx"):
        open_artifact(publish(tmp_path / "artifact", kept))
