"""vlaopt recipe init: a recipe on stdout and nothing else there; mistakes in one line; nothing fetched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.unit.cli.conftest import ROOT, Cli
from vlaopt.recipe.load import load_recipe

CHECKPOINT = "recipes/edge-vla/checkpoint"


def test_what_is_printed_is_a_sound_recipe(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = cli("recipe", "init", CHECKPOINT, "--target", "jetson-orin", "--calibration", "calibration/metaworld")
    assert told.code == 0, told.err
    assert "missing" not in told.err
    for name in ("recipes", "calibration"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "recipe.yaml").write_text(told.out, encoding="utf-8")
    assert cli("recipe", "validate", tmp_path / "recipe.yaml").code == 0
    assert load_recipe(tmp_path / "recipe.yaml").target.name == "jetson-orin"


def test_what_is_missing_is_told_on_stderr(cli: Cli) -> None:
    told = cli("recipe", "init", CHECKPOINT, "--target", "cpu-x86", "--name", "mine")
    assert told.code == 0
    assert "missing: a calibration set" in told.err
    assert told.out.count("schema: vlaopt.recipe/1") == 1
    assert "\nname: mine\n" in told.out


def test_paths_below_the_working_directory_become_relative(cli: Cli) -> None:
    told = cli("recipe", "init", ROOT / CHECKPOINT, "--target", "cpu-x86")
    assert f"checkpoint: {CHECKPOINT}\n" in told.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nowhere", "--target", "cpu-x86"), "nowhere: no such checkpoint folder"),
        ((CHECKPOINT, "--target", "jetson"), "unknown target 'jetson'"),
        ((CHECKPOINT, "--target", "cpu-x86", "--hub-override", "vlm"), "--hub-override 'vlm' is not FIELD=FOLDER"),
        ((CHECKPOINT, "--target", "cpu-x86", "--hub-override", "a=b"), "edge-vla takes neither hub_overrides"),
        ((CHECKPOINT,), "--target"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_printed(cli: Cli, arguments: tuple[str, ...], message: str) -> None:
    told = cli("recipe", "init", *arguments)
    assert (told.code, told.out) == (2, "")
    errors = [line for line in told.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in told.err


def test_a_type_of_nobody_says_which_there_are(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"type": "pi9"}))
    told = cli("recipe", "init", tmp_path, "--target", "cpu-x86")
    assert told.code == 2
    assert "unknown policy type 'pi9'" in told.err
    assert "edge-vla" in told.err
