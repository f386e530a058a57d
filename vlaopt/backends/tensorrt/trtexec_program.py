"""The program trtexec: where it is, what it tells of this machine, what it is told, and its runs.

Options are those of NVIDIA's sources: samples/common/sampleOptions.cpp of TensorRT 10.3 to 11.1.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlaopt.artifact.graph import Graph
from vlaopt.backends import scratch_folder
from vlaopt.backends.tensorrt.library import numbers
from vlaopt.backends.tensorrt.plans import weak_types
from vlaopt.backends.tensorrt.trtexec_log import Log, parse
from vlaopt.errors import EnvironmentProblem

PROGRAM = "VLAOPT_TRTEXEC"
"""The environment variable that names the program."""

ONNX, PLAN, LAYERS, OUTPUTS = "model.onnx", "engine.plan", "layers.json", "outputs.json"
"""What the files are called in the folder that trtexec works in."""

HINT = f"JetPack's package libnvinfer-bin brings it; elsewhere name its path in {PROGRAM}"

_PLACES = ("/usr/src/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
_FLAGS = {
    "float16": "--fp16",
    "bfloat16": "--bf16",
    "int8": "--int8",
    "float8e4m3fn": "--fp8",
    "int4": "--int4",
}
"""What a weakly typed build must be allowed, by element type."""


def find() -> Path | None:
    """The program: that which the environment names, else on the PATH, else where NVIDIA's packages put it."""
    if named := os.environ.get(PROGRAM):
        return Path(named) if os.access(named, os.X_OK) else None
    found = shutil.which("trtexec") or next((place for place in _PLACES if os.access(place, os.X_OK)), None)
    return Path(found) if found else None


def probed() -> Log:
    """What trtexec tells of itself and of its device. Raises EnvironmentProblem when it cannot be started."""
    program = find()
    if program is None:
        raise EnvironmentProblem("trtexec is not found", hint=HINT)
    return _probe(program, program.stat().st_mtime_ns, frozenset(os.environ.items()))


@functools.lru_cache(maxsize=4)
def _probe(program: Path, changed: int, environment: frozenset[tuple[str, str]]) -> Log:
    """The device is told before the plan is looked for, which is not there; then trtexec ends."""
    with scratch_folder() as folder:
        log, status = run([f"--loadEngine={PLAN}", "--getPlanVersionOnly"], folder)
    if not log.version:
        raise EnvironmentProblem(f"{program} does not run: {log.told(status)}", hint=HINT)
    return log


def run(arguments: Sequence[str], folder: Path) -> tuple[Log, int]:
    """The log and exit status of trtexec with these arguments in `folder`."""
    program = find()
    if program is None:
        raise EnvironmentProblem("trtexec is not found", hint=HINT)
    try:
        done = subprocess.run(
            [str(program.absolute()), *arguments],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
    except OSError as error:
        raise EnvironmentProblem(f"{program} cannot be started: {error.strerror}", hint=HINT) from error
    return parse(done.stdout.decode("utf-8", "replace")), done.returncode


def build_arguments(
    settings: Mapping[str, Any],
    typing: Sequence[str],
    shapes: Mapping[str, Sequence[tuple[int, ...]]],
    cache: Path | None,
) -> list[str]:
    """What trtexec is told to build `model.onnx` in its working directory.

    `typing` are the flags of precision, `shapes` the least, usual and largest shape of every input with dynamic
    dimensions. `cache` is the file of the timing cache, which trtexec itself locks, reads and writes.
    """
    arguments = [f"--onnx={ONNX}", f"--saveEngine={PLAN}", "--skipInference", *typing]
    arguments += [f"--builderOptimizationLevel={settings['optimization_level']}"]
    if settings["workspace_mib"]:
        arguments.append(f"--memPoolSize=workspace:{settings['workspace_mib']}M")
    if settings["version_compatible"]:
        arguments.append("--versionCompatible")
    if settings["hardware_compatible"]:
        arguments.append("--hardwareCompatibilityLevel=ampere+")
    for at, bound in enumerate(("min", "opt", "max")):
        if shapes:
            arguments.append(f"--{bound}Shapes=" + _listed({name: sizes[at] for name, sizes in shapes.items()}))
    if cache is not None:
        arguments.append(f"--timingCacheFile={cache}")
    return [*arguments, "--profilingVerbosity=detailed", f"--exportLayerInfo={LAYERS}"]


def strong_typing(version: str) -> list[str]:
    """From 11 on every network is strongly typed, and the flag says nothing."""
    return [] if numbers(version) >= (11,) else ["--stronglyTyped"]


def weak_typing(graph: Graph) -> list[str]:
    """Every precision that the graph holds. For int8 without Q/DQ nodes trtexec would make ranges up at random."""
    held = weak_types(graph)
    return [flag for dtype, flag in _FLAGS.items() if dtype in held]


def run_arguments(
    version: tuple[int, ...],
    places: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    version_compatible: bool,
) -> list[str]:
    """What trtexec is told to run the plan in its working directory once, with inputs from `places` by name.

    From 11 on it neither copies inputs nor leaves CUDA graphs out unless it is told to.
    """
    arguments = [f"--loadEngine={PLAN}", "--iterations=1", "--duration=0", "--warmUp=0"]
    if version_compatible:
        arguments.append("--versionCompatible")
    if version >= (11,):
        arguments += ["--includeDataTransfers", "--noCudaGraph"]
    if shapes:
        arguments.append("--shapes=" + _listed(shapes))
    if places:
        arguments.append("--loadInputs=" + ",".join(f"{name}:{place}" for name, place in places.items()))
    return [*arguments, f"--exportOutput={OUTPUTS}"]


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
