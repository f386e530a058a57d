"""A backend for tests whose engines count as native code. It is ONNX Runtime, and dies where $NATIVE_FAKE says.

As a third party plugs it in: the child processes that vlaopt starts find it by its entry point too.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vlaopt.artifact.graph import Graph
from vlaopt.backends import Engine, EngineOptions, Session, onnxruntime
from vlaopt.errors import EnvironmentProblem
from vlaopt.files import write_file

VARIABLE = "NATIVE_FAKE"


def told() -> dict[str, Any]:
    """What a test set: `log`; `machine`, facts to give; `refuse`, what to refuse; `die_at_build` or `kill_at_build`, at
    which build this process or its parent dies; `die_at`, where else; `signal`, of what."""
    return json.loads(os.environ.get(VARIABLE, "{}"))


@dataclass
class NativeFake(onnxruntime.OnnxRuntimeBackend):
    """Says in a log who built and opened."""

    name: str = "native-fake"
    native: bool = True
    timed: bool = True
    settings: Mapping[str, Any] = field(default_factory=lambda: {"workspace_mib": 0})

    def machine(self) -> Mapping[str, str]:
        return {"sm": "8.7", "gpu": "Fake", **told().get("machine", {})}

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        count = note("build")
        if options.advance:
            options.advance("Compiling", 1, 2)
        if count == told().get("die_at_build"):
            die()
        if count == told().get("kill_at_build"):
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)  # the kernel ends this process with its parent
        if told().get("refuse") == "build":
            raise EnvironmentProblem("no room to build")
        engine = super().build(graph, replace(options, settings={}))
        counts = {"int8": 2}  # what tests/board.py plans; on a CPU the audit of this graph would find less
        return replace(engine, precisions=counts, layers={}, needs={"sm": "8.7"}, facts={"process": os.getpid()})

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        note("open")
        if told().get("die_at") == "open":
            die()
        if told().get("refuse") == "open":
            raise EnvironmentProblem("the engine does not load")
        return super().open(files, replace(options, settings={}))


def note(what: str) -> int:
    """Add a line to the log; gives how many there are of its kind."""
    if "log" not in told():
        return 0
    with Path(told()["log"]).open("a") as log:
        log.write(f"{what} {os.getpid()}\n")
    return sum(line.startswith(what) for line in Path(told()["log"]).read_text().splitlines())


def die() -> None:
    os.write(2, b"the fake was told to die\n")
    os.kill(os.getpid(), signal.Signals[told()["signal"]])


BACKEND = NativeFake()
UNTIMED = NativeFake(name="untimed-fake", timed=False)


def install(folder: Path) -> Path:
    """What makes `folder`, on `sys.path`, an installed package with these backends."""
    info = folder / "native_fake-1.0.dist-info"
    write_file(info / "METADATA", b"Metadata-Version: 2.1\nName: native-fake\nVersion: 1.0\n")
    points = [
        "[vlaopt.backends]",
        "native-fake = tests.native_fake:BACKEND",
        "untimed-fake = tests.native_fake:UNTIMED",
    ]
    write_file(info / "entry_points.txt", "\n".join(points).encode() + b"\n")
    return folder
