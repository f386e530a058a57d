"""A recipe is read whole, and every problem it has is told at once, with its line, its key and a way out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlaopt.errors import EnvironmentProblem, InputError, RecipeError
from vlaopt.hashing import canonical_json
from vlaopt.recipe.load import find_recipes, load_recipe
from vlaopt.recipe.model import Recipe

REPOSITORY = Path(__file__).resolve().parents[3]

SOUND = """\
schema: vlaopt.recipe/1
name: edge-vla
version: 1.0.0
target: cpu-x86
policy: {type: edge-vla, checkpoint: checkpoint/}
calibration: {path: calibration}
quantize:
  scheme: int8
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe's text beside a checkpoint and a calibration set; returns its path."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "calibration").mkdir()

    def _write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return _write


@pytest.fixture
def sound() -> str:
    return SOUND


def problems(path: Path, *overrides: str, target: str | None = None, check_paths: bool = True) -> list[str]:
    """What `load_recipe` has to say, one line a problem, its file's folder left out."""
    with pytest.raises(RecipeError, match=r"\S") as caught:
        load_recipe(path, overrides, target, check_paths=check_paths)
    return [str(problem).replace(f"{path.parent}/", "") for problem in caught.value.problems]


def hints(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError, match=r"\S") as caught:
        load_recipe(path, overrides)
    return "\n".join(problem.hint or "" for problem in caught.value.problems)


def test_a_sound_recipe_loads_with_its_defaults_and_its_target(write: Write, sound: str) -> None:
    path = write(sound)
    recipe = load_recipe(path)
    assert recipe.path == path
    assert recipe.folder == path.parent
    assert recipe.target.name == "cpu-x86"
    assert recipe.quantize.scheme == "int8"
    assert recipe.calibration is not None and recipe.calibration.samples == 256
    assert recipe.export.opset == 20
    assert recipe.locate(recipe.policy.checkpoint) == path.parent / "checkpoint"


def test_the_resolved_recipe_is_json_without_the_place_of_its_file(write: Write, sound: str) -> None:
    recipe = load_recipe(write(sound))
    text = canonical_json(recipe.resolved()).decode()
    assert str(recipe.folder) not in text
    assert recipe.resolved()["target"]["name"] == "cpu-x86"
    assert recipe.resolved()["schema"] == "vlaopt.recipe/1"
    again = Recipe.model_validate({**recipe.resolved(), "path": recipe.path})
    assert again.resolved() == recipe.resolved()


