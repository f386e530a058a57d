"""vlaopt compare A B [C …]"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.bench import ready
from vlaopt.cli.comparison import NAMES, as_value, show
from vlaopt.cli.recipe import AsJson
from vlaopt.cli.stage import TrustOption, refuse_options

if TYPE_CHECKING:
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.benchmark.sides import Side

RUNS, SECONDS = 20, 600
WHAT_RECORDS_ARE = {
    "blocks of one launch": "one record, by the medians of blocks of its calls",
    "launches": "records, each a launch, by the medians of their calls",
}
MEANWHILE = (
    "Records do not tell what the machine did between one side and the other: that counts as a difference of theirs"
)


def compare(
    sources: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B [C…]",
            help="Artifacts of one policy; or records of them, each a file of `vlaopt bench --record` or a folder with "
            "one for each of ten launches or more. The first is what the others are held against.",
        ),
    ],
    runs: Annotated[
        int | None, typer.Option("--runs", min=10, max=10_000, metavar="N", help=f"Launches of each; {RUNS} otherwise.")
    ] = None,
    seconds: Annotated[
        int | None,
        typer.Option(
            "--seconds",
            min=1,
            max=86_400,
            metavar="S",
            help=f"Launch fewer to keep within, never under ten; {SECONDS} otherwise.",
        ),
    ] = None,
    assertions: Annotated[
        list[str] | None,
        typer.Option(
            "--assert", metavar="EXPR", help='A limit, such as "ratio<1.05" or "answer!=SLOWER"; missed: exit code 5.'
        ),
    ] = None,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="B", help="Compare the portable graphs on this backend.")
    ] = None,
    trust: TrustOption = False,
    as_json: AsJson = False,
) -> None:
    """Say whether B is faster than A.

    Artifacts are launched in turns, each launch a fresh process on the same observations; records are taken as they
    are.
    """
    from vlaopt.benchmark.assertions import parse_assertion
    from vlaopt.benchmark.sides import NUMBERS, WORDS, hold, judge
    from vlaopt.errors import GateError, InputError

    wanted = [parse_assertion(expression, numbers=NUMBERS, words=WORDS) for expression in assertions or ()]
    if not 2 <= len(sources) <= len(NAMES):
        raise InputError(f"{len(sources)} given, 2 to {len(NAMES)} can be compared", hint="vlaopt compare A B")
    if _all_artifacts(sources):
        sides, told = _launched(sources, runs or RUNS, seconds or SECONDS, backend, trust, as_json)
    else:
        refuse_options(
            {"--runs": runs, "--seconds": seconds, "--backend": backend, "--trust": trust},
            "for launching artifacts, and these are records",
            hint="leave it out",
        )
        sides, told = _recorded(sources)
    first, others = sides[0], dict(zip(NAMES[1:], sides[1:], strict=False))
    comparisons = {name: hold(first, other) for name, other in others.items()}
    outcomes = {name: judge(wanted, first, other, comparisons[name]) for name, other in others.items()}
    if as_json:
        terminal.give_json(as_value(sides, comparisons, outcomes, told))
    else:
        show(sides, comparisons, outcomes, told)
    missed = [
        f"{name}: {outcome.expression}: {outcome.reason}"
        for name, judged in outcomes.items()
        for outcome in judged
        if not outcome.ok
    ]
    if missed:
        raise GateError("; ".join(missed))


def _all_artifacts(sources: Sequence[Path]) -> bool:
    """Whether the sources are artifacts, not records. Raises InputError for a mixture, and where nothing is there."""
    from vlaopt.artifact.manifest import FILE_NAME
    from vlaopt.errors import InputError

    for source in sources:
        if not source.exists():
            raise InputError(
                "no such artifact or record",
                where=str(source),
                hint="`vlaopt build` prints an artifact, `vlaopt bench ARTIFACT --record FILE` writes a record",
            )
    artifacts = [source for source in sources if (source / FILE_NAME).exists()]
    if artifacts and len(artifacts) < len(sources):
        record = next(source for source in sources if source not in artifacts)
        raise InputError(
            f"an artifact, and {record} is not",
            where=str(artifacts[0]),
            hint=f"compare two artifacts, or two records: vlaopt bench {artifacts[0]} --record FILE writes one",
        )
    return bool(artifacts)


def _recorded(sources: Sequence[Path]) -> tuple[list[Side], list[str]]:
    """The sides that records are, and in words what that compares."""
    from vlaopt.benchmark.record import BenchRecord
    from vlaopt.benchmark.sides import DOUBTFUL_SPREAD, LAUNCH_SPREAD, ONE_LAUNCH, check_comparable, of_records
    from vlaopt.errors import InputError
    from vlaopt.files import read_file
    from vlaopt.report.records import SIZE_LIMIT

    sides, firsts = [], []
    for source in sources:
        files = sorted(source.glob("*.json")) if source.is_dir() else [source]
        if not files:
            raise InputError("neither an artifact nor a folder of records", where=str(source))
        records = [BenchRecord.from_json(read_file(file, limit=SIZE_LIMIT), where=str(file)) for file in files]
        sides.append(of_records(records, str(source)))
        firsts.append(records[0])
        check_comparable(firsts[0], records[0])
    told = [f"{name}: {WHAT_RECORDS_ARE[side.unit]}" for name, side in zip(NAMES, sides, strict=False)]
    if any(side.unit == ONE_LAUNCH for side in sides):
        told.append(
            f"one launch does not tell how launches differ: {100 * LAUNCH_SPREAD:g} % is allowed for that, "
            f"{100 * DOUBTFUL_SPREAD:g} % where it may be wrong, or what the other side shows"
        )
    return sides, [*told, MEANWHILE]


def _launched(
    sources: Sequence[Path], runs: int, seconds: int, backend: str | None, trust: bool, quiet: bool
) -> tuple[list[Side], list[str]]:
    """The sides that artifacts are, launched in turns, and in words what that compares."""
    from vlaopt.runtime.launch import in_turns, plan, side

    artifacts = [_opened(source, backend, quiet) for source in sources]
    _check_same_policy(artifacts)
    with terminal.watched(quiet=quiet) as progress:
        paths = [artifact.path for artifact in artifacts]
        planned = plan(paths, runs=runs, seconds=seconds, backend=backend, trust=trust, progress=progress)
        launches = in_turns(paths, planned, backend=backend, trust=trust, progress=progress)
    fewer = f" ({runs} would have taken more than {seconds} s)" if planned.runs < runs else ""
    sides = [side(artifact, found, backend) for artifact, found in zip(artifacts, launches, strict=True)]
    told = [
        f"compared: {planned.runs} launches of each{fewer}, in turns, each a fresh process that counts by the median "
        f"of its {planned.calls} calls, back-to-back, after {planned.warmup + 1}"
    ]
    recorded = _with_records(sides, artifacts) if backend is None else None
    if recorded is None:
        return sides, told
    return recorded, [*told, "paced figures and energy: as `vlaopt bench` measured them before"]


def _with_records(sides: Sequence[Side], artifacts: Sequence[Artifact]) -> list[Side] | None:
    """The sides with what only a paced run knows; None unless each artifact has a record and these are comparable."""
    from vlaopt.artifact.store import Store
    from vlaopt.benchmark.sides import check_comparable, figures
    from vlaopt.errors import InputError
    from vlaopt.report.records import newest

    records = [record for artifact in artifacts if (record := newest(artifact, Store.default()).record)]
    if len(records) < len(sides):
        return None
    try:
        for record in records:
            check_comparable(records[0], record)
    except InputError:
        return None
    known = [{name: value for name, value in side.figures.items() if value is not None} for side in sides]
    return [
        replace(side, figures={**figures([record]), **own})
        for side, record, own in zip(sides, records, known, strict=True)
    ]


def _opened(source: Path, backend: str | None, quiet: bool) -> Artifact:
    from vlaopt.artifact.artifact import Artifact

    artifact = Artifact.open(source)
    artifact.check()
    return ready(artifact, source, backend, quiet)


def _check_same_policy(artifacts: Sequence[Artifact]) -> None:
    from vlaopt.errors import InputError
    from vlaopt.runtime.golden import ACTIONS

    first = artifacts[0]
    for other in artifacts[1:]:
        where = f"{first.path}, {other.path}"
        if first.entry(ACTIONS).sha256 != other.entry(ACTIONS).sha256:
            raise InputError("the artifacts are of different policies: their golden actions differ", where=where)
        one, another = first.spec().control_hz, other.spec().control_hz
        if one != another:
            raise InputError(f"the policies are for different control rates: {one:g} and {another:g} Hz", where=where)


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(
        epilog="Examples: vlaopt compare artifacts/A artifacts/B · vlaopt compare stored.json new.json --assert "
        '"ratio<1.05"'
    )(compare)
