"""`vlaopt calibration` and `vlaopt capture`: a path on stdout, one line for what is wrong, nothing half done."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.cli.conftest import ROOT, STATE, Cli, Told
from tests.unit.conftest import Files, Publish
from vlaopt.calibration import CalibrationSet
from vlaopt.cli import ranges
from vlaopt.cli.wanted import wanted_by
from vlaopt.quantization.calibrators import Extremes, Found, Histogram, Range, Step
from vlaopt.quantization.fit import REPORT, CalibrationReport, TensorFit, fits_of

NAME = "observation.state"
SHIPPED = ROOT / "calibration/metaworld-held-out"


@pytest.fixture
def episodes(tmp_path: Path) -> Path:
    """Three episodes of the linear policy's robot, which also has a camera that the policy does not look through."""
    folder = tmp_path / "episodes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        np.savez(
            folder / f"{number}.npz",
            **{
                NAME: rng.normal(size=(20, STATE)).astype(np.float32),
                "observation.images.front": rng.integers(0, 256, (20, 8, 6, 3), dtype=np.uint8),
                "action": rng.normal(size=(20, 2)).astype(np.float32),
                "task": np.array(["open", "close"][number % 2]),
            },
        )
    return folder


def check_refused(told: Told, words: str) -> None:
    assert told.code == 2, told.err
    assert told.out == ""
    # Progress may be told before it.
    [line] = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_make_gives_the_path(cli: Cli, episodes: Path, tmp_path: Path) -> None:
    told = cli("calibration", "make", episodes, "-o", tmp_path / "set", "--samples", 30, "--licence", "MIT")
    assert told.code == 0, told.err
    assert told.out == f"{tmp_path / 'set'}\n"
    card = CalibrationSet.open(tmp_path / "set").card
    assert (card.name, card.licence, card.samples) == ("set", "MIT", 30)
    assert card.source == "episodes: 3 episode files, 60 steps"
    assert f"30 samples of 3 episodes, digest {CalibrationSet.open(tmp_path / 'set').digest[:12]}" in told.err


def test_make_tells_what_it_rounded(cli: Cli, episodes: Path, tmp_path: Path) -> None:
    for path in episodes.iterdir():
        np.savez(path, **{NAME: np.random.default_rng(0).normal(size=(9, 4))})
    told = cli("calibration", "make", episodes, "-o", tmp_path / "set")
    assert "observation.state: float64 rounded to float32" in told.err


def test_make_takes_what_an_artifact_observes(cli: Cli, episodes: Path, tmp_path: Path, artifact: Path) -> None:
    told = cli("calibration", "make", episodes, "-o", tmp_path / "set", "--policy", artifact)
    assert told.code == 0, told.err
    assert set(CalibrationSet.open(tmp_path / "set").card.observation) == {NAME}


def test_make_takes_what_a_recipe_observes(cli: Cli, tmp_path: Path) -> None:
    recipe = ROOT / "recipes/edge-vla/cpu.yaml"
    told = cli("calibration", "make", SHIPPED, "-o", tmp_path / "set", "--policy", recipe, "--samples", 16)
    assert told.code == 0, told.err
    assert set(CalibrationSet.open(tmp_path / "set").card.observation) == {"observation.images.front", NAME, "task"}


def lerobot_checkpoint(folder: Path, steps: list[dict[str, Any]] | None, **config: Any) -> Path:
    """What a LeRobot checkpoint says of observations."""
    folder.mkdir()
    features = {
        "observation.images.camera1": {"type": "VISUAL", "shape": [3, 8, 6]},
        NAME: {"type": "STATE", "shape": [STATE]},
    }
    (folder / "config.json").write_text(json.dumps({"type": "act", "input_features": features, **config}))
    if steps is not None:
        (folder / "policy_preprocessor.json").write_text(json.dumps({"name": "policy_preprocessor", "steps": steps}))
    return folder


RENAME = {
    "registry_name": "rename_observations_processor",
    "config": {"rename_map": {"observation.images.front": "observation.images.camera1"}},
}


@pytest.mark.parametrize(
    ("steps", "config", "kept"),
    [
        ([RENAME], {}, {"observation.images.front", NAME}),
        ([RENAME, {"registry_name": "tokenizer_processor"}], {}, {"observation.images.front", NAME, "task"}),
    ],
    ids=["without language", "with language"],
)
def test_make_takes_what_a_lerobot_checkpoint_observes(
    cli: Cli, episodes: Path, tmp_path: Path, steps: list[dict[str, Any]], config: dict[str, Any], kept: set[str]
) -> None:
    checkpoint = lerobot_checkpoint(tmp_path / "checkpoint", steps, **config)
    told = cli("calibration", "make", episodes, "-o", tmp_path / "set", "--policy", checkpoint)
    assert told.code == 0, told.err
    assert set(CalibrationSet.open(tmp_path / "set").card.observation) == kept


