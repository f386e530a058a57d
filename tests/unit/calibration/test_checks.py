"""A set that would give wrong scales is refused by feature and sample, before any calibrator sees it."""

from __future__ import annotations

import struct
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vlaopt.calibration import CalibrationSet, Expected, write_calibration_set
from vlaopt.errors import InputError

FRONT, STATE = "observation.images.front", "observation.state"
EXPECTED: Expected = {FRONT: ("uint8", (8, 6, 3)), STATE: ("float32", (4,)), "task": ("string", ())}


def images(count: int = 12) -> list[NDArray[Any]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 256, (8, 6, 3), dtype=np.uint8) for _ in range(count)]


def states(count: int = 12) -> list[NDArray[Any]]:
    return list(np.random.default_rng(2).normal(size=(count, 4)).astype(np.float32))


def recorded(
    path: Path, front: Sequence[NDArray[Any]] | None, state: Sequence[NDArray[Any]], actions: list[Any] | None = None
) -> CalibrationSet:
    rows: list[dict[str, Any]] = [{STATE: value, "task": "go"} for value in state]
    for row, image in zip(rows, front or [], strict=False):
        row[FRONT] = image
    return write_calibration_set(
        path / "set",
        rows,
        actions,
        episodes=[0] * len(rows),
        steps=list(range(len(rows))),
        name="test",
        description="",
        source="",
        licence="Apache-2.0",
        created_by="",
        seed=0,
    )


def test_a_good_set_passes(tmp_path: Path) -> None:
    recorded(tmp_path, images(), states()).check(EXPECTED)


def test_images_may_be_float_with_channels_first(tmp_path: Path) -> None:
    front = [(image.transpose(2, 0, 1) / 255).astype(np.float32) for image in images()]
    recorded(tmp_path, front, states()).check(EXPECTED)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_one_value_that_is_not_finite(tmp_path: Path, value: float, word: str) -> None:
    state = states()
    state[7][2] = value
    with pytest.raises(InputError, match=f"observation.state holds {word} at sample 7"):
        recorded(tmp_path, images(), state).check(EXPECTED)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e7, 2e5])
def test_one_outlier(tmp_path: Path, value: float) -> None:
    state = states()
    state[3][0] = value
    with pytest.raises(InputError, match=r"observation\.state reaches .* at sample 3"):
        recorded(tmp_path, images(), state).check(EXPECTED)


@settings(max_examples=25)
@given(scale=st.floats(1e-6, 1e4), power=st.floats(0.0, 3.0))
def test_the_tails_of_an_honest_distribution_are_no_outliers(
    tmp_path_factory: pytest.TempPathFactory, scale: float, power: float
) -> None:
    rng = np.random.default_rng(5)
    values = (rng.normal(size=(64, 4)) * scale * (1 + np.abs(rng.normal(size=(64, 4))) ** power)).astype(np.float32)
    recorded(tmp_path_factory.mktemp("tails"), None, list(values)).check({STATE: ("float32", (4,))})


def test_all_constant_state(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"observation\.state is the same in all 12 samples"):
        recorded(tmp_path, images(), [np.ones(4, np.float32)] * 12).check(EXPECTED)


def test_all_constant_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"observation\.images\.front is the same in all 12 samples"):
        recorded(tmp_path, images(1) * 12, states()).check(EXPECTED)


def test_one_sample(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="1 samples, at least 8 are needed"):
        recorded(tmp_path, images(1), states(1)).check(EXPECTED)


def test_no_sample(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no observations"):
        recorded(tmp_path, [], [])


def test_wrong_shape(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"observation.state is float32 \[3\], the policy needs float32 \[4\]"):
        recorded(tmp_path, images(), [value[:3] for value in states()]).check(EXPECTED)


def test_float64(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"observation.state is float64 \[4\]") as caught:
        recorded(tmp_path, images(), [value.astype(np.float64) for value in states()]).check(EXPECTED)
    assert caught.value.hint == "convert it to float32"


@pytest.mark.parametrize("swap", ["uint8 channels first", "float32 channels last"])
def test_channels_on_the_wrong_side(tmp_path: Path, swap: str) -> None:
    front = [
        np.ascontiguousarray(image.transpose(2, 0, 1)) if swap.startswith("uint8") else (image / 255).astype(np.float32)
        for image in images()
    ]
    with pytest.raises(InputError, match="the policy needs uint8") as caught:
        recorded(tmp_path, front, states()).check(EXPECTED)
    assert caught.value.hint is not None and "channels are on the wrong side" in caught.value.hint


def test_float_images_that_go_to_255(tmp_path: Path) -> None:
    front = [image.transpose(2, 0, 1).astype(np.float32) for image in images()]
    with pytest.raises(InputError, match="float images are 0 to 1") as caught:
        recorded(tmp_path, front, states()).check(EXPECTED)
    assert caught.value.hint == "divide by 255, or record uint8"


def test_another_camera(tmp_path: Path) -> None:
    expected = {**EXPECTED, "observation.images.wrist": ("uint8", (8, 6, 3))}
    with pytest.raises(InputError, match=r"has no 'observation\.images\.wrist'.*it has observation\.images\.front"):
        recorded(tmp_path, images(), states()).check(expected)


def test_an_action_that_is_not_finite(tmp_path: Path) -> None:
    actions = [np.zeros((2, 4), np.float32) for _ in range(12)]
    actions[5][1, 3] = np.nan
    with pytest.raises(InputError, match="action holds NaN at sample 5"):
        recorded(tmp_path, images(), states(), actions).check(EXPECTED)


def test_an_image_that_is_no_png(tmp_path: Path) -> None:
    opened = recorded(tmp_path, images(), states())
    opened._tensors[f"{FRONT}.png"][:8] = 0  # type: ignore[index]
    with pytest.raises(InputError, match="front at sample 0: not a sound PNG"):
        opened.check(EXPECTED)


def test_an_image_that_says_it_is_huge_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    opened = recorded(tmp_path, images(), states())
    image = opened._tensors[f"{FRONT}.png"]
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + image[24:29].tobytes()
    image[12:29] = np.frombuffer(header, dtype=np.uint8)  # type: ignore[index]
    image[29:33] = np.frombuffer(struct.pack(">I", zlib.crc32(header)), dtype=np.uint8)  # type: ignore[index]
    started = time.monotonic()
    with pytest.raises(InputError, match=r"60000"):
        opened.observation(0)
    assert time.monotonic() - started < 1


def test_an_archive_that_unpacks_without_bound_is_not_opened(tmp_path: Path) -> None:
    bomb = tmp_path / "observations.npz"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("state.npy", "w") as member:
        for _ in range(64):
            member.write(bytes(1 << 20))
    with pytest.raises(InputError, match=r"\.npz files are not opened: they can run code or unpack without bound"):
        CalibrationSet.open(bomb)
