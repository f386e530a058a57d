"""Numbers are written with three digits and a unit; what is not there is said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.benchmark.statistics import percentile as of
from vlaopt.report.numbers import interval, memory, milliseconds, number, percentile, share, size


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, "—"),
        (0.0, "0"),
        (1.3e-7, "1.3e-7"),
        (0.0206, "0.0206"),
        (-0.0128, "-0.0128"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (123.4, "123"),
        (99.99, "100"),
        (90, "90"),
        (180_003, "180 003"),
    ],
)
def test_three_digits(value: float | None, told: str) -> None:
    assert number(value) == told


@given(st.floats(1e-12, 1e12))
def test_a_number_is_told_within_five_percent(value: float) -> None:
    assert float(number(value).replace(" ", "")) == pytest.approx(value, rel=0.05)


def test_units() -> None:
    assert milliseconds(0.775) == "0.775 ms"
    assert share(0.0007) == "0.0700 %"
    assert [size(count) for count in (512, 99_999, 1_330_000, 1_387_072_419)] == [
        "0.512 kB",
        "100 kB",
        "1.33 MB",
        "1.39 GB",
    ]
    assert [memory(None), memory(851.5), memory(2048)] == ["not available", "852 MiB", "2.00 GiB"]


def test_a_percentile_of_too_few_samples_is_no_number() -> None:
    few, enough = of([1.0] * 50, 0.99), of([1.0] * 500, 0.99)
    assert (percentile(few), interval(few)) == ("insufficient samples", "50, p99 needs 459")
    assert (percentile(enough), interval(enough)) == ("1.00 ms", "1.00 – 1.00 ms")