def test_make_takes_the_steps_that_the_policy_looks_back(cli: Cli, episodes: Path, tmp_path: Path) -> None:
    checkpoint = lerobot_checkpoint(tmp_path / "checkpoint", None, n_obs_steps=2)
    arguments = ["--rename", "observation.images.front=observation.images.camera1", "--policy", checkpoint]
    told = cli("calibration", "make", episodes, "-o", tmp_path / "set", *arguments)
    assert told.code == 0, told.err
    assert CalibrationSet.open(tmp_path / "set").card.observation["observation.images.camera1"].shape == (2, 8, 6, 3)


@pytest.mark.parametrize(("kind", "history"), [("act", 1), ("diffusion", 2), ("smolvla", 1)])
def test_what_a_checkpoint_of_lerobots_own_classes_observes(tmp_path: Path, kind: str, history: int) -> None:
    lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")
    wanted = wanted_by(lerobot.make(kind, tmp_path / "checkpoint"))
    assert wanted.history == history
    assert wanted.expected == CalibrationSet.open(lerobot.write_set(tmp_path / "set", kind)).layout()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing"], "missing: no such folder"),
        (["vlaopt"], "nothing to make a calibration set from"),
        (["README.md"], "README.md: a file, a folder is needed"),
        ([SHIPPED, "--rename", "a"], "--rename 'a' is not OLD=NEW"),
        ([SHIPPED, "--rename", "a=b"], "has no 'a' to rename"),
        ([SHIPPED, "--keep", "wrist"], "has no 'wrist', which is to be kept"),
        ([SHIPPED, "--policy", "missing"], "missing: no such artifact, checkpoint or recipe"),
        ([SHIPPED, "--policy", "vlaopt"], "vlaopt: tells nothing of observations"),
        ([SHIPPED, "--policy", "vlaopt", "--keep", "task"], "tells nothing of observations"),
        ([SHIPPED, "--history", "2"], "a history needs whole episodes"),
        ([SHIPPED, "--samples", "3"], "--samples"),
        ([SHIPPED, "--licence", ""], "card.json:licence: String should have at least 1 character"),
    ],
    ids=lambda value: " ".join(map(str, value[1:])) if isinstance(value, list) else "",
)
def test_make_refuses(cli: Cli, tmp_path: Path, arguments: list[str | Path], words: str) -> None:
    check_refused(cli("calibration", "make", *arguments, "-o", tmp_path / "set"), words)
    assert list(tmp_path.glob("*set*")) == []


def test_make_needs_a_place_that_is_free(cli: Cli, tmp_path: Path) -> None:
    check_refused(cli("calibration", "make", SHIPPED, "-o", tmp_path), f"{tmp_path}: already exists")


def test_inspect_tells_a_person(cli: Cli) -> None:
    told = cli("calibration", "inspect", SHIPPED)
    assert told.code == 0, told.err
    assert "metaworld-held-out: 192 samples" in told.out
    assert re.search(r"observation\.state +float32 \[4\] +-?\d", told.out)
    assert told.out.endswith("no problems found\n")


def test_inspect_tells_a_program(cli: Cli) -> None:
    told = cli("calibration", "inspect", SHIPPED, "--json").json
    assert told["card"]["schema"] == "vlaopt.observations/1"
    assert told["digest"] == CalibrationSet.open(SHIPPED).digest
    assert sum(told["tasks"].values()) == sum(told["episodes"].values()) == 192
    assert told["features"]["observation.images.front"]["maximum"] <= 255
    assert told["problems"] == []


def test_inspect_holds_a_set_against_a_policy(cli: Cli, episodes: Path, tmp_path: Path, artifact: Path) -> None:
    for path in episodes.iterdir():
        np.savez(path, **{NAME: np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)})
    assert cli("calibration", "make", episodes, "-o", tmp_path / "set").code == 0
    told = cli("calibration", "inspect", tmp_path / "set", "--policy", artifact)
    assert told.code == 0
    assert "problem: observation.state is float32 [5], the policy needs float32 [4]" in told.out


def fit(amax: float, seen: float, steps: tuple[float, ...] = (), taken_by: str = "layers.0/Gemm") -> TensorFit:
    """A tensor whose values were spread evenly up to `seen`."""
    values = np.linspace(-seen, seen, 1001, dtype=np.float32)
    histogram = Histogram(Extremes.of(values))
    histogram.add(values)
    own = tuple(Step(Extremes(-step, step), Range(-step, step)) for step in steps)
    found = Found(Range(-amax, amax), histogram, own or (Step(histogram.extremes, None),))
    return fits_of({"x": found}, {"x": [taken_by]})["x"]


@pytest.fixture
def quantized(tmp_path: Path, publish: Publish, tiny_files: Files) -> Path:
    """An artifact whose calibration held one tensor well, cut another in half, and saw a loop grow louder."""
    fits = {f"good_{number}": fit(1.0, 1.0) for number in range(20)}
    fits |= {"cut": fit(0.5, 1.0, taken_by="[last]/MatMul"), "loop": fit(3.0, 4.0, steps=(1.0, 4.0))}
    report = CalibrationReport(calibrator="mse", steps="union", samples=9, components={"step": fits})
    data = report.model_dump_json(by_alias=True).encode()
    return publish(tmp_path / "quantized", {**tiny_files, REPORT: ("report", data)}).path


