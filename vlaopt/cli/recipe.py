"""vlaopt recipe ls | show | validate | schema"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaopt.cli import terminal

commands = typer.Typer(help="Look at recipes.", epilog="Example: vlaopt recipe ls", no_args_is_help=True)
RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one value, such as prune.amount=0.2.")
]
TargetName = Annotated[str | None, typer.Option("--target", metavar="T", help="Another target than the recipe's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@commands.command(epilog="Example: vlaopt recipe ls recipes")
def ls(
    root: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to look.")] = Path("recipes"),
    as_json: AsJson = False,
) -> None:
    """List the recipes below a folder."""
    from vlaopt.errors import InputError, VlaoptError
    from vlaopt.recipe.load import find_recipes, load_recipe

    if not root.is_dir():
        raise InputError("no such folder", where=str(root), hint="vlaopt recipe ls FOLDER")
    rows: list[tuple[str, ...]] = []
    for path in find_recipes(root):
        try:
            recipe = load_recipe(path, check_paths=False)
            rows.append((str(path), recipe.name, recipe.target.name, recipe.quantize.scheme, recipe.description))
        except VlaoptError as error:
            rows.append((str(path), "", "", "", error.lines()[0]))
    if as_json:
        names = ("path", "name", "target", "scheme", "description")
        terminal.give_json([dict(zip(names, row, strict=True)) for row in rows])
        return
    table = terminal.table("recipe", "name", "target", "scheme", "description")
    for row in rows:
        table.add_row(*row)
    terminal.give_table(table)


@commands.command(epilog="Example: vlaopt recipe show recipes/edge-vla/cpu.yaml --set prune.amount=0.25")
def show(recipe: RecipePath, overrides: Overrides = None, target: TargetName = None) -> None:
    """Print a recipe with every default and its target written out, as JSON."""
    from vlaopt.recipe.load import load_recipe

    terminal.give_json(load_recipe(recipe, overrides=overrides or (), target=target, check_paths=False).resolved())


@commands.command(epilog="Example: vlaopt recipe validate recipes/edge-vla/cpu.yaml")
def validate(recipe: RecipePath, overrides: Overrides = None, target: TargetName = None) -> None:
    """Check a recipe, its target and its paths; every problem is listed at once."""
    from vlaopt.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides=overrides or (), target=target)
    terminal.give(f"{recipe}: ok ({loaded.name} {loaded.version} for {loaded.target.name})")


@commands.command(epilog="Example: vlaopt recipe schema > vlaopt.schema.json")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from vlaopt.recipe.schema import recipe_schema

    terminal.give_json(recipe_schema())


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.add_typer(commands, name="recipe")
