"""vlaopt report ARTIFACT"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlaopt.cli import terminal


def report(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="An artifact directory.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write the page.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option("--record", metavar="FILE", help="Tell this measurement, which `vlaopt bench --record` wrote."),
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print a short text for a pull request; write no page.")
    ] = False,
) -> None:
    """Tell what a team decides on, in one page.

    What the policy is, whether its gates and its control rate held, what it gained and lost, and how it came to be.
    The page is one HTML file, report.html unless --output says otherwise, and needs nothing but itself. Every byte of
    the artifact is checked before; nothing of it runs.
    """
    from vlaopt.artifact.artifact import Artifact
    from vlaopt.artifact.store import Store
    from vlaopt.optional import require
    from vlaopt.report import markdown as text
    from vlaopt.report import records
    from vlaopt.report.reading import read_facts
    from vlaopt.runtime import finished

    if markdown and output:
        raise typer.BadParameter("prints its text; take --output out, or redirect stdout", param_hint="--markdown")
    target = None if markdown else _outside(output or Path("report.html"), artifact)
    for library in () if markdown else ("jinja2", "matplotlib"):
        require(library, "report")
    opened = Artifact.open(artifact)
    opened.check()
    opened = finished.find(opened) or opened
    store = Store.default()
    found = records.given(record, opened) if record else records.newest(opened, store)
    facts = read_facts(opened, found, store)
    if target is None:
        terminal.give(text.as_markdown(facts).rstrip())
        return
    from vlaopt.files import replace_file
    from vlaopt.report import figures, page

    replace_file(target, page.render(facts, figures.draw(facts)).encode())
    terminal.give(str(target))


def _outside(path: Path, artifact: Path) -> Path:
    """`path`, which must be a file to be, and not in the artifact, which never changes once written."""
    from vlaopt.errors import InputError

    if path.is_dir():
        raise InputError("a folder, not a file to write", where=str(path), hint=f"-o {path}/report.html")
    if path.resolve().is_relative_to(artifact.resolve()):
        raise InputError(
            "lies in the artifact, which never changes once written", where=str(path), hint="-o FILE somewhere else"
        )
    return path


def add_to(app: typer.Typer) -> None:
    """Register the subcommand."""
    app.command(
        epilog="Examples: vlaopt report artifacts/edge-vla/…/cpu-x86 -o /tmp/report.html · "
        "vlaopt report ARTIFACT --record bench.json --markdown"
    )(report)
