"""vlaopt recipe init | ls | show | validate | schema"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaopt.cli import terminal

commands = typer.Typer(help="Write and look at recipes.", epilog="Example: vlaopt recipe ls", no_args_is_help=True)
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


@commands.command(
    epilog="Example: vlaopt recipe init recipes/edge-vla/checkpoint --target jetson-orin --calibration "
    "calibration/metaworld > recipe.yaml"
)
def init(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder.")],
    target: Annotated[str, typer.Option("--target", metavar="T", help="A name from `vlaopt target ls`, or a file.")],
    name: Annotated[str | None, typer.Option(metavar="NAME", help="The artifact's name; the type otherwise.")] = None,
    kind: Annotated[
        str | None, typer.Option("--type", metavar="TYPE", help="The policy's type, where its config.json has none.")
    ] = None,
    calibration: Annotated[str | None, typer.Option(metavar="SET", help="The calibration set.")] = None,
    held_out: Annotated[str | None, typer.Option(metavar="SET", help="Other observations, to judge on.")] = None,
    hub_overrides: Annotated[
        list[str] | None,
        typer.Option("--hub-override", metavar="FIELD=FOLDER", help="A local folder for what a field names on a hub."),
    ] = None,
) -> None:
    """Print a commented recipe for a checkpoint: its components, schemes, limits, and what is still missing.

    The recipe belongs in this folder: its paths are relative to it. Nothing is fetched, nothing is written.
    """
    from vlaopt.proposal import Wish, propose
    from vlaopt.proposal.text import as_yaml, missing

    wish = Wish(
        checkpoint=_from_here(checkpoint),
        target=target,
        type=kind,
        name=name,
        calibration=calibration and _from_here(calibration),
        held_out=held_out and _from_here(held_out),
        hub_overrides=_folders(hub_overrides),
    )
    with terminal.watched() as progress:
        proposal = propose(wish, Path(), progress)
    terminal.give(as_yaml(proposal).removesuffix("\n"))
    for what, _ in missing(proposal):
        terminal.note(f"missing: {what}; the recipe says how to come by it")


@commands.command(epilog="Example: vlaopt recipe schema > vlaopt.schema.json")
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from vlaopt.recipe.schema import recipe_schema

    terminal.give_json(recipe_schema())


def _from_here(path: str) -> str:
    """The path as a recipe in the working directory names it."""
    place = Path(path)
    return (place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place).as_posix()


def _folders(texts: list[str] | None) -> dict[str, str]:
    """What `--hub-override` says. Raises InputError for what is not FIELD=FOLDER."""
    from vlaopt.errors import InputError

    found = {}
    for text in texts or ():
        field, _, folder = text.partition("=")
        if not (field and folder):
            raise InputError(f"--hub-override {text!r} is not FIELD=FOLDER")
        found[field] = _from_here(folder)
    return found


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.add_typer(commands, name="recipe")
