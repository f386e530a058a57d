"""The documents say what is so: links, code map, exit codes, examples, words. And nothing speaks of one machine."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from vlaopt import errors
from vlaopt.cli.app import app, run

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = (
    *("README.md", "CHANGELOG.md", "vlaopt/README.md", "vlaopt/policies/README.md"),
    *("recipes/README.md", "calibration/README.md"),
)

NEVER_SAY = ("baseline", "threshold", "observer", "submodel", "submodels", "fixture", "framework")
"""From the table of words: those whose every use would be a slip."""


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def commands(command: Any, path: tuple[str, ...] = ("vlaopt",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command and group of the command line, with the words that call it."""
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, (*path, name))


COMMANDS = dict(commands(typer.main.get_command(app)))


def examples_of(epilog: str) -> list[str]:
    _, _, examples = epilog.rpartition("Examples: ") if "Examples: " in epilog else epilog.rpartition("Example: ")
    return examples.split(" · ")


EXAMPLES = sorted({example for command in COMMANDS.values() for example in examples_of(command.epilog or "")})


def documented() -> list[str]:
    """The command lines in the documents' code blocks, without comments; one with [optional] parts is no example."""
    found = []
    for document in DOCUMENTS:
        fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", read(document), re.MULTILINE | re.DOTALL))
        indented = "\n".join(re.findall(r"^ {4}(\S.*)$", read(document), re.MULTILINE))
        for line in re.findall(r"^(?:\$ )?(vlaopt \S.*)$", f"{fenced}\n{indented}", re.MULTILINE):
            text = re.sub(r"\s+#.*", "", line).strip()
            if not re.search(r"[\[|]", text):
                found.append(text)
    return list(dict.fromkeys(found))


def parse(line: str) -> None:
    """Parse a command line with the real parser and run nothing; raises what the command line would report."""
    words = tuple(word for word in shlex.split(line.split(" > ")[0]) if word != "--debug")
    path = next(words[:length] for length in range(len(words), 0, -1) if words[:length] in COMMANDS)
    COMMANDS[path].make_context(" ".join(path), list(words[len(path) :]))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        if not target.startswith(("http://", "https://", "#")):
            assert ((ROOT / document).parent / target.partition("#")[0]).exists(), target


def test_the_code_map_names_every_module_and_no_other() -> None:
    package = ROOT / "vlaopt"
    there = {path.relative_to(package).as_posix() for path in package.rglob("*.py")}
    there = {name.removesuffix("__init__.py") if "/" in name else name for name in there}
    rows = [line for line in read("vlaopt/README.md").splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w/]+\.py|\w+(?:/\w+)*/)`", row)}
    assert sorted(there - named) == []
    assert sorted(name for name in named if not (package / name).exists()) == []


@pytest.mark.parametrize("document", ["README.md", "vlaopt/README.md"])
def test_the_exit_codes_are_those_of_the_errors(document: str) -> None:
    rows = re.findall(r"^\| (\d+) \|(.*)\|$", read(document), re.MULTILINE)
    assert [int(code) for code, _ in rows] == [0, 1, 2, 3, 4, 5, 130]
    for name in re.findall(r"`(\w+(?:Error|Problem))`", read(document)):
        kind = getattr(errors, name)
        code = next(int(code) for code, text in rows if f"`{name}`" in text)
        assert kind.exit_code == code


def test_every_kind_of_error_is_in_the_table() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.VlaoptError)]
    for kind in kinds:
        if kind is not errors.VlaoptError:
            assert f"`{kind.__name__}`" in read("vlaopt/README.md")


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_ends_with_an_example(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*path[1:], "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    epilog = COMMANDS[path].epilog or ""
    assert told.endswith(" ".join(epilog.split()))
    assert all(example.startswith(" ".join(path)) or path == ("vlaopt",) for example in examples_of(epilog)), epilog


@pytest.mark.parametrize("line", EXAMPLES)
def test_the_examples_of_help_parse(line: str) -> None:
    parse(line)


@pytest.mark.parametrize("line", documented())
def test_the_commands_of_the_documents_parse(line: str) -> None:
    parse(line)


def test_an_example_that_does_not_parse_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse("vlaopt bench ARTIFACT --assrt x")


CHEAP = ("vlaopt recipe", "vlaopt target", "vlaopt cache", "vlaopt calibration inspect")


@pytest.mark.parametrize("line", [line for line in EXAMPLES if line.startswith(CHEAP) or "--dry-run" in line])
def test_the_cheap_examples_run(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("VLAOPT_STORE", str(tmp_path))
    assert run(shlex.split(line.split(" > ")[0])[1:]) == 0
    assert capsys.readouterr().out


def test_the_make_targets_of_the_documents_exist() -> None:
    known = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    for document in DOCUMENTS:
        for name in re.findall(r"^(?: {4})?make ([a-z-]+)|`make ([a-z-]+)`", read(document), re.MULTILINE):
            target = "".join(name)
            assert target in known or target.startswith("build-"), f"{document}: make {target}"


def test_files_that_the_documents_name_exist() -> None:
    tops = ("vlaopt", "recipes", "calibration", "tests", "scripts")
    for document in DOCUMENTS:
        for name in re.findall(rf"`((?:{'|'.join(tops)})/[\w./-]+)`", read(document)):
            assert (ROOT / name).exists() or (ROOT / "vlaopt" / name).exists(), f"{document}: {name}"


def without_words_table(text: str) -> str:
    return re.sub(r"^\| say \|.*?\n\n", "", text, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("word", NEVER_SAY)
def test_one_word_per_thing(word: str) -> None:
    texts = {document: without_words_table(read(document)) for document in DOCUMENTS}
    texts |= {" ".join(path): f"{command.help} {command.epilog}" for path, command in COMMANDS.items()}
    texts |= {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (ROOT / "vlaopt").rglob("*.py")}
    # Not the name of a library's argument, which is the library's word.
    found = [place for place, text in texts.items() if re.search(rf"\b{word}\b(?!=)", text, re.IGNORECASE)]
    assert found == []


def test_the_files_of_the_package_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "vlaopt").rglob("*.py")}
    assert [str(path) for path, length in lengths.items() if length > 500] == []


def tracked() -> Iterator[tuple[str, str]]:
    """The project's text files: what git has or would add."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, done.stdout.decode().split("\0")):
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 1 << 20:
            data = path.read_bytes()
            if b"\0" not in data:
                yield name, data.decode("utf-8", errors="replace")


MACHINE = re.compile(
    "|".join([r"(?<![\w.])/(?:work|home|root|Users|opt|mnt)/\w", r"file:///\w", r"https?://[^\s/]+/simple\b"])
)
"""A folder of one machine, or the address of a package index."""
LEGITIMATE = re.compile(r"/opt/(?:nvidia|tensorrt)|/home/s(?=omebody)|https://pypi\.org/simple")


def test_nothing_speaks_of_one_machine() -> None:
    found = [
        f"{name}: {match[0]}"
        for name, text in tracked()
        for match in MACHINE.finditer(text)
        if not LEGITIMATE.match(text, match.start()) and not name.endswith("test_docs.py")
    ]
    assert found == []


def test_only_what_belongs_there_is_at_the_top() -> None:
    allowed = {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE", "CHANGELOG.md"}
    folders = {"vlaopt", "recipes", "calibration", "tests", "scripts"}
    tops = {name.partition("/")[0] for name, _ in tracked()}
    assert {name for name in tops - allowed - folders if not name.startswith(".")} == set()
