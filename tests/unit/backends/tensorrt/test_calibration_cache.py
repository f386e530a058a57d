"""The classic calibration cache: what is written is what tools of TensorRT 10 and before read."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.backends.tensorrt.calibration_cache import decode, encode, version_number
from vlaopt.errors import InputError

names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"), min_size=1)
bounds = st.floats(-(2.0**100), 2.0**100)


@given(ranges=st.dictionaries(names, st.tuples(bounds, bounds)))
def test_what_is_written_is_read_as_the_scales_of_symmetric_int8(ranges: dict[str, tuple[float, float]]) -> None:
    expected = {name: float(np.float32(max(abs(low), abs(high)) / 127)) for name, (low, high) in ranges.items()}
    assert decode(encode(ranges, "10.3")) == expected


def test_a_line_is_the_bits_of_a_float32() -> None:
    assert encode({"x": (-127.0, 3.0), "a: b": (0.0, 254.0)}, "8.6.1") == (
        b"TRT-8601-EntropyCalibration2\nx: 3f800000\na: b: 40000000\n"
    )


def test_a_cache_of_tensorrt_itself_is_read() -> None:
    """Lines as TensorRT 7.2 wrote them for a sample: github.com/NVIDIA/TensorRT/issues and ONNX Runtime's comments."""
    scales = decode(b"TRT-7202-EntropyCalibration2\ndata: 3c008912\nip1: 3e11094c\n(Unnamed Layer* 4) [x]_output: 0\n")
    assert scales["data"] * 127 == pytest.approx(0.99636, rel=1e-4)
    assert scales["(Unnamed Layer* 4) [x]_output"] == 0


@pytest.mark.parametrize(
    ("version", "number"), [("7.1.3", 7103), ("8.6.1", 8601), ("10.3", 100300), ("10.16.2.10", 101602)]
)
def test_versions_are_numbers_as_in_tensorrts_headers(version: str, number: int) -> None:
    assert version_number(version) == number


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"\xff\xfe", "it is no text"),
        (b"data: 3c008912\n", "it begins with 'data: 3c008912'"),
        (b"TRT-8601-EntropyCalibration2\ndata 3c008912\n", "a line without a scale"),
        (b"TRT-8601-EntropyCalibration2\ndata: 3c008912\ndata: 0\n", "a tensor twice"),
    ],
)
def test_what_is_no_cache_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        decode(data)


@pytest.mark.parametrize(
    ("ranges", "problem"), [({"a\nb": (0, 1)}, "cannot stand"), ({"a": (0, float("inf"))}, "finite")]
)
def test_what_has_no_line_is_refused(ranges: dict[str, tuple[float, float]], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        encode(ranges, "10.3")
