"""vlaopt calibration make | inspect"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlaopt.cli import terminal
from vlaopt.cli.recipe import AsJson

if TYPE_CHECKING:
    from vlaopt.calibration.inspection import Inspection

commands = typer.Typer(
    help="Make and look at calibration sets, and at what they made of an artifact.",
    epilog="Example: vlaopt calibration inspect calibration/metaworld",
    no_args_is_help=True,
)
SetOption = Annotated[Path, typer.Option("--output", "-o", metavar="SET", help="The new set's folder.")]
SamplesOption = Annotated[int, typer.Option(min=8, metavar="N", help="Samples, spread over tasks, episodes and time.")]
SeedOption = Annotated[int, typer.Option(min=0, metavar="S", help="Seed of the choice.")]
NameOption = Annotated[str | None, typer.Option(metavar="NAME", help="The set's name; the folder's otherwise.")]
LicenceOption = Annotated[str, typer.Option(metavar="L", help="Licence of the recordings, for the card.")]
RenameOption = Annotated[
    list[str] | None, typer.Option("--rename", metavar="OLD=NEW", help="A name of SOURCE to one of the policy.")
]
PolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", metavar="P", help="An artifact, LeRobot checkpoint or recipe: what it observes, no more."),
]


@commands.command(
    epilog="Example: vlaopt calibration make datasets/pick -o calibration/pick --policy checkpoints/pick --licence MIT"
)
def make(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A LeRobotDataset, a folder of .npz or .safetensors episodes, or a set."),
    ],
    output: SetOption,
    samples: SamplesOption = 256,
    policy: PolicyOption = None,
    rename: RenameOption = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", metavar="NAME", help="Take this part of observations; repeat for more."),
    ] = None,
    history: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Steps that a sample holds; the policy's, or 1.")
    ] = None,
    actions: Annotated[
        int | None, typer.Option(min=1, metavar="CHUNK", help="Keep the next CHUNK actions of every sample.")
    ] = None,
    seed: SeedOption = 0,
    name: NameOption = None,
    licence: LicenceOption = "unknown",
) -> None:
    """Make a calibration set from recorded episodes; prints its path.

    Only the frames that are needed are decoded. Nothing is written when a calibrator could not use the samples.
    """
    from vlaopt import __version__
    from vlaopt.calibration.making import Wish, make, open_source
    from vlaopt.calibration.writing import Facts
    from vlaopt.cli.wanted import wanted_by
    from vlaopt.errors import InputError

    wanted = wanted_by(policy) if policy else None
    if wanted and keep:
        raise InputError("--keep and --policy both say what to take", hint="leave one of them out")
    wish = Wish(
        samples=samples,
        seed=seed,
        history=history or (wanted.history if wanted else 1),
        chunk=actions,
        rename=renamings(rename),
        keep=tuple(keep) if keep else None,
        expected=wanted.expected if wanted else None,
    )
    opened = open_source(source)
    facts = Facts(
        name or output.resolve().name, "", opened.origin, licence, f"vlaopt {__version__} calibration make", seed
    )
    with terminal.watched() as progress:
        made = make(opened, output, wish, facts, progress)
    for line in made.notes:
        terminal.note(line)
    card = made.samples.card
    terminal.note(f"{card.samples} samples of {card.episodes} episodes, digest {made.samples.digest[:12]}")
    terminal.give(str(output))


@commands.command(epilog="Example: vlaopt calibration inspect calibration/metaworld-held-out --json")
def inspect(
    path: Annotated[
        Path, typer.Argument(metavar="SET|ARTIFACT", help="A calibration set, or an artifact quantized with one.")
    ],
    policy: PolicyOption = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw an artifact's worst tensors.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a set holds and what would be refused; or how well 8 bits hold each tensor of an artifact."""
    from vlaopt.artifact.manifest import FILE_NAME
    from vlaopt.calibration import CalibrationSet
    from vlaopt.calibration.inspection import inspect as measure
    from vlaopt.cli.wanted import wanted_by
    from vlaopt.errors import InputError

    if (path / FILE_NAME).is_file():
        if policy:
            raise InputError("--policy is for a calibration set, this is an artifact", where=str(path))
        _inspect_artifact(path, plot, as_json)
        return
    if plot:
        raise InputError("--plot draws the tensors of an artifact, this is none", where=str(path))
    expected = wanted_by(policy).expected if policy else None
    found = measure(CalibrationSet.open(path), expected)
    if as_json:
        terminal.give_json(found.model_dump(mode="json", by_alias=True))
    else:
        _show(found)


def _inspect_artifact(path: Path, plot: Path | None, as_json: bool) -> None:
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.cli import ranges
    from vlaopt.quantization.fit import read_report

    report = read_report(Artifact.open(path))
    if plot:
        ranges.plot(report, plot)
        terminal.note(f"plot: {plot}")
    if as_json:
        terminal.give_json(report.model_dump(mode="json", by_alias=True))
    else:
        ranges.show(report)


def _show(found: Inspection) -> None:
    card = found.card
    terminal.give(f"{card.name}: {card.samples} samples of {card.episodes} episodes, licence {card.licence}")
    terminal.give_words(f"source: {card.source}")
    terminal.give(f"digest {found.digest}")
    tasks = terminal.table("task", "samples", right=("samples",))
    for task, count in found.tasks.items():
        tasks.add_row(task or "(none)", str(count))
    terminal.give_table(tasks)
    counts = found.episodes.values()
    if counts:
        terminal.give(f"samples per episode: {min(counts)} to {max(counts)}")
    features = terminal.table("feature", "kind", "min", "max", "mean", "std", right=("min", "max", "mean", "std"))
    for name, measured in found.features.items():
        numbers = (measured.minimum, measured.maximum, measured.mean, measured.std)
        told = ("not finite" if number is None else f"{number:.4g}" for number in numbers)
        features.add_row(name, f"{measured.dtype} {list(measured.shape)}", *told)
    terminal.give_table(features)
    if card.action:
        terminal.give(f"actions: chunks of {card.action.shape[0]}, {card.action.shape[1]} values each")
    for message, hint in found.problems:
        terminal.give_words(f"problem: {message}" + (f" ({hint})" if hint else ""))
    if not found.problems:
        terminal.give("no problems found")


def renamings(texts: list[str] | None) -> dict[str, str]:
    """What `--rename` says. Raises InputError for what is not OLD=NEW."""
    from vlaopt.errors import InputError

    found = {}
    for text in texts or ():
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise InputError(f"--rename {text!r} is not OLD=NEW")
        found[old] = new
    return found


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.add_typer(commands, name="calibration")
