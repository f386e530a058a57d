"""From a recipe's file to a checked `Recipe`, or to every problem it has. Reads files, builds nothing."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vlaopt.errors import EnvironmentProblem, InputError, RecipeError
from vlaopt.recipe import checks
from vlaopt.recipe.checks import Finding
from vlaopt.recipe.model import SCHEMA, Recipe, RecipeFile
from vlaopt.recipe.overrides import apply_override, parse_override
from vlaopt.recipe.problems import Place, Places, as_problem, validation_errors
from vlaopt.recipe.reader import Document, KeyPath, read_mapping
from vlaopt.target import Target, find_target, read_target

_DECLARES_RECIPE = re.compile(rb"""^["']?schema["']?\s*:\s*["']?vlaopt\.recipe/""", re.MULTILINE)
_SCHEMA = re.compile(r"vlaopt\.recipe/([0-9]+)(\..*)?")
_OTHER_SCHEMA = re.compile(r"vlaopt\.(?!recipe/)([a-z-]+)/")
_OTHER_HINTS = {
    "artifact": "give the directory it lies in: vlaopt verify, bench, inspect and compare take an artifact",
    "target": "a recipe names it under `target`, or give it as --target",
}
# Stand-ins for keys that every recipe must have, so that the other keys can still be checked when one is at fault.
_STAND_INS = {"schema": SCHEMA, "name": "unnamed", "version": "0.0.0", "target": "unnamed"}


def load_recipe(
    path: Path | str, overrides: Sequence[str] = (), target: str | None = None, *, check_paths: bool = True
) -> Recipe:
    """Read a recipe, put `overrides` (`key.path=value`) over it and its target's defaults under it, and check all.

    `target` replaces the recipe's own: a name, or a path relative to the working directory. `check_paths` also looks
    for the files and folders that the recipe names.
    Raises RecipeError with every problem at once (InputError when the file cannot be read as YAML at all), and
    EnvironmentProblem when the recipe is sound and only its target cannot do what it asks.
    """
    file = Path(path)
    document = read_mapping(file)
    _check_schema(document, str(file))
    draft = _Draft(file, document)
    for text in overrides:
        draft.override(text)
    draft.resolve_target(target)
    return draft.finish(check_paths)


def find_recipes(root: Path) -> tuple[Path, ...]:
    """The YAML files below `root` that declare themselves recipes, sound or not, in the order of their paths."""
    return tuple(path for path in sorted(root.rglob("*.yaml")) if path.is_file() and _declares_recipe(path))


def _declares_recipe(path: Path) -> bool:
    with path.open("rb") as file:
        return _DECLARES_RECIPE.search(file.read(1 << 16)) is not None


def _check_schema(document: Document, source: str) -> None:
    """Stop at a recipe of another major, or at no recipe: what else it holds would be judged by the wrong rules."""
    schema = document.values.get("schema")
    if isinstance(schema, str) and (other := _OTHER_SCHEMA.match(schema)):
        where = f"{source}:{document.places[('schema',)][0]}:schema"
        hint = _OTHER_HINTS.get(other[1])
        raise RecipeError([InputError(f"{other[1]} file, not a recipe: {schema}", where=where, hint=hint)])
    match = _SCHEMA.fullmatch(schema) if isinstance(schema, str) else None
    if match is None or schema == SCHEMA:
        return
    where = f"{source}:{document.places[('schema',)][0]}:schema"
    major = int(SCHEMA.rpartition("/")[2])
    if int(match[1]) < major:
        hint = f"rewrite it for {SCHEMA}; `vlaopt recipe schema` describes that"
        raise RecipeError([InputError(f"recipe of an older schema, {schema}", where=where, hint=hint)])
    hint = f"update vlaopt; this version reads {SCHEMA}"
    raise RecipeError([InputError(f"recipe of a newer schema, {schema}", where=where, hint=hint)])


class _Draft:
    """A recipe on its way to be checked: its values, where each came from, and the problems so far."""

    def __init__(self, file: Path, document: Document) -> None:
        self.file = file
        self.values: dict[str, Any] = copy.deepcopy(document.values)
        self.places = Places.of(str(file), document.places)
        self.target: Target | None = None
        self.problems: list[InputError] = []

    def override(self, text: str) -> None:
        try:
            override = parse_override(text)
            path = apply_override(self.values, override)
        except InputError as error:
            self.problems += _flat(error)
        else:
            self.places = self.places.replaced(path, Place("--set", None))

    def resolve_target(self, name: str | None) -> None:
        """Find the target that was asked for, and lay its defaults under the recipe's own values."""
        beside = self.file.parent
        if name is not None:
            self.values["target"] = name
            self.places = self.places.replaced(("target",), Place("--target", None))
            beside = Path()
        asked = self.values.get("target")
        if not isinstance(asked, str) or self._leaves_folder(asked, given=name is not None):
            return
        try:
            found = find_target(asked, beside)
        except InputError as error:
            where = "--target" if name is not None else self.places.where(("target",))
            self.problems.append(InputError(error.message, where=where, hint=error.hint))
            return
        try:
            self.target = read_target(found)
        except InputError as error:
            self.problems += _flat(error)
            return
        self._put_defaults(self.target, found)

    def _leaves_folder(self, asked: str, *, given: bool) -> bool:
        finding = None if given else checks.leaves_folder(asked)
        if finding is not None:
            self._report([finding])
        return finding is not None

    def _put_defaults(self, target: Target, file: Path) -> None:
        for section, defaults in target.defaults.items():
            own = self.values.setdefault(section, {})
            if isinstance(own, dict):
                self.values[section] = _over(defaults, own)
        if target.defaults:
            self.places = self.places.over(Places.of(str(file), read_mapping(file).places, below=("defaults",)))

    def finish(self, check_paths: bool) -> Recipe:
        errors = validation_errors(RecipeFile, self.values)
        faulty = [tuple(error["loc"]) for error in errors]
        self.problems += [as_problem(RecipeFile, error, self.places) for error in errors]
        findings = [f for f in self._findings(faulty, check_paths) if not _touches(f.path, faulty)]
        if findings and not self.problems and all(finding.target_cannot for finding in findings):
            raise self._target_cannot(findings)
        self._report(findings)
        if self.problems or self.target is None:
            raise RecipeError(sorted(self.problems, key=self._order))
        return self._recipe(RecipeFile.model_validate(self.values), self.target)

    def _findings(self, faulty: Sequence[KeyPath], check_paths: bool) -> list[Finding]:
        recipe = self._sound_part(faulty)
        if recipe is None:
            return []
        found = checks.check_target(recipe, self.target) if self.target is not None else []
        ruled_out = {finding.path for finding in found}
        # What the target cannot do at all need not also be something that this version does not write.
        found += [finding for finding in checks.check_keys(recipe) if finding.path not in ruled_out]
        return [*found, *(checks.check_paths(recipe, self.file.parent) if check_paths else [])]

    def _sound_part(self, faulty: Sequence[KeyPath]) -> RecipeFile | None:
        """The recipe with its faulty values left out, so that the rest of it can be checked too."""
        values = copy.deepcopy(self.values)
        for path in faulty:
            _remove(values, path)
        policy = values.get("policy")
        stand_in = {"type": "unnamed", "checkpoint": "."}
        values["policy"] = {**stand_in, **policy} if isinstance(policy, dict) else stand_in
        try:
            return RecipeFile.model_validate({**_STAND_INS, **values})
        except ValidationError:
            return None

    def _report(self, findings: Iterable[Finding]) -> None:
        self.problems += [InputError(f.message, where=self.places.where(f.path), hint=f.hint) for f in findings]

    def _target_cannot(self, findings: Sequence[Finding]) -> EnvironmentProblem:
        first, *others = findings
        also = "".join(f"; {self.places.where(finding.path)}: {finding.message}" for finding in others)
        return EnvironmentProblem(first.message + also, where=self.places.where(first.path), hint=first.hint)

    def _order(self, problem: InputError) -> tuple[bool, int]:
        """The recipe's own lines first, in their order; the command line and the target's file after them."""
        line = re.match(re.escape(str(self.file)) + r":([0-9]+)", problem.where or "")
        return line is None, int(line[1]) if line else 0

    def _recipe(self, file: RecipeFile, target: Target) -> Recipe:
        fields = {info.alias or name: getattr(file, name) for name, info in RecipeFile.model_fields.items()}
        return Recipe.model_validate({**fields, "target": target, "path": self.file.absolute()})


def _over(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`own` with what it leaves out of `defaults`, and of the sections in both."""
    merged = copy.deepcopy({**defaults, **own})
    for key in defaults.keys() & own.keys():
        if isinstance(defaults[key], dict) and isinstance(own[key], dict):
            merged[key] = _over(defaults[key], own[key])
    return merged


def _flat(error: InputError) -> list[InputError]:
    return list(error.problems) if isinstance(error, RecipeError) else [error]


def _touches(path: KeyPath, faulty: Sequence[KeyPath]) -> bool:
    """Whether a value at fault lies at, above or below `path`."""
    return any(path[: len(fault)] == fault or fault[: len(path)] == path for fault in faulty)


def _remove(values: Any, path: KeyPath) -> None:
    """Take the value at `path` out, or the whole list when it lies in one: the items after it would move."""
    for part in path[:-1]:
        item = values.get(part) if isinstance(values, dict) else None
        if isinstance(item, list):
            del values[part]
            return
        if not isinstance(item, dict):
            return
        values = item
    if isinstance(values, dict):
        values.pop(path[-1], None)
