"""Plan and execute: run the stages in order, each from the store when nothing it depends on has changed."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaopt import stages
from vlaopt.artifact.artifact import Artifact, Draft, copy, drafted, finish
from vlaopt.artifact.manifest import Step
from vlaopt.artifact.store import Record, Store, differences, key_of
from vlaopt.errors import EnvironmentProblem, GateError, InputError
from vlaopt.files import check_writable, remove_directory, staged_directory, write_file
from vlaopt.progress import Progress, Silent
from vlaopt.recipe.load import load_recipe
from vlaopt.recipe.model import Recipe
from vlaopt.runtime import finished
from vlaopt.stages import ORDER, Stage

DEFAULT_OUTPUT = "artifacts"


@dataclass(frozen=True)
class Outcome:
    """One stage of a build: its stored result, whether it was there already, and the seconds making it took."""

    stage: str
    artifact: Artifact
    cached: bool
    seconds: float


@dataclass(frozen=True)
class Build:
    """A finished build: every stage's outcome, the published artifact, and the seconds it took in all."""

    recipe: Recipe
    outcomes: tuple[Outcome, ...]
    artifact: Artifact
    seconds: float


@dataclass(frozen=True)
class Planned:
    """One stage of a plan. `state`: `cached`, `run`, or `follows`: its input is known when an earlier stage has run."""

    stage: str
    state: str
    why: str


def build(
    recipe: str | Path | Recipe,
    *,
    overrides: Sequence[str] = (),
    target: str | None = None,
    start_from: str | None = None,
    output: str | Path = DEFAULT_OUTPUT,
    store: Store | None = None,
    progress: Progress | None = None,
) -> Build:
    """Run the whole chain and publish its artifact under `output`; `start_from` runs that stage and later ones anew.

    Raises InputError, EnvironmentProblem, StageError or GateError; every stage that ended well stays in the store.
    """
    started = time.monotonic()
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(Path(recipe), overrides=overrides, target=target)
    kept = store or Store.default()
    check_writable(Path(output))
    outcomes = run_stages(loaded, None, ORDER, store=kept, progress=progress or Silent(), start_from=start_from)
    published = publish(outcomes[-1].artifact, loaded, Path(output))
    return Build(loaded, tuple(outcomes), published, time.monotonic() - started)


def run_stages(
    recipe: Recipe,
    source: Artifact | None,
    names: Sequence[str],
    *,
    store: Store,
    progress: Progress,
    start_from: str | None = None,
) -> list[Outcome]:
    """The stages `names` one after the other, the first on `source`.

    Raises InputError when `source` holds native code that this machine did not build: stages run what they take.
    """
    check_outside(recipe, names)
    if source is not None:
        finished.check_trust(source, store)
    outcomes: list[Outcome] = []
    anew = False
    for position, name in enumerate(names, 1):
        anew = anew or name == start_from
        with progress.task(f"{position}/{len(names)} {name}" if len(names) > 1 else name):
            outcome = run_stage(stages.get(name), recipe, source, store=store, progress=progress, anew=anew)
        source = outcome.artifact
        outcomes.append(outcome)
    return outcomes


def check_outside(recipe: Recipe, names: Sequence[str]) -> None:
    """Read what the stages `names` read from outside, so that a damaged set is told of before minutes of work."""
    for name in names:
        stages.get(name).outside(recipe)


def run_stage(
    stage: Stage, recipe: Recipe, source: Artifact | None, *, store: Store, progress: Progress, anew: bool = False
) -> Outcome:
    """One stage, from the store when it is there. What it read from outside is hashed again before it is stored.

    A stored result is held to the recipe's limits each time: see `stages.judge`.
    """
    stage.requires(source)
    parts = stage.key_parts(recipe, source)
    key = key_of(parts)
    if not anew and (found := store.find(stage.name, key)):
        stages.judge(found, recipe.accept)
        return Outcome(stage.name, found, cached=True, seconds=0.0)
    started = time.monotonic()
    final = store.place(stage.name, key)
    if anew:
        store.forget_unfinished(stage.name, key)
    with drafted(final) as draft:
        _places(draft, store, stage.name, key)
        try:
            stage.run(recipe, source, draft, progress)
        except GateError as error:
            error.hint = "; ".join(filter(None, [error.hint, _keep_reports(draft.folder, store, stage.name, key)]))
            raise
        if changed := list(differences("", parts, stage.key_parts(recipe, source))):
            raise InputError(f"what {stage.name} reads was changed while it ran: {changed[0]}", hint="run it again")
        resolved = recipe.resolved()
        lineage = source.manifest.lineage if source else ()
        step = Step(stage=stage.name, stage_version=stage.version, key=key, took=parts["input"])
        seen = {**(source.manifest.recipe if source else {}), **parts["recipe"], "target": resolved["target"]}
        finish(
            draft,
            name=recipe.name,
            version=recipe.version,
            target=recipe.target.name,
            stage=stage.name,
            recipe=seen,
            lineage=(*lineage, step),
            tools={**(source.manifest.tools if source else {}), **parts["tools"]},
        )
        if anew:  # not before: an interrupted run keeps the result there was
            remove_directory(final)
    store.forget_unfinished(stage.name, key)
    seconds = time.monotonic() - started
    store.note(
        Record(stage.name, key, recipe.name, recipe.target.name, parts, round(seconds, 3), round(time.time(), 3))
    )
    made = Artifact.open(final)
    finished.vouch(made, store)
    stages.judge(made, recipe.accept)
    return Outcome(stage.name, made, cached=False, seconds=seconds)


