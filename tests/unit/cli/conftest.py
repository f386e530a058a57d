"""The command line in this process, and an artifact small enough to make for every test."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vlaopt.artifact.artifact import SPEC_PATH, Artifact, drafted, finish
from vlaopt.artifact.manifest import component_path
from vlaopt.artifact.policy_spec import (
    Chunk,
    Component,
    NormaliseProcessor,
    PolicySpec,
    SingleLoop,
    TensorSpec,
    Unnormalise,
)
from vlaopt.cli.app import run
from vlaopt.recipe.load import load_recipe
from vlaopt.runtime.golden import Golden
from vlaopt.tensors import pack

ROOT = Path(__file__).resolve().parents[3]
CPU = ROOT / "recipes/edge-vla/cpu.yaml"

STATE, CHUNK, ACTION = 4, 3, 2
SAMPLES = 4


@dataclass(frozen=True)
class Told:
    """What a command gave: its exit code, the result on stdout, the lines for people on stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The result, which must be JSON and nothing else."""
        return json.loads(self.out)


Cli = Callable[..., Told]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty store, which the commands use."""
    monkeypatch.setenv("VLAOPT_STORE", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def cli(store: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs one command line in the project's top folder."""
    monkeypatch.chdir(ROOT)

    def _cli(*arguments: str | Path) -> Told:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        told = capsys.readouterr()
        return Told(code, told.out, told.err)

    return _cli


def spec() -> PolicySpec:
    """A policy of one linear layer: a state to a chunk of actions."""
    component = Component(
        kind="single",
        inputs=(TensorSpec(name="state", dtype="float32", shape=(1, STATE)),),
        outputs=(TensorSpec(name="actions", dtype="float32", shape=(1, CHUNK, ACTION)),),
    )
    return PolicySpec(
        type="linear",
        action_dim=ACTION,
        control_hz=20,
        components={"policy": component},
        loop=SingleLoop(),
        chunk=Chunk(size=CHUNK, n_action_steps=2),
        preprocess=(NormaliseProcessor(input="observation.state", output="state", size=STATE, statistics="state"),),
        postprocess=Unnormalise(input="actions", statistics="action"),
    )


def graph(weight: np.ndarray) -> bytes:
    """`state` [1, 4] times `weight` [4, 6], shaped to `actions` [1, 3, 2]."""
    nodes = [
        helper.make_node("MatMul", ["state", "weight"], ["flat"], name="product"),
        helper.make_node("Reshape", ["flat", "shape"], ["actions"], name="chunk"),
    ]
    shape = np.asarray([1, CHUNK, ACTION], dtype=np.int64)
    made = helper.make_graph(
        nodes,
        "policy",
        [helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, STATE])],
        [helper.make_tensor_value_info("actions", TensorProto.FLOAT, [1, CHUNK, ACTION])],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(shape, "shape")],
    )
    data: bytes = onnx.helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
    ).SerializeToString()
    return data


def write_artifact(folder: Path, *, off_by: float = 0.0) -> Artifact:
    """An artifact of the linear policy, without an engine; `off_by` is added to the actions it should give."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((STATE, CHUNK * ACTION)).astype(np.float32)
    states = generator.standard_normal((SAMPLES, STATE)).astype(np.float32)
    actions = (states @ weight).reshape(SAMPLES, CHUNK, ACTION) + np.float32(off_by)
    golden = Golden(tuple({"observation.state": state} for state in states), actions.astype(np.float32), None)
    ones, zeros = np.ones, np.zeros
    statistics = {
        "state.mean": zeros(STATE, np.float32),
        "state.std": ones(STATE, np.float32),
        "action.mean": zeros(ACTION, np.float32),
        "action.std": ones(ACTION, np.float32),
    }
    recipe = load_recipe(
        CPU, overrides=("bench.duration_s=0.2", "bench.back_to_back_s=0.1", "verify.observations=null")
    )
    whole = recipe.resolved()
    with drafted(folder) as draft:
        draft.write_json(SPEC_PATH, spec(), "policy")
        draft.write("policy/statistics.safetensors", pack(statistics), "policy")
        draft.write(component_path("policy"), graph(weight), "component")
        for path, data in golden.files([{"state": state[None]} for state in states]).items():
            draft.write(path, data, "golden")
        finish(
            draft,
            name="linear",
            version="1.0.0",
            target="cpu-x86",
            stage="export",
            recipe={key: whole[key] for key in whole if key not in ("name", "version", "schema")},
            lineage=(),
            tools={"onnx": onnx.__version__},
        )
    return Artifact.open(folder)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """The folder of a sound artifact of stage export."""
    return write_artifact(tmp_path / "artifact").path
