"""vlaopt export-triton ARTIFACT -o DIR"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaopt.cli import terminal


def export_triton(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="A finished artifact directory.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder for all of it.")],
) -> None:
    """Write an artifact as a model repository of Triton Inference Server; prints its path.

    One model per component; an ensemble of them where each runs once, else README.md says how a client runs the
    loop. Statistics, tokenizer and golden data lie beside. Needs neither torch nor onnx.
    """
    from vlaopt import triton
    from vlaopt.artifact.artifact import Artifact

    repository = triton.export(Artifact.open(artifact), output)
    terminal.note(f"{output / triton.GUIDE} says how it is served and used")
    terminal.give(str(repository))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("export-triton", epilog="Example: vlaopt export-triton artifacts/edge-vla/…/x86-gpu -o served")(
        export_triton
    )