def test_inspect_tells_how_an_artifact_was_calibrated(cli: Cli, quantized: Path) -> None:
    told = cli("calibration", "inspect", quantized)
    assert told.code == 0, told.err
    assert told.out.startswith("mse on 9 samples, loop steps: union, 22 tensors\n")
    rows = [line for line in told.out.splitlines() if " to " in line]
    assert re.search(r"step: cut +\[last\]/MatMul +-0.5 to 0.5 +-1 to 1 +\d\d.\d\d% +50.\d+%", rows[0])
    assert re.search(r" 127$", rows[0]), "the median of values spread to twice the range is at its end"
    assert any(re.search(r"step: loop .* 1 to 4 over 2$", row) for row in rows)
    assert "2 more tensors with less noise; --json has all" in told.out


def test_inspect_tells_a_program_how_an_artifact_was_calibrated(cli: Cli, quantized: Path) -> None:
    told = cli("calibration", "inspect", quantized, "--json").json
    assert (told["schema"], told["calibrator"], told["steps"]) == ("vlaopt.calibration-report/1", "mse", "union")
    assert len(told["components"]["step"]) == 22
    assert told["components"]["step"]["loop"]["steps"][1] == {"range": [-4.0, 4.0], "seen": [-4.0, 4.0]}


def test_inspect_draws_the_worst_tensors_and_the_loop(cli: Cli, quantized: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    told = cli("calibration", "inspect", quantized, "--plot", tmp_path / "plot.svg", "--json")
    assert told.code == 0, told.err
    assert told.json["calibrator"] == "mse"
    words = {text.strip() for text in ET.fromstring((tmp_path / "plot.svg").read_bytes()).itertext()}
    assert {"step.[last]/MatMul", "loop step", "largest |x| by step: 1 to 4 over 2", "range, steps union"} <= words


def test_inspect_draws_a_policy_without_a_loop(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report = CalibrationReport(calibrator="mse", steps="together", samples=9, components={"arm": {"x": fit(1.0, 1.0)}})
    ranges.plot(report, tmp_path / "plot.svg")
    assert b"loop step" not in (tmp_path / "plot.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{artifact}"], "nothing was calibrated for this artifact"),
        (["{artifact}", "--policy", "{artifact}"], "--policy is for a calibration set, this is an artifact"),
        ([str(SHIPPED), "--plot", "plot.svg"], "--plot draws the tensors of an artifact, this is none"),
    ],
)
def test_inspect_refuses(cli: Cli, artifact: Path, arguments: list[str], words: str) -> None:
    check_refused(cli("calibration", "inspect", *(text.format(artifact=artifact) for text in arguments)), words)


def test_capture_replays_episodes(cli: Cli, episodes: Path, tmp_path: Path, artifact: Path) -> None:
    told = cli("capture", artifact, "--from", episodes, "-o", tmp_path / "set", "--samples", 25, "--licence", "MIT")
    assert told.code == 0, told.err
    assert told.out == f"{tmp_path / 'set'}\n"
    assert "of 3 episodes, 60 ticks seen" in told.err
    samples = CalibrationSet.open(tmp_path / "set")
    assert 12 <= len(samples) <= 25
    assert set(samples.card.observation) == {NAME}
    assert samples.card.source == "episodes: 3 episode files, 60 steps"
    for index in range(len(samples)):
        number, step = samples.episode(index)
        with np.load(episodes / f"{number}.npz") as whole:
            np.testing.assert_array_equal(samples.observation(index)[NAME], whole[NAME][step])


def test_capture_plays_as_many_episodes_as_asked(cli: Cli, episodes: Path, tmp_path: Path, artifact: Path) -> None:
    told = cli("capture", artifact, "--from", episodes, "-o", tmp_path / "set", "--episodes", 2)
    assert "of 2 episodes, 40 ticks seen" in told.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name one of --from and --simulator"),
        (["--from", SHIPPED, "--simulator", "metaworld"], "name one of --from and --simulator"),
        (["--from", SHIPPED, "--task", "drawer-open"], "--task is for a simulator"),
        (["--simulator", "metaworld", "--rename", "a=b"], "--rename is for --from"),
        (["--from", SHIPPED], "a replay needs whole episodes"),
        (["--from", "missing"], "missing: no such folder"),
    ],
    ids=lambda value: " ".join(map(str, value)).replace(str(SHIPPED), "") if isinstance(value, list) else "",
)
def test_capture_refuses(cli: Cli, tmp_path: Path, artifact: Path, arguments: list[str | Path], words: str) -> None:
    check_refused(cli("capture", artifact, *arguments, "-o", tmp_path / "set"), words)
    assert not (tmp_path / "set").exists()


def test_capture_refuses_what_the_policy_cannot_observe(
    cli: Cli, episodes: Path, tmp_path: Path, artifact: Path
) -> None:
    for path in episodes.iterdir():
        np.savez(path, joints=np.zeros((9, 4), np.float32))
    told = cli("capture", artifact, "--from", episodes, "-o", tmp_path / "set")
    check_refused(told, f"has no '{NAME}'")
