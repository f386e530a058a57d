"""scripts/ci.sh, as a team copies it: what passes is published, what does not is not, and the exit code says which."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.integration.conftest import CPU, NO_RECOVERY, ROOT, SmallBuild
from vlaopt.artifact.artifact import Artifact

QUICK = {"SET": " ".join(NO_RECOVERY), "DURATION": "1", "RECIPE": str(CPU)}


@pytest.fixture
def job(small_build: SmallBuild, tmp_path: Path) -> dict[str, str]:
    """The job's variables: the small recipe, whose stages are in the store already, and a command to run."""
    (tmp_path / "vlaopt").write_text(f'#!/bin/sh\nexec {sys.executable} -m vlaopt "$@"\n')
    (tmp_path / "vlaopt").chmod(0o755)
    return {
        **QUICK,
        "VLAOPT": str(tmp_path / "vlaopt"),
        "RESULTS": str(tmp_path / "results"),
        "PUBLISH": str(tmp_path / "published"),
        "VLAOPT_STORE": str(small_build.store.root),
    }


def run(job: dict[str, str], **changes: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(ROOT / "scripts/ci.sh")]
    environment = {**os.environ, **job, **changes}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False, timeout=300)


def failed(results: Path) -> list[str | None]:
    cases = ElementTree.parse(results / "bench.xml").iter("testcase")
    return [case.get("name") for case in cases if case.find("failure") is not None]


def test_what_holds_is_published_with_its_record_and_its_report(job: dict[str, str]) -> None:
    done = run(job)
    assert done.returncode == 0, done.stderr
    place = Path(done.stdout.splitlines()[-1])
    assert place.is_relative_to(job["PUBLISH"])
    assert {path.name for path in place.iterdir()} == {"artifact", "record.json", "report.html", "bench.xml"}
    artifact = Artifact.open(place / "artifact")
    artifact.check()
    assert json.loads((place / "record.json").read_text())["subject"]["artifact"] == artifact.id
    assert failed(Path(job["RESULTS"])) == []
    assert not list(Path(job["PUBLISH"]).rglob("*.staging-*"))

    again = run(job)
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, str(place))
    assert "published before" in again.stderr


def test_an_assertion_that_cannot_hold_publishes_nothing(job: dict[str, str]) -> None:
    done = run(job, ASSERT="p50_ms<0.000001 verdict!=INVALID")
    assert done.returncode == 5, done.stderr
    assert not Path(job["PUBLISH"]).exists()
    assert failed(Path(job["RESULTS"])) == ["p50_ms<0.000001"]
    assert (Path(job["RESULTS"]) / "report.html").is_file()


def test_a_build_that_is_slower_than_the_stored_record_publishes_nothing(job: dict[str, str], tmp_path: Path) -> None:
    assert run(job, PUBLISH="").returncode == 0
    record = json.loads((Path(job["RESULTS"]) / "record.json").read_text())
    record["verdict"], record["reasons"] = "VALID", []
    for part in ("paced", "back_to_back"):
        record[part]["samples_ms"] = [sample / 10 for sample in record[part]["samples_ms"]]
    (tmp_path / "stored.json").write_text(json.dumps(record))
    done = run(job, STORED=str(tmp_path / "stored.json"))
    assert done.returncode == 5, done.stderr
    assert "answer!=SLOWER" in done.stderr
    assert not Path(job["PUBLISH"]).exists()


def test_a_recipe_that_is_wrong_keeps_its_exit_code(job: dict[str, str]) -> None:
    done = run(job, SET="quantize.schem=int8")
    assert done.returncode == 2
    assert "did you mean" in done.stderr
    assert not Path(job["PUBLISH"]).exists()
    assert not (Path(job["RESULTS"]) / "record.json").exists()
