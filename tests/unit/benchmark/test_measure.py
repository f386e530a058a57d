"""A policy of known latency on a clock of our own: every figure and every verdict is exact."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.unit.benchmark.test_schedule import by_hand
from tests.unit.test_isolated import gone
from vlaopt.benchmark import load
from vlaopt.benchmark.environment import read_environment
from vlaopt.benchmark.measure import measure
from vlaopt.benchmark.record import BenchRecord, BenchSettings
from vlaopt.benchmark.sampling import Sampler
from vlaopt.benchmark.statistics import summarise
from vlaopt.errors import InputError
from vlaopt.machine.state import State

ROOT = Path(__file__).parents[3]
Bench = Callable[..., BenchRecord]
Policy = Callable[[Callable[[int], float]], Any]
HALF_MINUTE = BenchSettings(hz=50, duration_s=30, back_to_back_s=3)


def test_a_steady_policy_is_valid_and_its_figures_are_exact(bench: Bench, policy: Policy) -> None:
    record = bench(policy(lambda n: 10.0), settings=HALF_MINUTE)
    assert (record.verdict, record.reasons) == ("VALID", ())
    paced = record.paced
    assert (paced.latency_ms.min, paced.latency_ms.p50.value, paced.latency_ms.p99.value) == (10.0, 10.0, 10.0)
    assert (paced.ticks, paced.misses, paced.dropped, paced.jitter_ms, paced.deadline_ms) == (1500, 0, (), 0.0, 20.0)
    assert paced.latency_ms.p99_9.reason == "insufficient samples: 1500, p99.9 needs 4603"
    assert record.back_to_back.throughput_hz == 100.0
    assert (record.warmup_iterations, record.overhead_us) == (50, 0.0)
    assert record.actions.checked == 1500 + 300
    assert record.actions.worst_difference == 0.0


LAWS: dict[str, Callable[[int], float]] = {
    "uniform": lambda n: 1 + n % 10,
    "two-valued": lambda n: 4.0 if n % 20 else 30.0,
    "heavy tail": lambda n: round(min(900.0, 2 / (1 - n % 1000 / 1000) ** 1.2), 3),
    "slower than the rate": lambda n: 31.0,
}


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_every_figure_of_a_known_law_is_the_one_counted_by_hand(
    bench: Bench, policy: Policy, law: Callable[[int], float]
) -> None:
    settings = BenchSettings(hz=50, duration_s=100, back_to_back_s=3)
    record = bench(policy(law), settings=settings)
    warmed, burst = record.warmup_iterations, len(record.back_to_back.samples_ms)
    assert list(record.back_to_back.samples_ms) == [law(warmed + call) for call in range(burst)]
    call_ns = [round(law(warmed + burst + call) * 1e6) for call in range(5000)]
    paced_ns, dropped = by_hand(call_ns, [tick * 20_000_000 for tick in range(5000)])
    assert list(record.paced.samples_ms) == [latency_ns / 1e6 for latency_ns in paced_ns]
    assert list(record.paced.dropped) == dropped
    ordered = sorted(record.paced.samples_ms)
    latency = record.paced.latency_ms
    assert (latency.p50.value, latency.p90.value) == (ordered[2499], ordered[4499])
    assert (latency.p99.value, latency.p99_9.value) == (ordered[4949], ordered[4994])
    assert (latency.min, latency.max) == (ordered[0], ordered[-1])
    assert record.paced.jitter_ms == round(ordered[4949] - ordered[2499], 3)
    assert record.paced.misses == sum(sample > 20 for sample in ordered)
    assert record.paced.miss_rate == record.paced.misses / 5000
    spent_s = sum(record.back_to_back.samples_ms) / 1e3
    assert record.back_to_back.throughput_hz == pytest.approx(burst / spent_s, rel=1e-4)


def test_a_stall_shows_in_the_paced_tail_and_not_in_the_back_to_back_median(bench: Bench, policy: Policy) -> None:
    settings = BenchSettings(hz=50, duration_s=100, back_to_back_s=3)
    record = bench(policy(lambda n: 80.0 if n % 500 == 499 else 10.0), settings=settings)
    assert record.back_to_back.latency_ms.p50.value == 10.0
    assert record.paced.latency_ms.p50.value == 10.0
    assert record.paced.latency_ms.p99_9.value == 80.0
    # each stall: its own tick and the three it covered
    stalls = record.paced.samples_ms.count(80.0)
    assert stalls == 10
    assert len(record.paced.dropped) == 3 * stalls
    assert record.paced.misses == 4 * stalls
    assert record.paced.miss_rate == pytest.approx(4 * stalls / 5000)


def test_a_late_wake_up_is_counted_in_the_latency_and_reported_apart(bench: Bench, policy: Policy, clock: Any) -> None:
    clock.wake_up_ns = 300_000
    record = bench(policy(lambda n: 10.0), settings=HALF_MINUTE)
    assert record.paced.latency_ms.p50.value == 10.3
    assert record.back_to_back.latency_ms.p50.value == 10.0
    assert (record.paced.wake_up.p50_us, record.paced.wake_up.max_us) == (300.0, 300.0)


def test_three_ticks_are_insufficient_and_inconclusive(bench: Bench, policy: Policy) -> None:
    record = bench(policy(lambda n: 10.0), settings=BenchSettings(hz=1, duration_s=3))
    assert record.verdict == "INCONCLUSIVE"
    assert record.reasons == ("insufficient samples: 3 paced ticks, 44 needed",)
    assert record.paced.latency_ms.p50.value is None
    assert record.paced.latency_ms.p50.reason == "insufficient samples: 3, p50 needs 8"
    assert record.paced.jitter_ms is None


def test_all_observations_are_used_in_an_order_of_the_seed(bench: Bench, policy: Policy) -> None:
    first, again, other = (policy(lambda n: 10.0) for _ in range(3))
    bench(first)
    bench(again)
    bench(other, settings=BenchSettings(seed=1))
    assert sorted(first.seen[:8]) == list(range(8))
    assert first.seen == again.seen
    assert first.seen[:8] != other.seen[:8]


@pytest.mark.parametrize(
    ("spoil", "worst", "reason"),
    [
        (lambda actions: actions + 0.03, pytest.approx(3.0, rel=1e-4), "is off by 3 times the tolerance"),
        (lambda actions: np.where(actions == actions.max(), math.nan, actions), None, "not finite or of another shape"),
        (lambda actions: actions[:5], None, "not finite or of another shape"),
    ],
)
def test_one_wrong_chunk_makes_the_run_invalid(
    bench: Bench, policy: Policy, spoil: Callable[..., np.ndarray], worst: float | None, reason: str
) -> None:
    right = policy(lambda n: 10.0)

    def wrong_once(observation: Any) -> np.ndarray:
        actions: np.ndarray = right(observation)
        return spoil(actions) if right.count == 400 else actions

    record = bench(wrong_once)
    assert record.verdict == "INVALID"
    assert "actions differ" in record.reasons[0]
    assert reason in record.reasons[0]
    assert record.actions.worst_difference == worst
    assert "NaN" not in record.to_json()


def test_a_callable_decides_what_differs(bench: Bench, policy: Policy) -> None:
    record = bench(policy(lambda n: 10.0), tolerance=lambda actions, wanted: 0.25)
    assert (record.verdict, record.actions.worst_difference) == ("VALID", 0.25)


def test_without_expected_actions_a_run_is_inconclusive_and_nan_still_invalid(bench: Bench, policy: Policy) -> None:
    record = bench(policy(lambda n: 10.0), expected=None, tolerance=None)
    assert (record.verdict, record.reasons) == ("INCONCLUSIVE", ("actions not checked: no expected actions given",))
    record = bench(lambda observation: policy(lambda n: 10.0)(observation) * math.nan, expected=None, tolerance=None)
    assert record.verdict == "INVALID"


def test_a_policy_that_slows_down_while_it_runs_is_inconclusive(bench: Bench, policy: Policy) -> None:
    record = bench(policy(lambda n: 10.0 if n < 500 else 10.0 + (n - 500) * 0.004), settings=HALF_MINUTE)
    assert record.verdict == "INCONCLUSIVE"
    assert record.reasons[0].startswith("latency drifts: +")


def test_warm_up_goes_on_until_the_median_stands_still(bench: Bench, policy: Policy) -> None:
    record = bench(policy(lambda n: max(10.0, 100.0 - n)))
    assert 90 < record.warmup_iterations < 150
    assert record.verdict == "VALID"


def test_a_warm_up_that_never_settles_ends_at_its_cap_and_says_so(bench: Bench, policy: Policy) -> None:
    record = bench(policy(lambda n: 10.0 * 1.01 ** min(n, 60)), settings=BenchSettings(warmup_cap_s=1))
    assert f"warm-up did not become stable in {record.warmup_iterations} calls" in record.reasons


def test_unlocked_clocks_and_a_single_observation_raise_doubts(
    bench: Bench, policy: Policy, tree: Callable[..., Path]
) -> None:
    tree({"sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "schedutil\n"})
    one = [{"state": np.zeros(4, np.float32)}]
    record = bench(policy(lambda n: 10.0), observations=one, expected=[np.zeros((10, 4), np.float32)])
    assert record.verdict == "INCONCLUSIVE"
    assert record.reasons == (
        "one observation repeated: caches flatter it",
        "clocks not locked: governor performance+schedutil",
    )


@pytest.mark.parametrize(
    ("busy", "throttled", "verdict", "reason"),
    [
        (9_000, 0, "INCONCLUSIVE", "busy machine: others took 90% of the CPU time"),
        (0, 2, "INVALID", "the CPU throttled 2 times during the run"),
    ],
)
def test_a_busy_machine_is_inconclusive_and_a_throttling_one_invalid(
    bench: Bench, policy: Policy, tree: Callable[..., Path], busy: int, throttled: int, verdict: str, reason: str
) -> None:
    count = "sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count"
    own = "42 (python) R 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0\n"
    tree({"proc/stat": "cpu  0 0 0 0 0 0 0 0 0 0\n", "proc/self/stat": own, count: "0\n"})
    steady = policy(lambda n: 10.0)

    def disturbed(observation: Any) -> np.ndarray:
        if steady.count == 500:
            tree({"proc/stat": f"cpu  {busy} 0 0 {10_000 - busy} 0 0 0 0 0 0\n", count: f"{throttled}\n"})
        actions: np.ndarray = steady(observation)
        return actions

    record = bench(disturbed, settings=HALF_MINUTE)
    assert (record.verdict, record.reasons) == (verdict, (reason,))


def test_what_the_machine_did_in_the_paced_run_is_on_its_time_axis(bench: Bench, policy: Policy, sampler: Any) -> None:
    sampler.state = lambda seconds: State(clocks_mhz={"cpu": 2000.0}, temperatures_c={"tj": 50.0}, held=True)
    record = bench(policy(lambda n: 10.0), settings=BenchSettings(hz=50, duration_s=4, back_to_back_s=1))
    assert record.timeline is not None
    # the readings just before and after the run, and one in each half second between
    assert record.timeline.seconds == (-0.02, 0.48, 0.98, 1.48, 1.98, 2.48, 2.98, 3.48, 3.98, 3.99)
    assert record.timeline.series == {"clock_mhz.cpu": (2000.0,) * 10, "temperature_c.tj": (50.0,) * 10}
    assert (record.timeline.period_s, record.timeline.throttling, record.verdict) == (0.5, {}, "VALID")
    assert bench(policy(lambda n: 10.0), sampler=None).timeline is None


@pytest.mark.parametrize(
    ("state", "verdict", "reason"),
    [
        (State(throttling=("GPU too hot",)), "INVALID", "throttled: GPU too hot, at 100% of the readings"),
        (State(held=False), "INCONCLUSIVE", "clocks not locked"),
        (State(gpu_processes=3), "INCONCLUSIVE", "busy GPU: other programs on it: 3"),
        (State(gpu_processes=0, held=True), "VALID", None),
    ],
)
def test_states_that_make_figures_wrong_or_doubtful(
    bench: Bench, policy: Policy, sampler: Any, jetson: Path, state: State, verdict: str, reason: str | None
) -> None:
    sampler.state = lambda seconds: state
    record = bench(policy(lambda n: 10.0), machine=read_environment(root=jetson, gpu="NVIDIA RTX 4090"))
    assert (record.verdict, record.reasons) == (verdict, () if reason is None else (reason,))


def test_other_programs_on_a_gpu_that_is_not_used_raise_no_doubt(bench: Bench, policy: Policy, sampler: Any) -> None:
    sampler.state = lambda seconds: State(gpu_processes=3)
    assert bench(policy(lambda n: 10.0)).verdict == "VALID"


def test_a_machine_that_heats_up_meanwhile_is_inconclusive(bench: Bench, policy: Policy, sampler: Any) -> None:
    sampler.state = lambda seconds: State(temperatures_c={"tj": 40.0 + seconds})
    record = bench(policy(lambda n: 10.0))
    assert record.verdict == "INCONCLUSIVE"
    assert record.reasons[0].startswith("temperature not settled: tj +8 °C")


def test_a_reader_that_fails_leaves_the_latencies_and_says_so(bench: Bench, policy: Policy, sampler: Any) -> None:
    sampler.board, sampler.failure = ("VDD_IN",), "it was killed"
    record = bench(policy(lambda n: 10.0), settings=HALF_MINUTE)
    assert record.paced.latency_ms.p50.value == 10.0
    assert record.reasons == ("the machine's state is not known to the end: it was killed",)
    assert record.energy.reason == "not available: it was killed"


def test_the_load_works_from_before_the_warm_up_to_the_end_and_is_nobody_elses_nor_is_the_reader(
    bench: Bench, policy: Policy, sampler: Any, tree: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler.reader = 79
    stat = "{} (python) R 1 1 1 0 -1 0 0 0 0 0 {} 0 0 0 20 0\n"
    begin = {"proc/stat": "cpu  0 0 0 0 0 0 0 0 0 0\n", "proc/self/stat": stat.format(42, 0)}
    tree(
        {
            **begin,
            "proc/77/stat": stat.format(77, 0),
            "proc/78/stat": stat.format(78, 0),
            "proc/79/stat": stat.format(79, 0),
        }
    )
    steady = policy(lambda n: 10.0)
    noted: list[tuple[str, int]] = []

    @contextmanager
    def busy(count: int, seed: int) -> Iterator[Any]:
        noted.append((f"{count} at work, seed {seed}", steady.count))
        yield SimpleNamespace(processes=(77, 78), lost=lambda: 0)
        noted.append(("gone", steady.count))

    def loaded(observation: Any) -> np.ndarray:
        if steady.count == 500:
            # of 10 000 jiffies: 3000 + 3000 of the load, 2000 of the reader, 500 of this process, 300 of others
            tree({"proc/stat": "cpu  8800 0 0 1200 0 0 0 0 0 0\n", "proc/self/stat": stat.format(42, 500)})
            tree({f"proc/{process}/stat": stat.format(process, 3000) for process in (77, 78)})
            tree({"proc/79/stat": stat.format(79, 2000)})
        actions: np.ndarray = steady(observation)
        return actions

    monkeypatch.setattr(load, "busy", busy)
    record = bench(loaded, settings=BenchSettings(hz=50, duration_s=30, load=2, seed=7))
    assert noted == [("2 at work, seed 7", 0), ("gone", 50 + 300 + 1500)]
    assert (record.others_cpu_share, record.verdict, record.settings.load) == (0.03, "VALID", 2)


def test_the_latency_of_each_tick_is_told_when_its_call_is_over(bench: Bench, policy: Policy) -> None:
    told: list[tuple[int, int]] = []
    stalling = policy(lambda n: 80.0 if n % 500 == 499 else 10.0)
    record = bench(stalling, on_tick=lambda latency_ns: told.append((latency_ns, stalling.count)), settings=HALF_MINUTE)
    assert [latency_ns / 1e6 for latency_ns, _ in told] == list(record.paced.samples_ms)
    counts = [count for _, count in told]
    assert counts == sorted(counts)
    assert counts[0] == stalling.count - (len(told) - len(record.paced.dropped)) + 1


@pytest.mark.parametrize("call", [20, 200, 450])
def test_an_interruption_anywhere_ends_load_and_leaves_nothing(
    bench: Bench, policy: Policy, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    steady = policy(lambda n: 10.0)
    ended: list[int] = []

    @contextmanager
    def busy(count: int, seed: int) -> Iterator[Any]:
        try:
            yield SimpleNamespace(processes=(), lost=lambda: 0)
        finally:
            ended.append(count)

    def interrupted(observation: Any) -> np.ndarray:
        if steady.count == call:
            raise KeyboardInterrupt("Ctrl-C")
        actions: np.ndarray = steady(observation)
        return actions

    monkeypatch.setattr(load, "busy", busy)
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        bench(interrupted, settings=BenchSettings(load=3))
    assert ended == [3]


@pytest.mark.parametrize("counted", [True, False])
def test_energy_per_chunk_is_given_raw_and_above_idle(
    bench: Bench, policy: Policy, clock: Any, sampler: Any, counted: bool
) -> None:
    """5 W at rest and 20 W more during the 10 ms of a call at 50 Hz, told as a counter or as power."""
    steady = policy(lambda n: 10.0)

    def state(seconds: float) -> State:
        if counted:
            return State(energy_j={"package-0": 5.0 * seconds + 20.0 * 0.010 * steady.count})
        return State(power_w={"package-0": 15.0 if steady.count else 5.0})

    sampler.state, sampler.board, sampler.sources, sampler.missing = state, ("package-0",), ("cpu",), {}
    energy = bench(steady, settings=BenchSettings(hz=50, duration_s=4, back_to_back_s=1)).energy
    assert energy.source == "cpu"
    assert energy.joules == pytest.approx(0.3, rel=0.01)
    assert energy.joules_above_idle == pytest.approx(0.2, rel=0.01)
    assert energy.parts == {"package-0": energy.joules}


def test_no_energy_counter_is_said_and_not_zero(bench: Bench, policy: Policy, sampler: Any) -> None:
    energy = bench(policy(lambda n: 10.0)).energy
    assert (energy.joules, energy.parts, energy.reason) == (None, {}, "not available: no RAPL counters")
    sampler.missing = {}
    energy = bench(policy(lambda n: 10.0)).energy
    assert (energy.joules, energy.reason) == (None, "not available: no source of energy on this machine")
    energy = bench(policy(lambda n: 10.0), sampler=None).energy
    assert (energy.joules, energy.reason) == (None, "not available: the machine's state was not read")


def test_progress_is_told_between_phases_only(bench: Bench, policy: Policy) -> None:
    phases: list[tuple[str, int]] = []
    steady = policy(lambda n: 10.0)
    bench(steady, on_progress=lambda phase: phases.append((phase, steady.count)))
    assert [phase for phase, _ in phases] == ["idle", "warm-up", "back-to-back", "paced"]
    assert [count for _, count in phases] == [0, 0, 50, 350]


def test_a_record_survives_the_round_trip_and_its_figures_follow_from_its_samples(bench: Bench, policy: Policy) -> None:
    record = bench(policy(lambda n: 10 + (n % 7) / 7), settings=HALF_MINUTE)
    text = record.to_json()
    again = BenchRecord.from_json(text, where="bench.json")
    assert again == record
    assert json.loads(text)["schema"] == "vlaopt.bench/2"
    assert summarise(again.paced.samples_ms) == record.paced.latency_ms
    assert summarise(again.back_to_back.samples_ms) == record.back_to_back.latency_ms


@pytest.mark.parametrize("text", ["", "[]", '{"schema": "vlaopt.bench/1"}', '{"schema": "vlaopt.bench/2"}'])
def test_what_is_not_a_record_is_refused_with_its_place(text: str) -> None:
    with pytest.raises(InputError, match=r"^bench\.json: not a vlaopt\.bench/2 record: "):
        BenchRecord.from_json(text, where="bench.json")


def test_a_record_with_nan_is_refused(bench: Bench, policy: Policy) -> None:
    text = bench(policy(lambda n: 10.0)).to_json().replace('"overhead_us":0.0', '"overhead_us":NaN')
    with pytest.raises(InputError, match=r"overhead_us|expected value|JSON"):
        BenchRecord.from_json(text, where="bench.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"observations": []}, "no observations"),
        ({"expected": []}, "0 expected action chunks for 8 observations"),
        ({"tolerance": None}, "tolerance None: a number above 0"),
        ({"tolerance": 0.0}, r"tolerance 0\.0: a number above 0"),
        ({"tolerance": math.nan}, "tolerance nan: a number above 0"),
    ],
)
def test_unusable_observations_or_tolerance_are_refused(
    bench: Bench, policy: Policy, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        bench(policy(lambda n: 10.0), **given)


def test_the_harness_itself_costs_at_most_30_microseconds_at_the_median() -> None:
    """An empty session on the real clock, its action check included. The best of five: others may be at work here."""
    observations = [{"state": np.full(4, index, np.float32)} for index in range(4)]
    chunks = [np.zeros((10, 4), np.float32)] * 4
    std = np.ones(4, np.float32)
    settings = BenchSettings(hz=200, duration_s=0.1, back_to_back_s=0.01)

    def difference(actions: np.ndarray, expected: np.ndarray) -> float:
        return float((np.abs(actions - expected)[:5] / std).max()) / 0.01

    records = [
        measure(lambda observation: chunks[0], observations, expected=chunks, tolerance=difference, settings=settings)
        for _ in range(5)
    ]
    assert 0 < min(record.overhead_us for record in records) <= 30
    assert all(record.paced.ticks == 20 for record in records)
    # what the schedule itself wakes too late is told apart
    assert all(record.paced.wake_up.p50_us is not None for record in records)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_measurement_under_load_on_the_real_clock_leaves_no_process() -> None:
    chunk = np.zeros((10, 4), np.float32)
    settings = BenchSettings(hz=200, duration_s=0.5, back_to_back_s=0.1, load=1)
    before = children(os.getpid())
    with Sampler(0.05) as reader:
        record = measure(lambda observation: chunk, [0, 1], settings=settings, sampler=reader)
    assert record.timeline is not None
    assert record.timeline.seconds[0] < 0 < 0.49 < record.timeline.seconds[-1]
    assert BenchRecord.from_json(record.to_json(), where="bench.json") == record
    assert children(os.getpid()) == before


def children(process: int) -> set[str]:
    """Processes that it started and that are still there."""
    return set(Path(f"/proc/{process}/task/{process}/children").read_text().split())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ctrl_c_in_the_paced_run_leaves_no_process() -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import numpy as np\n"
        "from vlaopt.benchmark.measure import measure\n"
        "from vlaopt.benchmark.record import BenchSettings\n"
        "from vlaopt.benchmark.sampling import Sampler\n"
        "settings = BenchSettings(hz=200, duration_s=60, back_to_back_s=0.1, load=1)\n"
        "with Sampler() as sampler:\n"
        "    measure(lambda n: np.zeros((1, 1)), [0, 1], settings=settings, sampler=sampler,\n"
        "            on_progress=lambda phase: print(phase, flush=True))"
    )
    measuring = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert measuring.stdout is not None
    while measuring.stdout.readline().strip() != "paced":
        assert measuring.poll() is None
    reader_and_load = children(measuring.pid)
    measuring.send_signal(signal.SIGINT)
    measuring.communicate(timeout=20)
    assert len(reader_and_load) == 2
    assert all(gone(int(process)) for process in reader_and_load)
