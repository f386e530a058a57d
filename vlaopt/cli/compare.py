"""vlaopt compare A B [C …]"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson
from vlaopt.cli.stage import TrustOption, refuse_options

if TYPE_CHECKING:
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.benchmark.assertions import Outcome
    from vlaopt.benchmark.compare import Comparison
    from vlaopt.benchmark.sides import Side

RUNS, SECONDS = 20, 600.0
NAMES = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWERS = {
    "FASTER": "is FASTER than A",
    "SLOWER": "is SLOWER than A",
    "SAME": "is the SAME as A within 2 %",
    "UNCLEAR": "against A is UNCLEAR",
}
HOW = {"paced": "paced", "back_to_back": "back-to-back"}
FIGURES = {
    "p99_ms": "paced p99, ms",
    "miss_rate": "miss rate, paced",
    "energy_j": "energy per chunk, J",
    "cold_start_ms": "cold start, ms",
    "host_mib": "peak memory, MiB",
    "device_mib": "GPU memory, MiB",
    "size_mb": "size, MB",
    "action_error_mean": "mean action error, σ",
}


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
        float | None,
        typer.Option(
            "--seconds", min=1, metavar="S", help=f"Launch fewer, though ten, to keep within; {SECONDS:g} otherwise."
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
        terminal.give_json(_value(sides, comparisons, outcomes, told))
    else:
        _show(sides, comparisons, outcomes, told)
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
    from vlaopt.benchmark.sides import LAUNCH_SPREAD, check_comparable, of_records
    from vlaopt.errors import InputError
    from vlaopt.files import read_file

    sides, firsts = [], []
    for source in sources:
        files = sorted(source.glob("*.json")) if source.is_dir() else [source]
        if not files:
            raise InputError("neither an artifact nor a folder of records", where=str(source))
        records = [BenchRecord.from_json(read_file(file), where=str(file)) for file in files]
        sides.append(of_records(records, str(source)))
        firsts.append(records[0])
        check_comparable(firsts[0], records[0])
    if len({side.unit for side in sides}) > 1:
        raise InputError(
            "one launch cannot be held against many", hint="give one record of each, or a folder of ten or more of each"
        )
    if not sides[0].unseen:
        return sides, ["compared: records, each a launch that counts by the median of its calls"]
    return sides, [
        "compared: one record of each, by the medians of blocks of successive calls. One launch does not tell how "
        f"launches differ: {LAUNCH_SPREAD:.0%} is allowed for that, so SAME needs more: a folder with a record for "
        "each of ten launches or more, or comparing the artifacts"
    ]


def _launched(
    sources: Sequence[Path], runs: int, seconds: float, backend: str | None, trust: bool, quiet: bool
) -> tuple[list[Side], list[str]]:
    """The sides that artifacts are, launched in turns, and in words what that compares."""
    from vlaopt.runtime.launch import in_turns, plan, side

    with terminal.watched(quiet=quiet) as progress:
        artifacts = [_ready(source, backend, progress) for source in sources]
        _check_same_policy(artifacts)
        paths = [artifact.path for artifact in artifacts]
        planned = plan(paths, runs=runs, seconds=seconds, backend=backend, trust=trust, progress=progress)
        if not quiet:
            terminal.note(f"{planned.runs} launches of each take about {planned.seconds:.0f} s")
        launches = in_turns(paths, planned, backend=backend, trust=trust, progress=progress)
    fewer = f" ({runs} would have taken more than {seconds:g} s)" if planned.runs < runs else ""
    return [side(artifact, found) for artifact, found in zip(artifacts, launches, strict=True)], [
        f"compared: {planned.runs} launches of each{fewer}, in turns, each a fresh process that counts by the median "
        f"of its {planned.calls} calls, back-to-back, after {planned.warmup + 1}. How they keep the control rate, "
        "`vlaopt bench` tells"
    ]


def _ready(source: Path, backend: str | None, progress: Any) -> Artifact:
    """The artifact, checked, with its engine finished where that was left to this machine."""
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.artifact.store import Store
    from vlaopt.chain import finish_here
    from vlaopt.errors import EnvironmentProblem
    from vlaopt.stages.bench import why_not_timed

    artifact = Artifact.open(source)
    artifact.check()
    if backend is None and artifact.manifest.finish:
        artifact = finish_here(artifact, store=Store.default(), progress=progress)
    if backend is None and (reason := why_not_timed(artifact)):
        raise EnvironmentProblem(
            f"cannot be measured here: {reason}",
            where=str(source),
            hint="--backend onnxruntime compares the portable graphs",
        )
    return artifact


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


def _show(
    sides: Sequence[Side],
    comparisons: Mapping[str, Mapping[str, Comparison]],
    outcomes: Mapping[str, Sequence[Outcome]],
    told: Sequence[str],
) -> None:
    for name, side in zip(NAMES, sides, strict=False):
        terminal.give(f"{name}: {side.source}")
    _show_table(sides)
    for name, found in comparisons.items():
        for how, comparison in found.items():
            terminal.give_words(_sentence(name, how, comparison))
    for name, side in zip(NAMES, sides, strict=False):
        if side.doubts:
            terminal.give_words(f"{name} may be wrong: {'; '.join(side.doubts)}")
    for line in told:
        terminal.give_words(line)
    for name, judged in outcomes.items():
        for outcome in judged:
            reason = f" ({outcome.reason})" if outcome.reason else ""
            terminal.give(f"{'held  ' if outcome.ok else 'MISSED'} {name}: {outcome.expression}{reason}")


def _show_table(sides: Sequence[Side]) -> None:
    """Medians and figures, those that are known of any side; beside each what it is of A's."""
    from vlaopt.benchmark.statistics import median

    names = [column for name in NAMES[1 : len(sides)] for column in (name, f"{name} / A")]
    table = terminal.table("", "A", *names, right=("A", *names))
    rows: dict[str, list[float | None]] = {
        f"median {HOW[how]}, ms": [median(side.latencies_ms[how]) for side in sides] for how in sides[0].latencies_ms
    }
    rows |= {label: [side.figures.get(name) for side in sides] for name, label in FIGURES.items()}
    for label, values in rows.items():
        if any(value is not None for value in values):
            table.add_row(label, *_cells(values))
    terminal.give_table(table)


