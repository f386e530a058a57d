"""A model repository passes Triton's own schema, computes what the artifact does, and appears whole or not at all."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

pytest.importorskip("tritonclient", reason="needs vlaopt[triton]")

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from vlaopt import triton
from vlaopt.artifact.artifact import SPEC_PATH, Artifact
from vlaopt.artifact.manifest import EngineComponent, EngineEntry, Finish
from vlaopt.artifact.policy_spec import (
    AutoregressiveLoop,
    Component,
    DiffusionLoop,
    EulerLoop,
    Noise,
    PolicySpec,
    TensorSpec,
)
from vlaopt.cli.app import run
from vlaopt.errors import EnvironmentProblem, InputError, StageError
from vlaopt.hashing import canonical_json
from vlaopt.runtime.diffusion import denoised
from vlaopt.triton.models import model_name
from vlaopt.triton.schema import check_ensemble

Publish = Callable[..., Artifact]


@pytest.fixture
def finished(tmp_path: Path, tiny_files: Any, tiny_engine: Any, publish: Publish) -> Artifact:
    """The tiny policy, finished for ONNX Runtime."""
    entry, files = tiny_engine
    return publish(tmp_path / "artifact", {**tiny_files, **files}, stage="engine", engine=entry)


def config_of(repository: Path, name: str) -> Any:
    """A configuration as Triton reads it: by its schema, which refuses unknown fields."""
    return text_format.Parse((repository / name / "config.pbtxt").read_text("utf-8"), model_config_pb2.ModelConfig())


def serve(repository: Path, name: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What Triton's ensemble scheduler does, over ONNX Runtime: nothing but the repository is known here."""
    tensors = dict(feeds)
    config = config_of(repository, name)
    assert {tensor.name: tuple(tensor.dims) for tensor in config.input} == {k: v.shape for k, v in feeds.items()}
    for step in config.ensemble_scheduling.step:
        session = onnxruntime.InferenceSession(repository / step.model_name / "1" / "model.onnx")
        given = session.run(list(step.output_map), {name: tensors[tensor] for name, tensor in step.input_map.items()})
        tensors |= dict(zip(step.output_map.values(), given, strict=True))
    return {tensor.name: tensors[tensor.name] for tensor in config.output}


def test_the_ensemble_gives_the_actions_of_the_policy(finished: Artifact, tmp_path: Path, tiny_chunk: Any) -> None:
    repository = triton.export(finished, tmp_path / "served")
    image = np.zeros((1, 3, 2, 2), np.float32)
    image[:, :, 0] = 1
    raw = serve(repository, "tiny", {"image": image, "state": np.ones((1, 2), np.float32)})["raw"]
    np.testing.assert_allclose(raw[0] * [1, 0.5] + [10, 20], tiny_chunk)
    manual = (tmp_path / "served/README.md").read_text("utf-8")
    assert "y · `action.std` + `action.mean`, clipped to -100 … 100" in manual
    assert "(x − `state.mean`) / (`state.std` + 0)" in manual


def test_a_component_is_one_instance_without_batching(finished: Artifact, tmp_path: Path) -> None:
    repository = triton.export(finished, tmp_path / "served")
    assert sorted(path.name for path in repository.iterdir()) == ["tiny", "tiny_arm", "tiny_eye"]
    arm = config_of(repository, "tiny_arm")
    assert (arm.name, arm.backend, arm.max_batch_size) == ("tiny_arm", "onnxruntime", 0)
    assert [(tensor.name, list(tensor.dims)) for tensor in arm.input] == [("state", [1, 2]), ("feature", [1, 1])]
    assert {tensor.data_type for tensor in (*arm.input, *arm.output)} == {model_config_pb2.TYPE_FP32}
    assert [(group.count, group.kind) for group in arm.instance_group] == [(1, arm.instance_group[0].KIND_CPU)]
    assert arm.parameters["intra_op_thread_count"].string_value == "1"
    assert (repository / "tiny/1").is_dir()


