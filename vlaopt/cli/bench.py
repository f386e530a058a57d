"""vlaopt bench ARTIFACT"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson, Overrides
from vlaopt.cli.record import show_outcomes, show_record
from vlaopt.cli.stage import (
    ONLY_STAGE,
    OutputOption,
    RecipeOption,
    TrustOption,
    is_artifact,
    outside,
    refuse_options,
    run_alone,
)

if TYPE_CHECKING:
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.benchmark.assertions import Outcome
    from vlaopt.benchmark.record import BenchRecord


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
    load: Annotated[
        int | None,
        typer.Option(
            "--with-load", metavar="N", min=0, max=1024, help="Processes that keep the machine busy meanwhile."
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option("--sweep", metavar="OVER=N,N", help='Latency over loop steps, "steps=1,2,5", or "batch=1,2,4".'),
    ] = None,
    assertions: Annotated[
        list[str] | None,
        typer.Option("--assert", metavar="EXPR", help='A limit, such as "p99_ms<40"; missed: exit code 5.'),
    ] = None,
    record_file: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE.json", help="Write the record there, for compare and report."),
    ] = None,
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE.xml", help="Write verdict and assertions as JUnit XML.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show the paced run while it goes on, on stderr.")] = False,
    lock_clocks: Annotated[
        bool, typer.Option("--lock-clocks", help="Lock the clocks meanwhile (as root); restored in any case.")
    ] = False,
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

    Then back-to-back; its actions are checked meanwhile. Cold start and memory are those of a fresh process. Needs
    neither torch nor onnx. The record is kept in this machine's store under the artifact's id.
    """
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.artifact.store import Store
    from vlaopt.benchmark.assertions import evaluate, metrics_of, parse_assertion, why_not_valid
    from vlaopt.cli.watch import shown
    from vlaopt.errors import GateError
    from vlaopt.files import replace_file
    from vlaopt.machine.clocks import locked
    from vlaopt.stages.bench import bench_artifact, settings_of, sweep_of

    if not is_artifact(source) or recipe:
        refuse_options(
            {
                "--hz": hz,
                "--duration": duration,
                "--with-load": load,
                "--sweep": sweep,
                "--assert": assertions,
                "--record": record_file,
                "--junit": junit,
                "--watch": watch,
                "--lock-clocks": lock_clocks,
                "--backend": backend,
                "--trust": trust,
            },
            "for measuring an artifact, not for stage `bench` of a recipe",
            hint="build it first; a recipe's own settings are in its section bench (--set bench.hz=50)",
        )
        run_alone("bench", source, recipe, overrides, output, as_json)
        return
    refuse_options(
        {"--set": overrides, "--output": output}, ONLY_STAGE, hint="add --recipe RECIPE to run stage `bench`"
    )
    artifact = Artifact.open(source)
    artifact.check()
    wanted = [
        parse_assertion(expression, numbers=metrics_of(artifact.spec().components)) for expression in assertions or ()
    ]
    own = artifact.recipe().bench
    over = {**sweep_of(own), **_sweep(sweep or ())}
    given = {"hz": hz, "duration_s": duration, "load": load}
    settings = settings_of(own).model_copy(update={key: value for key, value in given.items() if value is not None})
    _check_places(source, *filter(None, (record_file, junit)))
    artifact = ready(artifact, source, backend, as_json)
    started = datetime.now(timezone.utc)
    with ExitStack() as around:
        progress = around.enter_context(terminal.watched(quiet=as_json))
        held = around.enter_context(locked()) if lock_clocks else ()
        if held:
            terminal.note(f"locked: {', '.join(held)}")
        view = None
        if watch:
            view = around.enter_context(shown(progress, hz=settings.hz, duration_s=settings.duration_s))
        record = bench_artifact(
            artifact,
            settings,
            view or progress,
            backend=backend,
            trust=trust,
            sweep=over,
            on_tick=view.tick if view else None,
            locked=held,
        )
    outcomes = evaluate(wanted, record)
    _give(record, outcomes, as_json)
    # Told first: where a file cannot be written or the store is full, it has been measured all the same.
    if record_file:
        replace_file(record_file, record.to_json().encode())
    if junit:
        replace_file(junit, _junit(record, outcomes, artifact, started))
    key = f"{artifact.id[:16]}-{record.environment.machine_key()}"
    Store.default().remember("bench", key, record.model_dump(mode="json", by_alias=True))
    if any(not outcome.ok for outcome in outcomes):
        raise GateError(_missed(outcomes))
    if junit and record.verdict == "INVALID":  # what the file calls failed, the exit code does too
        raise GateError(why_not_valid(record))