def _cells(values: Sequence[float | None]) -> list[str]:
    from vlaopt.benchmark.sides import ratio

    cells = [_number(values[0])]
    for value in values[1:]:
        share = ratio(values[0], value)
        cells += [_number(value), "—" if share is None else f"{share:.3f}"]
    return cells


def _number(value: float | None) -> str:
    return "not known" if value is None else "0" if value == 0 else f"{value:#.4g}".rstrip(".")


def _sentence(name: str, how: str, found: Comparison) -> str:
    return (
        f"{name} {ANSWERS[found.answer]}, {HOW[how]}: {found.speedup:.2f} times A's speed; ratio {found.ratio:.3f} "
        f"({found.ratio_low:.3f} to {found.ratio_high:.3f}), difference {found.difference_ms:+.3f} ms "
        f"({found.difference_low_ms:+.3f} to {found.difference_high_ms:+.3f}) at 99 %, p = {found.p_value:.1g}"
    )


def _value(
    sides: Sequence[Side],
    comparisons: Mapping[str, Mapping[str, Comparison]],
    outcomes: Mapping[str, Sequence[Outcome]],
    told: Sequence[str],
) -> dict[str, Any]:
    return {
        "sides": {
            name: {
                "source": side.source,
                "unit": side.unit,
                "latencies_ms": {how: samples.tolist() for how, samples in side.latencies_ms.items()},
                "figures": dict(side.figures),
                "doubts": list(side.doubts),
            }
            for name, side in zip(NAMES, sides, strict=False)
        },
        "comparisons": {
            name: {how: {**vars(found), "speedup": found.speedup} for how, found in of.items()}
            for name, of in comparisons.items()
        },
        "assertions": {name: [vars(outcome) for outcome in judged] for name, judged in outcomes.items()},
        "told": list(told),
    }


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(
        epilog="Examples: vlaopt compare artifacts/A artifacts/B · vlaopt compare stored.json new.json --assert "
        '"ratio<1.05"'
    )(compare)
