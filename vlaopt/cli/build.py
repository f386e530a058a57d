"""vlaopt build RECIPE"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson, Overrides, RecipePath, TargetName

Output = Annotated[Path, typer.Option("--output", metavar="DIR", help="Where the artifact is published.")]


class StageName(str, Enum):
    """A stage, as an option's value."""

    export = "export"
    prune = "prune"
    quantize = "quantize"
    onnx = "onnx"
    engine = "engine"
    verify = "verify"
    bench = "bench"


def build(
    recipe: RecipePath,
    target: TargetName = None,
    overrides: Overrides = None,
    start_from: Annotated[
        StageName | None, typer.Option("--from", metavar="STAGE", help="Run this stage and later ones anew.")
    ] = None,
    output: Output = Path("artifacts"),
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would run, run nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Build the artifact that a recipe asks for.

    Runs export, prune, quantize, onnx, engine, verify and bench. A stage whose inputs have not changed is taken from
    the store. The last line on stdout is the artifact's path.
    """
    from vlaopt import chain
    from vlaopt.artifact.store import Store
    from vlaopt.cli.cache import show_plan
    from vlaopt.cli.summary import show_summary
    from vlaopt.errors import InputError
    from vlaopt.recipe.load import load_recipe
    from vlaopt.summary import summarise

    if recipe.is_dir():
        raise InputError(
            "a directory, not a recipe",
            where=str(recipe),
            hint="`vlaopt recipe ls FOLDER` lists recipes; `vlaopt verify` and `bench` take an artifact",
        )
    loaded = load_recipe(recipe, overrides=overrides or (), target=target)
    store = Store.default()
    if dry_run:
        planned = [vars(stage) for stage in chain.plan(loaded, store)]
        show_plan(planned, as_json=as_json, title=f"{loaded.name} {loaded.version} for {loaded.target.name}")
        return
    with terminal.watched(quiet=as_json) as progress:
        result = chain.build(
            loaded, start_from=start_from and start_from.value, output=output, store=store, progress=progress
        )
        summary = summarise(result, store, progress)
    show_summary(summary, as_json=as_json)


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(
        epilog="Examples: vlaopt build recipes/edge-vla/cpu.yaml · vlaopt build recipes/edge-vla/cpu.yaml --set "
        "quantize.scheme=none --output /tmp/fp32 · vlaopt build recipes/edge-vla/jetson-orin.yaml --dry-run"
    )(build)
