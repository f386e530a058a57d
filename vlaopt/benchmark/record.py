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
    """How to measure: control rate, seconds paced and back-to-back, seed of the order, bounds of the warm-up.

    `load` is the number of processes that keep the machine busy meanwhile, as a robot's planners and cameras do.
    """

    hz: float = Field(default=20.0, gt=0, le=10_000)
    duration_s: float = Field(default=10.0, gt=0, le=86_400)
    back_to_back_s: float = Field(default=3.0, gt=0, le=86_400)
    seed: int = Field(default=0, ge=0)
    warmup_iterations: int = Field(default=50, ge=50)
    warmup_cap_s: float = Field(default=30.0, gt=0)
    load: int = Field(default=0, ge=0, le=1024)


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
    """Joules per action chunk in the paced run, or why none: from one period before the first tick to the last action.

    `joules_above_idle` is less what the machine drew in two seconds while the policy rested and its load, if any, did
    not. `parts` is `joules` by counter or rail, `source` the probes that told them.
    """

    joules: float | None = None
    joules_above_idle: float | None = None
    parts: dict[str, float] = {}
    source: str | None = None
    reason: str | None = None


class Timeline(Part):
    """What the machine did during the paced run, read by a process of its own every `period_s` seconds.

    `seconds` are the moments, 0 being the first intended tick; every series has one value for each, None where there
    was none. Names are `clock_mhz.<name>`, `temperature_c.<name>`, `power_w.<name>`, `gpu_memory_mib`.
    `throttling` are the reasons that were seen, each with the share of moments at which it was.
    """

    period_s: float
    seconds: tuple[float, ...]
    series: dict[str, tuple[float | None, ...]]
    throttling: dict[str, float] = {}


class ColdStart(Part):
    """A fresh process, in ms: its start and the import of the backend's library, opening the policy, the first call."""

    import_ms: float
    open_ms: float
    first_ms: float

    @property
    def total_ms(self) -> float:
        """From the start of the process to the first action."""
        return round(self.import_ms + self.open_ms + self.first_ms, 3)


class Memory(Part):
    """The largest resident size of a fresh process that opened the policy and ran it, and of its GPU memory, in MiB."""

    host_mib: float | None = None
    device_mib: float | None = None


class ComponentTime(Part):
    """What a component takes of one chunk, medians over chunks. `calls` per chunk; times on the device by events.

    `copies_ms` is copying its inputs there and its outputs back. None where the backend has no such clock.
    """

    calls: float
    wall_ms: float
    device_ms: float | None = None
    copies_ms: float | None = None


class Breakdown(Part):
    """Where the time of a chunk goes: medians over `chunks` chunks of each part, which so need not add up exactly.

    `processors_ms` is preparing the observation and turning tensors into actions, `loop_ms` what is left: the loop's
    own arithmetic and calls. Components run one by one here, where the policy otherwise runs them as one CUDA graph
    (`together_ms` is then the same chunks as that).
    """

    chunks: int
    whole_ms: float
    together_ms: float
    components: dict[str, ComponentTime]
    processors_ms: float
    loop_ms: float


class CurvePoint(Part):
    """One value: latency of a call (a whole batch), and the mean action error against the golden actions."""

    value: int
    latency_ms: Percentile
    action_error_mean: float | None = None


class Curve(Part):
    """Cost over the size of a batch, or over the number of the loop's steps; all points measured in turns."""

    over: Literal["batch", "steps"]
    points: tuple[CurvePoint, ...]


class Actions(Part):
    """Actions checked while the clock ran, and the worst difference in units of the tolerance (above 1 differs).

    `worst_difference` is None when none was checked, or when one was not finite or of another shape.
    """

    checked: int
    worst_difference: float | None


class BenchRecord(Part):
    """One measurement. `verdict` other than VALID comes with `reasons`.

    `told` is what the components' sessions said of how they ran, such as whether it was as a CUDA graph.
    `others_cpu_share` is the CPU time that neither this process nor its load took.
    """

    schema_: Literal["vlaopt.bench/2"] = Field(default="vlaopt.bench/2", alias="schema")
    subject: Subject
    environment: Environment
    settings: BenchSettings
    verdict: Verdict
    reasons: tuple[str, ...]
    warmup_iterations: int
    paced: Paced
    back_to_back: BackToBack
    energy: Energy
    overhead_us: float
    others_cpu_share: float | None
    actions: Actions
    cold_start: ColdStart | None = None
    memory: Memory = Memory()
    breakdown: Breakdown | None = None
    curves: tuple[Curve, ...] = ()
    timeline: Timeline | None = None
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
            raise InputError(f"not a vlaopt.bench/2 record: {place}: {first['msg']}", where=where) from error
