"""vlaopt diagnose SOURCE"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson, Overrides
from vlaopt.cli.stage import is_artifact, refuse_options

if TYPE_CHECKING:
    from vlaopt.backends.audit import Audit
    from vlaopt.benchmark.actions import ActionError
    from vlaopt.quantization.diagnosis import Diagnosis


def diagnose(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="An artifact built here; or a recipe, whose stages run as needed.")
    ],
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="B", help="Run on this backend; the engine's otherwise.")
    ] = None,
    observations: Annotated[
        Path | None,
        typer.Option("--observations", metavar="SET", help="The held-out set of the build; a recipe names it itself."),
    ] = None,
    evaluations: Annotated[int, typer.Option(min=4, metavar="N", help="Trials that locating may take.")] = 48,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Say which layers lose the actions, why, and what mends it.

    Layers are toggled between their planned precision and FP32 on golden or held-out observations, whichever are
    further off. Recipe lines come with the error that they would leave. Also for a build that missed a gate.
    """
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.artifact.store import Store
    from vlaopt.calibration import CalibrationSet
    from vlaopt.chain import written_whatever_it_loses
    from vlaopt.quantization.case import Case, held_out, written_graphs
    from vlaopt.quantization.diagnosis import diagnose as locate
    from vlaopt.quantization.diagnosis import worst
    from vlaopt.recipe.load import load_recipe
    from vlaopt.runtime.golden import Golden
    from vlaopt.stages import limits

    store = Store.default()
    with terminal.watched(quiet=as_json) as progress:
        if is_artifact(source):
            refuse_options({"--set": overrides}, "for diagnosing by a recipe", hint="give the recipe instead")
            artifact = Artifact.open(source)
            recipe, written = artifact.recipe(), written_graphs(artifact, store)
            engine = artifact.manifest.engine
            chosen = backend or (engine.backend if engine else "onnxruntime")
        else:
            refuse_options(
                {"--observations": observations}, "for diagnosing an artifact", hint="--set verify.observations=SET"
            )
            recipe = load_recipe(source, overrides=overrides or ())
            written = written_whatever_it_loses(recipe, store=store, progress=progress)
            named = recipe.verify.observations
            observations = recipe.locate(named) if named else None
            chosen = backend or "onnxruntime"
        case = Case.of(written)
        golden = {"golden": Golden.of(written)}
        if observations:
            most = len(golden["golden"].observations)
            golden["held-out"] = held_out(written, CalibrationSet.open(observations), most)

        def held(error: ActionError) -> bool:
            return all(gate.held for gate in limits(error, recipe.accept))

        label = worst(case, golden, chosen)
        found = locate(case, golden[label], label, held, progress, backend=chosen, evaluations=evaluations)
        audits = case.audits(chosen)
    if as_json:
        terminal.give_json({**found.to_json(), "audit": {name: audit.to_json() for name, audit in audits.items()}})
    else:
        _show(found, audits)


def _show(found: Diagnosis, audits: dict[str, Audit]) -> None:
    limit = "within the limits" if found.held else "beyond the limits"
    terminal.give_words(
        f"mean action error {found.error.executed.mean:.4f} on {found.samples} {found.observed_on} observations on "
        f"{found.backend}, {limit}; FP32 has {found.fp32.executed.mean:.4f}"
    )
    for name, audit in audits.items():
        if audit.others:
            terminal.give_words(audit.told(found.backend, name))
    if not found.guilty:
        terminal.give("its layers in low precision lose nothing")
        return
    terminal.give_words(
        f"what its {found.layers} layers in low precision lose against FP32 is {found.loss:.4f}; found in "
        f"{found.evaluations} trials:"
    )
    layers = terminal.table("layer", "alone", "without it", "why", right=("alone", "without it"), whole=("layer",))
    for part in found.guilty:
        more = f" ({len(part.nodes)} layers)" if len(part.nodes) > 1 else ""
        why = "; ".join(f"{cause.kind}: {cause.told}" for cause in part.causes)
        layers.add_row(part.scope + more, f"{part.alone:.4f}", f"{part.without:.4f}", why)
    terminal.give_table(layers)
    for mend in found.mends:
        kept = "within the limits" if mend.held else "still beyond the limits"
        terminal.give_words(f"# {mend.why}")
        terminal.give_words(f"# leaves a mean action error of {mend.error.executed.mean:.4f}, {kept}")
        terminal.give(mend.lines)


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(epilog="Example: vlaopt diagnose recipes/edge-vla/cpu.yaml")(diagnose)
