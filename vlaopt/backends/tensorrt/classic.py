"""Classic TensorRT, 10.3 to 11: builds and runs engines for the GPU of this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vlaopt.artifact.graph import Graph
from vlaopt.backends import Engine, EngineOptions, Placement, Session
from vlaopt.backends.tensorrt.building import settings_of
from vlaopt.backends.tensorrt.cuda import driver_problem
from vlaopt.errors import EnvironmentProblem
from vlaopt.optional import installed_version

SETTINGS: dict[str, Any] = {
    "optimization_level": 3,
    "workspace_mib": 0,
    "cuda_graph": True,
    "version_compatible": False,
    "hardware_compatible": False,
    "profiles": {},
}

_HINT = "pip install 'vlaopt[tensorrt]'"


@dataclass(frozen=True)
class TensorRtBackend:
    """Builds and opens components with TensorRT."""

    name: str = "tensorrt"
    placement: Placement = "tensorrt"
    settings: Mapping[str, Any] = field(default_factory=lambda: SETTINGS)
    native: bool = True
    timed: bool = True

    def missing(self) -> str | None:
        return None if importlib.util.find_spec("tensorrt") else f"tensorrt is not installed: {_HINT}"

    def version(self) -> str:
        if found := installed_version("tensorrt"):
            return found
        raise EnvironmentProblem("tensorrt is not installed", hint=_HINT)

    def runnable(self) -> str | None:
        return self.missing() or driver_problem()

    def machine(self) -> Mapping[str, str]:
        return {"tensorrt": self.version()}

    def build(self, graph: Graph, options: EngineOptions) -> Engine:
        settings_of(options, SETTINGS, self.name)
        raise EnvironmentProblem("tensorrt: not in this version of vlaopt")

    def open(self, files: Mapping[str, bytes], options: EngineOptions) -> Session:
        raise EnvironmentProblem("tensorrt: not in this version of vlaopt")


BACKEND = TensorRtBackend()
