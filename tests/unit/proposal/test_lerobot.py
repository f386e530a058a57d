"""Proposed and shipped recipes for LeRobot's policies: sound for every target, and their scopes name real layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlaopt import policies
from vlaopt.artifact.store import Store
from vlaopt.chain import plan
from vlaopt.progress import Silent
from vlaopt.proposal import Contents, Proposal, Wish, propose
from vlaopt.proposal.anatomy import examine
from vlaopt.proposal.precision import Rule
from vlaopt.proposal.text import as_yaml, missing
from vlaopt.recipe.load import load_recipe
from vlaopt.scopes import covers
from vlaopt.target import list_targets

lerobot = pytest.importorskip("tests.support_lerobot", reason="needs lerobot")

RECIPES = Path(__file__).parents[3] / "recipes"
KINDS = ("act", "diffusion", "smolvla")
COMPONENTS = {"act": ["act"], "diffusion": ["vision", "step"], "smolvla": ["vision", "prefix", "step"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints, `vlm`, and the calibration sets `act-set` and so on. Shared: not to be changed."""
    place = tmp_path_factory.mktemp("lerobot")
    for kind in KINDS:
        lerobot.make(kind, place / kind)
        lerobot.write_set(place / f"{kind}-set", kind, 9)
    return place


def wish(kind: str, *, target: str = "cpu-x86", calibration: str | None = None) -> Wish:
    hub = {"vlm_model_name": "vlm"} if kind == "smolvla" else None
    return Wish(kind, target, calibration=calibration, hub_overrides=hub)


@pytest.fixture(scope="module")
def proposals(folder: Path) -> dict[str, Proposal]:
    """One for each policy, without a calibration set."""
    return {kind: propose(wish(kind), folder, Silent()) for kind in KINDS}


def contents(proposal: Proposal) -> Contents:
    assert proposal.contents is not None
    return proposal.contents


def paths(found: Contents) -> list[str]:
    return [f"{component.name}.{layer}" for component in found.components for layer in component.layers]


@pytest.mark.parametrize("with_set", [False, True], ids=["no set", "a set"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_sound_and_can_be_planned_for_every_target(
    proposals: dict[str, Proposal], folder: Path, kind: str, with_set: bool
) -> None:
    proposal = proposals[kind]
    if with_set:
        proposal = propose(wish(kind, calibration=f"{kind}-set"), folder, Silent())
    path = folder / f"{kind}-{with_set}.yaml"
    path.write_text(as_yaml(proposal), encoding="utf-8")
    for target in list_targets():
        recipe = load_recipe(path, target=target)
        assert recipe.quantize.scheme == ("int8" if with_set else "none")
        assert plan(recipe, Store(folder / "store"))[0].state == "run"


@pytest.mark.parametrize("kind", KINDS)
def test_the_components_are_found(proposals: dict[str, Proposal], kind: str) -> None:
    assert [component.name for component in contents(proposals[kind]).components] == COMPONENTS[kind]
    for name in COMPONENTS[kind]:
        assert f"#   {name} " in as_yaml(proposals[kind])


def test_the_time_of_the_loop_and_its_attention_stay_fp32(proposals: dict[str, Proposal]) -> None:
    found = contents(proposals["smolvla"])
    kept = {path for path in paths(found) if any(covers(rule.scope, path) for rule in found.rules)}
    assert {path for path in paths(found) if path.startswith("step.") and ("time" in path or "attn" in path)} <= kept
    assert any(path.endswith("action_out_proj") for path in kept)
    assert not any("mlp." in path for path in kept)
    assert not any("attn" in path for path in kept if path.startswith(("vision.", "prefix.")))


def test_on_a_gpu_language_and_feed_forward_have_8_bits(folder: Path) -> None:
    def scheme(path: str, rules: tuple[Rule, ...]) -> str:
        return next((rule.scheme for rule in reversed(rules) if covers(rule.scope, path)), "fp16")

    found = contents(propose(wish("smolvla", target="jetson-orin"), folder, Silent()))
    schemes = {path: scheme(path, found.rules) for path in paths(found)}
    for path, said in schemes.items():
        if path.startswith("vision.") or (path.startswith("step.") and "attn" in path):
            assert said == "fp16", path
        elif path.startswith(("prefix.", "step.")) and "mlp." in path and "time" not in path:
            assert said == "int8", path
        elif "time" in path or "state_proj" in path or "action_out" in path:
            assert said == "fp32", path
    assert set(schemes.values()) == {"fp16", "int8", "fp32"}


def test_weights_for_training_only_are_told_of(proposals: dict[str, Proposal]) -> None:
    assert contents(proposals["act"]).unused > 0
    assert "of the parameters" in as_yaml(proposals["act"])


def test_a_hub_that_is_needed_is_asked_for(folder: Path) -> None:
    proposal = propose(Wish("smolvla", "jetson-orin"), folder, Silent())
    assert [what for what, _ in missing(proposal)] == [
        "a local copy of what vlm_model_name names on a hub",
        "a calibration set",
    ]
    path = folder / "hub.yaml"
    path.write_text(as_yaml(proposal), encoding="utf-8")
    for target in list_targets():
        assert plan(load_recipe(path, target=target), Store(folder / "store"))[0].state == "run"


def test_ten_steps_are_offered_to_a_diffusion_policy_that_takes_a_hundred(tmp_path: Path) -> None:
    lerobot.make_diffusion(tmp_path / "slow", config={"noise_scheduler_type": "DDPM", "num_inference_steps": None})
    text = as_yaml(propose(Wish("slow", "cpu-x86"), tmp_path, Silent()))
    path = tmp_path / "recipe.yaml"
    path.write_text(text.replace("  # config_overrides", "  config_overrides"), encoding="utf-8")
    loop = policies.load(load_recipe(path)).spec.loop
    assert loop.kind == "ddim"
    assert loop.steps == 10


@pytest.mark.parametrize("kind", KINDS)
def test_the_scopes_of_the_shipped_recipes_name_real_layers(proposals: dict[str, Proposal], kind: str) -> None:
    known = paths(contents(proposals[kind]))
    for path in sorted((RECIPES / kind).glob("*.yaml")):
        recipe = load_recipe(path, check_paths=False)
        assert recipe.policy.type == kind
        for rule in recipe.quantize.rules:
            # One of an operator names nodes of the graph, as of norms; `plan_nodes` refuses it where there is none.
            if "/" not in rule.scope:
                assert any(covers(rule.scope, layer) for layer in known), f"{path.name}: {rule.scope}"


@pytest.mark.parametrize("kind", KINDS)
def test_the_shipped_recipes_fit_their_policies(folder: Path, kind: str) -> None:
    recipe = load_recipe(RECIPES / kind / "cpu.yaml", check_paths=False)
    hub = {field: folder / path for field, path in recipe.policy.hub_overrides.items()}
    eager = policies.get(kind).load(folder / kind, hub, recipe.policy.config_overrides)
    components, _ = examine(eager)
    assert [component.name for component in components] == COMPONENTS[kind]
