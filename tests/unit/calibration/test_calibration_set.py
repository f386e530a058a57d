"""A calibration set gives back what was written, picks evenly, and opens only when it is whole."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.calibration import CalibrationSet, write_calibration_set
from vlaopt.errors import InputError
from vlaopt.hashing import digest_bytes

FRONT, STATE = "observation.images.front", "observation.state"


def observations(count: int, size: int = 8) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    return [
        {
            FRONT: rng.integers(0, 256, (size, size, 3), dtype=np.uint8),
            STATE: rng.normal(size=4).astype(np.float32),
            "task": ("open the drawer", "close it")[index % 2],
        }
        for index in range(count)
    ]


def write(path: Path, rows: list[dict[str, Any]], actions: list[Any] | None = None) -> CalibrationSet:
    return write_calibration_set(
        path,
        rows,
        actions,
        episodes=[index // 4 for index in range(len(rows))],
        steps=[index % 4 for index in range(len(rows))],
        name="test",
        description="random",
        source="a test",
        licence="Apache-2.0",
        created_by="a test",
        seed=0,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "set", observations(12)).path


def edit_card(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    card = json.loads((folder / "card.json").read_text())
    change(card)
    (folder / "card.json").write_text(json.dumps(card))


def replace_data(folder: Path, data: bytes) -> None:
    """New data with a card that vouches for it, so that only the content can be refused."""
    (folder / "observations.safetensors").write_bytes(data)
    edit_card(folder, lambda card: card["files"][0].update(size=len(data), sha256=digest_bytes(data)))


def test_gives_back_what_was_written(tmp_path: Path) -> None:
    rows = observations(12)
    actions = [np.full((3, 4), index, dtype=np.float32) for index in range(12)]
    opened = write(tmp_path / "set", rows, actions)
    assert len(opened) == 12
    for index, row in enumerate(opened):
        np.testing.assert_array_equal(row[FRONT], rows[index][FRONT])
        np.testing.assert_array_equal(row[STATE], rows[index][STATE])
        assert row["task"] == rows[index]["task"]
        np.testing.assert_array_equal(opened.action(index), actions[index])
        assert opened.episode(index) == (index // 4, index % 4)


def test_same_content_has_the_same_digest_and_other_content_another(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a", observations(12)), write(tmp_path / "b", observations(12))
    assert first.digest == second.digest
    assert write(tmp_path / "c", observations(11)).digest != first.digest


def test_a_sample_beyond_the_end_is_an_index_error(folder: Path) -> None:
    with pytest.raises(IndexError, match="sample 12 of 12"):
        CalibrationSet.open(folder).observation(12)


def test_a_set_without_actions_says_so(folder: Path) -> None:
    with pytest.raises(InputError, match="holds no actions"):
        CalibrationSet.open(folder).action(0)


def test_never_writes_over_a_set(folder: Path) -> None:
    with pytest.raises(InputError, match="already exists"):
        write(folder, observations(3))


def test_refuses_samples_that_differ(tmp_path: Path) -> None:
    rows = observations(3)
    rows[2][STATE] = rows[2][STATE][:3]
    with pytest.raises(InputError, match="sample 2 differs from sample 0"):
        write(tmp_path / "set", rows)
    assert not (tmp_path / "set").exists()


@given(count=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_a_subset_has_distinct_samples_and_is_repeatable(
    tmp_path_factory: pytest.TempPathFactory, count: int, seed: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "subset"
    opened = CalibrationSet.open(path) if path.exists() else write(path, observations(32))
    chosen = opened.subset(count, seed)
    assert chosen == opened.subset(count, seed)
    assert len(set(chosen)) == len(chosen) == min(count, 32)
    assert all(0 <= index < 32 for index in chosen)


def test_a_subset_takes_as_many_of_each_instruction(folder: Path) -> None:
    opened = CalibrationSet.open(folder)
    tasks = [opened.observation(index)["task"] for index in opened.subset(6, seed=3)]
    assert tasks.count("close it") == 3


def test_a_subset_needs_a_sample(folder: Path) -> None:
    with pytest.raises(InputError, match="at least 1 is needed"):
        CalibrationSet.open(folder).subset(0, seed=0)


def test_refuses_a_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such calibration set"):
        CalibrationSet.open(tmp_path / "none")


@pytest.mark.parametrize("inside", [True, False])
def test_refuses_numpy_archives_unopened(tmp_path: Path, inside: bool) -> None:
    archive = tmp_path / "set.npz"
    archive.write_bytes(b"never read")
    with pytest.raises(InputError, match=r"\.npz files are not opened") as caught:
        CalibrationSet.open(tmp_path if inside else archive)
    assert caught.value.hint is not None and "convert it" in caught.value.hint


def test_refuses_a_card_that_is_not_json(folder: Path) -> None:
    (folder / "card.json").write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        CalibrationSet.open(folder)


def test_refuses_a_schema_of_the_future(folder: Path) -> None:
    edit_card(folder, lambda card: card.update(schema="vlaopt.observations/2"))
    with pytest.raises(InputError, match=r"schema is 'vlaopt\.observations/2', this version reads"):
        CalibrationSet.open(folder)


def test_refuses_a_card_that_names_another_file(folder: Path) -> None:
    edit_card(folder, lambda card: card["files"][0].update(path="../secret"))
    with pytest.raises(InputError, match=r"card\.json:files\.0\.path"):
        CalibrationSet.open(folder)


def test_refuses_data_that_changed_after_the_card_was_written(folder: Path) -> None:
    data = bytearray((folder / "observations.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "observations.safetensors").write_bytes(bytes(data))
    with pytest.raises(InputError, match="not the file its card describes"):
        CalibrationSet.open(folder)


def test_notices_data_that_changes_while_the_set_is_in_use(folder: Path) -> None:
    opened = CalibrationSet.open(folder)
    opened.check_unchanged()
    (folder / "observations.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="changed while it was in use"):
        opened.check_unchanged()


@pytest.mark.parametrize("header", [2**63, 2**63 - 1, 10**6, 0])
def test_refuses_a_safetensors_header_of_impossible_length(folder: Path, header: int) -> None:
    replace_data(folder, struct.pack("<Q", header) + b"{}")
    with pytest.raises(InputError, match=r"not a sound safetensors file|lacks tensor"):
        CalibrationSet.open(folder)


def test_refuses_every_truncation(folder: Path) -> None:
    whole = (folder / "observations.safetensors").read_bytes()
    for percent in range(0, 100, 5):
        replace_data(folder, whole[: len(whole) * percent // 100])
        with pytest.raises(InputError, match="not a sound safetensors file"):
            CalibrationSet.open(folder)


def test_refuses_tensors_the_card_does_not_describe(folder: Path) -> None:
    edit_card(folder, lambda card: card.update(samples=11))
    with pytest.raises(InputError, match=r"tensor task_index is int64 \[12\], the card says int64 \[11\]"):
        CalibrationSet.open(folder)


def test_refuses_an_instruction_that_is_not_there(folder: Path) -> None:
    edit_card(folder, lambda card: card.update(instructions=["open the drawer"]))
    with pytest.raises(InputError, match="task_index points outside"):
        CalibrationSet.open(folder)


def test_refuses_an_image_larger_than_the_card_says_before_decoding_it(folder: Path) -> None:
    edit_card(folder, lambda card: card["observation"][FRONT].update(shape=[4, 4, 3]))
    with pytest.raises(InputError, match="a PNG of RGB 8x8, RGB 4x4 is needed"):
        CalibrationSet.open(folder).observation(0)
