"""The promise: what is packed comes back, what is not a sound safetensors file never becomes an array."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from vlaopt.errors import InputError
from vlaopt.tensors import check, check_finite, pack, unpack

SAMPLE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.asarray([1, 2], np.int64)}
DTYPES = ["float32", "float16", "float64", "int8", "int32", "int64", "uint8", "bool"]


def raw(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(lambda name: name != "__metadata__"),
        st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))),
        max_size=4,
    )
)
def test_packed_tensors_come_back(tensors: dict[str, np.ndarray]) -> None:
    found = unpack(pack(tensors), where="test")
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()


def test_equal_tensors_give_equal_bytes_whatever_their_order_and_layout() -> None:
    turned = {"b": SAMPLE["b"], "a": np.asfortranarray(SAMPLE["a"])}
    assert pack(turned) == pack(SAMPLE)


@pytest.mark.parametrize("percent", range(100))
def test_a_file_cut_short_is_refused(percent: int) -> None:
    data = pack(SAMPLE)
    with pytest.raises(InputError, match="cut: not a sound safetensors file"):
        unpack(data[: len(data) * percent // 100], where="cut")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (struct.pack("<Q", 1 << 63) + b"{}", "header too large"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", "header too large"),
        (raw({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, bytes(4)), "invalid offset"),
        (raw({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "invalid offset"),
        (raw({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)), "invalid offset"),
        (raw({"a": entry(0, 4, [1])}, bytes(8)), "not fully covered"),
        (raw({"a": entry(0, 4, [2])}, bytes(4)), "not a sound"),
        (raw({"a": entry(0, 4, [1 << 62, 8])}, bytes(4)), "overflow"),
        (raw({"a": entry(0, 4, [-1])}, bytes(4)), "not a sound"),
        (raw({"a": entry(4, 0, [1])}, bytes(4)), "not a sound"),
        (raw({"a": entry(0, 4, [1], "F99")}, bytes(4)), "not a sound"),
        (raw(["a"]), "not a sound"),
        (struct.pack("<Q", 100_000) + b"[" * 100_000, "not a sound"),
        (raw({"a": entry(0, 4, [2], "BF16")}, bytes(4)), "numpy has no element type BF16"),
    ],
    ids=[
        "2^63",
        "2^64",
        "same",
        "overlap",
        "hole",
        "rest",
        "short",
        "product",
        "negative",
        "backward",
        "type",
        "list",
        "deep",
        "bf16",
    ],
)
def test_a_malformed_file_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        unpack(data, where="bad.safetensors")
    assert caught.value.where == "bad.safetensors"


@given(st.binary(max_size=200))
def test_no_bytes_at_all_do_more_than_be_refused(data: bytes) -> None:
    try:
        unpack(data, where="noise")
    except InputError:
        return


def test_an_array_as_it_must_be_passes() -> None:
    assert check("a", SAMPLE["a"], dtype="float32", shape=(2, 3)) is SAMPLE["a"]
    assert check("a", SAMPLE["a"], dtype="float32", shape=(-1, 3)) is SAMPLE["a"]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1.0, 2.0], "joints: list given, a numpy array is needed"),
        (np.zeros(2), "joints: dtype float64 given, float32 needed"),
        (np.zeros(2, ">f4"), "joints: dtype >f4 given, float32 needed"),
        (np.zeros(3, np.float32), r"joints: shape \[3\] given, \[2\] needed"),
        (np.zeros((1, 2), np.float32), r"joints: shape \[1, 2\] given, \[2\] needed"),
        (np.asarray([0, np.nan], np.float32), r"joints: not finite at \[1\]: nan"),
    ],
)
def test_any_other_array_is_refused_by_name(value: object, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        check("joints", value, dtype="float32", shape=(2,))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_place_of_the_first_value_that_is_not_finite_is_told(bad: float) -> None:
    value = np.zeros((2, 3), np.float16)
    value[1, 2] = bad
    with pytest.raises(InputError, match=r"x: not finite at \[1, 2\]"):
        check_finite("x", value)
    with pytest.raises(InputError, match=r"x: not finite at \[\]"):
        check_finite("x", np.asarray(bad, np.float32))
    check_finite("x", np.zeros((0, 3), np.float32))
    check_finite("x", np.asarray([1, 2], np.int64))
