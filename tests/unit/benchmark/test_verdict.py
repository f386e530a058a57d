"""Each reason for disbelief alone: what makes a measurement invalid, what raises doubts, and what does neither."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.benchmark.record import BackToBack, Paced, Timeline, WakeUp
from vlaopt.benchmark.statistics import summarise
from vlaopt.benchmark.verdict import Evidence, Surroundings, judge


def paced(samples_ms: tuple[float, ...]) -> Paced:
    return Paced(
        latency_ms=summarise(samples_ms),
        jitter_ms=None,
        deadline_ms=20.0,
        ticks=len(samples_ms),
        misses=0,
        miss_rate=0.0,
        dropped=(),
        wake_up=WakeUp(p50_us=None, max_us=None),
        samples_ms=samples_ms,
    )


STEADY = (10.0,) * 500
SOUND = Evidence(
    paced=paced(STEADY),
    back_to_back=BackToBack(latency_ms=summarise(STEADY), jitter_ms=0.0, throughput_hz=100.0, samples_ms=STEADY),
    around=Surroundings(
        governor=None,
        unlocked=False,
        others_cpu_share=0.01,
        throttle_events=0,
        timeline=None,
        gpu="NVIDIA RTX 4090",
        gpu_programs=0,
        load_lost=0,
        unread=None,
    ),
    warmed=50,
    stable=True,
    observations=8,
    overhead_us=5.0,
    actions_wrong=None,
    actions_checked=500,
)


def given_that(**seen: Any) -> Evidence:
    """Sound evidence but for what was seen, in the run or around it."""
    around = {name: seen.pop(name) for name in list(seen) if name in Surroundings.__dataclass_fields__}
    return replace(SOUND, around=replace(SOUND.around, **around), **seen)


def timeline(**told: Any) -> Timeline:
    count = len(next(iter(told.get("series", {"none": (None,)}).values())))
    return Timeline(**{"period_s": 0.5, "seconds": tuple(0.5 * tick for tick in range(count)), "series": {}, **told})


def heated(*temperatures_c: float | None) -> Evidence:
    return given_that(timeline=timeline(series={"temperature_c.tj": tuple(temperatures_c)}))


def test_nothing_seen_is_nothing_to_doubt() -> None:
    assert judge(SOUND) == ("VALID", ())
    assert judge(given_that(timeline=timeline(), others_cpu_share=None)) == ("VALID", ())


@pytest.mark.parametrize(
    ("seen", "verdict", "reason"),
    [
        ({"actions_wrong": "observation 3 is off"}, "INVALID", "actions differ: observation 3 is off"),
        ({"throttle_events": 2}, "INVALID", "the CPU throttled 2 times during the run"),
        (
            {"timeline": timeline(throttling={"GPU too hot": 0.125}), "throttle_events": 2},
            "INVALID",
            "throttled: GPU too hot, at 12% of the readings",
        ),
        ({"load_lost": 1}, "INVALID", "load processes that ended during the run: 1"),
        ({"paced": paced((10.0,) * 43)}, "INCONCLUSIVE", "insufficient samples: 43 paced ticks, 44 needed"),
        ({"observations": 1}, "INCONCLUSIVE", "one observation repeated: caches flatter it"),
        ({"actions_checked": 0}, "INCONCLUSIVE", "actions not checked: no expected actions given"),
        ({"stable": False}, "INCONCLUSIVE", "warm-up did not become stable in 50 calls"),
        ({"governor": "schedutil", "unlocked": True}, "INCONCLUSIVE", "clocks not locked: governor schedutil"),
        ({"unlocked": True}, "INCONCLUSIVE", "clocks not locked"),
        (
            {"timeline": timeline(series={"clock_mhz.gpu0 sm": (1980.0, None, 1410.0)})},
            "INCONCLUSIVE",
            "GPU clock not locked: 1410 to 1980 MHz during the run",
        ),
        ({"timeline": timeline(series={"clock_mhz.gpu0 sm": (1980.0, None, 1980.0)})}, "VALID", None),
        ({"timeline": timeline(series={"clock_mhz.cpu": (800.0, 900.0)})}, "VALID", None),
        ({"others_cpu_share": 0.11}, "INCONCLUSIVE", "busy machine: others took 11% of the CPU time"),
        ({"gpu_programs": 2}, "INCONCLUSIVE", "busy GPU: other programs on it: 2"),
        ({"unread": "it died"}, "INCONCLUSIVE", "the machine's state is not known to the end: it died"),
        (
            {"paced": paced((10.0,) * 250 + (11.0,) * 250)},
            "INCONCLUSIVE",
            "latency drifts: +10% from the first to the last quarter of the run",
        ),
        ({"overhead_us": 100.0}, "VALID", None),
        (
            {"back_to_back": BackToBack(
                latency_ms=summarise((0.01,) * 50), jitter_ms=0.0, throughput_hz=1e5, samples_ms=(0.01,) * 50
            ), "overhead_us": 31.0},
            "INCONCLUSIVE",
            "harness overhead of 31 µs per call",
        ),
    ],
)  # fmt: skip
def test_each_reason_alone(seen: dict[str, Any], verdict: str, reason: str | None) -> None:
    assert judge(given_that(**seen)) == (verdict, () if reason is None else (reason,))


def test_what_a_gpu_does_says_nothing_of_a_policy_on_the_cpu() -> None:
    seen = {"gpu_programs": 2, "timeline": timeline(throttling={"GPU too hot": 1.0})}
    assert judge(given_that(**seen, gpu=None)) == ("VALID", ())
    assert judge(given_that(**seen))[0] == "INVALID"


def test_what_is_invalid_comes_before_what_is_doubtful() -> None:
    verdict, reasons = judge(given_that(throttle_events=1, stable=False))
    assert (verdict, [reason.split()[0] for reason in reasons]) == ("INVALID", ["the", "warm-up"])


@pytest.mark.parametrize("turn", [1, -1])
def test_a_machine_that_still_warms_up_or_cools_down_has_not_settled(turn: int) -> None:
    ramp = [50 + turn * 0.5 * reading for reading in range(20)]
    assert judge(heated(*ramp)) == (
        "INCONCLUSIVE",
        (f"temperature not settled: tj {turn * 8:+d} °C from the first to the last quarter",),
    )


@pytest.mark.parametrize(
    "temperatures_c",
    [
        [50.0] * 20,
        [50.0 + reading * 0.15 for reading in range(20)],  # 3 °C at most
        [50.0 + 5 * reading for reading in range(19)],  # a quarter of fewer than five
        [50.0, 60.0] * 10,  # jumps with the work
        [60.0, *[50.0] * 8, *[55.0] * 8, 50.0, 50.0, 50.0],  # apart in the middle alone
        [None] * 20,
    ],
)
def test_a_machine_that_stands_still_or_jumps_about_has_settled(temperatures_c: list[float | None]) -> None:
    assert judge(heated(*temperatures_c)) == ("VALID", ())


def test_only_temperatures_are_judged_as_such() -> None:
    rising = timeline(series={"power_w.VDD_IN": tuple(float(watts) for watts in range(40))})
    assert judge(given_that(timeline=rising)) == ("VALID", ())


@given(st.integers(0, 2**32 - 1), st.integers(20, 400))
def test_noise_of_a_degree_around_a_settled_temperature_raises_no_doubt(seed: int, count: int) -> None:
    noise = np.random.default_rng(seed).normal(0, 1, count).clip(-1.5, 1.5)
    assert judge(heated(*(60 + noise).tolist())) == ("VALID", ())


def test_heat_is_seen_in_a_long_run_through_outliers() -> None:
    rng = np.random.default_rng(0)
    rising = 50 + 10 * (1 - np.exp(-np.arange(4000) / 1000)) + 20 * (rng.random(4000) < 0.02)
    verdict, reasons = judge(heated(*rising.tolist()))
    assert verdict == "INCONCLUSIVE"
    assert reasons == ("temperature not settled: tj +6 °C from the first to the last quarter",)
