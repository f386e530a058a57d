"""vlaopt compare A B"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson
from vlaopt.cli.stage import TrustOption

ANSWERS = {
    "FASTER": "B is FASTER",
    "SLOWER": "B is SLOWER",
    "SAME": "SAME speed",
    "UNCLEAR": "UNCLEAR which is faster (more --rounds may tell)",
}
"""How `Comparison.answer` is told."""


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="An artifact.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another artifact of the same policy.")],
    rounds: Annotated[int, typer.Option(min=10, metavar="N", help="Turns of each.")] = 20,
    trust: TrustOption = False,
    as_json: AsJson = False,
) -> None:
    """Say whether B is faster than A.

    Both are measured in turns in one process on the same observations.
    """
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.benchmark.compare import compare as judge
    from vlaopt.benchmark.compare import interleave
    from vlaopt.errors import InputError
    from vlaopt.runtime.golden import ACTIONS, Golden, of_sample
    from vlaopt.runtime.policy import open_artifact

    artifacts = [Artifact.open(path) for path in (first, second)]
    for artifact in artifacts:
        artifact.check()
    if artifacts[0].entry(ACTIONS).sha256 != artifacts[1].entry(ACTIONS).sha256:
        raise InputError(
            "the artifacts are of different policies: their golden actions differ", where=f"{first}, {second}"
        )
    opened = {name: open_artifact(artifact, trust=trust) for name, artifact in zip("AB", artifacts, strict=True)}
    with terminal.watched(quiet=as_json) as progress, progress.task("measuring in turns"):
        turns = interleave(
            {name: of_sample(policy.predict_chunk) for name, policy in opened.items()},
            Golden.of(artifacts[0]).samples,
            rounds=rounds,
            iterations_per_round=10,
            fewest_rounds=rounds,
        )
    result = judge(turns.samples_ms["A"], turns.samples_ms["B"])
    if as_json:
        terminal.give_json({**vars(result), "speedup": result.speedup})
        return
    terminal.give(f"A: {result.median_a_ms:.3f} ms   {first}")
    terminal.give(f"B: {result.median_b_ms:.3f} ms   {second}")
    terminal.give(
        f"{ANSWERS[result.answer]}: {result.speedup:.2f}× A's speed (difference {result.difference_low_ms:+.3f} … "
        f"{result.difference_high_ms:+.3f} ms at 99 %, p = {result.p_value:.1g})"
    )


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(epilog="Example: vlaopt compare artifacts/A artifacts/B")(compare)
