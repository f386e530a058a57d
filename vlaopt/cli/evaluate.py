"""vlaopt eval SOURCE"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson
from vlaopt.cli.stage import TrustOption


def evaluate(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="An artifact, or the checkpoint of a policy.")],
    episodes: Annotated[int, typer.Option(min=1, metavar="N", help="Episodes per task.")] = 25,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Seed of the episodes.")] = 0,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="T", help="One task; repeat for more; all otherwise.")
    ] = None,
    policy_type: Annotated[str, typer.Option("--type", metavar="P", help="Policy type of a checkpoint.")] = "edge-vla",
    trust: TrustOption = False,
    as_json: AsJson = False,
) -> None:
    """Closed-loop success in Meta-World, with its 95 % interval.

    The same seed gives every policy the same episodes. Training has seen none of them, nor the phrasings they are
    commanded in.
    """
    from vlaopt.artifact.manifest import FILE_NAME
    from vlaopt.sim import evaluate as run

    policy: Any
    if (source / FILE_NAME).is_file():
        from vlaopt.runtime.policy import open as open_policy

        policy = open_policy(source, trust=trust)
    else:
        from vlaopt import policies
        from vlaopt.runtime.stepping import Stepper

        eager = policies.get(policy_type).load(source, {}, {})
        policy = Stepper(eager.spec, eager.predict_chunk)
    with terminal.watched(quiet=as_json) as progress:
        record = run(policy, tasks=task or None, episodes=episodes, seed=seed, progress=progress)
    if as_json:
        terminal.give_json(record.model_dump(mode="json"))
        return
    table = terminal.table(
        "task", "successes", "episodes", "rate", "95 % interval", right=("successes", "episodes", "rate")
    )
    for row in record.tasks:
        low, high = row.interval
        table.add_row(
            row.task,
            str(row.successes),
            str(row.episodes),
            f"{row.successes / row.episodes:.0%}",
            f"{low:.0%} – {high:.0%}",
        )
    terminal.give_table(table)
    low, high = record.interval
    terminal.give(
        f"success: {record.successes} of {record.episodes} = {record.success_rate:.1%} "
        f"(Wilson 95 %: {low:.1%} – {high:.1%}); {record.mean_policy_ms:.2f} ms a prediction"
    )


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command("eval", epilog="Example: vlaopt eval recipes/edge-vla/checkpoint --task drawer-close --episodes 1")(
        evaluate
    )
