"""Records are held against each other only where that means something, and by what of them is independent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from vlaopt.benchmark.assertions import parse_assertion
from vlaopt.benchmark.record import BenchRecord, BenchSettings, ColdStart, Energy, Memory, Subject
from vlaopt.benchmark.sides import NUMBERS, WORDS, Side, check_comparable, hold, judge, of_records
from vlaopt.errors import InputError

Bench = Callable[[float], BenchRecord]


@pytest.fixture
def measured(bench: Callable[..., BenchRecord], policy: Callable[..., Any]) -> Bench:
    """A record of a policy that takes so many milliseconds, a hundredth more or less from call to call."""

    def record(milliseconds: float) -> BenchRecord:
        noise = np.random.default_rng(round(1000 * milliseconds))
        call = policy(lambda _: milliseconds * (1 + 0.01 * noise.standard_normal()))
        return bench(call, subject=Subject(artifact="a" * 64, policy="edge-vla"))

    return record


def changed(record: BenchRecord, **parts: Any) -> BenchRecord:
    return record.model_copy(update=parts)


def test_records_of_one_policy_on_one_machine_are_comparable(measured: Bench) -> None:
    record = measured(10.0)
    check_comparable(record, changed(record, subject=Subject(artifact="b" * 64, policy="edge-vla")))


def test_records_of_other_machines_policies_rates_or_loads_are_refused(measured: Bench) -> None:
    record = measured(10.0)
    machine = record.environment.model_copy(update={"governor": "schedutil"})
    with pytest.raises(InputError, match="different environments: governor 'performance' and 'schedutil'"):
        check_comparable(record, changed(record, environment=machine))
    with pytest.raises(InputError, match="different policies: edge-vla and act"):
        check_comparable(record, changed(record, subject=Subject(policy="act")))
    faster, loaded = (record.settings.model_copy(update=update) for update in ({"hz": 50.0}, {"load": 2}))
    with pytest.raises(InputError, match="different control rates: 20 and 50 Hz"):
        check_comparable(record, changed(record, settings=faster))
    with pytest.raises(InputError, match="under different load: 0 and 2 busy processes"):
        check_comparable(record, changed(record, settings=loaded))


def test_an_invalid_record_is_refused_with_its_reasons(measured: Bench) -> None:
    record = measured(10.0)
    wrong = changed(record, verdict="INVALID", reasons=("actions differ: by 3",))
    for one, other in ((record, wrong), (wrong, record)):
        with pytest.raises(InputError, match="a record is INVALID: actions differ: by 3"):
            check_comparable(one, other)


def test_backends_may_differ_but_not_the_version_of_one_that_both_name(measured: Bench) -> None:
    record = measured(10.0)

    def with_libraries(gpu: str | None, **libraries: str) -> BenchRecord:
        return changed(record, environment=record.environment.model_copy(update={"libraries": libraries, "gpu": gpu}))

    one = with_libraries(None, onnxruntime="1.22.0")
    check_comparable(one, with_libraries("Orin", tensorrt="10.3.0"))
    with pytest.raises(InputError, match=r"onnxruntime '1\.22\.0' and '1\.23\.0'"):
        check_comparable(one, with_libraries(None, onnxruntime="1.23.0"))
    with pytest.raises(InputError, match="gpu 'Orin' and 'Thor'"):
        check_comparable(with_libraries("Orin"), with_libraries("Thor"))


def test_one_record_is_cut_into_blocks_and_what_it_cannot_tell_is_allowed_for(measured: Bench) -> None:
    slow, fast = of_records([measured(10.0)], "slow.json"), of_records([measured(9.0)], "fast.json")
    assert (slow.unit, len(slow.latencies_ms["paced"])) == ("blocks of one launch", 20)
    told = hold(slow, fast)
    assert list(told) == ["paced", "back_to_back"]
    assert [comparison.answer for comparison in told.values()] == ["FASTER", "FASTER"]
    assert told["paced"].ratio == pytest.approx(0.9, rel=0.01)


def test_one_record_a_side_never_says_same_for_launches_differ(measured: Bench) -> None:
    sides = [of_records([measured(ms)], "record.json") for ms in (10.0, 10.02)]
    assert hold(*sides)["paced"].answer == "UNCLEAR"


def test_one_launch_in_doubt_must_differ_by_more(measured: Bench) -> None:
    busy = changed(measured(9.0), verdict="INCONCLUSIVE", reasons=("busy machine",))
    halved = changed(measured(3.0), verdict="INCONCLUSIVE", reasons=("busy machine",))
    assert hold(of_records([measured(10.0)], "a"), of_records([busy], "b"))["paced"].answer == "UNCLEAR"
    assert hold(of_records([busy], "a"), of_records([halved], "b"))["paced"].answer == "FASTER"


def test_ten_records_a_side_are_ten_launches(measured: Bench) -> None:
    sides = [of_records([measured(ms + 0.01 * n) for n in range(10)], "folder") for ms in (10.0, 10.02)]
    assert sides[0].unit == "launches"
    assert hold(*sides)["paced"].answer == "SAME"


def test_one_launch_against_many_is_allowed_what_the_many_differ_by(measured: Bench) -> None:
    def many(spread_ms: float) -> Side:
        return of_records([measured(10.0 + spread_ms * (n - 4.5)) for n in range(10)], "folder")

    slower = of_records([measured(10.6)], "new.json")
    assert hold(many(0.01), slower)["paced"].answer == "SLOWER"
    assert hold(many(0.1), slower)["paced"].answer == "UNCLEAR"


def test_too_few_records_or_calls_are_refused(measured: Bench, bench: Callable[..., BenchRecord], policy: Any) -> None:
    with pytest.raises(InputError, match="2 records, 10 are needed for each to stand for a launch") as caught:
        of_records([measured(10.0)] * 2, "folder")
    assert caught.value.where == "folder"
    short = bench(policy(lambda _: 10.0), settings=BenchSettings(duration_s=1.0, back_to_back_s=1.0))
    with pytest.raises(InputError, match="20 calls, 50 are needed to compare"):
        of_records([short], "short.json")


def test_figures_are_those_that_are_known(measured: Bench) -> None:
    record = measured(10.0)
    known = changed(
        record,
        energy=Energy(joules=0.25, source="RAPL"),
        memory=Memory(host_mib=200.0),
        cold_start=ColdStart(import_ms=100.0, open_ms=50.0, first_ms=10.0),
    )
    assert of_records([record], "a").figures["energy_j"] is None
    figures = of_records([known] * 5 + [record] * 5, "b").figures
    expected = {"energy_j": 0.25, "host_mib": 200.0, "cold_start_ms": 160.0, "device_mib": None, "miss_rate": 0.0}
    assert {name: figures[name] for name in expected} == expected


def side(latency_ms: float, **figures: float | None) -> Side:
    noise = 1 + 0.001 * np.random.default_rng(0).standard_normal(20)
    return Side("a", "launches", {"back_to_back": latency_ms * noise}, figures)


@pytest.mark.parametrize(
    ("expression", "measured", "ok"),
    [
        ("ratio<1.05", pytest.approx(0.5), True),
        ("ratio_high<0.4", pytest.approx(0.5, rel=0.01), False),
        ("speedup>=1.9", pytest.approx(2.0), True),
        ("difference_ms<0", pytest.approx(-5.0, rel=0.01), True),
        ("answer!=SLOWER", "FASTER", True),
        ("answer==SAME", "FASTER", False),
        ("back_to_back.ratio<0.6", pytest.approx(0.5), True),
        ("ratio.host_mib<=1.1", pytest.approx(1.5), False),
        ("ratio.energy_j<2", None, False),
        ("ratio.device_mib<2", None, False),
    ],
)
def test_assertions_hold_b_against_a(expression: str, measured: Any, ok: bool) -> None:
    a, b = side(10.0, host_mib=100.0, energy_j=None, device_mib=0.0), side(5.0, host_mib=150.0, energy_j=1.0)
    (outcome,) = judge([parse_assertion(expression, numbers=NUMBERS, words=WORDS)], a, b, hold(a, b))
    assert (outcome.measured, outcome.ok) == (measured, ok)
    assert (outcome.reason is None) == ok


def test_every_name_that_can_be_asserted_is_measured() -> None:
    a, b = side(10.0, **{name.removeprefix("ratio."): 1.0 for name in NUMBERS if name.startswith("ratio.")}), side(5.0)
    both = hold(a, Side("b", "launches", b.latencies_ms, a.figures))
    for name in NUMBERS:
        (outcome,) = judge([parse_assertion(f"{name}!=1e9", numbers=NUMBERS, words=WORDS)], a, a, both)
        assert outcome.ok, name
