"""Clocks locked while something is measured: of the CPUs, of an NVIDIA GPU, of a Jetson. Only where it is asked for."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlaopt.errors import EnvironmentProblem
from vlaopt.machine.changes import Command, Step, Write, undone
from vlaopt.machine.jetson import is_jetson
from vlaopt.machine.sources import Sources
from vlaopt.machine.state.cpu import PERFORMANCE, policies
from vlaopt.machine.state.nvml import visible_gpu
from vlaopt.machine.system import read_text


@contextmanager
def locked(sources: Sources | None = None) -> Iterator[tuple[str, ...]]:
    """Lock the clocks; gives what was locked, in words. Afterwards all is as it was, also when this process is killed.

    The governor of the CPUs becomes `performance` and the clock of the GPU its highest; on a Jetson, jetson_clocks does
    both. Only a lock of an NVIDIA GPU that was there before is lost: nothing tells it. Raises EnvironmentProblem, with
    what root would have to run, when it is not allowed; then nothing has changed.
    """
    sources = sources or Sources()
    with _claimed(sources.root) as claim, undone(claim) as changes:
        locks = _locks(sources, changes.folder)
        if not locks:
            raise EnvironmentProblem("no clocks can be locked here: no cpufreq, no NVIDIA GPU", hint=_WITHOUT)
        for lock in locks:
            for step, undo in lock.steps:
                if reason := changes.make(step, undo):
                    by_hand = "; ".join(lock.by_hand for lock in locks)
                    raise EnvironmentProblem(
                        f"clocks cannot be locked: {step}: {reason}", hint=f"run it as root, or first: {by_hand}"
                    )
        yield tuple(lock.told for lock in locks)


_WITHOUT = "measure without --lock-clocks"


@dataclass(frozen=True)
class _Lock:
    """One lock in words, what a person would run for it, and its steps with what undoes each."""

    told: str
    by_hand: str
    steps: tuple[tuple[Step, Step | None], ...]


@contextmanager
def _claimed(root: Path) -> Iterator[int]:
    """One lock at a time: a second one would take the first one's clocks for those to give back."""
    try:
        claim = os.open(root / "sys/devices/system/cpu", os.O_RDONLY)
    except OSError as error:
        raise EnvironmentProblem("clocks can be locked on Linux only", hint=_WITHOUT) from error
    try:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EnvironmentProblem("another run has locked this machine's clocks", hint="wait for its end") from error
        yield claim
    finally:
        os.close(claim)


def _locks(sources: Sources, folder: Path) -> list[_Lock]:
    """Those of this machine. Commands come first: they are refused before anything has changed."""
    if is_jetson(sources.root):
        return [_of_jetson(folder)]
    return [lock for lock in (_of_gpu(sources), _of_cpus(sources.root)) if lock is not None]


def _of_jetson(folder: Path) -> _Lock:
    """jetson_clocks asks before it writes over a file, so that this one must not be there."""
    stored = str(folder / "clocks.conf")
    store, restore = (Command(("jetson_clocks", option, stored)) for option in ("--store", "--restore"))
    return _Lock("jetson_clocks", "sudo jetson_clocks", ((store, None), (Command(("jetson_clocks",)), restore)))


def _of_gpu(sources: Sources) -> _Lock | None:
    """The GPU that programs see first, at its highest clock; without persistence the driver would forget that."""
    gpu = visible_gpu(sources.variables)
    query = ("nvidia-smi", "-i", gpu or "", "--query-gpu=clocks.max.sm,persistence_mode")
    told = sources.run([*query, "--format=csv,noheader,nounits"]) if gpu else None
    highest, _, persistence = (told or "").strip().partition(",")
    if gpu is None or not highest.isdigit():
        return None

    def command(*words: str) -> Command:
        return Command(("nvidia-smi", "-i", gpu, *words))

    lock = command("-lgc", f"{highest},{highest}")
    keep = [(command("-pm", "1"), command("-pm", "0"))] if persistence.strip() == "Disabled" else []
    return _Lock(f"GPU {gpu} at {highest} MHz", f"sudo {lock}", (*keep, (lock, command("-rgc"))))


def _of_cpus(root: Path) -> _Lock | None:
    files = [policy / "scaling_governor" for policy in policies(root)]
    before = {file: governor for file in files if (governor := read_text(file))}
    if not before:
        return None
    by_hand = f"echo {PERFORMANCE} | sudo tee {root / 'sys/devices/system/cpu/cpufreq/policy*/scaling_governor'}"
    steps = tuple((Write(file, PERFORMANCE), Write(file, governor)) for file, governor in before.items())
    return _Lock(f"CPU governor {PERFORMANCE}", by_hand, steps)
