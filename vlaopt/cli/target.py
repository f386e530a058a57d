"""vlaopt target ls | show"""

from __future__ import annotations

from typing import Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson

commands = typer.Typer(help="Look at targets.", epilog="Example: vlaopt target ls", no_args_is_help=True)


@commands.command(epilog="Example: vlaopt target ls")
def ls(as_json: AsJson = False) -> None:
    """List the targets that recipes can name."""
    from vlaopt.target import list_targets, load_target

    found = [load_target(name) for name in list_targets()]
    if as_json:
        terminal.give_json([target.model_dump(mode="json", by_alias=True) for target in found])
        return
    table = terminal.table("target", "backends", "precisions", "built on", "description", whole=("target", "built on"))
    for target in found:
        table.add_row(
            target.name,
            ", ".join(target.backends),
            ", ".join(target.precisions),
            target.engine_built_on,
            target.description,
        )
    terminal.give_table(table)


@commands.command(epilog="Example: vlaopt target show jetson-orin")
def show(name: Annotated[str, typer.Argument(metavar="TARGET", help="A name or a target file.")]) -> None:
    """Print one target, as JSON."""
    from vlaopt.target import load_target

    terminal.give_json(load_target(name).model_dump(mode="json", by_alias=True))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.add_typer(commands, name="target")
