"""How the stand-ins are to behave in this process: the JSON in the variable VLAOPT_STANDIN."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "VLAOPT_STANDIN"
LANES = ("10.3", "10.13", "10.16", "11.4")
FAULTS = {
    "build-none": "a build gives None; the reason is only in the logger",
    "strong-refused": "a strongly typed build gives None on 10.0 to 10.11",
    "ignores-precision": "the inspector says FP32 of every layer",
    "parser-crashes": "the parser kills its process by SIGSEGV",
    "builder-killed": "the builder kills its process by SIGKILL, as the system does when memory is short",
    "builder-segfaults": "the builder kills its process by SIGSEGV",
    "deserialize-none": "no plan can be loaded; the reason is only in the logger",
    "deserialize-segfaults": "loading a plan kills its process by SIGSEGV",
    "out-of-memory": "builds and allocations on the device fail for want of memory",
    "execute-fails": "a context refuses to run",
    "execute-segfaults": "running kills its process by SIGSEGV",
    "sticky-error": "running gives CUDA error 700, and so does every call after it",
    "capture-fails": "a context cannot be captured into a CUDA graph, although it runs",
    "instantiate-fails": "a captured graph cannot be made executable",
    "wrong-actions": "engines give wrong values",
    "no-driver": "there is no NVIDIA driver",
    "no-gpu": "there is a driver, and it sees no GPU",
    "no-tensorrt": "importing tensorrt fails, as where a library that it needs is missing",
    "no-cuda-python": "importing cuda.bindings fails",
    "no-pycuda": "importing pycuda fails",
}


@dataclass(frozen=True)
class Settings:
    """`memory_mib` is the device's; `log` a file that every call is appended to; `os` as plans are tagged with."""

    lane: str = "11.4"
    gpu: str = "NVIDIA Orin"
    sm: str = "8.7"
    memory_mib: int = 30000
    integrated: bool = True
    os: str = f"{sys.platform}-{platform.machine()}"
    driver: int = 12060
    faults: tuple[str, ...] = ()
    log: str | None = None

    def has(self, fault: str) -> bool:
        """Whether this fault is planted. Raises KeyError for a fault that no stand-in knows."""
        FAULTS[fault]
        return fault in self.faults

    def note(self, call: str, *arguments: Any) -> None:
        """Append one call to the log."""
        if self.log is None:
            return
        shown = ", ".join(_short(argument) for argument in arguments)
        with Path(self.log).open("a", encoding="utf-8") as file:
            file.write(f"{call}({shown})\n")


def settings() -> Settings:
    """What the variable says now. Raises ValueError for a key, lane or fault that is not known."""
    given = json.loads(os.environ.get(VARIABLE, "{}"))
    if unknown := set(given) - set(Settings.__dataclass_fields__):
        raise ValueError(f"{VARIABLE}: unknown {', '.join(sorted(unknown))}")
    found = Settings(**{**given, "faults": tuple(given.get("faults", ()))})
    if found.lane not in LANES:
        raise ValueError(f"{VARIABLE}: unknown lane {found.lane!r}, known: {', '.join(LANES)}")
    if unknown := set(found.faults) - set(FAULTS):
        raise ValueError(f"{VARIABLE}: unknown fault {', '.join(sorted(unknown))}, known: {', '.join(FAULTS)}")
    return found


def _short(value: Any) -> str:
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    text = str(value) if type(value).__repr__ is object.__repr__ else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
