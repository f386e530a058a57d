"""vlaopt bench ARTIFACT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson, Overrides
from vlaopt.cli.stage import ONLY_STAGE, OutputOption, RecipeOption, TrustOption, is_artifact, refuse_options, run_alone


def bench(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="An artifact; or a recipe, whose earlier stages run as needed.")
    ],
    hz: Annotated[
        float | None,
        typer.Option("--hz", metavar="N", min=0.01, max=10_000, help="Control rate; the recipe's otherwise."),
    ] = None,
    duration: Annotated[
        float | None, typer.Option("--duration", metavar="S", min=0.1, max=86_400, help="Seconds of the paced run.")
    ] = None,
    assertions: Annotated[
        list[str] | None,
        typer.Option("--assert", metavar="EXPR", help='A limit, such as "p99_ms<40"; missed: exit code 5.'),
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="B", help="Measure the portable graphs on this backend.")
    ] = None,
    trust: TrustOption = False,
    recipe: RecipeOption = None,
    overrides: Overrides = None,
    output: OutputOption = None,
    as_json: AsJson = False,
) -> None:
    """Measure an artifact, paced at the control rate.

    Then back-to-back; its actions are checked meanwhile. Needs neither torch nor onnx. The record is kept in
    this machine's store under the artifact's id.
    """
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.artifact.store import Store
    from vlaopt.benchmark.assertions import evaluate, parse_assertion
    from vlaopt.benchmark.record import BenchSettings
    from vlaopt.chain import finish_here
    from vlaopt.errors import EnvironmentProblem, GateError
    from vlaopt.stages.bench import bench_artifact, why_not_timed

    wanted = [parse_assertion(expression) for expression in assertions or ()]
    if not is_artifact(source) or recipe:
        refuse_options(
            {"--hz": hz, "--duration": duration, "--backend": backend, "--assert": wanted, "--trust": trust},
            "for measuring an artifact, not for stage `bench` of a recipe",
            hint="build it first; a recipe's own settings are bench.hz and bench.duration_s (--set)",
        )
        run_alone("bench", source, recipe, overrides, output, as_json)
        return
    refuse_options(
        {"--set": overrides, "--output": output}, ONLY_STAGE, hint="add --recipe RECIPE to run stage `bench`"
    )
    artifact = Artifact.open(source)
    artifact.check()
    if backend is None and artifact.manifest.finish:
        with terminal.watched(quiet=as_json) as progress:
            artifact = finish_here(artifact, store=Store.default(), progress=progress)
    if backend is None and (reason := why_not_timed(artifact)):
        raise EnvironmentProblem(
            f"cannot be measured here: {reason}",
            where=str(source),
            hint="--backend onnxruntime measures the portable graphs",
        )
    own = artifact.recipe().bench
    settings = BenchSettings(hz=hz or own.hz, duration_s=duration or own.duration_s, back_to_back_s=own.back_to_back_s)
    with terminal.watched(quiet=as_json) as progress:
        record = bench_artifact(artifact, settings, progress, backend=backend, trust=trust)
    outcomes = evaluate(wanted, record)
    value: dict[str, Any] = record.model_dump(mode="json", by_alias=True)
    if as_json:
        terminal.give_json({"record": value, "assertions": [vars(outcome) for outcome in outcomes]})
    else:
        show(record)
        for outcome in outcomes:
            terminal.give(
                f"{'held  ' if outcome.ok else 'MISSED'} {outcome.expression}"
                + (f" ({outcome.reason})" if outcome.reason else "")
            )
    # Told first: a machine whose store cannot be written has measured all the same.
    Store.default().remember("bench", f"{artifact.id[:16]}-{record.environment.machine_key()}", value)
    missed = [f"{outcome.expression}: {outcome.reason}" for outcome in outcomes if not outcome.ok]
    if missed:
        raise GateError("; ".join(missed))


def show(record: Any) -> None:
    """Print a record."""
    table = terminal.table(
        "",
        "min",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "max",
        "jitter",
        right=("min", "p50", "p90", "p99", "p99.9", "max", "jitter"),
        title=f"latency in ms ({record.environment.cpu_model})",
    )
    unstated: list[str] = []
    for name, part in ((f"paced at {record.settings.hz:g} Hz", record.paced), ("back-to-back", record.back_to_back)):
        spread = part.latency_ms
        cells = [spread.p50, spread.p90, spread.p99, spread.p99_9]
        values = ["—" if cell.value is None else f"{cell.value:.3f}" for cell in cells]
        unstated += [f"{name}: {cell.reason}" for cell in cells if cell.value is None][:1]
        jitter = "—" if part.jitter_ms is None else f"{part.jitter_ms:.3f}"
        table.add_row(name, f"{spread.min:.3f}", *values, f"{spread.max:.3f}", jitter)
    terminal.give_table(table)
    for reason in unstated:
        terminal.give_words(f"— {reason}")
    paced = record.paced
    terminal.give_words(
        f"misses: {paced.misses} of {paced.ticks} ticks past their deadline of {paced.deadline_ms:g} ms, "
        f"{len(paced.dropped)} dropped"
    )
    memory = "not available" if record.peak_memory_mib is None else f"{record.peak_memory_mib:.0f} MiB"
    energy = record.energy.reason if record.energy.joules is None else f"{record.energy.joules * 1e3:.2f} mJ per chunk"
    terminal.give_words(
        f"cold start {record.cold_start_ms:.0f} ms · peak memory {memory} · energy {energy} · "
        f"harness {record.overhead_us:.1f} µs"
    )
    for name, told in record.told.items():
        terminal.give_words(f"{name} ran {'; '.join(told)}")
    terminal.give_words(f"actions checked: {record.actions.checked}")
    terminal.give_words(f"verdict: {record.verdict}" + (f": {'; '.join(record.reasons)}" if record.reasons else ""))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(
        epilog="Examples: vlaopt bench artifacts/edge-vla/…/cpu-x86 · vlaopt bench ARTIFACT --hz 50 --duration 30 "
        '--assert "p99_ms<20"'
    )(bench)
