"""Whether a measurement can be believed. INVALID: its figures are wrong; INCONCLUSIVE: they may be."""

from __future__ import annotations

from dataclasses import dataclass

from vlaopt.benchmark.record import BackToBack, Paced, Verdict
from vlaopt.benchmark.statistics import mann_whitney, median, minimum_samples

BUSY_SHARE = 0.10
OVERHEAD_LIMIT_US = 30.0
DRIFT_LIMIT = 0.05


@dataclass(frozen=True)
class Evidence:
    """What was seen beside the latencies. `actions_wrong` says how actions differ; `others_cpu_share` None: unknown."""

    paced: Paced
    back_to_back: BackToBack
    governor: str | None
    warmed: int
    stable: bool
    observations: int
    overhead_us: float
    others_cpu_share: float | None
    throttle_events: int
    actions_wrong: str | None
    actions_checked: int


def judge(evidence: Evidence) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and every reason for it, the gravest first."""
    invalid, doubts = _invalid(evidence), _doubts(evidence)
    verdict: Verdict = "INVALID" if invalid else "INCONCLUSIVE" if doubts else "VALID"
    return verdict, (*invalid, *doubts)


def _invalid(evidence: Evidence) -> list[str]:
    reasons = []
    if evidence.actions_wrong is not None:
        reasons.append(f"actions differ: {evidence.actions_wrong}")
    if evidence.throttle_events:
        reasons.append(f"the CPU throttled {evidence.throttle_events} times during the run")
    return reasons


def _doubts(evidence: Evidence) -> list[str]:
    """An unknown governor, as in a virtual machine, raises no doubt by itself: the environment says so."""
    reasons = []
    ticks, needed = evidence.paced.ticks, minimum_samples(0.9)
    if ticks < needed:
        reasons.append(f"insufficient samples: {ticks} paced ticks, {needed} needed")
    if evidence.observations < 2:
        reasons.append("one observation repeated: caches flatter it")
    if evidence.actions_checked == 0:
        reasons.append("actions not checked: no expected actions given")
    if not evidence.stable:
        reasons.append(f"warm-up did not become stable in {evidence.warmed} calls")
    if evidence.governor not in (None, "performance"):
        reasons.append(f"clocks not locked: governor {evidence.governor}")
    if evidence.others_cpu_share is not None and evidence.others_cpu_share > BUSY_SHARE:
        reasons.append(f"busy machine: others took {evidence.others_cpu_share:.0%} of the CPU time")
    drift = _drift(evidence.paced.samples_ms)
    if drift is not None:
        reasons.append(f"latency drifts: {drift:+.0%} from the first to the last quarter of the run")
    typical_us = evidence.back_to_back.latency_ms.p50.value
    if evidence.overhead_us > max(OVERHEAD_LIMIT_US, 10.0 * (typical_us or 0.0)):
        reasons.append(f"harness overhead of {evidence.overhead_us:.0f} µs per call")
    return reasons


def _drift(samples_ms: tuple[float, ...]) -> float | None:
    """Change of the median between the outer quarters, when above 5 % and not chance: heat or a leak."""
    quarter = len(samples_ms) // 4
    if quarter < minimum_samples(0.5):
        return None
    first, last = samples_ms[:quarter], samples_ms[-quarter:]
    before = median(first)
    change = (median(last) - before) / before if before > 0 else 0.0
    return change if abs(change) > DRIFT_LIMIT and mann_whitney(first, last) < 0.01 else None
