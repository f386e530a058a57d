"""vlaopt export | prune | quantize | onnx | engine: one stage alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson, Overrides

if TYPE_CHECKING:
    from vlaopt.artifact.artifact import Artifact

SUMMARIES = {
    "export": "Checkpoint to FP32 ONNX components. PolicySpec and golden data too, all compared with eager.",
    "prune": "Make the components smaller. By the recipe's method, with recovery training where it asks.",
    "quantize": "Find scales; decide which nodes run in which precision.",
    "onnx": "Write the final portable graphs. Simplified, Q/DQ in, checked.",
    "engine": "Compile the graphs and audit their precision. On the target, finish an artifact.",
}
Source = Annotated[
    Path,
    typer.Argument(
        metavar="SOURCE", help="A recipe (earlier stages run as needed), or the artifact of the stage before."
    ),
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", metavar="RECIPE", help="The recipe, when SOURCE is an artifact.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", metavar="DIR", help="Publish the result there; it stays in the store otherwise."),
]

TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust", help="Open an engine of native code that another machine built: opening it runs that code."
    ),
]

ONLY_STAGE = "only for a stage that is run by its recipe"


def is_artifact(source: Path) -> bool:
    """Whether SOURCE, an artifact or a recipe, names an artifact. Raises InputError when nothing is there."""
    from vlaopt.errors import InputError

    if not source.exists():
        raise InputError("no such artifact or recipe", where=str(source), hint="`vlaopt build` prints the artifact")
    return source.is_dir()


def run_alone(
    name: str, source: Path, recipe: Path | None, overrides: list[str] | None, output: Path | None, as_json: bool
) -> None:
    """Run one stage on a recipe or an artifact and give the result's path."""
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.artifact.store import Store
    from vlaopt.chain import finish_here, publish, run_stages
    from vlaopt.errors import InputError
    from vlaopt.recipe.load import load_recipe
    from vlaopt.stages import ORDER

    store = Store.default()
    if is_artifact(source):
        artifact = Artifact.open(source)
        if recipe is None and name == "engine" and artifact.manifest.finish:
            with terminal.watched(quiet=as_json) as progress:
                finished = finish_here(artifact, store=store, progress=progress)
            _give(name, publish(finished, finished.recipe(), output) if output else finished, as_json)
            return
        if recipe is None:
            raise InputError(
                f"{name} on an artifact needs the recipe it is built by",
                where=str(source),
                hint=f"vlaopt {name} {source} --recipe RECIPE",
            )
        loaded, names = load_recipe(recipe, overrides=overrides or (), target=artifact.manifest.target), [name]
    else:
        if recipe is not None:
            raise InputError("give either a recipe or an artifact with --recipe, not two recipes", where=str(source))
        artifact = None
        loaded, names = load_recipe(source, overrides=overrides or ()), list(ORDER[: ORDER.index(name) + 1])
    with terminal.watched(quiet=as_json) as progress:
        outcome = run_stages(loaded, artifact, names, store=store, progress=progress)[-1]
    _give(name, publish(outcome.artifact, loaded, output) if output else outcome.artifact, as_json)


def _give(name: str, result: Artifact, as_json: bool) -> None:
    if not as_json:
        terminal.give(str(result.path))
        return
    terminal.give_json(
        {
            "path": str(result.path),
            "id": result.id,
            "stage": name,
            "content": result.manifest.content_digest(),
            "metrics": result.manifest.metrics.get(name, {}),
        }
    )


def refuse_options(given: Mapping[str, object], why: str, *, hint: str) -> None:
    """Raise InputError, naming those of the options that were given: nothing asked for is silently left undone."""
    from vlaopt.errors import InputError

    stray = [option for option, value in given.items() if value]
    if stray:
        raise InputError(f"{', '.join(stray)}: {why}", hint=hint)


def outside(path: Path, artifact: Path) -> Path:
    """`path`, which must be a file to be, and not in the artifact, which never changes once written."""
    from vlaopt.errors import InputError

    if path.is_dir():
        raise InputError("a folder, not a file to write", where=str(path), hint="name a file in it")
    if path.resolve().is_relative_to(artifact.resolve()):
        raise InputError(
            "lies in the artifact, which never changes once written", where=str(path), hint="name a file somewhere else"
        )
    return path


def _command(name: str) -> Callable[..., None]:
    def command(
        source: Source,
        recipe: RecipeOption = None,
        overrides: Overrides = None,
        output: OutputOption = None,
        as_json: AsJson = False,
    ) -> None:
        run_alone(name, source, recipe, overrides, output, as_json)

    command.__doc__ = SUMMARIES[name]
    return command


def add_to(app: typer.Typer) -> None:
    """Register the subcommands."""
    for name in SUMMARIES:
        app.command(name, epilog=f"Example: vlaopt {name} recipes/edge-vla/cpu.yaml")(_command(name))
