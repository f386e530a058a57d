"""The chain: one recipe in, one checked artifact out; nothing is done twice; every stage also runs alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import vlaopt
from tests.integration.conftest import CPU, NO_RECOVERY, ROOT, SmallBuild, settings
from tests.integration.conftest import vlaopt as command
from vlaopt import summary
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.chain import Outcome, build, plan, run_stage
from vlaopt.errors import GateError, InputError
from vlaopt.progress import Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.runtime.golden import Golden
from vlaopt.stages import ORDER, Stage, get


def test_a_build_runs_every_stage_and_publishes_a_sound_artifact(small_build: SmallBuild) -> None:
    assert [outcome.stage for outcome in small_build.result.outcomes] == list(ORDER)
    artifact = Artifact.open(small_build.result.artifact.path)
    artifact.check()
    assert artifact.path == small_build.output / "edge-vla" / artifact.version / "cpu-x86"
    assert [step.stage for step in artifact.manifest.lineage] == list(ORDER)
    assert artifact.manifest.engine is not None


def test_the_artifact_predicts_what_the_reference_did(small_build: SmallBuild) -> None:
    artifact = small_build.result.artifact
    golden = Golden.of(artifact)
    policy = vlaopt.open(artifact.path)
    chunk = policy.predict_chunk(golden.observations[0])
    assert chunk.shape == (10, 4)
    assert chunk.dtype == np.float32
    assert np.abs(chunk - golden.actions[0]).mean() < 0.2
    assert np.array_equal(policy.predict(golden.observations[0]), chunk[0])


def test_the_second_build_does_nothing(small_build: SmallBuild) -> None:
    again = build(small_build.result.recipe, output=small_build.output, store=small_build.store)
    assert all(outcome.cached for outcome in again.outcomes)
    assert again.artifact.id == small_build.result.artifact.id


def test_the_second_build_takes_under_two_seconds(small_build: SmallBuild) -> None:
    arguments = ["build", CPU, *settings(NO_RECOVERY), "--output", small_build.output]
    first = command(*arguments, store=small_build.store.root)
    assert first.returncode == 0, first.stderr
    started = time.monotonic()
    second = command(*arguments, store=small_build.store.root)
    seconds = time.monotonic() - started
    assert second.returncode == 0
    assert "nothing to do" in second.stdout
    assert second.stdout.splitlines()[-1] == str(small_build.result.artifact.path)
    assert seconds < 2


@pytest.mark.parametrize(
    ("override", "first"),
    [
        ("bench.hz=40", "bench"),
        ("verify.samples=10", "export"),
        ("calibration.samples=20", "export"),
        ("engine.minimum_speedup=0.5", "engine"),
        ("quantize.calibrator=mse", "quantize"),
        ("prune.amount=0.5", "prune"),
    ],
)
def test_a_changed_value_runs_its_stage_and_those_after_it(small_build: SmallBuild, override: str, first: str) -> None:
    planned = plan(load_recipe(CPU, overrides=[*NO_RECOVERY, override]), small_build.store)
    position = ORDER.index(first)
    assert [stage.state for stage in planned] == ["cached"] * position + ["run"] + ["follows"] * (6 - position)
    key = override.split("=")[0]
    assert key in planned[position].why


def test_cache_why_says_what_changed(small_build: SmallBuild) -> None:
    arguments = ["cache", "why", CPU, *settings([*NO_RECOVERY, "quantize.calibrator=mse"]), "--json"]
    told = json.loads(command(*arguments, store=small_build.store.root).stdout)
    assert told[2]["stage"] == "quantize"
    assert "quantize.calibrator" in told[2]["why"]
    assert "minmax → mse" in told[2]["why"]


def test_each_stage_alone_gives_what_the_build_gave(small_build: SmallBuild, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source: Artifact | None = None
    for outcome in small_build.result.outcomes[:4]:
        alone = run_stage(get(outcome.stage), small_build.result.recipe, source, store=store, progress=Silent())
        assert not alone.cached
        assert alone.artifact.manifest.content_digest() == outcome.artifact.manifest.content_digest(), outcome.stage
        source = alone.artifact


@pytest.mark.parametrize("stage", ["engine", "verify", "bench"])
def test_a_stage_runs_from_the_command_line_on_the_artifact_before_it(
    small_build: SmallBuild, tmp_path: Path, stage: str
) -> None:
    before = small_build.result.outcomes[ORDER.index(stage) - 1].artifact
    arguments = [stage, before.path, "--recipe", CPU, *settings(NO_RECOVERY), "--json"]
    done = command(*arguments, store=tmp_path / "store")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["stage"] == stage
    made = Artifact.open(told["path"]).manifest
    wanted = small_build.result.outcomes[ORDER.index(stage)].artifact.manifest
    assert made.lineage[-1] == wanted.lineage[-1]
    if stage != "engine":
        assert made.content_digest() == wanted.content_digest()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_engine_stage_alone_builds_the_same_bytes(small_build: SmallBuild, tmp_path: Path, backend: str) -> None:
    """With nothing left to the clock: which backend and which form ships is otherwise decided by measurement."""
    pytest.importorskip(backend)
    overrides = [*NO_RECOVERY, f"engine.backend={backend}", "engine.minimum_speedup=100"]
    recipe, source = load_recipe(CPU, overrides=overrides), small_build.result.outcomes[3].artifact

    def engines(folder: str) -> dict[str, str]:
        result = run_stage(get("engine"), recipe, source, store=Store(tmp_path / folder), progress=Silent())
        manifest = result.artifact.manifest
        assert manifest.engine is not None
        shipped = {name: part.variant for name, part in manifest.engine.components.items()}
        files = {entry.path: entry.sha256 for entry in manifest.by_role("engine")}
        return {path: digest for path, digest in files.items() if shipped[path.split("/")[2]] == "plain"}

    first, second = engines("first"), engines("second")
    assert {path.split("/")[2] for path in first} >= {"vision", "head"}
    assert first.keys() & second.keys() >= {path for path in first if "/language/" not in path}
    assert all(first[path] == second[path] for path in first.keys() & second.keys())


def test_a_stage_refuses_the_artifact_of_another_stage(small_build: SmallBuild, tmp_path: Path) -> None:
    exported = small_build.result.outcomes[0].artifact
    with pytest.raises(InputError, match="verify takes the artifact of engine, this one is of export"):
        run_stage(get("verify"), small_build.result.recipe, exported, store=Store(tmp_path), progress=Silent())


def test_a_missed_gate_ends_with_five_keeps_its_report_and_another_limit_needs_no_new_run(
    small_build: SmallBuild, tmp_path: Path
) -> None:
    exported, store = small_build.result.outcomes[0].artifact, Store(tmp_path / "store")

    def prune(limit: str) -> Outcome:
        recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, f"accept.action_error.mean={limit}"])
        return run_stage(get("prune"), recipe, exported, store=store, progress=Silent())

    for _ in range(2):
        with pytest.raises(GateError, match=r"mean action error .* \(limit 1e-09\)") as raised:
            prune("1e-9")
        assert raised.value.exit_code == 5
    report = Path(str(raised.value.hint).rpartition(" ")[2])
    assert json.loads(report.read_bytes())["action_error"]["executed"]["mean"] > 1e-9
    assert prune("0.5").cached


def test_a_gate_missed_in_verify_keeps_its_report_and_stores_nothing(small_build: SmallBuild, tmp_path: Path) -> None:
    built, store = small_build.result.outcomes[4].artifact, Store(tmp_path / "store")
    recipe = load_recipe(CPU, overrides=[*NO_RECOVERY, "accept.action_error.mean=1e-9"])
    with pytest.raises(GateError, match="golden: mean action error"):
        run_stage(get("verify"), recipe, built, store=store, progress=Silent())
    kept = list((store.root / "failed").rglob("verify.json"))
    assert any(not gate["held"] for gate in json.loads(kept[0].read_bytes())["gates"])
    assert not list((store.root / "stages").rglob("manifest.json"))


def test_what_changes_while_a_stage_reads_it_is_not_stored(
    small_build: SmallBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = get("quantize")
    answers = iter([{"calibration.path": "0" * 64}, {"calibration.path": "1" * 64}])
    monkeypatch.setattr(Stage, "outside", lambda self, recipe: next(answers))
    store = Store(tmp_path / "store")
    with pytest.raises(InputError, match="was changed while it ran"):
        run_stage(
            stage, small_build.result.recipe, small_build.result.outcomes[1].artifact, store=store, progress=Silent()
        )
    assert not list(store.root.rglob("manifest.json"))


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("edge-vla/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_can_be_planned_here(recipe: Path, tmp_path: Path) -> None:
    done = command("build", recipe, "--dry-run", "--json", store=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [stage["stage"] for stage in json.loads(done.stdout)] == list(ORDER)


def test_the_script_of_the_whole_chain_runs(small_build: SmallBuild, tmp_path: Path) -> None:
    script = ROOT / "scripts/whole_chain.py"
    environment = {**os.environ, "VLAOPT_STORE": str(small_build.store.root)}
    done = subprocess.run(
        [sys.executable, str(script), str(CPU), *NO_RECOVERY],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "built edge-vla 1.0.0+" in done.stdout
    assert done.stdout.count("  action ") == 3


def test_forms_too_large_to_be_open_together_are_measured_one_after_the_other(
    small_build: SmallBuild, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "TOGETHER", -1)
    told = summary.summarise(small_build.result, Store(tmp_path / "another store"), Silent())
    assert [row.form for row in told.rows] == ["eager", "FP32 ONNX", "pruned", "quantized", "engine"]
    assert all(row.latency_ms is not None and row.latency_ms > 0 for row in told.rows)
    assert "p50 of 4 chunks" in told.how
