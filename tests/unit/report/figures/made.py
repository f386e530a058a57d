"""Facts made by hand, for figures: whatever a policy and a machine may bring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlaopt.artifact.manifest import Manifest
from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.benchmark import record as bench
from vlaopt.benchmark.actions import ActionError, compare_actions
from vlaopt.benchmark.environment import Environment
from vlaopt.benchmark.statistics import percentile, summarise
from vlaopt.report.facts import ComponentFacts, Example, Facts, Fit, Form, Gate, Layer, Trial

HZ = 50.0
CHUNK = 10


def paced(samples_ms: Sequence[float], *, hz: float = HZ, dropped: Sequence[int] = ()) -> bench.Paced:
    misses = sum(sample > 1000 / hz for sample in samples_ms)
    return bench.Paced(
        latency_ms=summarise(samples_ms),
        jitter_ms=None,
        deadline_ms=1000 / hz,
        ticks=len(samples_ms),
        misses=misses,
        miss_rate=misses / len(samples_ms),
        dropped=tuple(dropped),
        wake_up=bench.WakeUp(p50_us=1.0, max_us=9.0),
        samples_ms=tuple(samples_ms),
    )


def record(
    samples_ms: Sequence[float],
    back_to_back_ms: Sequence[float] | None = None,
    *,
    hz: float = HZ,
    dropped: Sequence[int] = (),
    timeline: bench.Timeline | None = None,
    breakdown: bench.Breakdown | None = None,
    curves: Sequence[bench.Curve] = (),
) -> bench.BenchRecord:
    together = list(back_to_back_ms or samples_ms)
    return bench.BenchRecord(
        subject=bench.Subject(),
        environment=Environment.model_construct(),
        settings=bench.BenchSettings(hz=hz),
        verdict="VALID",
        reasons=(),
        warmup_iterations=50,
        paced=paced(samples_ms, hz=hz, dropped=dropped),
        back_to_back=bench.BackToBack(
            latency_ms=summarise(together), jitter_ms=None, throughput_hz=1.0, samples_ms=tuple(together)
        ),
        energy=bench.Energy(reason="not available"),
        overhead_us=1.0,
        others_cpu_share=None,
        actions=bench.Actions(checked=1, worst_difference=0.0),
        timeline=timeline,
        breakdown=breakdown,
        curves=tuple(curves),
    )


def timeline(seconds: Sequence[float], **series: Sequence[float | None]) -> bench.Timeline:
    """Series by the first word of their names: `clock_mhz=…` is that of "cpu0"."""
    named = {name if name == "gpu_memory_mib" else f"{name}.cpu0": tuple(values) for name, values in series.items()}
    return bench.Timeline(period_s=0.5, seconds=tuple(seconds), series=named)


BREAKDOWN = bench.Breakdown(
    chunks=40,
    whole_ms=9.4,
    together_ms=8.9,
    components={
        "vision": bench.ComponentTime(calls=1, wall_ms=3.1, device_ms=2.8, copies_ms=0.2),
        "language": bench.ComponentTime(calls=1, wall_ms=1.2, device_ms=1.1, copies_ms=0.0),
        "action_expert": bench.ComponentTime(calls=10, wall_ms=4.4, device_ms=3.9, copies_ms=0.1),
    },
    processors_ms=0.4,
    loop_ms=0.2,
)


def curve(
    over: Any, values: Sequence[int], latencies_ms: Sequence[float], errors: Sequence[float | None]
) -> bench.Curve:
    points = [
        bench.CurvePoint(
            value=value,
            latency_ms=percentile(np.linspace(0.9 * latency, 1.1 * latency, 20), 0.5),
            action_error_mean=error,
        )
        for value, latency, error in zip(values, latencies_ms, errors, strict=True)
    ]
    return bench.Curve(over=over, points=tuple(points))


def spec(action_dim: int = 4, *, gripper: int | None = None, steps: int = 10) -> PolicySpec:
    """A policy of three components; its action expert runs `steps` times."""

    def tensor(name: str, *shape: int) -> dict[str, Any]:
        return {"name": name, "dtype": "float32", "shape": (1, *shape)}

    return PolicySpec.model_validate(
        {
            "type": "made",
            "action_dim": action_dim,
            "gripper": gripper,
            "components": {
                "vision": {"kind": "vision", "inputs": [tensor("image", 3, 96, 96)], "outputs": [tensor("seen", 64)]},
                "language": {"kind": "prefix", "inputs": [tensor("tokens", 16)], "outputs": [tensor("said", 64)]},
                "action_expert": {
                    "kind": "step",
                    "inputs": [tensor("seen", 64), tensor("said", 64), tensor("x", CHUNK, action_dim), tensor("t")],
                    "outputs": [tensor("velocity", CHUNK, action_dim)],
                },
            },
            "loop": {
                "kind": "euler",
                "steps": steps,
                "start": 1.0,
                "end": 0.0,
                "step": "action_expert",
                "state_input": "x",
                "time_input": "t",
                "velocity_output": "velocity",
            },
            "noise": {"law": "normal", "shape": (1, CHUNK, action_dim)},
            "chunk": {"size": CHUNK, "n_action_steps": CHUNK // 2},
            "preprocess": [
                {"kind": "image", "input": "observation.images.front", "output": "image", "height": 96, "width": 96},
                {"kind": "tokenise", "input": "task", "output": "tokens", "max_length": 16, "asset": "tokenizer.json"},
            ],
            "postprocess": {"input": "x", "statistics": "action"},
        }
    )


def action_error(action_dim: int = 4, size: float = 0.02, *, seed: int = 0) -> ActionError:
    reference = np.random.default_rng(seed).standard_normal((8, CHUNK, action_dim)).cumsum(axis=1)
    noise = size * np.random.default_rng(seed + 1).standard_normal(reference.shape)
    return compare_actions(
        reference + noise, reference, std=np.ones(action_dim), n_action_steps=CHUNK // 2, gripper=None
    )


def example(sample: int, action_dim: int, chunk: int = CHUNK, size: float = 0.1) -> Example:
    random = np.random.default_rng(sample)
    reference = random.standard_normal((chunk, action_dim)).cumsum(axis=0)
    return Example(sample, size, reference + size * random.standard_normal(reference.shape), reference)


def layers(count: int, scheme: str = "int8") -> tuple[Layer, ...]:
    return tuple(
        Layer(
            f"blocks.{number // 4}.linear{number % 4}/Gemm", "Gemm", scheme, None, "fp32" if number % 7 == 3 else scheme
        )
        for number in range(count)
    )


def component(name: str, kind: str, count: int, *, calls: int = 1, scheme: str = "int8") -> ComponentFacts:
    found = layers(count, scheme)
    return ComponentFacts(
        name=name,
        kind=kind,
        calls=calls,
        in_loop=calls > 1,
        variant="quantized",
        reason=None,
        bytes=1_250_000 * count,
        plain_bytes=5_000_000 * count,
        precisions={one: sum(layer.runs == one for layer in found) for one in (scheme, "fp32")},
        layers=found,
    )


def form(name: str, stage: str, size: int, latency_ms: float | None, error: float | None) -> Form:
    return Form(name, stage, "onnxruntime", size, latency_ms, None if error is None else action_error(size=error))


def facts(action_dim: int = 4, **changes: Any) -> Facts:
    """Facts that hold everything, with `changes`."""
    error = action_error(action_dim)
    whole: dict[str, Any] = {
        "id": "0" * 64,
        "version": "1.0.0+000000000000",
        "manifest": Manifest(
            name="made",
            version="1.0.0",
            target="cpu-x86",
            stage="bench",
            recipe={},
            lineage=(),
            tools={},
            metrics={},
            files=(),
        ),
        "spec": spec(action_dim, gripper=action_dim - 1),
        "record": record(
            np.random.default_rng(0).lognormal(2.2, 0.1, 600).round(3).tolist(),
            timeline=timeline(
                (0.0, 0.5, 1.0),
                clock_mhz=(1500.0, 1490.0, None),
                temperature_c=(50.0, 51.0, 53.0),
                power_w=(9.0, 12, 11),
            ),
            breakdown=BREAKDOWN,
            curves=(
                curve("batch", (1, 2, 4, 8), (9, 12, 20, 36), (None,) * 4),
                curve("steps", (2, 4, 10), (4, 6, 9.4), (0.2, 0.06, 0.02)),
            ),
        ),
        "record_from": "reports/bench.json",
        "forms": (
            form("eager", "export", 200_000_000, 61.0, None),
            form("FP32", "export", 200_000_000, 33.0, 7e-7),
            form("pruned", "prune", 150_000_000, 25.0, 0.004),
            form("int8", "quantize", 51_000_000, None, 0.021),
            form("engine", "engine", 52_000_000, 9.4, 0.021),
        ),
        "forms_how": "in turns",
        "components": (
            component("vision", "vision", 21, scheme="fp16"),
            component("language", "prefix", 6),
            component("action_expert", "step", 40, calls=10),
        ),
        "gates": (
            Gate("golden: mean action error", error.executed.mean, 0.05, True),
            Gate("golden: p95 action error", error.executed.p95, 0.2, True),
        ),
        "verified_on": "onnxruntime",
        "error": error,
        "held_out": None,
        "deviations": (1.0,) * action_dim,
        "examples": (example(3, action_dim), example(5, action_dim, size=0.02)),
        "trials": (
            Trial("uniform", {}, 0.03, 0.0, 51_000_000, False, None),
            Trial("cheapest", {"vision.stem": "fp32"}, 0.024, 0.4, 52_000_000, True, None),
            Trial("cheapest", {"head.*": "fp16"}, None, None, 0, False, "it crashes"),
        ),
        "fits": (Fit("vision", "stem/Conv", 0.02, 8.0, 0.001), Fit("action_expert", "out/Gemm", 0.09, 31.0, 0.0)),
        "inputs": {},
        "recipe_text": "name: made\n",
        "missing": {},
    }
    return Facts(**{**whole, **changes})
