"""vlaopt verify SOURCE"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson, Overrides
from vlaopt.cli.stage import ONLY_STAGE, OutputOption, RecipeOption, TrustOption, is_artifact, refuse_options, run_alone


def verify(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="An artifact; or a recipe, whose earlier stages run as needed.")
    ],
    recipe: RecipeOption = None,
    overrides: Overrides = None,
    output: OutputOption = None,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="B", help="Verify the portable graphs on this backend.")
    ] = None,
    trust: TrustOption = False,
    as_json: AsJson = False,
) -> None:
    """Hold an artifact to its gates.

    Checks every file's digest, and its actions against its golden ones. Needs neither torch nor onnx. With --recipe,
    stage `verify` runs: held-out observations and closed loop too. Exit code 5 when a gate is missed.
    """
    if not is_artifact(source) or recipe:
        refuse_options(
            {"--backend": backend, "--trust": trust},
            "for verifying an artifact, not for stage `verify` of a recipe",
            hint="a recipe names its backend itself: --set engine.backend=…",
        )
        run_alone("verify", source, recipe, overrides, output, as_json)
        return
    refuse_options(
        {"--set": overrides, "--output": output}, ONLY_STAGE, hint="add --recipe RECIPE to run stage `verify`"
    )
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.runtime import finished
    from vlaopt.stages import hold
    from vlaopt.stages.verify import LOCATE, measure

    artifact = Artifact.open(source)
    artifact.check()
    if backend is None:
        artifact = finished.find(artifact) or artifact
    own = artifact.recipe()
    limits = own.model_copy(update={"verify": own.verify.model_copy(update={"closed_loop": None})})
    with terminal.watched(quiet=as_json) as progress:
        result = measure(artifact, limits, None, progress, backend=backend, trust=trust)
    if as_json:
        terminal.give_json(result.metrics)
    else:
        table = terminal.table("gate", "measured", "limit", "", right=("measured", "limit"))
        for gate in result.gates:
            table.add_row(gate.name, f"{gate.value:.4g}", f"{gate.limit:.4g}", "held" if gate.held else "MISSED")
        terminal.give_table(table)
        terminal.give(
            f"{artifact.manifest.name} {artifact.version}: {len(artifact.manifest.files)} files unchanged; "
            f"verified on {result.metrics['backend']}"
        )
    hold(result.gates, what="gates missed", hint=LOCATE)


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(epilog="Example: vlaopt verify artifacts/edge-vla/…/cpu-x86")(verify)
