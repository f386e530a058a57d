"""vlaopt cache ls | gc | why"""

from __future__ import annotations

import time
from typing import Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson, Overrides, RecipePath, TargetName

commands = typer.Typer(
    help="Look at the store of stage results ($VLAOPT_STORE).", epilog="Example: vlaopt cache ls", no_args_is_help=True
)


@commands.command(epilog="Example: vlaopt cache ls")
def ls(as_json: AsJson = False) -> None:
    """List the stored stage results, newest first."""
    from vlaopt.artifact.store import Store

    store = Store.default()
    records = store.records()
    if as_json:
        terminal.give_json([{**vars(record), "parts": dict(record.parts)} for record in records])
        return
    table = terminal.table(
        "stage", "recipe", "target", "key", "took", "written", right=("took",), title=str(store.root)
    )
    for record in records:
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.written))
        table.add_row(record.stage, record.name, record.target, record.key[:12], f"{record.seconds:.1f} s", written)
    terminal.give_table(table)


@commands.command(epilog="Example: vlaopt cache gc --older-than 30")
def gc(
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="Keep what is younger.")
    ] = 30.0,
) -> None:
    """Remove old stage results, and what dead processes left."""
    from vlaopt.artifact.store import Store

    removed, freed = Store.default().collect(older_than_days=older_than)
    terminal.give(f"{removed} removed, {terminal.size(freed)} freed")


@commands.command(epilog="Example: vlaopt cache why recipes/edge-vla/cpu.yaml --set quantize.calibrator=mse")
def why(recipe: RecipePath, overrides: Overrides = None, target: TargetName = None, as_json: AsJson = False) -> None:
    """Say which stages a build would run, and what changed since they last ran."""
    from vlaopt.artifact.store import Store
    from vlaopt.chain import plan
    from vlaopt.recipe.load import load_recipe

    planned = plan(load_recipe(recipe, overrides=overrides or (), target=target), Store.default())
    show_plan([vars(stage) for stage in planned], as_json=as_json)


def show_plan(rows: list[dict[str, str]], *, as_json: bool, title: str | None = None) -> None:
    """Print a plan; a row has stage, state and why."""
    if as_json:
        terminal.give_json(rows)
        return
    table = terminal.table("stage", "state", "why", title=title)
    for row in rows:
        table.add_row(row["stage"], row["state"], row["why"])
    terminal.give_table(table)


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.add_typer(commands, name="cache")
