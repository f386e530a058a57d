"""A flow policy of three components through the whole chain: captured once, quantized with every step of its loop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import vlaopt
from tests import toy_flow
from vlaopt import policies
from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import PLAN_PATH
from vlaopt.artifact.store import Store
from vlaopt.chain import Build, build, run_stage
from vlaopt.errors import InputError
from vlaopt.progress import Silent
from vlaopt.quantization.fit import read_report
from vlaopt.quantization.plan import QuantizationPlan
from vlaopt.recipe.load import load_recipe
from vlaopt.runtime.capture import Capture
from vlaopt.runtime.golden import Golden
from vlaopt.stages import get


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A toy checkpoint with its recipe, its type known in this process."""
    made = tmp_path_factory.mktemp("toy")
    toy_flow.make(made)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(policies.BUILT_IN, "toy-flow", "tests.toy_flow")
        yield made


@pytest.fixture(scope="module", params=["none", "int8"])
def built(request: pytest.FixtureRequest, folder: Path) -> Build:
    recipe = load_recipe(folder / "recipe.yaml", overrides=[f"quantize.scheme={request.param}"])
    return build(recipe, output=folder / "artifacts", store=Store(folder / "store"))


def test_the_artifact_does_what_the_policy_does(built: Build, folder: Path) -> None:
    policy = vlaopt.open(built.artifact.path)
    eager = toy_flow.ADAPTER.load(folder / "checkpoint", {}, {})
    scale = policy.processors.action_std()
    for index in range(100, 110):
        noise = np.random.default_rng(index).standard_normal((1, 8, 3), dtype=np.float32)
        seen = toy_flow.observation(index)
        apart = np.abs(policy.predict_chunk(seen, noise) - eager.predict_chunk(seen, noise)) / scale
        assert apart.mean() < (1e-4 if built.recipe.quantize.scheme == "none" else 0.5)
        assert apart.max() > 0 or built.recipe.quantize.scheme == "none"


def test_the_export_says_how_far_everything_is_from_eager(built: Build) -> None:
    metrics = built.artifact.manifest.metrics["export"]
    named = [*toy_flow.cache_names(), "prefix_mask", "state_of_loop", "time"]
    assert metrics["parity"].keys() == {
        "vision",
        "prefix",
        "step",
        "policy",
        "number of calls of step",
        "input image of vision",
        *(f"input {name} of prefix" for name in ("features", "state", "tokens", "token_mask")),
        *(f"input {name} of step" for name in named),
    }
    assert max(metrics["parity"].values()) < 2e-5
    assert metrics["captured"] == 12
    assert metrics["noise"]["drawn"] == "normal"


@pytest.mark.parametrize("steps", ["together", "union", "mean"])
def test_the_ranges_of_every_loop_step_are_recorded_and_merged(folder: Path, steps: str) -> None:
    recipe = load_recipe(folder / "recipe.yaml", overrides=["quantize.scheme=int8", f"quantize.steps={steps}"])
    source, store = None, Store(folder / "store")
    for stage in ("export", "prune", "quantize"):
        source = run_stage(get(stage), recipe, source, store=store, progress=Silent()).artifact
    plan = QuantizationPlan.from_json(source.read(PLAN_PATH), where=PLAN_PATH)
    report = read_report(source)
    assert plan.steps == report.steps == steps
    for component, fits in report.components.items():
        assert fits.keys() == plan.components[component].ranges.keys()
        for tensor, fit in fits.items():
            low, high = plan.components[component].ranges[tensor]
            assert (low, high) == pytest.approx(fit.range, rel=1e-5)
            assert len(fit.steps) == (5 if component == "step" else 0)
            if fit.steps:
                # The recipe's calibrator is minmax: a step's range is what was seen in it.
                lows, highs = zip(*(step.seen for step in fit.steps), strict=True)
                merged = (np.mean(lows), np.mean(highs)) if steps == "mean" else (min(lows), max(highs))
                assert (low, high) == pytest.approx(merged, rel=1e-5)
                own = None if steps == "together" else fit.steps[0].seen
                assert fit.steps[0].range == own


def test_the_capture_goes_as_far_as_quantize_and_no_further(built: Build) -> None:
    holds = {o.stage: bool(o.artifact.manifest.by_role("capture")) for o in built.outcomes}
    assert [stage for stage, held in holds.items() if held] == ["export", "prune"]
    assert not built.artifact.manifest.by_role("capture")


def test_golden_data_is_an_even_part_of_what_was_captured(built: Build) -> None:
    exported = built.outcomes[0].artifact
    capture, golden = Capture.of(exported), Golden.of(exported)
    assert capture.index.rows == tuple(range(12))
    assert capture.index.golden == (0, 3, 6, 9)
    assert golden.noise is not None
    for place, position in enumerate(capture.index.golden):
        assert np.array_equal(capture.noise(position), golden.noise[place])
        seen = toy_flow.observation(capture.index.rows[position])
        assert np.array_equal(golden.observations[place]["observation.state"], seen["observation.state"])


