"""Plans, the engines of classic TensorRT: how one is asked for and what it needs, whoever builds it.

Backend `tensorrt` does by TensorRT's Python module, backend `trtexec` by its program.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

from vlaopt.artifact.graph import Graph
from vlaopt.backends import ONE_OF, EngineOptions
from vlaopt.backends.tensorrt.building import platform_name, settings_of
from vlaopt.errors import EnvironmentProblem, InputError

FILE = "engine.plan"
SETTINGS: dict[str, Any] = {
    "optimization_level": 3,
    "workspace_mib": 0,
    "cuda_graph": True,
    "version_compatible": False,
    "hardware_compatible": False,
    "profiles": {},
}
WHOLLY_STRONG = (10, 12)
"""From here on strong typing is complete, as NVIDIA says; before, a graph that fails so is built weakly typed."""

AMPERE_AND_LATER = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
"""The compute capabilities that a hardware compatible plan is for."""

HOST_CODE = (
    "version compatible: the plan loads in this version and later ones of its major, and brings a runtime of its own: "
    "host code that loading it runs"
)


def build_settings(options: EngineOptions, backend: str) -> dict[str, Any]:
    """All settings of a build. Raises InputError for one that is unknown, of a wrong kind, or not for this machine."""
    settings = settings_of(options, SETTINGS, backend)
    if settings["hardware_compatible"] and platform.machine() != "x86_64":
        raise InputError(
            f"hardware_compatible engines are for x86 machines, this one is {platform.machine()}",
            hint="leave out engine.tensorrt.hardware_compatible",
        )
    return settings


def check_gpu(options: EngineOptions, gpu: str, sm: str) -> None:
    """Raise EnvironmentProblem unless this machine's GPU is one of those that are built for: it builds for no other."""
    wanted = options.compute_capabilities
    if wanted and sm not in wanted:
        raise EnvironmentProblem(
            f"the target is for compute capability {', '.join(wanted)}; this machine's {gpu} is {sm}",
            hint="TensorRT builds for the GPU that it runs on; name a target of this machine's",
        )


def machine_of(version: str | None, gpu: str | None, sm: str | None) -> dict[str, str]:
    """What a machine has, by the names of `Engine.needs`; None is not known."""
    major = version.split(".")[0] if version else None
    found = {"os": platform_name(), "tensorrt": version, "tensorrt major": major, "gpu": gpu, "sm": sm}
    return {name: value for name, value in found.items() if value}


def needs_of(machine: Mapping[str, str], settings: Mapping[str, Any]) -> dict[str, str]:
    """What loads a plan that `machine` built: this very TensorRT and GPU, or those that it was made compatible with."""
    version = "tensorrt major" if settings["version_compatible"] else "tensorrt"
    alike = {"sm": ONE_OF.join(AMPERE_AND_LATER)}
    gpu = alike if settings["hardware_compatible"] else {"gpu": machine["gpu"], "sm": machine["sm"]}
    return {"os": machine["os"], version: machine[version], **gpu}


def weak_types(graph: Graph) -> frozenset[str]:
    """The element types of a graph that a weakly typed build must be allowed.

    int8 only beside Q/DQ nodes: those give its ranges, and no calibrator does.
    """
    quantized = any(node.operator == "DequantizeLinear" for node in graph.nodes())
    return graph.dtypes() - (set() if quantized else {"int8"})