def test_what_clients_need_lies_beside_the_models(finished: Artifact, tmp_path: Path) -> None:
    triton.export(finished, tmp_path / "served")
    files = {path.relative_to(tmp_path / "served").as_posix() for path in (tmp_path / "served").rglob("*.*")}
    assert {"README.md", "policy/spec.json", "policy/statistics.safetensors"} <= files
    assert finished.id in (tmp_path / "served/README.md").read_text("utf-8")


def engine_of(backend: str, files: Mapping[str, tuple[str, ...]], **fields: Any) -> EngineEntry:
    about = {"needs": fields.pop("needs", {}), "facts": fields.pop("facts", {})}
    components = {
        name: EngineComponent(variant="plain", reason="a test", files=paths, precisions={}, **about)
        for name, paths in files.items()
    }
    known = {"machine": "there", "backend_version": "10.3.0", "threads": 2, "settings": {}, **fields}
    return EngineEntry(backend=backend, components=components, **known)


@pytest.fixture
def built_by(tmp_path: Path, tiny_files: Any, publish: Publish) -> Callable[..., Artifact]:
    """The tiny policy with an engine of `backend`, its files named `names`; their bytes are not looked at."""

    def made(backend: str, *names: str, **fields: Any) -> Artifact:
        paths = {part: tuple(f"engines/there/{part}/{name}" for name in names) for part in ("arm", "eye")}
        files = {path: ("engine", path.encode()) for part in paths.values() for path in part}
        engine = engine_of(backend, paths, **fields)
        return publish(tmp_path / "artifact", {**tiny_files, **files}, stage="engine", engine=engine)

    return made


