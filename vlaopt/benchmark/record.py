"""The record of one measurement, as reports keep it and later runs are compared with. Unknown is null, never NaN."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vlaopt.benchmark.environment import Environment
from vlaopt.benchmark.statistics import Distribution, Percentile
from vlaopt.errors import InputError
from vlaopt.hashing import canonical_json

Verdict = Literal["VALID", "INVALID", "INCONCLUSIVE"]


class Part(BaseModel):
    """Common rules: unknown keys refused, values frozen, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BenchSettings(Part):
    """How to measure: control rate, seconds paced and back-to-back, seed of the order, bounds of the warm-up."""

    hz: float = Field(default=20.0, gt=0, le=10_000)
    duration_s: float = Field(default=10.0, gt=0, le=86_400)
    back_to_back_s: float = Field(default=3.0, gt=0, le=86_400)
    seed: int = Field(default=0, ge=0)
    warmup_iterations: int = Field(default=50, ge=50)
    warmup_cap_s: float = Field(default=30.0, gt=0)


class Subject(Part):
    """What was measured: the artifact's id, and the policy it was built from. Records of one policy can be compared."""

    artifact: str | None = None
    policy: str | None = None


class WakeUp(Part):
    """How late the schedule itself woke, in µs: the machine's share in the latencies. None: it never had to wait."""

    p50_us: float | None
    max_us: float | None


class Paced(Part):
    """Latency from the intended tick at the control rate, dropped ticks included; see `schedule.run_ticks`.

    Tick k was intended at k/hz; `samples_ms[k]` is its latency, rounded to 1 µs; all figures come from those samples.
    A miss is a latency above the deadline, which is one period. `dropped` lists the ticks that were never started.
    """

    latency_ms: Distribution
    jitter_ms: float | None
    deadline_ms: float
    ticks: int
    misses: int
    miss_rate: float
    dropped: tuple[int, ...]
    wake_up: WakeUp
    samples_ms: tuple[float, ...]


class BackToBack(Part):
    """Latency of calls that follow each other at once; throughput is calls per second spent in calls."""

    latency_ms: Distribution
    jitter_ms: float | None
    throughput_hz: float
    samples_ms: tuple[float, ...]


class Energy(Part):
    """Joules per action chunk in the paced run, counted and less what the idle machine draws; or why none."""

    joules: float | None = None
    joules_above_idle: float | None = None
    source: str | None = None
    reason: str | None = None


class Actions(Part):
    """Actions checked while the clock ran, and the worst difference in units of the tolerance (above 1 differs).

    `worst_difference` is None when none was checked, or when one was not finite or of another shape.
    """

    checked: int
    worst_difference: float | None


class BenchRecord(Part):
    """One measurement. `verdict` other than VALID comes with `reasons`.

    `told` is what the components' sessions said of how they ran, such as whether it was as a CUDA graph.
    """

    schema_: Literal["vlaopt.bench/1"] = Field(default="vlaopt.bench/1", alias="schema")
    subject: Subject
    environment: Environment
    settings: BenchSettings
    verdict: Verdict
    reasons: tuple[str, ...]
    cold_start_ms: float | None
    warmup_iterations: int
    paced: Paced
    back_to_back: BackToBack
    components_ms: dict[str, Percentile]
    peak_memory_mib: float | None
    energy: Energy
    overhead_us: float
    others_cpu_share: float | None
    actions: Actions
    told: dict[str, tuple[str, ...]] = {}

    def to_json(self) -> str:
        """Canonical JSON."""
        return canonical_json(self.model_dump(mode="json", by_alias=True)).decode()

    @classmethod
    def from_json(cls, text: str | bytes, *, where: str) -> BenchRecord:
        """The record in `text`. Raises InputError, with `where`, when it is not one of this schema."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"]) or "record"
            raise InputError(f"not a vlaopt.bench/1 record: {place}: {first['msg']}", where=where) from error