def test_ranges_hold_every_step_of_the_loop(built: Build) -> None:
    if built.recipe.quantize.scheme == "none":
        pytest.skip("nothing is quantized")
    exported = built.outcomes[0].artifact
    ranges = (
        QuantizationPlan.from_json(built.outcomes[2].artifact.read(PLAN_PATH), where=PLAN_PATH)
        .components["step"]
        .ranges
    )
    capture = Capture.of(exported)
    states = [[call.inputs["state_of_loop"] for call in capture.calls(row, "step", {})] for row in range(12)]
    assert {len(calls) for calls in states} == {5}
    # The state itself has no range: it is reshaped before it is multiplied.
    assert (float(np.min(states)), float(np.max(states))) in ranges.values()
    first = [calls[0] for calls in states]
    assert np.max(np.abs(states)) > 1.2 * np.max(np.abs(first)), "the noise alone reaches as far: this proves nothing"


def test_another_number_of_samples_than_was_captured_is_refused(built: Build, folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(folder / "recipe.yaml", overrides=["quantize.scheme=int8", "calibration.samples=9"])
    with pytest.raises(InputError, match="was captured on 12 samples, 9 are asked for"):
        run_stage(
            get("quantize"), recipe, built.outcomes[1].artifact, store=Store(tmp_path / "store"), progress=Silent()
        )


def test_single_weights_are_pruned_from_components_that_only_wrap_the_network(
    built: Build, folder: Path, tmp_path: Path
) -> None:
    overrides = ["prune.method=l1-unstructured", "prune.amount=0.3", "accept.action_error.mean=5", "accept.jerk=5"]
    recipe = load_recipe(folder / "recipe.yaml", overrides=overrides)
    before = built.outcomes[0].artifact
    pruned = run_stage(get("prune"), recipe, before, store=Store(tmp_path / "store"), progress=Silent()).artifact
    metrics = json.loads(pruned.read("reports/prune.json"))
    assert max(metrics["parity"].values()) < 2e-5
    layers = {layer["scope"]: layer for layer in metrics["layers"]}
    assert layers["step.wide.0.weight"]["macs_before"] == 8 * 16 * 32
    assert metrics["macs_before"] > sum(layer["macs_before"] for layer in layers.values()) > 0
    assert Capture.of(pruned).index == Capture.of(before).index
    theirs, ours = (Capture.of(artifact).calls(0, "step", {}) for artifact in (before, pruned))
    assert np.array_equal(theirs[0].inputs["state_of_loop"], ours[0].inputs["state_of_loop"])
    assert not np.array_equal(theirs[0].outputs["velocity"], ours[0].outputs["velocity"])


def test_a_policy_is_not_captured_again_on_other_observations(built: Build, folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    toy_flow.make(other, samples=16)
    recipe = load_recipe(
        folder / "recipe.yaml",
        overrides=["prune.method=l1-unstructured", "prune.amount=0.3", f"calibration.path={other / 'set'}"],
    )
    with pytest.raises(InputError, match="captured on the observations of the export"):
        run_stage(get("prune"), recipe, built.outcomes[0].artifact, store=Store(tmp_path / "s"), progress=Silent())


def test_channels_of_components_that_only_wrap_the_network_are_refused(
    built: Build, folder: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(folder / "recipe.yaml", overrides=["prune.method=channels", "prune.amount=0.3"])
    with pytest.raises(InputError, match="policy type toy-flow cannot be pruned by channels yet: its component prefix"):
        run_stage(get("prune"), recipe, built.outcomes[0].artifact, store=Store(tmp_path / "s"), progress=Silent())


def test_two_exports_give_the_same_bytes(built: Build, folder: Path, tmp_path: Path) -> None:
    again = run_stage(get("export"), built.recipe, None, store=Store(tmp_path / "store"), progress=Silent()).artifact
    assert again.manifest.content_digest() == built.outcomes[0].artifact.manifest.content_digest()


def test_steps_and_horizon_change_without_a_new_build(built: Build) -> None:
    artifact = Artifact.open(built.artifact.path)
    seen, noise = toy_flow.observation(3), np.zeros((1, 8, 3), np.float32)
    chunks = [vlaopt.open(artifact.path, steps=steps).predict_chunk(seen, noise) for steps in (5, 10, 20)]
    nearer, further = np.abs(chunks[2] - chunks[1]).max(), np.abs(chunks[1] - chunks[0]).max()
    assert nearer > 0 and further > 0
    # In int8 the rounding is as large as what finer steps change.
    assert nearer < further or built.recipe.quantize.scheme == "int8"


def test_without_a_calibration_set_as_many_are_captured_as_are_golden(
    built: Build, folder: Path, tmp_path: Path
) -> None:
    overrides = ["calibration=null", f"verify.observations={folder / 'set'}", "verify.samples=3"]
    recipe = load_recipe(folder / "recipe.yaml", overrides=overrides)
    exported = run_stage(get("export"), recipe, None, store=Store(tmp_path / "store"), progress=Silent()).artifact
    index = Capture.of(exported).index
    assert len(index.rows) == 4
    assert index.golden == (0, 1, 2, 3)
    assert len(Golden.of(exported).observations) == 4