def test_a_recipe_cannot_be_changed(write: Write, sound: str) -> None:
    recipe = load_recipe(write(sound))
    with pytest.raises(ValueError, match="frozen"):
        recipe.quantize.scheme = "none"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("quantise: {}", "recipe.yaml:9:quantise: unknown key `quantise`"),
        (
            "prune: {method: channels, amount: 1.0}",
            "recipe.yaml:9:prune.amount: `amount` is 1.0, but must be below 1.0",
        ),
        (
            "prune: {method: channels, amount: -0.1}",
            "recipe.yaml:9:prune.amount: `amount` is -0.1, but must be at least 0.0",
        ),
        (
            "prune: {method: channels, amount: nan}",
            "recipe.yaml:9:prune.amount: `amount` should be a number, not the text 'nan'",
        ),
        ("prune: {method: channels}", "recipe.yaml:9:prune.amount: method channels needs an amount above 0"),
        ("prune: [channels]", "recipe.yaml:9:prune: `prune` should be a mapping of keys, not a list"),
        ("prune:", "recipe.yaml:9:prune: `prune` should be a mapping of keys, not null"),
        (
            "prune: {recovery: {demonstrations: calibration, steps: 9, learning_rate: 1e-3}}",
            "recipe.yaml:9:prune.recovery: recovery training without pruning (method none)",
        ),
        (
            "prune: {method: channels, amount: 0.5, global: true}",
            "recipe.yaml:9:prune.global: a global limit is for method l1-unstructured only",
        ),
        ("bench: {hz: '20'}", "recipe.yaml:9:bench.hz: `hz` should be a number, not the text '20'"),
        ("bench: {hz: 020}", "recipe.yaml:9:bench.hz: `hz` should be a number, not the text '020'"),
        ("bench: {hz: true}", "recipe.yaml:9:bench.hz: `hz` should be a number, not true"),
        ("bench: {hz: 0}", "recipe.yaml:9:bench.hz: `hz` is 0, but must be above 0.0"),
        ("export: {opset: 17}", "recipe.yaml:9:export.opset: `opset` is 17, but must be at least 18"),
        ("export: {opset: 20.0}", "recipe.yaml:9:export.opset: `opset` should be a whole number, not 20.0"),
        ("onnx: {simplify: no}", "recipe.yaml:9:onnx.simplify: `simplify` should be true or false, not the text 'no'"),
        ("onnx: {simplify: false}", "recipe.yaml:9:onnx.simplify: simplify cannot be false with quantize.scheme int8"),
        ("accept: {success: 0.9}", "recipe.yaml:9:accept.success: success needs episodes to count"),
        ("accept: {success_drop: 0.1}", "recipe.yaml:9:accept.success_drop: success_drop needs episodes to count"),
        ("verify: {observations: away}", "recipe.yaml:9:verify.observations: no such file or folder: 'away'"),
        (
            'verify: {observations: "a\\nb"}',
            "recipe.yaml:9:verify.observations: `observations`: 'a\\nb' is not a path: it holds a control character",
        ),
        ("order: [quantize, prune]", "recipe.yaml:9:order: unknown key `order`"),
        ("description: true", "recipe.yaml:9:description: `description` should be text, not true"),
    ],
)
def test_one_fault_gives_one_problem(write: Write, sound: str, line: str, expected: str) -> None:
    assert problems(write(f"{sound}{line}\n")) == [expected]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "scheme: int8",
            "scheme: int9",
            "recipe.yaml:8:quantize.scheme: `scheme` cannot be the text 'int9'",
        ),
        ("scheme: int8", "bits: 3", "recipe.yaml:8:quantize.bits: unknown key `bits`"),
        (
            "version: 1.0.0",
            "version: 10.10",
            "recipe.yaml:3:version: `version`: '10.10' is not a version: three numbers",
        ),
        ("version: 1.0.0", "version: 1.0.0+abc", "recipe.yaml:3:version: `version`: '1.0.0+abc' is not a version"),
        ("name: edge-vla", "name: ../x", "recipe.yaml:2:name: `name`: '../x' is not a name"),
        ("name: edge-vla\n", "", "recipe.yaml:1:name: `name` is missing"),
        ("checkpoint: checkpoint/", "checkpoint: gone", "recipe.yaml:5:policy.checkpoint: no such file or folder"),
        (", checkpoint: checkpoint/", "", "recipe.yaml:5:policy.checkpoint: `policy.checkpoint` is missing"),
        (
            "{path: calibration}",
            "{path: calibration, samples: 1}",
            "recipe.yaml:6:calibration.samples: `samples` is 1, but must be at least 8",
        ),
        (
            "calibration: {path: calibration}\n",
            "",
            "recipe.yaml:7:quantize.scheme: scheme int8 needs a calibration set",
        ),
        ("target: cpu-x86", "target: cpu-x68", "recipe.yaml:4:target: unknown target 'cpu-x68'"),
        ("target: cpu-x86", "target: ../t.yaml", "recipe.yaml:4:target: '../t.yaml' leaves the recipe's folder"),
        ("target: cpu-x86", "target: /t.yaml", "recipe.yaml:4:target: '/t.yaml' leaves the recipe's folder"),
        ("target: cpu-x86", "target: ./t.yaml", "recipe.yaml:4:target: no target file './t.yaml'"),
        ("target: cpu-x86", "target: [a]", "recipe.yaml:4:target: `target` should be text, not a list"),
        (
            "scheme: int8",
            "scheme: mixed\n  evaluations: 7",
            "recipe.yaml:9:quantize.evaluations: `evaluations` is 7, but must be at least 8",
        ),
        ("recipe/1", "recipe/0", "recipe.yaml:1:schema: recipe of an older schema, vlaopt.recipe/0"),
        ("recipe/1", "recipe/2.1", "recipe.yaml:1:schema: recipe of a newer schema, vlaopt.recipe/2.1"),
        ("recipe/1", "target/1", "recipe.yaml:1:schema: target file, not a recipe: vlaopt.target/1"),
    ],
)
def test_one_value_at_fault_gives_one_problem(write: Write, sound: str, old: str, new: str, expected: str) -> None:
    [problem] = problems(write(sound.replace(old, new, 1)))
    assert problem.startswith(expected)


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("quantise: {}", "did you mean `quantize`?"),
        ("export: {opsett: 20}", "did you mean `opset`?"),
        ("prune: {method: channel}", "did you mean `channels`?"),
        ("order: []", "stages have one order: export, prune, quantize, onnx, engine, verify, bench"),
        ("prune: {recovery: {stepps: 3}}", "did you mean `steps`?"),
    ],
)
def test_hints_name_the_nearest_known_word(write: Write, sound: str, line: str, hint: str) -> None:
    assert hint in hints(write(f"{sound}{line}\n"))


