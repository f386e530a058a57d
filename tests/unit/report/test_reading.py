"""Facts are those of the artifact, the record and the store; what they lack has a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.cli.conftest import CPU, ROOT, write_artifact
from tests.unit.report.conftest import record
from vlaopt.artifact.artifact import Artifact, drafted, finish
from vlaopt.artifact.manifest import EngineEntry
from vlaopt.artifact.store import Store
from vlaopt.benchmark.actions import compare_actions
from vlaopt.benchmark.record import Subject
from vlaopt.errors import InputError
from vlaopt.hashing import canonical_json, digest_bytes
from vlaopt.recipe.load import load_recipe
from vlaopt.report.reading import read_facts
from vlaopt.report.records import Found, given, newest
from vlaopt.runtime.golden import ACTIONS, Golden

ERROR = compare_actions(
    np.ones((4, 3, 2)), np.zeros((4, 3, 2)), std=np.ones(2), n_action_steps=2, gripper=None
).to_json()
GATE = {"name": "golden: mean action error", "value": 0.02, "limit": 0.05, "held": True}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def exported(tmp_path: Path) -> Artifact:
    return write_artifact(tmp_path / "exported")


def with_reports(source: Artifact, folder: Path, metrics: dict[str, Any], **reports: Any) -> Artifact:
    """`source` after more stages, as their metrics and reports tell."""
    with drafted(folder) as draft:
        draft.carry(source, "component", "policy", "golden")
        draft.metrics |= metrics
        for stage, told in reports.items():
            draft.write(f"reports/{stage}.json", canonical_json(told), "report")
        fields = source.manifest.model_dump(include={"name", "version", "target", "recipe", "lineage", "tools"})
        finish(draft, **fields, stage="verify")
    return Artifact.open(folder)


def test_an_exported_artifact_gives_reasons_for_all_that_it_lacks(exported: Artifact, store: Store) -> None:
    facts = read_facts(exported, newest(exported, store), store)
    for name in ("record", "gates", "error", "forms_how", "examples", "trials", "fits", "inputs"):
        assert facts.missing[name], name
    assert (facts.record, facts.gates, facts.error, facts.forms, facts.examples) == (None, (), None, (), ())
    (component,) = facts.components
    assert (component.name, component.calls, component.variant) == ("policy", 1, None)
    assert component.bytes == exported.size("component")
    assert facts.deviations == (1.0, 1.0)


def test_metrics_and_reports_become_facts(exported: Artifact, store: Store, tmp_path: Path) -> None:
    chunk = np.full((3, 2), 7.0)
    artifact = with_reports(
        exported,
        tmp_path / "verified",
        {
            "export": {"bytes": 4000, "action_error": ERROR},
            "prune": {"bytes": 3000, "action_error": ERROR},
            "onnx": {"bytes": 1000, "quantized_nodes": 1, "action_error": ERROR},
            "verify": {"backend": "onnxruntime", "engine_not_run": None, "golden": ERROR, "gates": [GATE]},
        },
        verify={"examples": [{"sample": 2, "error": 0.3, "actions": chunk.tolist()}]},
        quantize={
            "components": {
                "policy": {
                    "nodes": {
                        "blocks.10/Gemm": {"operator": "Gemm", "scheme": "fp32", "reason": "too few"},
                        "blocks.9/Gemm": {"operator": "Gemm", "scheme": "int8", "reason": "pays"},
                    }
                }
            },
            "search": {
                "trials": [
                    {
                        "what": "everything",
                        "moved": {},
                        "refused": None,
                        "held": True,
                        "error": ERROR,
                        "against_uniform_ms": 0.0,
                        "against_fp32_ms": -1.0,
                        "noise_ms": 0.0,
                        "bytes": 1000,
                    }
                ]
            },
        },
        calibration={
            "components": {
                "policy": {
                    "quiet": {"noise": 0.01, "outliers": 2.0, "saturated": 0.0},
                    "loud": {"noise": 0.2, "outliers": 90.0, "saturated": 0.1},
                }
            }
        },
        engine={"layers": {"policy": {"blocks.9/Gemm": "int8"}}},
    )
    facts = read_facts(artifact, newest(artifact, store), store)
    assert [(form.name, form.bytes, form.latency_ms) for form in facts.forms] == [
        ("FP32 ONNX", 4000, None),
        ("pruned", 3000, None),
        ("quantized", 1000, None),
    ]
    assert facts.gates[0].held
    assert facts.error is not None
    assert facts.error.executed.mean == 1.0
    (example,) = facts.examples
    np.testing.assert_array_equal(example.actions, chunk)
    np.testing.assert_array_equal(example.reference, Golden.of(artifact).actions[2])
    layers = facts.components[0].layers
    assert [(layer.name, layer.scheme, layer.runs) for layer in layers] == [
        ("blocks.9/Gemm", "int8", "int8"),
        ("blocks.10/Gemm", "fp32", None),
    ]
    assert facts.components[0].precisions == {"fp32": 1, "int8": 1}
    assert [fit.tensor for fit in facts.fits] == ["loud", "quiet"]
    assert facts.trials[0].error == 1.0
    assert not {"gates", "error", "examples", "trials", "fits"} & set(facts.missing)


@pytest.mark.parametrize(
    ("metrics", "reports"),
    [
        ({"verify": {"gates": [GATE]}}, {}),
        ({"verify": {"backend": "onnxruntime", "golden": {"mean": 1}}}, {}),
        ({"verify": {"backend": "onnxruntime", "gates": [{"name": "a gate of another time"}]}}, {}),
        ({}, {"verify": {"examples": [{"sample": 99, "error": 0.1, "actions": []}]}}),
        ({}, {"quantize": {"components": []}}),
        ({}, {"calibration": {"components": {"policy": {"tensor": {}}}}}),
    ],
)
def test_reports_of_another_form_are_refused(
    exported: Artifact, store: Store, tmp_path: Path, metrics: dict[str, Any], reports: dict[str, Any]
) -> None:
    artifact = with_reports(exported, tmp_path / "odd", metrics, **reports)
    with pytest.raises(InputError, match="odd: its metrics or reports are not as this vlaopt writes them"):
        read_facts(artifact, newest(artifact, store), store)


def test_the_recipe_is_one_again(exported: Artifact, store: Store, tmp_path: Path) -> None:
    text = read_facts(exported, newest(exported, store), store).recipe_text
    folder = tmp_path / "recipes/edge-vla"
    folder.mkdir(parents=True)
    (folder / "checkpoint").symlink_to(CPU.parent / "checkpoint")
    (tmp_path / "calibration").symlink_to(ROOT / "calibration")
    (folder / "recipe.yaml").write_text(text)
    again = load_recipe(folder / "recipe.yaml")
    assert again.model_dump(exclude={"path"}) == exported.recipe().model_dump(exclude={"path"})


def test_the_newest_measurement_of_the_store_is_told_before_the_builds_own(
    exported: Artifact, store: Store, tmp_path: Path
) -> None:
    own = record(reasons=("its own",))
    artifact = with_reports(exported, tmp_path / "benched", {}, bench=json.loads(own.to_json()))
    found = newest(artifact, store)
    assert found.record == own
    assert found.where == "the measurement made when the artifact was built"
    mine = record(reasons=("mine",), subject=Subject(artifact=artifact.id))
    store.remember("bench", f"{artifact.id[:16]}-here", json.loads(mine.to_json()))
    found = newest(artifact, store)
    assert found.record == mine
    assert found.where == "this machine's newest measurement"


def test_a_measurement_on_another_backend_is_said_to_be_none_of_the_engine(exported: Artifact, store: Store) -> None:
    engine = EngineEntry(machine="m", backend="tensorrt", backend_version="10", threads=0, settings={}, components={})
    with_engine = Artifact.from_manifest(exported.path, exported.manifest.model_copy(update={"engine": engine}))
    facts = read_facts(with_engine, Found(record(), "a file", None), store)
    assert facts.missing["engine_record"] == "measured on onnxruntime, not the engine on tensorrt"
    assert "engine_record" not in read_facts(exported, Found(record(), "a file", None), store).missing


def test_a_measurement_that_another_version_kept_is_passed_over(exported: Artifact, store: Store) -> None:
    store.remember("bench", f"{exported.id[:16]}-here", {"schema": "vlaopt.bench/1"})
    found = newest(exported, store)
    assert found.record is None
    assert found.reason is not None
    assert "the artifact holds no measurement" in found.reason


def test_a_measurement_of_the_build_in_another_schema_is_said_to_be_one(
    exported: Artifact, store: Store, tmp_path: Path
) -> None:
    artifact = with_reports(exported, tmp_path / "old", {}, bench={"schema": "vlaopt.bench/1"})
    found = newest(artifact, store)
    assert found.record is None
    assert found.reason is not None
    assert "another version of vlaopt measured it" in found.reason


def test_a_file_of_another_artifact_is_refused(exported: Artifact, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(record(subject=Subject(artifact="f" * 64)).to_json())
    with pytest.raises(InputError, match=r"bench\.json: measures another artifact \(ffffffffffff, this one is "):
        given(file, exported)
    file.write_text(record(subject=Subject(artifact=exported.id)).to_json())
    assert given(file, exported).where == "the file bench.json"


def test_a_file_of_the_same_policy_counts_only_for_an_artifact_that_is_finished_elsewhere(
    exported: Artifact, tmp_path: Path
) -> None:
    file = tmp_path / "bench.json"
    policy = digest_bytes(exported.read(ACTIONS))
    file.write_text(record(subject=Subject(artifact="f" * 64, policy=policy)).to_json())
    with pytest.raises(InputError, match="measures another artifact"):
        given(file, exported)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": "vlaopt.bench/1"}'])
def test_a_file_that_is_no_record_is_refused(exported: Artifact, tmp_path: Path, text: str) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"not a vlaopt\.bench/2 record"):
        given(file, exported)