@pytest.mark.parametrize("backend", ["tensorrt", "trtexec"])
def test_a_plan_goes_to_the_tensorrt_backend_on_a_gpu(
    backend: str, built_by: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = built_by(backend, "engine.plan", needs={"tensorrt": "10.3.0.30", "sm": "8.7"})
    repository = triton.export(artifact, tmp_path / "served")
    config = config_of(repository, "tiny_eye")
    assert (config.backend, config.instance_group[0].kind) == ("tensorrt", config.instance_group[0].KIND_GPU)
    assert (repository / "tiny_eye/1/model.plan").read_bytes() == b"engines/there/eye/engine.plan"
    manual = " ".join((tmp_path / "served/README.md").read_text("utf-8").split())
    assert "sm 8.7, tensorrt 10.3.0.30" in manual
    assert "native code" in manual


def test_a_version_compatible_plan_needs_its_option(built_by: Callable[..., Artifact], tmp_path: Path) -> None:
    triton.export(built_by("tensorrt", "engine.plan", settings={"version_compatible": True}), tmp_path / "served")
    manual = (tmp_path / "served/README.md").read_text("utf-8")
    assert "--backend-config=tensorrt,version-compatible=true" in manual


def test_openvino_gets_its_two_files_and_its_threads(built_by: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = built_by("openvino", "model.xml", "model.bin", facts={"computes_in": "bf16"})
    repository = triton.export(artifact, tmp_path / "served")
    config = config_of(repository, "tiny_arm")
    assert {key: value.string_value for key, value in config.parameters.items()} == {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": "2",
        "HINT_BF16": "YES",
    }
    assert sorted(path.name for path in (repository / "tiny_arm/1").iterdir()) == ["model.bin", "model.xml"]


def test_onnxruntime_on_tensorrt_names_its_accelerator(built_by: Callable[..., Artifact], tmp_path: Path) -> None:
    repository = triton.export(built_by("onnxruntime-tensorrt", "model.onnx", "arm.onnx.data"), tmp_path / "served")
    config = config_of(repository, "tiny_arm")
    accelerators = config.optimization.execution_accelerators.gpu_execution_accelerator
    assert [accelerator.name for accelerator in accelerators] == ["tensorrt"]
    assert sorted(path.name for path in (repository / "tiny_arm/1").iterdir()) == ["arm.onnx.data", "model.onnx"]


def test_what_triton_cannot_run_is_refused(built_by: Callable[..., Artifact], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Triton has no backend for engines of tensorrt-rtx"):
        triton.export(built_by("tensorrt-rtx", "engine.rtx"), tmp_path / "served")
    assert not (tmp_path / "served").exists()


def test_openvino_in_fp16_is_refused(built_by: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = built_by("openvino", "model.xml", "model.bin", facts={"computes_in": "fp16"})
    with pytest.raises(InputError, match="cannot be told to compute in FP16"):
        triton.export(artifact, tmp_path / "served")


def test_an_unfinished_artifact_is_refused_with_the_command(tmp_path: Path, tiny_files: Any, publish: Publish) -> None:
    left = Finish(backend="tensorrt", command="vlaopt engine ARTIFACT", reason="another machine")
    artifact = publish(tmp_path / "artifact", tiny_files, stage="bench", unfinished=left)
    with pytest.raises(EnvironmentProblem, match="not built yet") as told:
        triton.export(artifact, tmp_path / "served")
    assert "vlaopt engine ARTIFACT --output DIR" in str(told.value.hint)


def test_an_artifact_without_an_engine_is_refused(tiny_artifact: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="of stage 'onnx' and has no engine"):
        triton.export(tiny_artifact, tmp_path / "served")


def test_a_folder_with_files_is_left_alone(finished: Artifact, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something lies there already"):
        triton.export(finished, tmp_path / "served")
    assert [path.name for path in (tmp_path / "served").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_taken(finished: Artifact, tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    assert (triton.export(finished, tmp_path / "served") / "tiny_arm/config.pbtxt").is_file()


def test_a_changed_artifact_leaves_nothing(finished: Artifact, tmp_path: Path) -> None:
    path = finished.path / "policy/statistics.safetensors"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(InputError, match="was changed after it was written"):
        triton.export(finished, tmp_path / "served")
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_a_folder_that_appears_meanwhile_is_no_success(
    finished: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def assets(artifact: Artifact) -> list[str]:
        (tmp_path / "served").mkdir()
        (tmp_path / "served/README.md").write_text("another's")
        return []

    monkeypatch.setattr(triton, "_assets", assets)
    with pytest.raises(InputError, match="meanwhile"):
        triton.export(finished, tmp_path / "served")
    assert (tmp_path / "served/README.md").read_text() == "another's"


@pytest.mark.parametrize(
    ("tensor", "refusal"),
    [
        (TensorSpec(name="feature", dtype="float32", shape=()), "without a dimension"),
        (TensorSpec(name="feature", dtype="complex64", shape=(1, 1)), "no datatype for 'feature', which is complex64"),
    ],
)
def test_a_tensor_without_a_form_is_refused(
    tensor: TensorSpec, refusal: str, tiny_spec: PolicySpec, finished: Artifact
) -> None:
    eye = tiny_spec.components["eye"].model_copy(update={"outputs": (tensor,)})
    spec = tiny_spec.model_copy(update={"components": {**tiny_spec.components, "eye": eye}})
    assert finished.manifest.engine
    with pytest.raises(InputError, match=refusal):
        triton.models_of("tiny", spec, finished.manifest.engine)


def test_names_hold_nothing_that_a_path_would_split_at() -> None:
    assert model_name("edge-vla", "vision") == "edge-vla_vision"
    assert model_name("edge-vla", "a.b+c/d..") == "edge-vla_a_b_c_d__"


def test_without_tritons_schema_the_extra_is_named(
    finished: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    with pytest.raises(EnvironmentProblem, match="cannot be imported") as told:
        triton.export(finished, tmp_path / "served")
    assert told.value.hint == "pip install 'vlaopt[triton]'"
    assert not (tmp_path / "served").exists()


def test_the_command_prints_the_repository(
    finished: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["export-triton", str(finished.path), "-o", str(tmp_path / "served")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'served/models'}\n"


class TestEnsembleRules:
    """Each is one that Triton's own loader has; the ensemble of the tiny policy is spoilt."""

    @pytest.fixture
    def repository(self, finished: Artifact, tmp_path: Path) -> Path:
        return triton.export(finished, tmp_path / "served")

    @pytest.fixture
    def whole(self, repository: Path) -> Any:
        return config_of(repository, "tiny")

    @pytest.fixture
    def models(self, repository: Path) -> dict[str, Any]:
        return {name: config_of(repository, name) for name in ("tiny_arm", "tiny_eye")}

    def test_a_sound_one_passes(self, whole: Any, models: Any) -> None:
        check_ensemble(whole, models)

    def test_an_input_that_is_not_mapped(self, whole: Any, models: Any) -> None:
        del whole.ensemble_scheduling.step[1].input_map["feature"]
        with pytest.raises(StageError, match="input 'feature' of tiny_arm is not mapped"):
            check_ensemble(whole, models)

    def test_a_step_that_waits_for_itself(self, whole: Any, models: Any) -> None:
        whole.ensemble_scheduling.step[1].input_map["feature"] = "raw"
        with pytest.raises(StageError, match="tiny_arm waits for 'raw', which nothing gives"):
            check_ensemble(whole, models)

    def test_a_model_that_is_not_there(self, whole: Any, models: Any) -> None:
        whole.ensemble_scheduling.step[0].model_name = "tiny_ear"
        with pytest.raises(StageError, match="no model 'tiny_ear'"):
            check_ensemble(whole, models)

    def test_a_tensor_that_nothing_takes(self, whole: Any, models: Any) -> None:
        whole.ensemble_scheduling.step[0].output_map["feature"] = "lost"
        whole.input.add(name="feature", data_type=model_config_pb2.TYPE_FP32, dims=[1, 1])
        with pytest.raises(StageError, match="nothing takes 'lost'"):
            check_ensemble(whole, models)

    def test_a_tensor_of_another_form(self, whole: Any, models: Any) -> None:
        whole.input[0].data_type = model_config_pb2.TYPE_FP16
        with pytest.raises(StageError, match="another form"):
            check_ensemble(whole, models)


def loop_policy(loop: EulerLoop | DiffusionLoop | AutoregressiveLoop) -> PolicySpec:
    """joints → eye → prefix → step, by `loop`."""

    def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, shape=shape)

    if isinstance(loop, AutoregressiveLoop):
        inputs = (tensor("token", 1, 1, dtype="int64"), tensor("position", 1, dtype="int64"), tensor("kv", 1, 2))
        step = Component(kind="decode", inputs=inputs, outputs=(tensor("logits", 1, 9), tensor("kv_next", 1, 2)))
        last = Component(kind="head", inputs=(tensor("said", 1, 6, dtype="int64"),), outputs=(tensor("x", 1, 2, 2),))
        components, noise = {"step": step, "aloud": last}, Noise()
    else:
        x = tensor("x", 1, 2, 2)
        given = (x, tensor("t", 1), tensor("kv", 1, 2))
        components = {"step": Component(kind="step", inputs=given, outputs=(tensor("v", 1, 2, 2),))}
        noise = Noise(law="normal", shape=(1, 2, 2))
    eye = Component(kind="prefix", inputs=(tensor("state", 1, 2),), outputs=(tensor("kv", 1, 2),))
    return PolicySpec.model_validate(
        {
            "type": "looping",
            "action_dim": 2,
            "components": {**components, "eye": eye},
            "loop": loop,
            "noise": noise,
            "chunk": {"size": 2, "n_action_steps": 1},
            "preprocess": [{"kind": "normalise", "input": "joints", "output": "state", "size": 2, "mode": "identity"}],
            "postprocess": {"input": "x", "statistics": "action", "mode": "identity"},
        }
    )


@pytest.fixture
def manual_of(tmp_path: Path, publish: Publish) -> Callable[[PolicySpec], str]:
    """The README of a policy's repository, which has no ensemble."""

    def made(spec: PolicySpec) -> str:
        paths = {name: (f"engines/there/{name}/model.onnx",) for name in spec.components}
        files = {path: ("engine", b"graph") for part in paths.values() for path in part}
        files |= {SPEC_PATH: ("policy", canonical_json(spec.model_dump(mode="json", by_alias=True)))}
        engine = engine_of("onnxruntime", paths)
        artifact = publish(tmp_path / "artifact", files, stage="engine", engine=engine)
        repository = triton.export(artifact, tmp_path / "served")
        assert sorted(path.name for path in repository.iterdir()) == sorted(f"tiny_{name}" for name in paths)
        return (tmp_path / "served/README.md").read_text("utf-8")

    return made


NAMES = {"step": "step", "state_input": "x", "time_input": "t"}


def test_the_guide_to_a_flow_has_its_numbers(manual_of: Callable[[PolicySpec], str]) -> None:
    spec = loop_policy(EulerLoop(steps=4, start=1.0, end=0.0, velocity_output="v", **NAMES))
    manual = " ".join(manual_of(spec).split())
    assert "First call `tiny_eye`, once" in manual
    assert "`x` starts as noise of shape [1, 2, 2] by a standard normal law" in manual
    assert "4 times, k = 0 … 3: call `tiny_step` with `x` and with `t` = 1 + k · (-0.25) in all its elements" in manual
    assert "`x` ← `x` + (-0.25) · `v`" in manual


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_the_guide_to_denoising_is_enough_to_denoise(
    kind: Any, prediction: Any, manual_of: Callable[[PolicySpec], str]
) -> None:
    alphas = tuple(float(value) for value in np.linspace(0.98, 0.02, 12))
    loop = DiffusionLoop(
        kind=kind, steps=4, prediction_output="v", prediction=prediction, alphas_cumprod=alphas, clip=0.7, **NAMES
    )
    manual = manual_of(loop_policy(loop))
    joined = " ".join(manual.split())
    seen = "(`x` − √(1 − a) · `v`) / √a" if prediction == "epsilon" else "`v`"
    assert f"c = {seen}. Then clip it to −0.7 … 0.7." in joined
    rows = re.findall(r"^\| (\d+) \| (\d+) \| (\S+) \| (\S+) \|$", manual, re.MULTILINE)
    draw = np.random.default_rng(3).standard_normal
    x = other = draw((1, 2, 2), np.float32)
    for k, _, a_text, b_text in rows:  # by the README's formulas alone
        a, b = float(a_text), float(b_text)
        v, n = np.sin(x), draw((1, 2, 2), np.float32)
        c = np.clip((x - np.sqrt(1 - a) * v) / np.sqrt(a) if prediction == "epsilon" else v, -0.7, 0.7)
        if kind == "ddim":
            e = v if prediction == "epsilon" else (x - np.sqrt(a) * v) / np.sqrt(1 - a)
            x = np.sqrt(b) * c + np.sqrt(1 - b) * e
        else:
            r, s = a / b, 1 - a / b
            x = np.sqrt(b) * s / (1 - a) * c + np.sqrt(r) * (1 - b) / (1 - a) * x
            x = x + np.sqrt(max((1 - b) / (1 - a) * s, 1e-20)) * n if int(k) < 3 else x
        other = denoised(loop, int(k), other, np.sin(other), n)
    assert [int(t) for _, t, _, _ in rows] == [9, 6, 3, 0]
    np.testing.assert_allclose(x, other, rtol=1e-4, atol=1e-5)


def test_the_guide_to_tokens_has_its_numbers(manual_of: Callable[[PolicySpec], str]) -> None:
    loop = AutoregressiveLoop(
        max_length=6,
        step="step",
        token_input="token",
        position_input="position",
        logits_output="logits",
        tokens_output="said",
        start_token=3,
        end_token=2,
        cache={"kv_next": "kv"},
    )
    manual = " ".join(manual_of(loop_policy(loop)).split())
    assert (
        "Start with the token 3. For k = 0 … 5: call `tiny_step` with `token` = the token and `position` = k" in manual
    )
    assert "Its `kv_next` is what it takes as `kv` next." in manual
    assert "Stop at token 2. `said` is int64 [1, 6], 2 from the end on." in manual
    assert "At last call `tiny_aloud`, once" in manual
