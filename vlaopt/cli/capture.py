"""vlaopt capture ARTIFACT"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from vlaopt.cli import terminal
from vlaopt.cli.calibration import (
    LicenceOption,
    NameOption,
    RenameOption,
    SamplesOption,
    SeedOption,
    SetOption,
    renamings,
)
from vlaopt.cli.stage import TrustOption

if TYPE_CHECKING:
    from vlaopt.calibration.recorder import Recorder
    from vlaopt.progress import Progress
    from vlaopt.runtime.policy import Policy


def capture(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact directory.")],
    output: SetOption,
    source: Annotated[
        Path | None, typer.Option("--from", metavar="SOURCE", help="Replay recorded episodes, as of calibration make.")
    ] = None,
    simulator: Annotated[
        Literal["metaworld"] | None, typer.Option(help="Let the policy act in a simulator, closed loop.")
    ] = None,
    samples: SamplesOption = 256,
    episodes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Episodes: of SOURCE (all), or per task in a simulator (5).")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", metavar="T", help="One task of the simulator; repeat for more.")
    ] = None,
    rename: RenameOption = None,
    backend: Annotated[
        str | None, typer.Option("--backend", metavar="B", help="Run the portable graphs on it.")
    ] = None,
    trust: TrustOption = False,
    seed: SeedOption = 0,
    name: NameOption = None,
    licence: LicenceOption = "unknown",
) -> None:
    """Run an artifact; make a calibration set of what it sees.

    Prints the set's path. Kept is a bounded sample, spread over episodes, their phases and their instructions.
    On a robot use vlaopt.calibration.Recorder, which does the same inside the control loop.
    """
    from vlaopt.calibration.recorder import Recorder
    from vlaopt.errors import InputError
    from vlaopt.runtime.policy import open as open_policy

    if (source is None) == (simulator is None):
        raise InputError("name one of --from and --simulator", hint="vlaopt capture ARTIFACT --from SOURCE -o SET")
    for option, given, where in (("--task", task, simulator), ("--rename", rename, source)):
        if given and where is None:
            raise InputError(f"{option} is for {'a simulator' if option == '--task' else '--from'}")
    policy = open_policy(artifact, backend=backend, trust=trust)
    recorder = Recorder(
        output,
        capacity=samples,
        history=policy.spec.history,
        seed=seed,
        name=name,
        source=f"{policy.spec.type} seen in Meta-World" if source is None else "",
        licence=licence,
    )
    with terminal.watched() as progress:
        if source is None:
            _simulate(policy, recorder, task, episodes or 5, seed, progress)
        else:
            _replay(policy, recorder, source, renamings(rename), episodes, progress)
        unwritten = recorder.unwritten()
        unwritten.samples.check(policy.spec.observation_layout())
        card = unwritten.write().card
    terminal.note(f"{card.samples} samples of {card.episodes} episodes, {recorder.ticks} ticks seen")
    terminal.give(str(output))


def _simulate(
    policy: Policy, recorder: Recorder, tasks: list[str] | None, episodes: int, seed: int, progress: Progress
) -> None:
    """Episodes and phrasings that judging a policy never uses."""
    from vlaopt.sim import evaluate

    watched: Any = recorder.watch(policy)
    record = evaluate(
        watched,
        tasks=tasks,
        episodes=episodes,
        seed=seed,
        split="calibration",
        phrasings="training",
        progress=progress,
    )
    terminal.note(f"success: {record.successes} of {record.episodes} episodes")


def _replay(
    policy: Policy, recorder: Recorder, path: Path, rename: dict[str, str], episodes: int | None, progress: Progress
) -> None:
    from vlaopt.calibration.making import open_source
    from vlaopt.calibration.replay import replay

    source = open_source(path)
    recorder.source = source.origin
    replay(source, recorder.watch(policy), policy.spec.observation_names(), rename, episodes, progress)
    source.check_unchanged()


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(epilog="Example: vlaopt capture artifacts/pick/…/cpu-x86 --from datasets/pick -o calibration/pick")(
        capture
    )