def written_whatever_it_loses(recipe: Recipe, *, store: Store, progress: Progress) -> Artifact:
    """The result of stage `onnx`, for those who look for what its actions lose: its gates may have been missed."""
    names = ORDER[: ORDER.index("onnx")]
    source = run_stages(recipe, None, names, store=store, progress=progress)[-1].artifact
    stage = stages.get("onnx")
    try:
        return run_stage(stage, recipe, source, store=store, progress=progress).artifact
    except GateError:
        found = store.find(stage.name, key_of(stage.key_parts(recipe, source)))
        if found is None:
            raise
        return found


def finish_here(artifact: Artifact, *, store: Store, progress: Progress) -> Artifact:
    """The artifact with the engine that was left to this machine, built here and held to its gates; kept in the store.

    Needs neither torch nor onnx. Raises InputError when there is nothing left to finish, EnvironmentProblem when this
    machine is not of the target's class or lacks its backend, GateError when the engine's actions are too far off.
    """
    if artifact.manifest.finish is None:
        raise InputError("its engine is built already", where=str(artifact.path))
    stage, recipe, key = stages.get("engine"), artifact.recipe(), finished.key(artifact)
    found = store.find(finished.FINISHED, key)
    if found and found.manifest.lineage[-1].stage_version == stage.version:
        return found
    parts, final = stage.key_parts(recipe, artifact), store.place(finished.FINISHED, key)
    with drafted(final) as draft:
        _places(draft, store, finished.FINISHED, key)
        stage.run(recipe, artifact, draft, progress)
        if draft.finish:
            raise EnvironmentProblem(
                f"the engine for {recipe.target.name} cannot be built here: {draft.finish.reason}",
                where=str(artifact.path),
                hint=f"run it on its target: {draft.finish.command}; `vlaopt doctor ARTIFACT` says what is missing",
            )
        step = Step(stage=stage.name, stage_version=stage.version, key=key, took=parts["input"])
        fields = artifact.manifest.model_dump(include={"name", "version", "target", "recipe"})
        finish(
            draft,
            **fields,
            parent=artifact.id,
            stage=stage.name,
            lineage=(*artifact.manifest.lineage, step),
            tools={**artifact.manifest.tools, **parts["tools"]},
        )
        if found:
            remove_directory(final)
    store.forget_unfinished(finished.FINISHED, key)
    made = Artifact.open(final)
    finished.vouch(made, store)
    return made


def _places(draft: Draft, store: Store, stage: str, key: str) -> None:
    """Tell a draft where in the store its stage may keep what outlives it."""
    draft.unfinished = store.unfinished(stage, key)
    draft.unfinished_folder = store.unfinished_folder(stage, key)
    draft.opened = store.opened


def _keep_reports(folder: Path, store: Store, stage: str, key: str) -> str | None:
    """Save the reports of a draft whose gate was missed; gives the sentence that says where."""
    reports = sorted((folder / "reports").glob("*")) if (folder / "reports").is_dir() else []
    if not reports:
        return None
    place = store.root / "failed" / f"{stage}-{key[:12]}"
    shutil.rmtree(place, ignore_errors=True)
    with staged_directory(place) as kept:
        for report in reports:
            write_file(kept / report.name, report.read_bytes())
    return f"its report is kept in {place}"


def publish(artifact: Artifact, recipe: Recipe, output: Path) -> Artifact:
    """Copy a stage's result to `output/<name>/<version>+<digest12>/<target>/` with the whole recipe in its manifest."""
    whole = recipe.resolved()
    fields: dict[str, Any] = {
        "name": recipe.name,
        "version": recipe.version,
        "target": recipe.target.name,
        "recipe": {key: whole[key] for key in whole if key not in ("name", "version", "schema")},
    }
    renamed = artifact.manifest.model_copy(update=fields)
    manifest = type(artifact.manifest).model_validate_json(renamed.encode())
    published = Artifact.from_manifest(artifact.path, manifest)
    return copy(published, output / recipe.name / published.version / recipe.target.name)


def plan(recipe: Recipe, store: Store, names: Sequence[str] = ORDER) -> list[Planned]:
    """What a build would do, stage by stage, and why; runs nothing."""
    check_outside(recipe, names)
    planned: list[Planned] = []
    source: Artifact | None = None
    for position, name in enumerate(names):
        stage = stages.get(name)
        parts = stage.key_parts(recipe, source)
        found = store.find(name, key_of(parts))
        if found is None:
            planned.append(Planned(name, "run", store.why(name, recipe.name, recipe.target.name, parts)))
            return [*planned, *(Planned(later, "follows", f"after {name}") for later in names[position + 1 :])]
        planned.append(Planned(name, "cached", key_of(parts)[:12]))
        source = found
    return planned