def test_all_problems_are_told_at_once_in_the_order_of_the_lines(write: Write) -> None:
    path = write(
        "schema: vlaopt.recipe/1\n"
        "name: Edge VLA\n"
        "target: jetson-orin\n"
        "policy: {type: edge-vla, checkpoint: gone}\n"
        "export: {opset: 99}\n"
        "quantize:\n"
        "  scheme: int8\n"
        "  rules:\n"
        "    - {scope: 'head.*', scheme: fp16}\n"
        "engine: {backend: openvino}\n"
    )
    told = problems(path, "bench.hz=fast")
    assert [line.split(": ")[0] for line in told] == [
        "recipe.yaml:1:version",
        "recipe.yaml:2:name",
        "recipe.yaml:4:policy.checkpoint",
        "recipe.yaml:5:export.opset",
        "recipe.yaml:7:quantize.scheme",
        "recipe.yaml:9:quantize.rules.0.scheme",
        "recipe.yaml:10:engine.backend",
        "--set bench.hz",
    ]


@pytest.mark.parametrize(
    ("target", "overrides", "reason"),
    [
        ("jetson-orin", ["quantize.scheme=fp8"], "fp8 needs compute capability 8.9 or above; jetson-orin is SM 8.7"),
        ("jetson-orin", ["quantize.scheme=nvfp4"], "nvfp4 needs compute capability 10.0 or above"),
        ("cpu-x86", ["quantize.scheme=fp16"], "target cpu-x86 does not compute in fp16"),
        ("jetson-orin", ["quantize.scheme=int8-dynamic"], "int8-dynamic runs on CPU targets only"),
        ("cpu-x86", ["engine.backend=tensorrt"], "target cpu-x86 has no backend tensorrt"),
    ],
)
def test_what_only_the_target_rules_out_is_an_environment_problem(
    write: Write, sound: str, target: str, overrides: list[str], reason: str
) -> None:
    with pytest.raises(EnvironmentProblem, match=reason):
        load_recipe(write(sound), overrides, target)


def test_nvfp4_on_an_sm_9_0_target_names_the_precisions_it_has(write: Write, sound: str) -> None:
    path = write(sound.replace("cpu-x86", "./hopper.yaml"))
    (path.parent / "hopper.yaml").write_text(
        "schema: vlaopt.target/1\nname: hopper\nkind: gpu\narch: x86_64\nbackends: [tensorrt]\n"
        "compute_capabilities: ['9.0']\nprecisions: [fp32, int8, fp8]\nengine_built_on: target\n"
    )
    with pytest.raises(EnvironmentProblem, match=r"nvfp4 needs compute capability 10\.0") as caught:
        load_recipe(path, ["quantize.scheme=nvfp4"])
    assert caught.value.hint == "hopper has fp32, int8, fp8"


def test_an_int8_rule_needs_a_calibration_set_too(write: Write, sound: str) -> None:
    path = write(sound.replace("calibration: {path: calibration}\n", ""))
    assert load_recipe(path, ["quantize.scheme=int8-dynamic"]).calibration is None
    assert load_recipe(path, ["quantize.scheme=none"]).calibration is None
    rules = "quantize.rules=[{scope: vision, scheme: int8}]"
    assert problems(path, "quantize.scheme=int8-dynamic", rules) == [
        "--set quantize.rules.0.scheme: scheme int8 needs a calibration set"
    ]


