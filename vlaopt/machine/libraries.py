"""The libraries that build and run engines: CUDA, TensorRT in its forms, and Python's distributions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from vlaopt.machine.packages import numbers, version_of
from vlaopt.machine.sources import Sources
from vlaopt.machine.system import read_text

TRTEXEC = ("trtexec", "/usr/src/tensorrt/bin/trtexec", "/usr/local/tensorrt/bin/trtexec")
"""On the path, and where JetPack and NVIDIA's containers put it."""
TRTEXEC_VARIABLE = "VLAOPT_TRTEXEC"
"""The environment variable that names another."""

DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "cuda-python": ("cuda-bindings", "cuda-python"),
    "pycuda": ("pycuda",),
    "torch": ("torch",),
    "onnx": ("onnx",),
}
"""What vlaopt may drive or build with, by the name people know, and the distributions that bring it."""


class TensorRt(BaseModel):
    """The forms of TensorRT that are here, each with its version; `trtexec` is the program's path."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    system: str | None = None
    python: str | None = None
    rtx: str | None = None
    trtexec: str | None = None
    trtexec_version: str | None = None


def read_tensorrt(sources: Sources, packages: Mapping[str, str]) -> TensorRt:
    """TensorRT in the system, as a Python library, as TensorRT for RTX and as a program."""
    program, version = _trtexec(sources)
    rtx = (sources.installed(f"tensorrt-rtx-cu{major}-bindings") for major in (13, 12))
    return TensorRt(
        system=version_of(packages, r"libnvinfer\d+") or _library_version(sources.root, "libnvinfer.so"),
        python=sources.installed("tensorrt"),
        rtx=next(filter(None, rtx), None),
        trtexec=program,
        trtexec_version=version,
    )


def cuda_version(root: Path, packages: Mapping[str, str]) -> str | None:
    """The CUDA toolkit or runtime in the system: from its own file, its package, or the library's name."""
    try:
        told = json.loads(read_text(root / "usr/local/cuda/version.json") or "{}")
        if isinstance(version := told.get("cuda", {}).get("version"), str):
            return version
    except (ValueError, AttributeError):
        pass  # a file of another form says nothing
    return version_of(packages, r"cuda-cudart-\d+-\d+") or _library_version(root, "libcudart.so")


def read_libraries(sources: Sources) -> dict[str, str]:
    """Versions of Python's distributions that are here, by the names of `DISTRIBUTIONS`."""
    found = {}
    for name, distributions in DISTRIBUTIONS.items():
        if version := next(filter(None, map(sources.installed, distributions)), None):
            found[name] = version
    return found


def read_providers(sources: Sources) -> tuple[str, ...]:
    """What ONNX Runtime could compute on in this installation; not all of it need work on this machine."""
    runtime = sources.load("onnxruntime")
    return tuple(runtime.get_available_providers()) if runtime is not None else ()


def _trtexec(sources: Sources) -> tuple[str | None, str | None]:
    """Path and version of trtexec, whose first line says `[TensorRT v100300]`, or `[TensorRT v101602] [b10]`."""
    named = sources.variables.get(TRTEXEC_VARIABLE)
    for program in (named,) if named else TRTEXEC:
        found = re.search(r"\[TensorRT v(\d+)(\d\d)(\d\d)\]", sources.run([program, "--help"]) or "")
        if found:
            return program, ".".join(str(int(part)) for part in found.groups())
        if (sources.root / program.lstrip("/")).is_file():
            return program, None
    return None, None


def _library_version(root: Path, name: str) -> str | None:
    """The highest version in the file names of a library, `libnvinfer.so.10.3.0`."""
    places = ("usr/lib", "usr/lib/*-linux-gnu", "usr/lib64", "usr/local/cuda/lib64", "usr/local/tensorrt/lib")
    files = [path.name for place in places for path in root.glob(f"{place}/{name}.*")]
    versions = [found[1] for file in files if (found := re.fullmatch(rf"{re.escape(name)}\.([\d.]*\d)", file))]
    return max(versions, key=numbers, default=None)
