"""Whatever is wrong: one line what and where, a hint, the exit code of its kind, and never a traceback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.cli.conftest import CPU, ROOT, Cli, Told, write_artifact
from vlaopt.cli.app import run

SOUND = """\
schema: vlaopt.recipe/1
name: edge-vla
version: 1.0.0
target: cpu-x86
policy: {type: edge-vla, checkpoint: checkpoint/}
"""
ORIN = SOUND.replace("cpu-x86", "jetson-orin")


def check_error(told: Told, code: int, words: str) -> None:
    """One `error:` line with `words`, then hints only; nothing on stdout."""
    assert told.code == code, told.err
    lines = told.err.splitlines()
    assert lines, "an error without a line"
    assert lines[0].startswith("error: ")
    assert words in told.err
    assert all(line.startswith(("error: ", "hint: ")) for line in lines)
    assert "Traceback" not in told.err
    assert told.out == ""


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    """Writes a recipe beside a checkpoint folder; gives its path."""
    (tmp_path / "checkpoint").mkdir()

    def _write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["buld"], "No such command 'buld'. Did you mean 'build'?"),
        (["recipe", "shw"], "No such command 'shw'"),
        (["build", "--nope"], "No such option"),
        (["build"], "Missing argument 'RECIPE'"),
        (["build", CPU, "--from", "bake"], "'bake' is not one of 'export'"),
        (["build", CPU, "--set", "bench"], "'bench' is not key=value"),
        (["build", CPU, "--set", "quantise.scheme=int8"], "did you mean `quantize`?"),
        (["build", CPU, "--target", "jetson-orn"], "unknown target 'jetson-orn'"),
        (["build", "missing.yaml"], "missing.yaml: no such file"),
        (["build", "/"], "a directory, not a recipe"),
        (["build", ROOT / "recipes/targets/cpu-x86.yaml"], "target file, not a recipe"),
        (["recipe", "ls", "missing"], "missing: no such folder"),
        (["target", "show", "jetson"], "unknown target 'jetson'"),
        (["cache", "gc", "--older-than", "ages"], "--older-than"),
        (["compare", CPU.parent, CPU.parent, "--rounds", "1"], "--rounds"),
        (["inspect", "missing"], "missing: no such artifact directory"),
        (["inspect", CPU], "a file, not an artifact directory"),
        (["inspect", CPU.parent], "not an artifact"),
        (["verify", "missing"], "missing: no such artifact or recipe"),
        (["bench", "missing"], "missing: no such artifact or recipe"),
        (["bench", CPU.parent, "--hz", "100000"], "--hz"),
        (["eval", CPU.parent], "not a checkpoint folder"),
        (["verify", CPU.parent], "not an artifact"),
        (["bench", CPU.parent], "not an artifact"),
    ],
    ids=lambda value: " ".join(map(str, value[:3])).replace(str(CPU.parent), "") if isinstance(value, list) else "",
)
def test_bad_usage_is_exit_code_2(cli: Cli, arguments: list[str | Path], words: str) -> None:
    check_error(cli(*arguments), 2, words)


def test_no_command_shows_the_help(cli: Cli) -> None:
    told = cli()
    assert told.code == 2
    assert "Usage: vlaopt" in told.out
    assert told.err == ""


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        pytest.param("", 2, "empty file", id="1 empty"),
        pytest.param(SOUND + "quantise: {scheme: int8}\n", 2, "did you mean `quantize`?", id="2 near a known key"),
        pytest.param(SOUND + "bench: {hz: no}\n", 2, "recipe.yaml:6:bench.hz", id="3 no is not a number"),
        pytest.param(SOUND + "bench: {duration_s: 12:30}\n", 2, "bench.duration_s", id="3 12:30 is not seconds"),
        pytest.param(SOUND.replace("1.0.0", "10.10"), 2, "three numbers such as 1.0.0", id="3 10.10 is not semantic"),
        pytest.param(SOUND + "name: twice\n", 2, "recipe.yaml:6", id="4 duplicate key"),
        pytest.param(SOUND + "a: &a [1]\nb: [*a, *a, *a]\n", 2, "recipe.yaml:6", id="5 aliases"),
        pytest.param(SOUND + "a: " + "[" * 5000 + "]" * 5000, 2, "nested deeper than 32", id="5 deep nesting"),
        pytest.param(
            SOUND + "a: !!python/object/apply:os.system [id]\n", 2, "recipe.yaml:6", id="6 a tag that runs code"
        ),
        pytest.param(SOUND.replace("cpu-x86", "../x.yaml"), 2, "recipe.yaml:4:target", id="7 leaves the folder"),
        pytest.param(SOUND.replace("checkpoint/", "gone/"), 2, "policy.checkpoint", id="7 a path that is not there"),
        pytest.param(SOUND + "prune: {method: channels, amount: 1.0}\n", 2, "must be below 1.0", id="8 all pruned"),
        pytest.param(
            SOUND + "prune: {method: channels, amount: -0.1}\n", 2, "must be at least 0.0", id="8 less than none"
        ),
        pytest.param(SOUND + "prune: {method: channels, amount: .nan}\n", 2, "not a finite number", id="8 NaN"),
        pytest.param(SOUND + "quantize: {scheme: int8, bits: 3}\n", 2, "unknown key", id="8 three bits"),
        pytest.param(ORIN + "quantize: {scheme: fp8}\n", 3, "fp8", id="9 fp8 on SM 8.7"),
        pytest.param(ORIN + "quantize: {scheme: nvfp4}\n", 3, "nvfp4", id="9 fp4 on SM 8.7"),
    ],
)
def test_bad_recipes_build_nothing(
    cli: Cli, write: Callable[[str], Path], store: Path, tmp_path: Path, text: str, code: int, words: str
) -> None:
    told = cli("build", write(text), "--output", tmp_path / "artifacts")
    check_error(told, code, words)
    assert not (tmp_path / "artifacts").exists()
    assert not store.exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01" * 16, b"\x00" * 64], ids=["no text", "zeros"])
def test_a_binary_recipe_is_refused(cli: Cli, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    check_error(cli("build", tmp_path / "recipe.yaml"), 2, "recipe.yaml")


def test_a_recipe_of_200_mb_is_not_even_read(cli: Cli, tmp_path: Path) -> None:
    with (tmp_path / "recipe.yaml").open("wb") as file:
        file.truncate(200 << 20)
    check_error(cli("build", tmp_path / "recipe.yaml"), 2, "more than the 1048576 allowed")


def test_every_problem_of_a_recipe_comes_at_once(cli: Cli, write: Callable[[str], Path]) -> None:
    told = cli("recipe", "validate", write(SOUND + "bench: {hz: 0}\nprune: {amount: 2}\nonnxx: {}\n"))
    assert told.code == 2
    assert sum(line.startswith("error: ") for line in told.err.splitlines()) == 3


@pytest.mark.parametrize("command", ["engine", "bench"])
def test_stages_in_an_impossible_order_are_refused(cli: Cli, artifact: Path, command: str) -> None:
    told = cli(command, artifact, "--recipe", CPU)
    check_error(told, 2, f"{command} takes the artifact of")
    assert "the order of the stages is export → prune" in told.err


def test_a_stage_on_an_artifact_asks_for_its_recipe(cli: Cli, artifact: Path) -> None:
    check_error(cli("engine", artifact), 2, f"vlaopt engine {artifact} --recipe RECIPE")


def test_a_manifest_is_not_taken_for_a_recipe(cli: Cli, artifact: Path) -> None:
    told = cli("verify", artifact / "manifest.json")
    check_error(told, 2, "manifest.json:1:schema: artifact file, not a recipe")
    assert told.err.count("\n") == 2


def damage_a_byte(artifact: Path) -> None:
    path = artifact / "onnx/policy.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut_short(artifact: Path) -> None:
    path = artifact / "onnx/policy.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def remove_a_file(artifact: Path) -> None:
    (artifact / "golden/actions.safetensors").unlink()


def add_a_file(artifact: Path) -> None:
    (artifact / "extra.bin").write_bytes(b"x")


def link_a_file(artifact: Path) -> None:
    path = artifact / "onnx/policy.onnx"
    path.rename(artifact.parent / "elsewhere.onnx")
    path.symlink_to(artifact.parent / "elsewhere.onnx")


def break_the_manifest(artifact: Path) -> None:
    (artifact / "manifest.json").write_text("{")


def age_the_manifest(artifact: Path) -> None:
    path = artifact / "manifest.json"
    path.write_text(path.read_text().replace("vlaopt.artifact/1.", "vlaopt.artifact/7."))


@pytest.mark.parametrize("command", ["inspect", "verify", "bench"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_a_byte, "onnx/policy.onnx was changed after it was written"),
        (cut_short, "listed"),
        (remove_a_file, "golden/actions.safetensors is missing"),
        (add_a_file, "extra.bin is not listed"),
        (link_a_file, "onnx/policy.onnx is a link"),
        (break_the_manifest, "not a manifest"),
        (age_the_manifest, "another major version"),
    ],
)
def test_a_damaged_artifact_is_refused(
    cli: Cli, tmp_path: Path, command: str, damage: Callable[[Path], None], words: str
) -> None:
    artifact = write_artifact(tmp_path / "artifact").path
    damage(artifact)
    check_error(cli(command, artifact), 2, words)


def test_a_name_with_a_newline_stays_on_one_line(cli: Cli) -> None:
    told = cli("recipe", "validate", "a\nb\x1b[31m.yaml")
    assert told.err.splitlines()[0] == "error: a b\\x1b[31m.yaml: no such file"


def test_debug_shows_where_an_error_came_from(cli: Cli) -> None:
    told = cli("--debug", "recipe", "validate", "missing.yaml")
    assert told.code == 2
    assert "Traceback (most recent call last)" in told.err
    assert "error: missing.yaml: no such file" in told.err


def explode(error: BaseException) -> Callable[..., None]:
    def raise_it(*arguments: object, **named: object) -> None:
        raise error

    return raise_it


def test_a_bug_is_exit_code_1_and_asks_to_be_reported(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaopt.target.list_targets", explode(ZeroDivisionError("division by zero")))
    told = cli("target", "ls")
    assert told.code == 1
    assert told.err.splitlines()[0] == "error: a bug in vlaopt: ZeroDivisionError: division by zero"
    assert "hint: run again with `vlaopt --debug" in told.err
    assert "Traceback" not in told.err
    assert "Traceback" in cli("--debug", "target", "ls").err


def test_ctrl_c_is_exit_code_130(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaopt.target.list_targets", explode(KeyboardInterrupt()))
    told = cli("target", "ls")
    assert told.code == 130
    assert told.err == "interrupted; finished stages are kept, run the same command to go on\n"


@pytest.mark.parametrize("command", ["build", "verify", "bench", "inspect", "eval"])
def test_a_path_that_the_system_refuses_is_no_bug(cli: Cli, command: str) -> None:
    check_error(cli(command, "a" * 300), 2, "a" * 300)


def test_a_folder_of_another_user_is_no_bug(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlaopt.target.list_targets", explode(PermissionError(13, "Permission denied", "/theirs/x")))
    told = cli("target", "ls")
    check_error(told, 2, "error: /theirs/x: cannot be used: Permission denied")


def test_a_library_that_an_extra_brings_is_named(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ModuleNotFoundError("No module named 'torch'", name="torch")
    monkeypatch.setattr("vlaopt.target.list_targets", explode(absent))
    told = cli("target", "ls")
    assert told.code == 3
    assert told.err == "error: torch is not installed\nhint: pip install 'vlaopt[build]'\n"


def test_a_store_that_cannot_be_written_is_exit_code_3(monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("VLAOPT_STORE", "/dev/null/store")
    check_error(cli("export", CPU), 3, "check free space and permissions")


def test_run_takes_nothing_from_the_process_arguments() -> None:
    assert run(["--version"]) == 0