@pytest.mark.parametrize("missing", [True, False])
def test_paths_are_looked_for_only_when_asked(write: Write, sound: str, missing: bool) -> None:
    path = write(sound.replace("{path: calibration}", "{path: ../nowhere}"))
    if missing:
        assert problems(path) == ["recipe.yaml:6:calibration.path: no such file or folder: '../nowhere'"]
    else:
        assert load_recipe(path, check_paths=False).calibration is not None


def test_folders_with_spaces_and_unicode_work(tmp_path: Path, sound: str) -> None:
    folder = tmp_path / "my räcipes 机器人 🤖" / "-dash"
    (folder / "check point").mkdir(parents=True)
    (folder / "calibration").mkdir()
    path = folder / "-recipe ü.yaml"
    path.write_text(sound.replace("checkpoint: checkpoint/", "checkpoint: check point"), encoding="utf-8")
    recipe = load_recipe(path)
    assert recipe.locate(recipe.policy.checkpoint).is_dir()
    path.write_text(sound + "benchh: {}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"-recipe ü\.yaml:9:benchh: unknown key"):
        load_recipe(path)


def test_a_number_given_for_text_is_taken_as_written(write: Write, sound: str) -> None:
    assert load_recipe(write(f"{sound}description: 10.10\n")).description == "10.10"


class TestTargetDefaults:
    TARGET = (
        "schema: vlaopt.target/1\nname: mine\nkind: cpu\narch: x86_64\nbackends: [onnxruntime]\n"
        "precisions: [fp32, int8]\nengine_built_on: target\ndefaults:\n  engine: {threads: 3, minimum_speedup: 2}\n"
    )

    def test_they_lie_under_the_recipe_key_by_key(self, write: Write, sound: str) -> None:
        path = write(sound.replace("cpu-x86", "./mine.yaml") + "engine: {minimum_speedup: 1.5}\n")
        (path.parent / "mine.yaml").write_text(self.TARGET)
        recipe = load_recipe(path)
        assert (recipe.engine.threads, recipe.engine.minimum_speedup) == (3, 1.5)
        assert load_recipe(path, ["engine.threads=7"]).engine.threads == 7

    def test_sections_within_a_section_are_laid_under_key_by_key_too(self, write: Write, sound: str) -> None:
        path = write(sound.replace("cpu-x86", "./mine.yaml") + "engine: {tensorrt: {optimization_level: 5}}\n")
        (path.parent / "mine.yaml").write_text(self.TARGET.replace("threads: 3", "tensorrt: {workspace_mib: 256}"))
        built = load_recipe(path).engine.tensorrt
        assert (built.workspace_mib, built.optimization_level) == (256, 5)
        assert load_recipe(path, ["engine.tensorrt.workspace_mib=0"]).engine.tensorrt.workspace_mib == 0

    def test_a_fault_in_them_is_told_at_the_targets_line(self, write: Write, sound: str) -> None:
        path = write(sound.replace("cpu-x86", "./mine.yaml"))
        (path.parent / "mine.yaml").write_text(self.TARGET.replace("threads", "treads"))
        assert problems(path) == ["mine.yaml:9:defaults.engine.treads: unknown key `treads`"]

    def test_a_faulty_target_is_told_with_the_recipes_own_problems(self, write: Write, sound: str) -> None:
        path = write(sound.replace("cpu-x86", "./mine.yaml") + "benchh: {}\n")
        (path.parent / "mine.yaml").write_text(self.TARGET.replace("  engine:", "  engin:"))
        assert problems(path) == [
            "recipe.yaml:9:benchh: unknown key `benchh`",
            "mine.yaml:9:defaults.engin: unknown key `engin`",
        ]


class TestSet:
    def test_it_replaces_one_value(self, write: Write, sound: str) -> None:
        recipe = load_recipe(write(sound), ["quantize.scheme=none", "bench.hz=5e1", "calibration=null"])
        assert (recipe.quantize.scheme, recipe.bench.hz, recipe.calibration) == ("none", 50.0, None)

    def test_it_reaches_into_lists_and_makes_sections(self, write: Write, sound: str) -> None:
        path = write(f"{sound}  rules: [{{scope: a, scheme: int8}}]\n")
        recipe = load_recipe(path, ["quantize.rules.0.scheme=fp32", "verify.closed_loop.simulator=metaworld"])
        assert recipe.quantize.rules[0].scheme == "fp32"
        assert recipe.verify.closed_loop is not None

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("quantize", "--set: 'quantize' is not key=value"),
            ("=3", "--set: '=3' is not key=value"),
            ("a..b=3", "--set: 'a..b=3' is not key=value"),
            ("quantize.scheme.x=3", "--set quantize.scheme.x: `scheme` holds a value, not keys"),
            ("quantize.rules.0=3", "--set quantize.rules.0: `0` should be a mapping of keys, not 3"),
            ("quantize.rulez.a=3", "--set quantize.rulez: unknown key `rulez`"),
            ("quantize.scheme=[", "--set quantize.scheme:"),
            ("quantize.scheme=*x", "--set quantize.scheme:1:1: alias `*x`"),
            ("bench.hz=.inf", "--set bench.hz:1:1: `.inf` is not a finite number"),
            ("prune.amount=1.0", "--set prune.amount: `amount` is 1.0, but must be below 1.0"),
            ("target=nowhere", "--set target: unknown target 'nowhere'"),
        ],
    )
    def test_what_is_wrong_with_it_is_told_as_its_own(self, write: Write, sound: str, text: str, expected: str) -> None:
        path = write(f"{sound}  rules: [{{scope: a, scheme: int8}}]\n")
        [problem] = problems(path, text)
        assert problem.startswith(expected)

    def test_an_item_beyond_the_list_is_refused(self, write: Write, sound: str) -> None:
        path = write(f"{sound}  rules: []\n")
        assert problems(path, "quantize.rules.0.scheme=fp32") == [
            "--set quantize.rules.0.scheme: no item `0` in the list"
        ]

    def test_the_target_option_is_named_as_it_was_given(self, write: Write, sound: str) -> None:
        assert problems(write(sound), target="cpu-x68") == ["--target: unknown target 'cpu-x68'"]
        assert load_recipe(write(sound), target="cpu-arm").target.name == "cpu-arm"


