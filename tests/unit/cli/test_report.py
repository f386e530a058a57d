"""What a person does with `vlaopt report`: a page, a text, and what is refused."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.unit.cli.conftest import ROOT, Cli
from vlaopt.errors import EnvironmentProblem


def test_a_page_is_written_where_it_is_asked_for_and_its_path_printed(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    told = cli("report", artifact, "-o", page)
    assert (told.code, told.out.strip(), told.err) == (0, str(page), "")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert "linear" in text
    assert "Control rate" in text


def test_the_page_is_report_html_unless_said_otherwise(
    cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli("report", artifact).out.strip() == "report.html"
    assert (tmp_path / "report.html").is_file()


def test_markdown_goes_to_stdout_and_writes_nothing(
    cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = cli("report", artifact, "--markdown")
    assert told.code == 0
    assert told.out.startswith("### linear 1.0.0+")
    assert "not measured" in told.out
    assert not (tmp_path / "report.html").exists()


def test_a_measurement_made_before_is_told(cli: Cli, artifact: Path) -> None:
    assert cli("bench", artifact, "--duration", "0.2").code == 0
    assert "paced at 50 Hz" in cli("report", artifact, "--markdown").out


def test_the_artifact_is_not_written_into(cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(artifact)
    told = cli("report", artifact)
    assert told.code == 2
    assert "report.html: lies in the artifact, which never changes once written" in told.err
    assert not (artifact / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--markdown", "-o", "page.html"), "--markdown: prints its text"),
        (("-o", str(ROOT)), "a folder, not a file to write"),
        (("--record", "nowhere.json"), "nowhere.json: no such file"),
    ],
)
def test_what_cannot_be_meant_is_refused(cli: Cli, artifact: Path, arguments: tuple[str, ...], problem: str) -> None:
    told = cli("report", artifact, *arguments)
    assert told.code == 2
    assert problem in told.err
    assert told.out == ""


def test_a_damaged_artifact_is_refused(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    file = artifact / "policy/statistics.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    told = cli("report", artifact, "-o", tmp_path / "page.html")
    assert told.code == 2
    assert "was changed after it was written" in told.err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("library", ["jinja2", "matplotlib"])
def test_without_a_library_the_extra_that_brings_it_is_named(
    cli: Cli, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    found = importlib.import_module

    def lacking(name: str, package: str | None = None) -> object:
        if name.split(".")[0] == library:
            raise ImportError(f"No module named {library!r}")
        return found(name, package)

    monkeypatch.setattr(importlib, "import_module", lacking)
    told = cli("report", artifact, "-o", tmp_path / "page.html")
    assert told.code == EnvironmentProblem.exit_code
    assert f"{library} cannot be imported" in told.err
    assert "pip install 'vlaopt[report]'" in told.err
    assert cli("report", artifact, "--markdown").code == 0
