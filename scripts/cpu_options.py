"""What options of the CPU libraries are worth to a policy: each against vlaopt's own, in turns, on one thread.

python scripts/cpu_options.py artifacts/edge-vla/…/cpu-x86    the table of vlaopt/README.md; minutes

Chunks are timed by the CPU time of this process, so that a shared machine gives nearly the figures of an idle one. The
first row below vlaopt's own is the same again: what differs by no more is noise.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import onnxruntime
import torch

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.manifest import component_path
from vlaopt.backends import EngineOptions
from vlaopt.backends import onnxruntime as ort
from vlaopt.backends import openvino as ov
from vlaopt.benchmark.compare import interleave
from vlaopt.benchmark.schedule import SystemClock
from vlaopt.runtime.golden import Golden, Sample, of_sample
from vlaopt.runtime.policy import assemble

ONE = EngineOptions(threads=1)
LEVEL = onnxruntime.GraphOptimizationLevel
ORT: Mapping[str, Callable[[Any], object]] = {
    "vlaopt's own": lambda _: None,
    "the same again": lambda _: None,
    "optimisation level extended": lambda options: setattr(
        options, "graph_optimization_level", LEVEL.ORT_ENABLE_EXTENDED
    ),
    "optimisation level basic": lambda options: setattr(options, "graph_optimization_level", LEVEL.ORT_ENABLE_BASIC),
    "weights not packed beforehand": lambda options: options.add_session_config_entry(
        "session.disable_prepacking", "1"
    ),
    "no memory arena": lambda options: setattr(options, "enable_cpu_mem_arena", False),
    "no memory pattern": lambda options: setattr(options, "enable_mem_pattern", False),
}
OPENVINO: Mapping[str, Mapping[str, Any]] = {
    "vlaopt's own": {},
    "the same again": {},
    "denormals are zeros": {"CPU_DENORMALS_OPTIMIZATION": True},
    "one stream": {"NUM_STREAMS": "1"},
    "threads pinned to cores": {"ENABLE_CPU_PINNING": True},
    "execution mode accuracy": {"EXECUTION_MODE_HINT": "ACCURACY"},
}


class CpuClock(SystemClock):
    """The CPU time of this process."""

    def now_ns(self) -> int:
        """`time.process_time_ns`."""
        return time.process_time_ns()


def policies(artifact: Artifact, library: Any, options: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """A call per row: whole chunks on components that were opened while the function `options` gave what is changed."""
    built = {
        name: library.BACKEND.build(artifact.graph(component_path(name)), ONE) for name in artifact.spec().components
    }
    calls = {}
    for row, change in changed.items():
        with mock.patch.object(library, options, change):
            sessions = {name: library.BACKEND.open(engine.files, ONE) for name, engine in built.items()}
        calls[row] = of_sample(assemble(artifact, sessions, backend=library.BACKEND.name).predict_chunk)
    return calls


def session_options(change: Callable[[Any], object]) -> Callable[[EngineOptions], Any]:
    """ONNX Runtime's options as vlaopt sets them, then changed."""
    usual = ort._session_options

    def changed(given: EngineOptions) -> Any:
        options = usual(given)
        change(options)
        return options

    return changed


def properties(change: Mapping[str, Any]) -> Callable[[Mapping[str, bytes], EngineOptions], dict[str, Any]]:
    """OpenVINO's properties as vlaopt sets them, then changed."""
    usual = ov._config
    return lambda files, given: {**usual(files, given), **change}


def flushed(call: Callable[[Sample], object]) -> Callable[[Sample], object]:
    """`call` while this thread takes denormals for zeros: ONNX Runtime's own option would do so for good."""

    def run(sample: Sample) -> object:
        torch.set_flush_denormal(True)
        try:
            return call(sample)
        finally:
            torch.set_flush_denormal(False)

    return run


def main() -> None:
    artifact = Artifact.open(sys.argv[1])
    rows = policies(artifact, ort, "_session_options", {row: session_options(change) for row, change in ORT.items()})
    rows["denormals are zeros"] = flushed(rows["the same again"])
    other = policies(artifact, ov, "_config", {row: properties(change) for row, change in OPENVINO.items()})
    for name, calls in (("ONNX Runtime", rows), ("OpenVINO", other)):
        samples = Golden.of(artifact).samples
        turns = interleave(calls, samples, rounds=20, iterations_per_round=10, seconds=20, clock=CpuClock())
        own = turns.median_ms("vlaopt's own")
        print(f"\n{name}: {turns.count} chunks each, CPU time")
        for row in calls:
            print(f"  {turns.median_ms(row) / own:5.2f}  {turns.median_ms(row):9.3f} ms  {row}")


if __name__ == "__main__":
    main()
