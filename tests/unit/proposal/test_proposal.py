"""A proposed recipe is sound for every target, names layers that there are, and says what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.artifact.store import Store
from vlaopt.chain import plan
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.progress import Silent
from vlaopt.proposal import Proposal, Wish, propose
from vlaopt.proposal.text import WIDTH, as_yaml, missing
from vlaopt.recipe.load import load_recipe
from vlaopt.recipe.model import Recipe
from vlaopt.recipe.reader import read_mapping
from vlaopt.scopes import covers
from vlaopt.target import list_targets, load_target

ROOT = Path(__file__).parents[3]
CHECKPOINT, SET = "recipes/edge-vla/checkpoint", "calibration/metaworld"
HELD_OUT = "calibration/metaworld-held-out"


def loaded(text: str, folder: Path, **options: object) -> Recipe:
    """The recipe as `vlaopt` reads it from a file in `folder`."""
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, **options)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which the checkpoint and the sets lie where they lie here."""
    for name in ("recipes", "calibration"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize("calibration", [None, SET])
@pytest.mark.parametrize("target", list_targets())
def test_it_is_sound_and_can_be_planned(folder: Path, target: str, calibration: str | None) -> None:
    proposal = propose(Wish(CHECKPOINT, target, calibration=calibration), folder, Silent())
    recipe = loaded(as_yaml(proposal), folder)
    assert recipe.target.name == target
    scheme = "int8" if recipe.target.kind == "cpu" else "fp16"
    assert recipe.quantize.scheme == (scheme if calibration else "none")
    assert recipe.bench.hz == proposal.contents.spec.control_hz  # type: ignore[union-attr]
    assert [planned.state for planned in plan(recipe, Store(folder / "store"))] == ["run", *["follows"] * 6]


def test_another_target_can_be_asked_of_it(folder: Path) -> None:
    text = as_yaml(propose(Wish(CHECKPOINT, "jetson-orin", calibration=SET), folder, Silent()))
    for target in list_targets():
        if "fp16" in load_target(target).precisions:
            assert loaded(text, folder, target=target).target.name == target
        else:
            with pytest.raises(EnvironmentProblem, match="does not compute in fp16"):
                loaded(text, folder, target=target)


@pytest.mark.parametrize(
    ("target", "eight"), [("jetson-orin", "int8"), ("jetson-thor", "fp8"), ("x86-gpu", "int8"), ("x86-gpu-fp8", "fp8")]
)
def test_a_gpu_gets_the_8_bits_it_has_between_fp16(folder: Path, target: str, eight: str) -> None:
    proposal = propose(Wish(CHECKPOINT, target, calibration=SET), folder, Silent())
    recipe = loaded(as_yaml(proposal), folder)
    assert [(rule.scope, rule.scheme) for rule in recipe.quantize.rules] == [("head.*", eight), ("head.output", "fp32")]
    table = {line.split()[1]: line for line in as_yaml(proposal).splitlines() if line.startswith("#   ")}
    assert table["vision"].endswith(" fp16")
    assert table["head"].endswith(f" {eight}, 1 fp32")


def test_every_rule_names_layers_that_there_are(folder: Path) -> None:
    contents = propose(Wish(CHECKPOINT, "cpu-x86"), folder, Silent()).contents
    assert contents is not None
    paths = [f"{part.name}.{layer}" for part in contents.components for layer in part.layers]
    assert [rule.scope for rule in contents.rules] == ["head.output"]
    assert all(any(covers(rule.scope, path) for path in paths) for rule in contents.rules)


def test_what_is_missing_is_said_where_it_belongs(folder: Path) -> None:
    bare = propose(Wish(CHECKPOINT, "cpu-x86"), folder, Silent())
    whole = propose(Wish(CHECKPOINT, "cpu-x86", calibration=SET, held_out=HELD_OUT), folder, Silent())
    assert [what for what, _ in missing(bare)] == ["a calibration set"]
    assert "# calibration:  # MISSING" in as_yaml(bare)
    assert missing(whole) == []
    assert "MISSING" not in as_yaml(whole)
    assert loaded(as_yaml(whole), folder).verify.observations == HELD_OUT


def test_taking_off_the_comment_signs_is_enough(folder: Path) -> None:
    text = as_yaml(propose(Wish(CHECKPOINT, "cpu-x86"), folder, Silent()))
    shutil.copytree(ROOT / SET, folder / "sets")
    lines = text.replace("calibration/edge-vla\n", "sets\n").replace("scheme: none", "scheme: int8").splitlines()
    start = lines.index("# calibration:  # MISSING")
    lines[start : start + 3] = [line.removeprefix("# ") for line in lines[start : start + 3]]
    recipe = loaded("\n".join(lines), folder)
    assert recipe.quantize.scheme == "int8"
    assert recipe.calibration is not None and recipe.calibration.path == "sets"


def test_it_fits_a_terminal_and_a_screen(folder: Path) -> None:
    for target in list_targets():
        lines = as_yaml(propose(Wish(CHECKPOINT, target), folder, Silent())).splitlines()
        assert max(map(len, lines)) <= WIDTH
        assert len(lines) <= 75


def test_a_target_without_int8_gets_none(folder: Path) -> None:
    text = (ROOT / "recipes/targets/cpu-x86.yaml").read_text().replace("[fp32, int8]", "[fp32]")
    (folder / "plain.yaml").write_text(text.replace("name: cpu-x86", "name: plain"))
    proposal = propose(Wish(CHECKPOINT, "./plain.yaml", calibration=SET), folder, Silent())
    assert loaded(as_yaml(proposal), folder).quantize.scheme == "none"


def test_a_set_of_another_policy_is_refused(folder: Path) -> None:
    from tests import toy_flow

    toy_flow.make(folder / "toy")
    with pytest.raises(InputError, match="observation"):
        propose(Wish(CHECKPOINT, "cpu-x86", calibration="toy/set"), folder, Silent())


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish("nowhere", "cpu-x86"), "no such checkpoint folder"),
        (Wish("recipes", "cpu-x86"), "not a checkpoint folder"),
        (Wish(CHECKPOINT, "cpu-x68"), "unknown target 'cpu-x68'"),
        (Wish(CHECKPOINT, "cpu-x86", name="My Policy"), "'My Policy' is not a name"),
        (Wish(CHECKPOINT, "cpu-x86", type="edgevla"), "unknown policy type 'edgevla'"),
        (Wish(CHECKPOINT, "cpu-x86", calibration="nowhere"), "nowhere"),
        (Wish("typeless", "cpu-x86"), "does not say the policy's type"),
        (Wish("other", "cpu-x86"), "unknown policy type 'pi9'"),
        (Wish("pickled", "cpu-x86"), "is a pickle"),
        (Wish("pickled/model.pt", "cpu-x86"), "is a pickle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_proposed_is_refused(folder: Path, wish: Wish, message: str) -> None:
    for name, content in (("typeless", "{}"), ("other", '{"type": "pi9"}')):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(content)
    (folder / "pickled").mkdir()
    (folder / "pickled/model.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(InputError, match=message):
        propose(wish, folder, Silent())


def test_a_field_on_a_hub_is_asked_for_and_nothing_is_guessed(tmp_path: Path) -> None:
    wish = Wish("checkpoint", "jetson-thor", calibration="set")
    proposal = Proposal(wish, "smolvla", "smolvla", load_target("jetson-thor"), None, "vlm_model_name")
    recipe = loaded(as_yaml(proposal), tmp_path, check_paths=False)
    assert recipe.quantize.scheme == "none"
    assert recipe.policy.hub_overrides == {}
    [(what, how)] = missing(proposal)
    assert "vlm_model_name" in what
    assert "--hub-override vlm_model_name=FOLDER" in how


PATHS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1, max_size=20)


@settings(max_examples=200)
@given(checkpoint=PATHS, folder=PATHS, calibration=PATHS)
def test_any_path_is_read_as_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, checkpoint: str, folder: str, calibration: str
) -> None:
    wish = Wish(checkpoint, "cpu-x86", calibration=calibration, held_out=folder, hub_overrides={"field": folder})
    text = as_yaml(Proposal(wish, "act", "act", load_target("cpu-x86"), None))
    path = tmp_path_factory.mktemp("paths") / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    values = read_mapping(path).values
    assert values["policy"]["checkpoint"] == checkpoint
    assert values["policy"]["hub_overrides"] == {"field": folder}
    assert values["calibration"]["path"] == calibration
    assert values["verify"]["observations"] == folder
