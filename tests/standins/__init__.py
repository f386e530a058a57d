"""Stand-ins for TensorRT, cuda-python, pycuda and trtexec: how tests switch them on. The README beside tells more."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).resolve().parent
LANES = ("10.3", "10.13", "10.16", "11.4")

_MODULES = ("tensorrt", "cuda", "pycuda", "standin")


def environment(
    lane: str,
    *,
    gpu: str = "NVIDIA Orin",
    sm: str = "8.7",
    faults: Sequence[str] = (),
    log: str | Path | None = None,
    **more: Any,
) -> dict[str, str]:
    """The variables that make a process use the stand-ins, to be laid over `os.environ`.

    `faults` are those of `standin.settings.FAULTS`; every call of a stand-in is appended to `log`. `more` are other
    fields of `standin.settings.Settings`: memory_mib, integrated, os, driver.
    """
    wanted = {"lane": lane, "gpu": gpu, "sm": sm, "faults": list(faults), "log": None if log is None else str(log)}

    def in_front(variable: str, folder: Path) -> str:
        return os.pathsep.join([str(folder), *filter(None, [os.environ.get(variable)])])

    return {
        "VLAOPT_STANDIN": json.dumps({**wanted, **more}),
        "PYTHONPATH": in_front("PYTHONPATH", FOLDER),
        "PATH": in_front("PATH", FOLDER / "bin"),
        "VLAOPT_STANDIN_PYTHON": sys.executable,
    }


@contextmanager
def installed(lane: str, **wanted: Any) -> Iterator[ModuleType]:
    """The stand-ins in this process: `import tensorrt` gives them inside, and what was there before again behind.

    Gives the module tensorrt, imported freshly. Arguments as of `environment`. Keep nothing of it longer.
    """
    variables = environment(lane, **wanted)
    before = {name: os.environ.get(name) for name in variables}
    kept = _remove()
    os.environ.update(variables)
    sys.path.insert(0, str(FOLDER))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module("tensorrt")
    finally:
        _remove()
        sys.modules.update(kept)
        sys.path.remove(str(FOLDER))
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def alive() -> dict[str, int]:
    """How many allocations, streams, events and graphs of this process's device live. Only inside `installed`."""
    counts: dict[str, int] = importlib.import_module("standin.device").DEVICE.alive()
    return counts


def calls(log: str | Path) -> list[str]:
    """What was called, in order: lines like "Builder.create_network(2)"."""
    path = Path(log)
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _remove() -> dict[str, ModuleType]:
    """Take the modules with these names out of `sys.modules`."""
    names = [name for name in sys.modules if name.split(".")[0] in _MODULES]
    return {name: sys.modules.pop(name) for name in names}
