"""The promise: whatever becomes of the other process, this one gets its result or one clear error; nothing stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit import isolated_work as work
from vlaopt import isolated
from vlaopt.errors import EnvironmentProblem, RecipeError, StageError

ROOT = Path(__file__).parents[2]


def gone(process: int, seconds: float = 5.0) -> bool:
    """Whether a process has ended, or does so soon; one that nobody has waited for yet counts as ended."""
    for _ in range(int(seconds * 20)):
        try:
            status = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            return True
        if status.rpartition(")")[2].split()[0] in "ZX":
            return True
        time.sleep(0.05)
    return False


def test_the_result_comes_back_and_what_is_told_comes_while_it_runs() -> None:
    told: list[tuple[str, int]] = []
    total, process = isolated.run(work.add, 2, 3, what="adding", told=lambda *values: told.append(values))
    assert total == 5
    assert process != os.getpid()
    assert told == [("adding", 0), ("adding", 1), ("adding", 2)]


def test_an_error_comes_back_whole() -> None:
    with pytest.raises(EnvironmentProblem, match="no room") as caught:
        isolated.run(work.refuse, what="refusing")
    assert (caught.value.where, caught.value.hint) == ("here", "make some")
    assert "in refuse" in str(caught.value.__cause__)
    with pytest.raises(RecipeError) as several:
        isolated.run(work.refuse_a_recipe, what="refusing")
    assert several.value.lines() == ["a:1: one", "two", "hint: mend it"]


def test_a_bug_stays_a_bug() -> None:
    with pytest.raises(KeyError, match="a bug"):
        isolated.run(work.stumble, what="stumbling")
    with pytest.raises(RuntimeError, match="Own: of this function alone"):
        isolated.run(work.raise_what_cannot_be_sent, what="stumbling")


def test_memory_that_ran_out_is_the_machines_fault() -> None:
    with pytest.raises(StageError, match="memory ran out") as caught:
        isolated.run(work.run_out_of_memory, what="building")
    assert "swap" in (caught.value.hint or "")


def test_a_killed_process_is_told_of_with_its_last_words() -> None:
    with pytest.raises(StageError, match=r"building head was killed, probably for memory; .*second \| third \| last"):
        isolated.run(work.die, "SIGKILL", what="building head")


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_crash_is_named(name: str) -> None:
    with pytest.raises(StageError, match=rf"building head crashed \({name}\); the last it wrote: .*last words"):
        isolated.run(work.die, name, what="building head")


def test_one_that_leaves_without_a_result_is_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StageError, match="ended with exit code 3 and no result; the last it wrote: on stdout"):
        isolated.run(work.leave, 3, what="building head")
    assert capfd.readouterr().out == ""  # stdout is for results


def test_a_process_beside_answers_while_this_one_goes_on() -> None:
    with isolated.beside(work.count, 5, what="counting") as counter:
        assert counter.heard(20) == ("from", 5)
        assert [counter.ask(20) for _ in range(3)] == [(5,), (6,), (7,)]
        assert counter.running
        assert counter.process != os.getpid()
    assert not counter.running


def test_a_process_beside_has_the_files_that_it_is_given_and_no_other() -> None:
    read, write = os.pipe()
    os.write(write, b"left in the pipe")
    with isolated.beside(work.read_all, read, what="reading", descriptors=(read,)) as reader:
        assert reader.heard(20) == (b"left in the pipe",)
    with (
        pytest.raises(OSError, match="Bad file descriptor"),
        isolated.beside(work.read_all, read, what="reading") as reader,
    ):
        reader.heard(20)
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (work.refuse, (), EnvironmentProblem, "here: no room"),
        (
            work.leave,
            (3,),
            StageError,
            "standing by ended with exit code 3 and no result; the last it wrote: on stdout",
        ),
        (work.add, (1, 2), StageError, "standing by ended with exit code 0 and no result"),
        (work.linger_mutely, (), StageError, r"standing by gave no answer in 0\.3 s"),
    ],
)
def test_one_beside_that_does_not_answer_is_one_clear_error(
    function: Callable[..., object], arguments: tuple[int, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message), isolated.beside(function, *arguments, what="standing by") as other:
        for _ in range(5):
            other.ask(0.3 if function is work.linger_mutely else 20)


def test_one_beside_ends_when_the_body_fails() -> None:
    with pytest.raises(KeyboardInterrupt, match="stop"), isolated.beside(work.count, 0, what="counting") as counter:
        raise KeyboardInterrupt("stop")
    assert gone(counter.process)


def test_temporary_files_of_a_killed_process_are_removed() -> None:
    told: list[str] = []
    with pytest.raises(StageError):
        isolated.run(work.litter, what="littering", told=told.append)
    assert told
    assert not Path(told[0]).exists()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_no_process_outlives_the_one_that_started_it(name: str, tmp_path: Path) -> None:
    note = tmp_path / "note"
    code = (
        "import signal\n"
        "for each in (signal.SIGTERM, signal.SIGINT):  # a shell's job in the background ignores the latter\n"
        "    signal.signal(each, signal.default_int_handler)\n"
        "from pathlib import Path; from tests.unit import isolated_work as work; from vlaopt import isolated\n"
        f"isolated.run(work.linger, Path({str(note)!r}), what='lingering')"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    child, grandchild = map(int, note.read_text().split())
    parent.send_signal(signal.Signals[name])
    parent.wait(20)
    assert gone(child)
    if name == "SIGKILL":  # the kernel ends the child alone then
        os.kill(grandchild, signal.SIGKILL)
    assert gone(grandchild)