def _dump(values: Any) -> str:
    return yaml.safe_dump(values, sort_keys=False)


_VALUES: dict[str, Any] = {
    **yaml.safe_load(SOUND),
    "export": {"opset": 19, "golden_samples": 4},
    "prune": {"method": "channels", "amount": 0.25, "round_to": 4},
    "accept": {"action_error": {"mean": 0.1, "max": 2.0}, "jerk": 0.5},
    "bench": {"hz": 30, "duration_s": 2.5},
}
_SHARED = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@_SHARED
@given(data=st.data())
def test_the_order_of_keys_means_nothing(write: Write, data: st.DataObject) -> None:
    def shuffled(values: dict[str, Any]) -> dict[str, Any]:
        keys = data.draw(st.permutations(list(values)))
        return {key: shuffled(values[key]) if isinstance(values[key], dict) else values[key] for key in keys}

    expected = canonical_json(load_recipe(write(_dump(_VALUES))).resolved())
    assert canonical_json(load_recipe(write(_dump(shuffled(_VALUES)))).resolved()) == expected


_EDITS = st.one_of(
    st.tuples(st.just("bench.hz"), st.floats(0.5, 1000)),
    st.tuples(st.just("prune.amount"), st.floats(0.01, 0.99)),
    st.tuples(st.just("export.golden_samples"), st.integers(1, 99)),
    st.tuples(st.just("accept.action_error.mean"), st.floats(0, 10)),
    st.tuples(st.just("quantize.calibrator"), st.sampled_from(["minmax", "entropy", "mse"])),
    st.tuples(st.just("onnx.simplify"), st.just(True)),
    st.tuples(st.just("verify.closed_loop"), st.just({"simulator": "metaworld", "tasks": ["a", "b"]})),
    st.tuples(st.just("description"), st.text("ab 1.:é", max_size=9)),
)


@_SHARED
@given(edit=_EDITS)
def test_set_is_the_same_as_editing_the_file(write: Write, edit: tuple[str, Any]) -> None:
    key, value = edit
    edited = yaml.safe_load(_dump(_VALUES))
    *parents, last = key.split(".")
    section = edited
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    by_file = load_recipe(write(_dump(edited))).resolved()
    flow = yaml.safe_dump([value], default_flow_style=True, width=10_000).strip()[1:-1]
    assert load_recipe(write(_dump(_VALUES)), [f"{key}={flow}"]).resolved() == by_file


