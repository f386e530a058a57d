"""vlaopt doctor [--target T | ARTIFACT]"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson

if TYPE_CHECKING:
    from vlaopt.doctor import Verdict

CANNOT = 3
"""As of EnvironmentProblem: this machine will not do it."""
PIPED_WIDTH = 120


def doctor(
    artifact: Annotated[Path | None, typer.Argument(metavar="ARTIFACT", help="An artifact directory.")] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="T", help="A name from `vlaopt target ls`, or a file.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Say what this machine is and for which targets it builds and runs engines.

    With a target or an artifact: whether this machine is ready for it, else what it has, what is needed and what
    mends it. Ends with exit code 3 where it is not. An artifact's engine is not opened to find out.
    """
    from vlaopt import doctor as room
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.errors import InputError
    from vlaopt.machine import read_machine
    from vlaopt.target import list_targets, load_target

    if artifact is not None and target is not None:
        raise InputError("a target and an artifact are two questions", hint="ask one of them")
    opened = None if artifact is None else Artifact.open(artifact)
    named = None if target is None else load_target(target)
    machine, states = read_machine(), room.probe_all()
    facts = {"machine": machine.to_json(), "backends": [state.model_dump(mode="json") for state in states.values()]}
    if opened is not None:
        return _tell(room.judge_artifact(opened, machine, states), facts, as_json)
    if named is not None:
        return _tell(room.judge(named, machine, states), facts, as_json)
    found = room.examine_all([load_target(name) for name in list_targets()], machine, states)
    if as_json:
        terminal.give_json({**facts, "targets": [state.model_dump(mode="json") for state in found]})
    else:
        terminal.give("\n".join(room.show_machine(machine, states, found, _width())))
    return 0


def _tell(verdict: Verdict, facts: dict[str, Any], as_json: bool) -> int:
    """Give the verdict; its exit code."""
    if as_json:
        terminal.give_json({**facts, "verdict": verdict.to_json()})
    else:
        from vlaopt.doctor.text import show_verdict

        terminal.give("\n".join(show_verdict(verdict, _width())))
    return 0 if verdict.will else CANNOT


def _width() -> int:
    return max(shutil.get_terminal_size().columns, 60) if sys.stdout.isatty() else PIPED_WIDTH


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(
        epilog="Examples: vlaopt doctor · vlaopt doctor --target jetson-orin · vlaopt doctor "
        "artifacts/edge-vla/…/cpu-x86"
    )(doctor)
