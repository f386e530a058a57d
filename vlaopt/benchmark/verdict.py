"""Whether a measurement can be believed. INVALID: its figures are wrong; INCONCLUSIVE: they may be."""

from __future__ import annotations

import re
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

_SM_CLOCK = re.compile(r"clock_mhz\.gpu\d* sm$")


@dataclass(frozen=True)
class Surroundings:
    """What the machine did in the paced run.

    `governor` is one that lets clocks change, `unlocked` whether a reading found them so. `gpu` is the one that the
    policy uses; what happens to another says nothing of it. `gpu_programs` are others on a GPU, `load_lost` processes
    of the load that ended. `others_cpu_share` None: unknown. `unread` says why the state was not read to the end.
    """

    governor: str | None
    unlocked: bool
    others_cpu_share: float | None
    throttle_events: int
    timeline: Timeline | None
    gpu: str | None
    gpu_programs: int
    load_lost: int
    unread: str | None


@dataclass(frozen=True)
class Evidence:
    """What a measurement is judged by. `actions_wrong` says how actions differ; None: they do not."""

    paced: Paced
    back_to_back: BackToBack
    around: Surroundings
    warmed: int
    stable: bool
    observations: int
    overhead_us: float
    actions_wrong: str | None
    actions_checked: int


def judge(evidence: Evidence) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict and every reason for it, the gravest first."""
    wrong = [] if evidence.actions_wrong is None else [f"actions differ: {evidence.actions_wrong}"]
    invalid = [*wrong, *_disturbed(evidence.around)]
    doubts = [*_too_little(evidence), *_restless(evidence.around), *_unsteady(evidence)]
    verdict: Verdict = "INVALID" if invalid else "INCONCLUSIVE" if doubts else "VALID"
    return verdict, (*invalid, *doubts)


def _disturbed(around: Surroundings) -> list[str]:
    seen = around.timeline.throttling if around.timeline else {}
    throttling = {why: share for why, share in seen.items() if around.gpu or not why.startswith("GPU")}
    reasons = [f"throttled: {why}, at {share:.0%} of the readings" for why, share in throttling.items()]
    if around.throttle_events and not throttling:
        reasons.append(f"the CPU throttled {around.throttle_events} times during the run")
    if around.load_lost:
        reasons.append(f"load processes that ended during the run: {around.load_lost}")
    return reasons


def _too_little(evidence: Evidence) -> list[str]:
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
    return reasons


def _restless(around: Surroundings) -> list[str]:
    """An unknown governor, as in a virtual machine, raises no doubt by itself: the environment says so."""
    reasons = []
    if around.governor is not None:
        reasons.append(f"clocks not locked: governor {around.governor}")
    elif around.unlocked:
        reasons.append("clocks not locked")
    if around.gpu:
        reasons += _changing_clocks(around.timeline)
    if around.others_cpu_share is not None and around.others_cpu_share > BUSY_SHARE:
        reasons.append(f"busy machine: others took {around.others_cpu_share:.0%} of the CPU time")
    if around.gpu and around.gpu_programs:
        reasons.append(f"busy GPU: other programs on it: {around.gpu_programs}")
    if around.unread is not None:
        reasons.append(f"the machine's state is not known to the end: {around.unread}")
    return reasons + _heating(around.timeline)


def _changing_clocks(timeline: Timeline | None) -> list[str]:
    """NVML does not tell whether the clock of a GPU is locked; one that changes is not."""
    reasons = []
    for name, readings in timeline.series.items() if timeline else ():
        known = [value for value in readings if value is not None]
        if _SM_CLOCK.match(name) and known and min(known) < max(known):
            reasons.append(f"GPU clock not locked: {min(known):.0f} to {max(known):.0f} MHz during the run")
    return reasons


def _unsteady(evidence: Evidence) -> list[str]:
    reasons = []
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
