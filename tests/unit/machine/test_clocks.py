"""Clocks are locked only where that is allowed, and are what they were afterwards, whatever ends the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlaopt.errors import EnvironmentProblem
from vlaopt.machine.clocks import locked
from vlaopt.machine.sources import Sources

GOVERNORS = {0: "schedutil", 1: "powersave"}

# It keeps its clock in a file, as a driver does, and writes down what it was asked.
SMI = """#!/bin/sh
echo "nvidia-smi $*" >> "$STATE/log"
case "$*" in
  *--query-gpu=clocks.max.sm,persistence_mode*) echo "1980, $(cat "$STATE/persistence")" ;;
  *-pm*0) echo Disabled > "$STATE/persistence" ;;
  *-pm*1) echo Enabled > "$STATE/persistence" ;;
  *-lgc*) [ -e "$STATE/refuse" ] && echo "The current user does not have permission to change clocks" && exit 4
          echo 1980 > "$STATE/gpu"
          if [ -e "$STATE/kill" ]; then kill -9 $PPID; fi ;;
  *-rgc*) [ -e "$STATE/refuse" ] && exit 4
          echo free > "$STATE/gpu" ;;
  *) exit 2 ;;
esac
"""
# Like NVIDIA's: it does not write over a file without asking.
JETSON_CLOCKS = """#!/bin/sh
echo "jetson_clocks $1" >> "$STATE/log"
case "$1" in
  --store) [ -e "$2" ] && exit 1
           cat "$STATE/jetson" > "$2" ;;
  --restore) cat "$2" > "$STATE/jetson" ;;
  "") echo highest > "$STATE/jetson" ;;
esac
"""

KILLED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
from pathlib import Path
from vlaopt.machine.clocks import locked
from vlaopt.machine.sources import Sources
with locked(Sources(root=Path(sys.argv[1]), variables={})):
    print("locked", flush=True)
    time.sleep(60)
"""


class Board:
    """A machine of files below a root, with the commands that it has."""

    def __init__(self, folder: Path) -> None:
        self.root, self.state, self.commands = folder / "root", folder / "state", folder / "bin"
        for made in (self.root / "sys/devices/system/cpu", self.state, self.commands):
            made.mkdir(parents=True)
        self.sources = Sources(root=self.root, variables={})

    def governor(self, number: int) -> Path:
        return self.root / f"sys/devices/system/cpu/cpufreq/policy{number}/scaling_governor"

    def with_cpus(self) -> Board:
        for number, governor in GOVERNORS.items():
            self.governor(number).parent.mkdir(parents=True)
            self.governor(number).write_text(governor + "\n")
        return self

    def with_gpu(self, persistence: str = "Disabled") -> Board:
        (self.state / "gpu").write_text("free\n")
        (self.state / "persistence").write_text(persistence + "\n")
        return self._with_command("nvidia-smi", SMI)

    def with_jetson(self) -> Board:
        tree = self.root / "proc/device-tree"
        tree.mkdir(parents=True)
        (tree / "compatible").write_text("nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0")
        (self.state / "jetson").write_text("as it was\n")
        return self._with_command("jetson_clocks", JETSON_CLOCKS)

    def now(self) -> dict[str, str]:
        """All that locking changes."""
        cpus = {f"cpu{number}": self.governor(number) for number in GOVERNORS}
        files = {**cpus, **{name: self.state / name for name in ("gpu", "persistence", "jetson")}}
        return {name: path.read_text().strip() for name, path in files.items() if path.exists()}

    def asked(self) -> list[str]:
        log = self.state / "log"
        return log.read_text().splitlines() if log.exists() else []

    def _with_command(self, name: str, script: str) -> Board:
        (self.commands / name).write_text(script)
        (self.commands / name).chmod(0o755)
        return self


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """An empty machine; commands that it does not have cannot be found."""
    board = Board(tmp_path)
    monkeypatch.setenv("PATH", f"{board.commands}:/bin")
    monkeypatch.setenv("STATE", str(board.state))
    return board


@pytest.fixture
def victim(board: Board) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts a process that has locked the board's clocks and waits to be ended."""
    started = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", KILLED, str(board.root)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def becomes(board: Board, expected: dict[str, str]) -> bool:
    """Whether the board is so soon; another process works on it."""
    deadline = time.monotonic() + 10
    while board.now() != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return board.now() == expected


def test_governors_and_the_gpu_are_locked_and_given_back(board: Board) -> None:
    before = board.with_cpus().with_gpu().now()
    with locked(board.sources) as told:
        assert told == ("GPU 0 at 1980 MHz", "CPU governor performance")
        assert board.now() == {"cpu0": "performance", "cpu1": "performance", "gpu": "1980", "persistence": "Enabled"}
    assert board.now() == before


def test_persistence_that_was_on_stays_on(board: Board) -> None:
    board.with_gpu("Enabled")
    with locked(board.sources):
        pass
    assert board.now() == {"gpu": "free", "persistence": "Enabled"}
    assert not any("-pm" in line for line in board.asked())


