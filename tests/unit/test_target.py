"""A target is found by name or path, and promises only what its hardware has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlaopt.errors import InputError, RecipeError
from vlaopt.target import cpu_lacks, find_target, list_targets, load_target, read_target

SOUND = """\
schema: vlaopt.target/1
name: mine
kind: gpu
arch: x86_64
backends: [tensorrt]
compute_capabilities: ["8.9", "12.0"]
precisions: [fp32, fp16, int8, fp8]
engine_built_on: target
"""


def _write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_the_shipped_targets_are_sound() -> None:
    assert [load_target(name).name for name in list_targets()] == list(list_targets())
    assert {
        "cpu-arm", "cpu-x86", "cpu-x86-vnni", "jetson-orin", "jetson-orin-nano", "jetson-thor",
        "x86-gpu", "x86-gpu-fp8", "x86-rtx", "x86-rtx-fp8",
    } <= set(list_targets())  # fmt: skip


def test_a_builder_on_a_jetson_leaves_memory_to_the_robot() -> None:
    for name in list_targets():
        target = load_target(name)
        bound = target.defaults.get("engine", {}).get("tensorrt", {}).get("workspace_mib", 0)
        assert (target.kind == "jetson") == (0 < bound <= (target.memory_mib or 0) // 8), name


def test_fp8_is_of_classes_whose_gpus_all_have_it() -> None:
    with_fp8 = [name for name in list_targets() if "fp8" in load_target(name).precisions]
    assert with_fp8 == ["jetson-thor", "x86-gpu-fp8", "x86-rtx-fp8"]


def test_a_target_is_found_by_name_and_by_path_beside_a_recipe(tmp_path: Path) -> None:
    assert load_target("jetson-orin").compute_capabilities == ("8.7",)
    path = _write(tmp_path, SOUND)
    assert load_target("mine.yaml", beside=tmp_path) == load_target(str(path)) == read_target(path)


def test_an_unknown_name_is_met_with_the_nearest_known_one() -> None:
    with pytest.raises(InputError, match="unknown target 'jetson-orion'") as caught:
        load_target("jetson-orion")
    assert caught.value.hint is not None
    assert caught.value.hint.startswith("did you mean 'jetson-orin'? targets: cpu-arm, ")


@pytest.mark.parametrize("path", ["./gone.yaml", "gone.yaml", "a/b"])
def test_a_missing_file_is_named(tmp_path: Path, path: str) -> None:
    with pytest.raises(InputError, match="no target file"):
        find_target(path, beside=tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('["8.9", "12.0"]', '["8.7"]', r"fp8 needs compute capability 8\.9 or above; mine is SM 8\.7"),
        ("fp8]", "nvfp4]", r"nvfp4 needs compute capability 10\.0 or above; mine is SM 8\.9"),
        ("fp32, fp16", "fp16", "precisions lacks fp32"),
        ("kind: gpu", "kind: cpu", r"kind cpu and compute_capabilities \['8.9', '12.0'\] disagree"),
        ('["8.9", "12.0"]', "[]", r"kind gpu and compute_capabilities \[\] disagree"),
        ('["8.9", "12.0"]', '["sm89"]', "'sm89' is not a compute capability"),
        ("[tensorrt]", "[]", r"mine\.yaml:5:backends: `backends` is an empty list"),
        ("backends: [tensorrt]", "backends: tensorrt", "`backends` should be a list, not the text 'tensorrt'"),
        ("fp8]", "fp9]", "cannot be the text 'fp9'"),
        ("name: mine", "name: other", "name differs from the file's, 'mine'"),
        ("arch: x86_64", "arch: arm64", "`arch` cannot be the text 'arm64'"),
        ("target/1", "target/2", "`schema` cannot be the text 'vlaopt.target/2'"),
        ("arch: x86_64\n", "", "`arch` is missing"),
    ],
)
def test_a_target_that_contradicts_itself_is_refused(tmp_path: Path, old: str, new: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        read_target(_write(tmp_path, SOUND.replace(old, new)))


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("tensorrt: about 10", "'about 10' is not a range of versions"),
        ("memory_mib: 0", "`memory_mib` is 0, but must be at least 1"),
        ("defaults: {engin: {}}", "unknown key `engin`"),
        ("colour: red", "unknown key `colour`"),
        ("cpu_features: [avx512 or avx2]", "'avx512 or avx2' is not a CPU feature, such as avx2 or "),
        ("cpu_features: [avx2]", "cpu_features are for kind cpu, and this is a gpu"),
    ],
)
def test_an_extra_line_at_fault_is_refused(tmp_path: Path, line: str, match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        read_target(_write(tmp_path, f"{SOUND}{line}\n"))


@pytest.mark.parametrize(
    ("version", "taken"),
    [("10.3.0.30", True), ("10.3", True), ("10.16.2", True), ("10", False), ("10.2.9", False), ("11.0.0", False)],
)
def test_a_range_of_tensorrt_versions_speaks_for_its_builds(tmp_path: Path, version: str, taken: bool) -> None:
    target = read_target(_write(tmp_path, f'{SOUND}tensorrt: ">=10.3, <11"\n'))
    assert target.takes_tensorrt(version) is taken
    assert read_target(_write(tmp_path, SOUND)).takes_tensorrt(version)


@pytest.mark.parametrize(
    ("features", "lacking"),
    [
        (("avx2", "avx512_vnni"), None),
        (("avx2", "avx_vnni"), None),
        (("avx2", "avx512f"), "cpu-x86-vnni needs a CPU with avx512_vnni or avx_vnni, which this one lacks"),
        ((), "cpu-x86-vnni needs a CPU with avx512_vnni or avx_vnni, which this one lacks"),
    ],
)
def test_a_cpu_is_of_the_class_that_has_its_features(features: tuple[str, ...], lacking: str | None) -> None:
    assert load_target("cpu-x86-vnni").cpu_lacks(features) == lacking
    assert load_target("cpu-x86").cpu_lacks(features) is None


def test_every_feature_that_is_missing_is_named() -> None:
    assert (
        cpu_lacks("mine", ["avx2", "a|b", "fma"], {"fma"})
        == "mine needs a CPU with avx2 and a or b, which this one lacks"
    )
    assert cpu_lacks("mine", ["avx2", "a|b", "fma"], {"fma", "avx2", "b"}) is None


def test_full_8_bit_weights_are_for_cpus_that_multiply_them_exactly() -> None:
    for target in map(load_target, list_targets()):
        if target.kind == "cpu" and target.arch == "x86_64":
            assert target.reduce_range == (target.cpu_lacks({"avx2", "avx512f"}) is None), target.name


def test_a_target_goes_through_json_unchanged() -> None:
    for target in map(load_target, list_targets()):
        assert type(target).model_validate(target.as_json()) == target


def test_reading_recipes_and_targets_loads_no_heavy_library() -> None:
    code = (
        "import sys, vlaopt.recipe.load, vlaopt.recipe.schema, vlaopt.target; vlaopt.target.load_target('cpu-x86');"
        "print([name for name in ('numpy', 'torch', 'onnx', 'onnxruntime', 'openvino') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
