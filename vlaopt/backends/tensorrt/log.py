"""TensorRT's log, collected: a call that fails returns None and says why only there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

MEMORY_HINT = "close other programs, lower engine.tensorrt.workspace_mib, or build one component at a time"

_MEMORY = re.compile(
    r"out of memory|out_of_memory|outofmemory|insufficient (?:\w+ )?(?:memory|workspace)|bad_alloc"
    r"|(?:unable|failed|not enough memory) to allocate|requested amount of gpu memory",
    re.IGNORECASE,
)


class Log(Protocol):
    """A logger of TensorRT that keeps what it is told."""

    warnings: list[str]
    errors: list[str]
    totals: list[str]
    layers: str


def collector(trt: Any) -> Log:
    """A logger for `trt` (its module) that keeps warnings, errors, and a built engine's memory and layers."""

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.warnings: list[str] = []
            self.errors: list[str] = []
            self.totals: list[str] = []
            self.layers = ""

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.WARNING:
                self.warnings.append(message)
            elif severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif message.startswith("Total "):
                self.totals.append(message)
            elif message.startswith("Layers:\n"):
                self.layers = message

    made: Log = Collector()
    return made


def reason(log: Log) -> str:
    """What the errors of a log say, each once, in one line."""
    return "; ".join(dict.fromkeys(map(meaning, log.errors))) or "it gives no reason"


def total_bytes(log: Log, what: str) -> int | None:
    """Bytes of an engine's "Weights" or "Activation", which a build logs at its end; None where it did not."""
    found = [match for line in log.totals if (match := re.match(rf"Total {what} Memory: (\d+)", line))]
    return int(found[-1][1]) if found else None


def ran_out_of_memory(messages: Sequence[str]) -> bool:
    """Whether lines of a log tell of memory that was not to be had."""
    return any(_MEMORY.search(message) for message in messages)


def meaning(message: str) -> str:
    """A line of TensorRT's log without the names of its functions and source files."""
    text = re.sub(r"^\S+ Error Code \d+: ", "", " ".join(message.split()))
    text = re.sub(r"\[\w+\.cpp:\d+: \w+\] ", "", text)
    text = re.sub(r"\(In \w+ at \S+?:\d+ ", "(", text)
    return re.sub(r"\.? In \w+ at \S+?:\d+", "", text)


def parser_meaning(description: str) -> str:
    """A parser's description of an error without the names of its functions and source files.

    Where it wraps what the network said, as "Invalid Node - … (…: what In function at file) [file] Error Code 1: …",
    that alone: a machine without a driver adds an error of CUDA that has nothing to do with the node.
    """
    text = " ".join(description.split())
    if wrapped := re.search(r"API Usage Error \((?:[^ ]+: )?(.+?)\.? In \w+ at \S+\)", text):
        return wrapped[1]
    text = re.sub(r"^Assertion failed: \S+: ", "", text)
    return "it gives no reason" if text == "false" else text
