"""The commands that only look: recipes, targets, the store. Tables for people, JSON for programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.conftest import CPU, ROOT, Cli, write_artifact
from vlaopt import __version__
from vlaopt.artifact.store import Record, Store, key_of
from vlaopt.target import list_targets

RECIPE = str(CPU.relative_to(ROOT))


def test_version_is_the_packages(cli: Cli) -> None:
    told = cli("--version")
    assert (told.code, told.out) == (0, f"{__version__}\n")


def test_recipe_ls_lists_every_recipe_with_its_target(cli: Cli) -> None:
    told = cli("recipe", "ls")
    assert told.code == 0
    assert RECIPE in told.out
    rows = cli("recipe", "ls", "--json").json
    assert {"path": RECIPE, "name": "edge-vla", "target": "cpu-x86", "scheme": "int8"}.items() <= next(
        row for row in rows if row["path"] == RECIPE
    ).items()


def test_recipe_ls_lists_a_broken_recipe_with_its_problem(cli: Cli, tmp_path: Path) -> None:
    broken = CPU.read_text().replace("name: edge-vla", "name: '[/x]'")
    (tmp_path / "broken.yaml").write_text(broken)
    row = cli("recipe", "ls", tmp_path, "--json").json[0]
    assert "broken.yaml:3:name" in row["description"]
    assert "[/x]" in row["description"]
    told = cli("recipe", "ls", tmp_path)
    assert told.code == 0, told.err
    assert "broken.yaml" in told.out


def test_recipe_show_writes_every_default_out(cli: Cli) -> None:
    shown = cli("recipe", "show", RECIPE, "--set", "bench.hz=33").json
    assert shown["bench"]["hz"] == 33
    assert shown["target"]["name"] == "cpu-x86"
    assert shown["onnx"]["simplify"] is True


def test_recipe_validate_says_ok_in_one_line(cli: Cli) -> None:
    told = cli("recipe", "validate", RECIPE)
    assert (told.code, told.out) == (0, f"{RECIPE}: ok (edge-vla 1.0.0 for cpu-x86)\n")


def test_recipe_schema_is_a_json_schema(cli: Cli) -> None:
    schema = cli("recipe", "schema").json
    assert "quantize" in schema["properties"]


def test_target_ls_names_every_target(cli: Cli) -> None:
    assert {target["name"] for target in cli("target", "ls", "--json").json} == set(list_targets())
    told = cli("target", "ls")
    assert all(name in told.out for name in list_targets())


def test_target_show_is_its_file_as_json(cli: Cli) -> None:
    assert "8.7" in cli("target", "show", "jetson-orin").json["compute_capabilities"]


def test_dry_run_plans_every_stage_and_runs_none(cli: Cli, store: Path) -> None:
    rows = cli("build", RECIPE, "--dry-run", "--json").json
    assert [row["stage"] for row in rows] == ["export", "prune", "quantize", "onnx", "engine", "verify", "bench"]
    assert rows[0]["state"] == "run"
    assert {row["state"] for row in rows[1:]} == {"follows"}
    assert not store.exists()


def remembered(store: Path, parts: dict[str, object], *, written: float) -> Path:
    """A stored result of stage export under the key of `parts`."""
    kept = Store(store)
    place = kept.place("export", key_of(parts))
    write_artifact(place)
    kept.note(Record("export", key_of(parts), "edge-vla", "cpu-x86", parts, 1.5, written))
    return place


def test_cache_ls_shows_what_is_stored(cli: Cli, store: Path) -> None:
    remembered(store, {"stage": "export"}, written=1_700_000_000.0)
    told = cli("cache", "ls")
    assert told.code == 0
    assert "export" in told.out
    assert "1.5 s" in told.out
    assert cli("cache", "ls", "--json").json[0]["key"] == key_of({"stage": "export"})


def test_cache_why_says_what_changed(cli: Cli, store: Path) -> None:
    remembered(store, {"stage": "export", "recipe": {"export": {"opset": 18}}}, written=1_700_000_000.0)
    rows = cli("cache", "why", RECIPE, "--json").json
    assert rows[0]["state"] == "run"
    assert "recipe.export.opset: 18 → 20" in rows[0]["why"]


def test_cache_gc_removes_what_is_old(cli: Cli, store: Path) -> None:
    place = remembered(store, {"stage": "export"}, written=1_700_000_000.0)
    assert cli("cache", "gc", "--older-than", "30").out.startswith("1 removed, ")
    assert not place.exists()
    assert cli("cache", "gc").out == "0 removed, 0.0 kB freed\n"


@pytest.mark.parametrize(
    "arguments", [("--help",), ("target", "ls"), ("recipe", "ls"), ("build", RECIPE, "--dry-run"), ("nonsense",)]
)
def test_no_colour_and_no_bars_where_nobody_watches(arguments: tuple[str, ...], tmp_path: Path) -> None:
    kept = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "GITHUB_ACTIONS")}
    environment = {**kept, "VLAOPT_STORE": str(tmp_path), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "vlaopt", *arguments]
    done = subprocess.run(command, capture_output=True, check=False, env=environment, cwd=ROOT)
    assert b"\x1b" not in done.stdout + done.stderr


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    environment = {**os.environ, "VLAOPT_STORE": str(tmp_path)}
    command = [sys.executable, "-m", "vlaopt", "recipe", "schema"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=ROOT
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_a_terminal_without_unicode_gets_a_question_mark_not_an_error(tmp_path: Path) -> None:
    environment = {**os.environ, "VLAOPT_STORE": str(tmp_path), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "vlaopt", "bench", "nowhere…"]
    done = subprocess.run(command, capture_output=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 2
    assert b"nowhere?" in done.stderr