@pytest.mark.parametrize("scheme", ["none", "bf16"])
def test_floats_stand_beside_a_scheme_of_fewer_bits(write: Write, sound: str, scheme: str) -> None:
    with pytest.raises(RecipeError, match=f"floats bf16 stand beside a scheme of fewer bits, and scheme is {scheme}"):
        load_recipe(write(sound), [f"quantize.scheme={scheme}", "quantize.floats=bf16"], "cpu-x86-bf16")


def test_floats_must_be_what_the_target_computes_in(write: Write, sound: str) -> None:
    with pytest.raises(EnvironmentProblem, match="target cpu-x86 does not compute in bf16"):
        load_recipe(write(sound), ["quantize.floats=bf16"])
    assert load_recipe(write(sound), ["quantize.floats=bf16"], "cpu-x86-bf16").quantize.floats == "bf16"


def test_the_shipped_recipes_are_sound() -> None:
    found = find_recipes(REPOSITORY / "recipes")
    targets = {"cpu", "x86-rtx", "x86-gpu", "jetson-orin", "jetson-thor"}
    in_fp8 = {(name, "x86-gpu-fp8") for name in ("act", "edge-vla", "smolvla")}
    policies = ("act", "diffusion", "edge-vla", "smolvla")
    others = {
        "cpu-bf16": "cpu-x86-bf16",
        "cpu-mixed": "cpu-x86",
        "x86-rtx-fp16": "x86-rtx",
        "jetson-thor-nvfp4": "jetson-thor",
    }
    wanted = {(name, to) for name in policies for to in targets} | in_fp8
    wanted |= {("edge-vla", name) for name in ("cpu-mixed", "x86-rtx-fp16", "x86-rtx-fp8")}
    wanted |= {("smolvla", "jetson-thor-nvfp4"), *((name, "cpu-bf16") for name in ("act", "edge-vla", "smolvla"))}
    assert {(path.parent.name, path.stem) for path in found} == wanted
    for path in found:
        recipe = load_recipe(path, check_paths=False)
        assert recipe.name == recipe.policy.type == path.parent.name
        assert recipe.target.name == ({"cpu": "cpu-x86"} | others).get(path.stem, path.stem)


def test_the_shipped_recipes_fit_a_screen() -> None:
    for path in find_recipes(REPOSITORY / "recipes"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 60, path
        assert max(map(len, lines)) <= 120, path


@pytest.mark.parametrize("policy", ["act", "diffusion", "smolvla"])
def test_a_shipped_recipe_without_its_checkpoint_says_what_it_looked_for(tmp_path: Path, policy: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes((REPOSITORY / "recipes" / policy / "jetson-orin.yaml").read_bytes())
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    wanted = ["policy.checkpoint", "calibration.path"]
    if policy == "smolvla":
        wanted.insert(1, "policy.hub_overrides.vlm_model_name")
    assert [problem.where.rpartition(":")[2] for problem in caught.value.problems if problem.where] == wanted
    assert all("no such file or folder" in problem.message for problem in caught.value.problems)


def test_find_recipes_lists_broken_ones_and_no_other_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# comment\nschema: vlaopt.recipe/1\nbroken: [\n")
    (tmp_path / "b.yaml").write_text("schema: vlaopt.target/1\n")
    (tmp_path / "c.yaml").write_bytes(b"\0\1")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.yaml").write_text("schema: 'vlaopt.recipe/9'\n")
    assert find_recipes(tmp_path) == (tmp_path / "a.yaml", tmp_path / "deep" / "d.yaml")


@pytest.mark.parametrize("data", [b"", b"\x89PNG\0", b"\xff\xfe"])
def test_an_empty_or_binary_recipe_is_one_sentence(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"empty file|binary file|not UTF-8"):
        load_recipe(path)


def test_observations_that_are_calibrated_on_are_not_held_out(write: Write, sound: str) -> None:
    [problem] = problems(write(sound + "verify: {observations: ./calibration}\n"))
    assert problem.startswith("recipe.yaml:9:verify.observations: these observations are calibrated or trained on")
