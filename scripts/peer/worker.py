"""One row in a process of its own: its memory and its threads are no one else's. Answers over a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

CALL_S = 900.0
"""What any answer may take."""
SLOW_S, SLOWEST_S = 1.0, 10.0
"""A call that takes so long is made once before it is measured; one that takes longer is not measured at all."""
REASON = 240
"""Letters of a reason that are told; all of it is in the row's log."""


class Failed(Exception):
    """A row could not be built, opened or run; the message is the reason, on one line."""


class Worker:
    """A process that answers. `ask` raises Failed with the reason when it cannot, or when the process is gone."""

    def __init__(self, target: Callable[..., None], *arguments: Any, log: Path, limit_s: float = CALL_S) -> None:
        self._own, other = get_context("spawn").Pipe()
        self._limit_s = limit_s
        self._process = get_context("spawn").Process(target=target, args=(other, log, *arguments), daemon=True)
        self._process.start()
        other.close()

    def ask(self, question: Any) -> Any:
        """The answer to a question, or to None what the process says by itself."""
        try:
            if question is not None:
                self._own.send(question)
            if not self._own.poll(self._limit_s):
                raise Failed(f"no answer within {self._limit_s:.0f} s")
            kind, value = self._own.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            self._process.join(5)
            raise Failed(f"its process ended with exit code {self._process.exitcode}") from error
        if kind == "failed":
            raise Failed(value)
        return value

    def close(self) -> None:
        self._own.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def run_once(target: Callable[..., Any], *arguments: Any, log: Path, limit_s: float = CALL_S) -> Any:
    """What `target(*arguments)` gives in a process of its own. Raises Failed."""
    worker = Worker(_once, target, arguments, log=log, limit_s=limit_s)
    try:
        return worker.ask(None)
    finally:
        worker.close()


def _once(pipe: Connection, log: Path, target: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    _logged(log)
    _answering(pipe, lambda: target(*arguments))


def build(row: str, subject_path: Path, folder: Path) -> float:
    """Build a row's files into `folder`, unless they are there; the seconds it took."""
    from peer.rows import ROWS
    from peer.subjects import Subject

    done = folder / "built.json"
    if done.is_file():
        took: float = json.loads(done.read_text())
        return took
    making = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    subject, started = Subject.load(subject_path), time.perf_counter()
    make = ROWS[row].build
    if make is not None:
        for component in subject.components:
            make(subject, component, making)
    took = time.perf_counter() - started
    (making / "built.json").write_text(json.dumps(took))
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)
    return took


def serve(pipe: Connection, log: Path, row: str, subject_path: Path, folder: Path, threads: int) -> None:
    """Open a row, say so, then answer: ("time", first, count) with ms, ("error",) and ("memory",)."""
    _logged(log)
    opened: list[Any] = []

    def start() -> dict[str, Any]:
        started = time.perf_counter()
        calls, size = _open(row, subject_path, folder, threads)
        calls.call(0)
        open_s = time.perf_counter() - started
        call_s = 0.0
        for _ in range(2):
            if call_s < SLOW_S:  # a row as slow as that has no need to warm up further
                started = time.perf_counter()
                calls.call(0)
                call_s = time.perf_counter() - started
        if call_s > SLOWEST_S:
            raise TimeoutError(f"one call takes {call_s:.0f} s, too long to be measured in turns")
        opened.append(calls)
        return {"open_s": open_s, "call_s": call_s, "bytes": size, "count": calls.count}

    if not _answering(pipe, start):
        return
    calls = opened[0]
    while True:
        try:
            question, *rest = pipe.recv()
        except EOFError:
            return
        answers = {"time": partial(_times, calls, *rest), "error": calls.error, "memory": _memory}
        if not _answering(pipe, answers[question]):
            return


def _open(row: str, subject_path: Path, folder: Path, threads: int) -> tuple[Any, int]:
    from peer.limit import LIMITS, Products
    from peer.rows import ROWS, VLAOPT
    from peer.subjects import Subject

    if row.startswith(("torch", "limit-fbgemm", "limit-onednn")):
        import torch

        torch.set_num_threads(threads)
    if row in LIMITS:
        return Products(LIMITS[row][1], threads), 0
    subject = Subject.load(subject_path)
    if row == VLAOPT:
        return subject.with_artifact(threads), subject.size()
    sessions = {name: ROWS[row].open(subject, name, folder, threads) for name in subject.components}
    return subject.with_sessions(sessions), sum(session.size for session in sessions.values())


def _times(calls: Any, first: int, count: int) -> list[float]:
    calls.call(first)  # wakes threads and caches that others have used since
    times = []
    for sample in range(first, first + count):
        started = time.perf_counter_ns()
        calls.call(sample)
        times.append((time.perf_counter_ns() - started) / 1e6)
    return times


def _memory() -> float | None:
    from vlaopt.benchmark.environment import peak_memory_mib

    return peak_memory_mib()


def _answering(pipe: Connection, answer: Callable[[], Any]) -> bool:
    try:
        pipe.send(("done", answer()))
    except Exception as error:  # a row that fails is a row with its reason, whatever it raised
        traceback.print_exc()
        pipe.send(("failed", _reason(error)))
        return False
    return True


def _reason(error: BaseException) -> str:
    """What an error says, on one line; where in its sources OpenVINO raised it is left out."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(line for line in lines if not line.startswith("Exception from "))
    return f"{type(error).__name__}: {text}"[:REASON] if text else type(error).__name__


def _logged(log: Path) -> None:
    """What the libraries print goes to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    with contextlib.suppress(OSError):
        os.close(file)
