"""Whether a measurement can be believed. INVALID: its figures are wrong; INCONCLUSIVE: they may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlaopt.benchmark.record import BackToBack, Paced, Timeline, Verdict
from vlaopt.benchmark.statistics import mann_whitney, median, minimum_samples, nearest_rank

BUSY_SHARE = 0.10
OVERHEAD_LIMIT_US = 30.0
DRIFT_LIMIT = 0.05
HEATING_LIMIT_C = 3.0
"""More than the steps of 1 °C in which drivers and boards tell temperatures, and what moves between two ticks."""
FEWEST_TEMPERATURES = 5
"""In a quarter: that five readings of one law all lie above five others is chance once in 252 times."""


@dataclass(frozen=True)
class Evidence:
    """What was seen beside the latencies.

    `governor` is one that lets clocks change; `actions_wrong` says how actions differ, `unread` why the machine's state
    could not be read to the end; `others_cpu_share` None: unknown. `load_lost` are processes of the load that ended in
    the run. `gpu` is the one that the policy uses; what happens to another says nothing of it.
    """

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
    load_lost: int
    timeline: Timeline | None
    unlocked: bool
    gpu: str | None
    gpu_programs: int
    unread: str | None


def judge(evidence: Evidence) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and every reason for it, the gravest first."""
    invalid, doubts = _invalid(evidence), _doubts(evidence)
    verdict: Verdict = "INVALID" if invalid else "INCONCLUSIVE" if doubts else "VALID"
    return verdict, (*invalid, *doubts)


def _invalid(evidence: Evidence) -> list[str]:
    reasons = []
    if evidence.actions_wrong is not None:
        reasons.append(f"actions differ: {evidence.actions_wrong}")
    throttling = _throttling(evidence)
    reasons += [f"throttled: {why}, at {share:.0%} of the readings" for why, share in throttling.items()]
    if evidence.throttle_events and not throttling:
        reasons.append(f"the CPU throttled {evidence.throttle_events} times during the run")
    if evidence.load_lost:
        reasons.append(f"load processes that ended during the run: {evidence.load_lost}")
    return reasons


def _throttling(evidence: Evidence) -> dict[str, float]:
    seen = evidence.timeline.throttling if evidence.timeline else {}
    return {why: share for why, share in seen.items() if evidence.gpu or not why.startswith("GPU")}


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
    if evidence.governor is not None:
        reasons.append(f"clocks not locked: governor {evidence.governor}")
    elif evidence.unlocked:
        reasons.append("clocks not locked")
    if evidence.others_cpu_share is not None and evidence.others_cpu_share > BUSY_SHARE:
        reasons.append(f"busy machine: others took {evidence.others_cpu_share:.0%} of the CPU time")
    if evidence.gpu and evidence.gpu_programs:
        reasons.append(f"busy GPU: other programs on it: {evidence.gpu_programs}")
    if evidence.unread is not None:
        reasons.append(f"the machine's state is not known to the end: {evidence.unread}")
    reasons += _heating(evidence.timeline)
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


def _heating(timeline: Timeline | None) -> list[str]:
    """Sensors that did not stand still: the medians of the outer quarters of the run are more than 3 °C apart.

    And nine in ten readings of the one lie beyond nine in ten of the other, for a core's sensor jumps with its work.
    """
    reasons = []
    for name, readings in timeline.series.items() if timeline else ():
        known = [value for value in readings if value is not None]
        quarter = len(known) // 4
        if not name.startswith("temperature_c.") or quarter < FEWEST_TEMPERATURES:
            continue
        first, last = np.sort(known[:quarter]), np.sort(known[-quarter:])
        change = nearest_rank(last, 0.5) - nearest_rank(first, 0.5)
        cooler, warmer = (first, last) if change > 0 else (last, first)
        if abs(change) > HEATING_LIMIT_C and nearest_rank(warmer, 0.1) > nearest_rank(cooler, 0.9):
            sensor = name.removeprefix("temperature_c.")
            reasons.append(f"temperature not settled: {sensor} {change:+.0f} °C from the first to the last quarter")
    return reasons