def test_a_jetson_is_locked_by_its_own_program_alone(board: Board) -> None:
    before = board.with_cpus().with_gpu().with_jetson().now()
    with locked(board.sources) as told:
        assert told == ("jetson_clocks",)
        assert board.now() == {**before, "jetson": "highest"}
    assert board.now() == before
    assert board.asked() == ["jetson_clocks --store", "jetson_clocks ", "jetson_clocks --restore"]


def test_an_error_in_between_is_the_one_that_is_raised_and_all_is_given_back(board: Board) -> None:
    before = board.with_cpus().with_gpu().now()
    with pytest.raises(KeyboardInterrupt, match="in the middle"), locked(board.sources):
        raise KeyboardInterrupt("in the middle")
    assert board.now() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_run_that_is_ended_from_outside_gives_back_too(
    board: Board, victim: Callable[[], subprocess.Popen[str]], number: signal.Signals
) -> None:
    before = board.with_cpus().with_gpu().now()
    process = victim()
    assert board.now() != before
    os.killpg(process.pid, number)  # as a terminal does: all processes of its group
    assert becomes(board, before)


def test_a_killed_run_gives_back_a_jetson(board: Board, victim: Callable[[], subprocess.Popen[str]]) -> None:
    before = board.with_jetson().now()
    victim().kill()
    assert becomes(board, before)


def test_a_run_that_is_killed_between_two_changes_gives_back_what_it_changed(board: Board) -> None:
    before = board.with_cpus().with_gpu().now()
    (board.state / "kill").touch()
    victim = subprocess.run([sys.executable, "-c", KILLED, str(board.root)], capture_output=True)
    assert (victim.returncode, victim.stdout) == (-signal.SIGKILL, b"")
    assert becomes(board, before)
    assert board.asked()[-2:] == ["nvidia-smi -i 0 -rgc", "nvidia-smi -i 0 -pm 0"]  # the last change first


def test_a_second_run_does_not_take_the_clocks_of_the_first_for_its_own(board: Board) -> None:
    before = board.with_cpus().now()
    with (
        locked(board.sources),
        pytest.raises(EnvironmentProblem, match="another run has locked"),
        locked(board.sources),
    ):
        pass
    assert board.now() == before
    with locked(board.sources):
        assert board.now() != before
    assert board.now() == before


def test_what_is_not_allowed_is_refused_before_anything_changes(board: Board) -> None:
    before = board.with_cpus().with_gpu("Enabled").now()
    (board.state / "refuse").touch()
    with (
        pytest.raises(EnvironmentProblem, match="does not have permission to change clocks") as caught,
        locked(board.sources),
    ):
        pass
    assert caught.value.hint == (
        "run it as root, or first: sudo nvidia-smi -i 0 -lgc 1980,1980; "
        f"echo performance | sudo tee {board.root}/sys/devices/system/cpu/cpufreq/policy*/scaling_governor"
    )
    assert board.now() == before


def test_what_was_done_before_a_refusal_is_undone(board: Board) -> None:
    before = board.with_cpus().with_gpu().now()
    refusing = board.governor(1)
    refusing.unlink()
    refusing.symlink_to("/proc/self/comm/nothing")  # can be neither read nor written, by nobody
    readable = board.root / "sys/devices/system/cpu/cpufreq/policy2/scaling_governor"
    readable.parent.mkdir()
    readable.symlink_to("/proc/version")  # can be read, and written by nobody
    with (
        pytest.raises(EnvironmentProblem, match=r"cannot be locked: echo performance > .*policy2"),
        locked(board.sources),
    ):
        pass
    assert board.now() == {name: value for name, value in before.items() if name != "cpu1"}


def test_what_cannot_be_given_back_is_said_with_its_commands(board: Board) -> None:
    board.with_gpu("Enabled")
    with pytest.raises(EnvironmentProblem, match="could not be given back") as caught, locked(board.sources):
        (board.state / "refuse").touch()
    assert caught.value.hint == "as root: nvidia-smi -i 0 -rgc"


def test_when_the_process_that_gives_back_is_killed_the_run_does_it(board: Board) -> None:
    before = board.with_cpus().with_gpu().now()
    with locked(board.sources):
        children = Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text().split()
        keeper = next(int(pid) for pid in children if b"_guard" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(keeper, signal.SIGKILL)
    assert board.now() == before


def test_a_machine_without_clocks_to_lock_says_so(board: Board, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="no clocks can be locked here"), locked(board.sources):
        pass
    nowhere = Sources(root=tmp_path / "nowhere", variables={})
    with pytest.raises(EnvironmentProblem, match="on Linux only"), locked(nowhere):
        pass


def test_the_gpu_is_the_one_that_the_program_sees(board: Board) -> None:
    board.with_gpu()
    with locked(Sources(root=board.root, variables={"CUDA_VISIBLE_DEVICES": "3,1"})) as told:
        assert told == ("GPU 3 at 1980 MHz",)
    assert "nvidia-smi -i 3 -lgc 1980,1980" in board.asked()
    with (
        pytest.raises(EnvironmentProblem, match="no clocks"),
        locked(Sources(root=board.root, variables={"CUDA_VISIBLE_DEVICES": "-1"})),
    ):
        pass
