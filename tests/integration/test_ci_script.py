"""scripts/ci.sh, as a team copies it: what passes is published, what does not is not, and the exit code says which."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.integration.conftest import CPU, NO_RECOVERY, ROOT, SmallBuild
from vlaopt.artifact.artifact import Artifact

QUICK = {"SET": " ".join(NO_RECOVERY), "DURATION": "1", "RECIPE": str(CPU)}


@dataclass(frozen=True)
class Job:
    """A job that ran: its variables, exit code and what it said."""

    variables: dict[str, str]
    code: int
    out: str
    err: str

    @property
    def results(self) -> Path:
        return Path(self.variables["RESULTS"])

    @property
    def published(self) -> Path:
        return Path(self.variables["PUBLISH"])

    def failed(self) -> list[str | None]:
        """The cases that a build server shows as failed."""
        cases = ElementTree.parse(self.results / "bench.xml").iter("testcase")
        return [case.get("name") for case in cases if case.find("failure") is not None]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, as an installation would have it."""
    path = tmp_path_factory.mktemp("bin") / "vlaopt"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} -m vlaopt "$@"\n')
    path.chmod(0o755)
    return path


def job(folder: Path, small_build: SmallBuild, command: Path) -> dict[str, str]:
    """The job's variables: the small recipe, whose stages are in the store already, and everything else in `folder`."""
    return {
        **QUICK,
        "VLAOPT": str(command),
        "RESULTS": f"{folder / 'results'}/",
        "PUBLISH": str(folder / "published"),
        "VLAOPT_STORE": str(small_build.store.root),
    }


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory, small_build: SmallBuild, command: Path) -> Job:
    """A job that passed."""
    return run(job(tmp_path_factory.mktemp("passed"), small_build, command))


def run(variables: dict[str, str]) -> Job:
    done = subprocess.run(
        ["sh", str(ROOT / "scripts/ci.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        cwd=ROOT,
        check=False,
        timeout=300,
    )
    return Job(variables, done.returncode, done.stdout, done.stderr)


def test_what_holds_is_published_with_its_record_and_its_report(passed: Job) -> None:
    assert passed.code == 0, passed.err
    place = Path(passed.out.splitlines()[-1])
    assert place.relative_to(passed.published).parts[::2] == ("edge-vla", "cpu-x86")
    assert {path.name for path in place.iterdir()} == {"artifact", "record.json", "report.html", "bench.xml"}
    artifact = Artifact.open(place / "artifact")
    artifact.check()
    assert json.loads((place / "record.json").read_text())["subject"]["artifact"] == artifact.id
    assert passed.failed() == []
    assert not list(passed.published.rglob("*.staging-*"))


def test_what_was_published_is_never_changed(passed: Job) -> None:
    before = (Path(passed.out.splitlines()[-1]) / "record.json").read_bytes()
    again = run(passed.variables)
    assert (again.code, again.out.splitlines()[-1]) == (0, passed.out.splitlines()[-1])
    assert "published before" in again.err
    assert (Path(again.out.splitlines()[-1]) / "record.json").read_bytes() == before


def test_an_assertion_that_cannot_hold_publishes_nothing(
    tmp_path: Path, small_build: SmallBuild, command: Path
) -> None:
    done = run({**job(tmp_path, small_build, command), "ASSERT": "p50_ms<0.000001 verdict!=INVALID"})
    assert done.code == 5, done.err
    assert not done.published.exists()
    assert done.failed() == ["p50_ms<0.000001"]
    assert (done.results / "report.html").is_file()


def test_what_is_slower_than_the_stored_record_is_not_published(
    tmp_path: Path, small_build: SmallBuild, command: Path, passed: Job
) -> None:
    stored = json.loads((passed.results / "record.json").read_text())
    stored["verdict"], stored["reasons"] = "VALID", []
    for part in ("paced", "back_to_back"):
        stored[part]["samples_ms"] = [sample / 10 for sample in stored[part]["samples_ms"]]
    (tmp_path / "stored.json").write_text(json.dumps(stored))
    done = run({**job(tmp_path, small_build, command), "STORED": str(tmp_path / "stored.json")})
    assert done.code == 5, done.err
    assert "answer!=SLOWER" in done.err
    assert not done.published.exists()


def test_a_recipe_that_is_wrong_keeps_its_exit_code(tmp_path: Path, small_build: SmallBuild, command: Path) -> None:
    done = run({**job(tmp_path, small_build, command), "SET": "quantize.schem=int8"})
    assert done.code == 2
    assert "did you mean" in done.err
    assert not done.published.exists()
    assert not (done.results / "record.json").exists()