def _junit(record: BenchRecord, outcomes: Sequence[Outcome], artifact: Artifact, started: datetime) -> bytes:
    from vlaopt.benchmark.junit import as_junit

    manifest = artifact.manifest
    return as_junit(
        record,
        outcomes,
        name=f"{manifest.name} {artifact.version} {manifest.target}",
        host=platform.node(),
        started=started,
        seconds=(datetime.now(timezone.utc) - started).total_seconds(),
    )


def _check_places(source: Path, *files: Path) -> None:
    """Raise InputError or EnvironmentProblem for files that could not be written when all is measured."""
    from vlaopt.errors import InputError
    from vlaopt.files import check_writable

    for file in files:
        check_writable(outside(file, source).parent)
    if len({file.resolve() for file in files}) < len(files):
        raise InputError("named for the record and for JUnit XML", where=str(files[0]), hint="name two files")


def _sweep(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """What `--sweep` asks for. Raises InputError for what is not OVER=N,N with values that a recipe may hold too."""
    from vlaopt.errors import InputError
    from vlaopt.recipe.model import SWEEP_MOST
    from vlaopt.stages.bench import CURVES

    found = {}
    for text in texts:
        over, _, values = text.partition("=")
        if over not in CURVES:
            near = difflib.get_close_matches(over, CURVES, n=1)
            raise InputError(
                f"--sweep {text!r}: {over!r} is none of {', '.join(CURVES)}",
                hint=f"did you mean {near[0]}?" if near else 'write it like "steps=1,2,5" or "batch=1,2,4"',
            )
        if over in found:
            raise InputError(
                f"--sweep {text!r}: {over} is given twice", hint=f"name all its values in one: {over}=1,2,4"
            )
        numbers = [value.strip() for value in values.split(",")]
        wrong = next((number for number in numbers if not _from_1_to(SWEEP_MOST, number)), None)
        if wrong is not None:
            raise InputError(
                f"--sweep {text!r}: {wrong!r} is not a whole number from 1 to {SWEEP_MOST}", hint=f"like {over}=1,2,4"
            )
        found[over] = tuple(map(int, numbers))
    return found


def _from_1_to(most: int, text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= len(str(most)) and 1 <= int(text) <= most


def ready(artifact: Artifact, source: Path, backend: str | None, as_json: bool) -> Artifact:
    """The artifact, its engine finished for this machine. Raises EnvironmentProblem where it cannot be measured."""
    from vlaopt.artifact.store import Store
    from vlaopt.chain import finish_here
    from vlaopt.errors import EnvironmentProblem
    from vlaopt.stages.bench import why_not_timed

    if backend is not None:
        return artifact
    if artifact.manifest.finish:
        with terminal.watched(quiet=as_json) as progress:
            artifact = finish_here(artifact, store=Store.default(), progress=progress)
    if reason := why_not_timed(artifact):
        raise EnvironmentProblem(
            f"cannot be measured here: {reason}",
            where=str(source),
            hint="--backend onnxruntime measures the portable graphs",
        )
    return artifact


def _missed(outcomes: Sequence[Outcome]) -> str:
    """The missed assertions, those with one reason together."""
    by_reason: dict[str | None, list[str]] = {}
    for outcome in outcomes:
        if not outcome.ok:
            by_reason.setdefault(outcome.reason, []).append(outcome.expression)
    return "; ".join(f"{', '.join(expressions)}: {reason}" for reason, expressions in by_reason.items())


def _give(record: BenchRecord, outcomes: Sequence[Outcome], as_json: bool) -> None:
    from vlaopt.benchmark.assertions import why_not_valid

    if as_json:
        value = record.model_dump(mode="json", by_alias=True)
        terminal.give_json({"record": value, "assertions": [vars(outcome) for outcome in outcomes]})
    else:
        show_record(record)
        show_outcomes(outcomes, why_not_valid(record))


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(
        epilog="Examples: vlaopt bench artifacts/edge-vla/…/cpu-x86 · vlaopt bench ARTIFACT --hz 50 --duration 30 "
        '--assert "p99_ms<20" · vlaopt bench ARTIFACT --sweep steps=1,5 --record record.json'
    )(bench)
