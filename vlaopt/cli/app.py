"""All subcommands, and how an error becomes a line and an exit code."""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Annotated

import typer

from vlaopt import __version__
from vlaopt.cli import (
    bench,
    build,
    cache,
    calibration,
    capture,
    compare,
    diagnose,
    doctor,
    evaluate,
    export_triton,
    inspect,
    recipe,
    report,
    sensitivity,
    stage,
    target,
    verify,
)
from vlaopt.errors import EnvironmentProblem, InputError, VlaoptError

BUG, USAGE, INTERRUPTED = 1, 2, 130
BROUGHT_BY = {
    **dict.fromkeys(("torch", "onnx", "onnxscript", "onnxsim", "torch_pruning"), "build"),
    **dict.fromkeys(("PIL", "pyarrow", "av"), "data"),
    "openvino": "cpu",
    **dict.fromkeys(("metaworld", "mujoco", "gymnasium"), "sim"),
}
"""The extra of vlaopt that brings a library: some installs, such as a robot's, lack it."""

PATH_FAULTS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)

app = typer.Typer(
    name="vlaopt",
    help="Turn a trained Vision-Language-Action policy into a small, fast, checked artifact.",
    epilog="Exit codes: 0 ok · 1 a bug · 2 bad usage or input · 3 this machine cannot · 4 a stage failed · 5 a gate "
    "was missed · 130 interrupted. Example: vlaopt build recipes/edge-vla/cpu.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # with it every help would first import all of Rich
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every subcommand."""


for module in (
    build,
    stage,
    verify,
    bench,
    compare,
    report,
    inspect,
    diagnose,
    sensitivity,
    evaluate,
    doctor,
    recipe,
    target,
    calibration,
    capture,
    cache,
    export_triton,
):
    module.add_to(app)


def run(arguments: list[str]) -> int:
    """Run one command line; gives its exit code. Never raises."""
    debug = "--debug" in arguments
    try:
        result = app(arguments, standalone_mode=False, prog_name="vlaopt")
    except VlaoptError as error:
        return _tell(error, debug=debug)
    except typer.TyperException as error:
        message = error.format_message()
        if message.startswith("Usage:"):  # of a command line without a command: the help
            typer.echo(message)
        else:
            _say(f"error: {message.replace('Value error, ', '')}")
            _say("hint: vlaopt --help lists the commands, vlaopt COMMAND --help its options")
        return USAGE
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED
    except SystemExit:
        # Typer exits by itself only when the reader of stdout is gone, as in `vlaopt recipe schema | head -1`.
        return 0
    except Exception as error:
        if unusable := _unusable_path(error):
            return _tell(unusable, debug=debug)
        if missing := _missing_library(error):
            return _tell(missing, debug=debug)
        if debug:
            traceback.print_exc()
        _say(f"error: a bug in vlaopt: {type(error).__name__}: {error}")
        _say("hint: run again with `vlaopt --debug …` and report what it prints")
        return BUG
    if result == INTERRUPTED:
        _say("interrupted; finished stages are kept, run the same command to go on")
    return result if isinstance(result, int) else 0


def _tell(error: VlaoptError, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    for line in error.lines():
        _say(line if line.startswith("hint:") else f"error: {line}")
    return error.exit_code


def _unusable_path(error: Exception) -> InputError | None:
    """The problem behind a system call that refused a path, such as one in a folder of another user, or None."""
    if not isinstance(error, OSError) or error.errno not in PATH_FAULTS or error.filename is None:
        return None
    return InputError(
        f"cannot be used: {error.strerror}", where=str(error.filename), hint="check the path and its permissions"
    )


def _missing_library(error: Exception) -> EnvironmentProblem | None:
    """The problem behind an import that failed because its library comes with an extra, or None."""
    library = (error.name or "").split(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if library not in BROUGHT_BY:
        return None
    return EnvironmentProblem(f"{library} is not installed", hint=f"pip install 'vlaopt[{BROUGHT_BY[library]}]'")


def _say(line: str) -> None:
    """One line on stderr, whatever a path or a library's message holds."""
    print("".join(_visible(character) for character in " ".join(line.splitlines())), file=sys.stderr)  # noqa: T201


def _visible(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
