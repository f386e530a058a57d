"""The schema and the table of keys describe every key, and the README shows that table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlaopt.recipe.load import find_recipes, load_recipe
from vlaopt.recipe.model import Quantize, Recovery
from vlaopt.recipe.schema import keys_as_markdown, recipe_keys, recipe_schema
from vlaopt.target import list_targets, load_target

README = Path(__file__).resolve().parents[3] / "recipes" / "README.md"


def _objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield schema
    yield from schema["$defs"].values()


def test_every_key_is_described_and_nothing_else_is_allowed() -> None:
    for section in _objects(recipe_schema()):
        assert section["additionalProperties"] is False
        assert all(key.get("description") for key in section["properties"].values()), section["title"]


def test_the_schema_is_json_of_the_2020_12_dialect_and_its_references_resolve() -> None:
    schema = recipe_schema()
    assert schema["$schema"].endswith("2020-12/schema")
    references = re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema))
    assert set(references) == set(schema["$defs"])
    assert schema["required"] == ["schema", "name", "version", "target", "policy"]


def test_the_keys_are_those_of_the_models() -> None:
    keys = {key.path: key for key in recipe_keys()}
    assert keys["prune.global"].default == "false"
    assert keys["quantize.rules.*.scope"].default == "required"
    assert {f"prune.recovery.{name}" for name in Recovery.model_fields} <= set(keys)
    assert "One of minmax, moving-average, entropy, percentile, mse." in keys["quantize.calibrator"].description


def test_the_readme_holds_the_table_of_every_key() -> None:
    # When this fails, put the output of vlaopt.recipe.schema.keys_as_markdown() in place of the table.
    assert keys_as_markdown() in README.read_text(encoding="utf-8")


def test_the_readme_lists_every_target_as_its_file_says() -> None:
    text = README.read_text(encoding="utf-8")
    for target in map(load_target, list_targets()):
        [row] = re.findall(rf"^\| `{target.name}` \|.*$", text, re.MULTILINE)
        assert f"| {', '.join(target.backends)} | {' '.join(target.precisions)} |" in row


def test_the_readme_lists_every_shipped_recipe_as_its_file_says() -> None:
    text = README.read_text(encoding="utf-8")
    for path in find_recipes(README.parent):
        recipe = load_recipe(path, check_paths=False)
        [row] = re.findall(rf"^\| `{path.parent.name}/{path.name}` \|.*$", text, re.MULTILINE)
        pruning = "none" if recipe.prune.method == "none" else f"{recipe.prune.method} {recipe.prune.amount:g}"
        assert f"| `{recipe.target.name}` | {pruning} | " in row
        scheme, *besides = row.split(" | ")[3].split(", ")
        assert scheme == recipe.quantize.scheme
        computed = {rule.scheme for rule in recipe.quantize.rules} - {"fp32", "int8-weights", scheme}
        assert {part.split()[0] for part in besides} == computed


def test_the_readmes_example_is_a_sound_recipe(tmp_path: Path) -> None:
    [example] = re.findall(r"```yaml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "recipe.yaml"
    path.write_text(example)
    assert load_recipe(path, check_paths=False).quantize == Quantize()
