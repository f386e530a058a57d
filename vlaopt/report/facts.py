"""What a report tells: the types alone. Read by `reading`, told by `page` and `markdown`, drawn by `figures`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlaopt.artifact.manifest import Manifest
from vlaopt.artifact.policy_spec import PolicySpec
from vlaopt.benchmark.actions import ActionError
from vlaopt.benchmark.record import BenchRecord
from vlaopt.tensors import Array


@dataclass(frozen=True)
class Form:
    """One form that the policy took on its way. `stage` gave it; `bytes` are those of its weights or graphs.

    `latency_ms` is the p50 of a whole chunk at batch 1, all forms measured in turns in one process; None where that was
    not measured. `error` is against the reference on golden observations; None for the reference itself, or where it
    was not run.
    """

    name: str
    stage: str
    backend: str
    bytes: int
    latency_ms: float | None
    error: ActionError | None


@dataclass(frozen=True)
class Layer:
    """One layer as it was planned (`scheme`, why) and as the engine really runs it; `runs` is None where that is not
    known, or where the layer was fused into another."""

    name: str
    operator: str | None
    scheme: str | None
    reason: str | None
    runs: str | None


@dataclass(frozen=True)
class ComponentFacts:
    """One component, in the order they run. `calls` per chunk; `variant` is None without an engine.

    `bytes` are those of its engine, else of its final graph; `plain_bytes` of its FP32 graph, where the artifact holds
    it. `precisions` counts the layers of the engine by what they run in, else those of the plan.
    """

    name: str
    kind: str
    calls: int
    in_loop: bool
    variant: str | None
    reason: str | None
    bytes: int
    plain_bytes: int | None
    precisions: Mapping[str, int]
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Gate:
    """A limit and what was found. It holds when the value is not above it."""

    name: str
    value: float
    limit: float
    held: bool


@dataclass(frozen=True)
class Example:
    """A golden sample: the optimised actions beside the reference's, [chunk, action_dim] in the robot's units.

    `error` is the mean error of its executed steps, in standard deviations.
    """

    sample: int
    error: float
    actions: Array
    reference: Array


@dataclass(frozen=True)
class Trial:
    """One plan that a search for mixed precision tried: parts moved to another scheme, the rest as it started.

    `error` is the mean action error, milliseconds are against the plan that is int8 throughout.
    """

    what: str
    moved: Mapping[str, str]
    error: float | None
    against_uniform_ms: float | None
    bytes: int
    held: bool
    refused: str | None


@dataclass(frozen=True)
class Fit:
    """How well 8 bits hold a tensor: `noise` is the RMS error of rounding relative to its RMS, `saturated` the share of
    its values beyond the range, `outliers` the largest of them over the 99.9th percentile."""

    component: str
    tensor: str
    noise: float
    outliers: float
    saturated: float


@dataclass(frozen=True)
class Facts:
    """All that a report tells. What is None or empty has its reason in `missing`, by the field's name, in words.

    `record_from` says where the record was found. `forms` start with the reference where this machine measured them;
    `forms_how` then says how. `error` is that of the form which runs, on golden observations, `held_out` on
    observations that nothing was tuned on. `deviations` are the standard deviations of the actions in training,
    [action_dim]. `inputs` are digests of what the stages took from outside, such as the checkpoint, by recipe key.
    """

    id: str
    version: str
    manifest: Manifest
    spec: PolicySpec
    record: BenchRecord | None
    record_from: str | None
    forms: tuple[Form, ...]
    forms_how: str | None
    components: tuple[ComponentFacts, ...]
    gates: tuple[Gate, ...]
    verified_on: str | None
    error: ActionError | None
    held_out: ActionError | None
    deviations: tuple[float, ...]
    examples: tuple[Example, ...]
    trials: tuple[Trial, ...]
    fits: tuple[Fit, ...]
    inputs: Mapping[str, str]
    recipe_text: str
    missing: Mapping[str, str]
