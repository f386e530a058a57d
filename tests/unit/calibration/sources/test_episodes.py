"""Episodes in .npz and .safetensors files: read row by row, refused before anything is unpacked or run."""

from __future__ import annotations

import io
import json
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from vlaopt.calibration.making import open_source
from vlaopt.calibration.sources import rows as rows_module
from vlaopt.calibration.sources.episodes import EpisodeFolder
from vlaopt.errors import InputError

FRONT, STATE = "observation.images.front", "observation.state"
Episode = dict[str, Any]
Write = Callable[[Path, Episode], None]


def episode(seed: int, length: int = 12) -> Episode:
    rng = np.random.default_rng(seed)
    return {
        FRONT: rng.integers(0, 256, (length, 8, 6, 3), dtype=np.uint8),
        STATE: rng.normal(size=(length, 4)).astype(np.float32),
        "action": rng.normal(size=(length, 2)).astype(np.float32),
    }


def save_npz(path: Path, arrays: Episode) -> None:
    np.savez(path.with_suffix(".npz"), **arrays)


def save_packed_npz(path: Path, arrays: Episode) -> None:
    np.savez_compressed(path.with_suffix(".npz"), **arrays)


def save_safetensors(path: Path, arrays: Episode) -> None:
    task = arrays.get("task")
    tensors = {name: value for name, value in arrays.items() if name != "task"}
    safetensors.numpy.save_file(tensors, path.with_suffix(".safetensors"), {"task": str(task)} if task else None)


FORMATS = {"npz": save_npz, "packed npz": save_packed_npz, "safetensors": save_safetensors}


@pytest.fixture(params=FORMATS)
def save(request: pytest.FixtureRequest) -> Write:
    return FORMATS[request.param]


def refused(folder: Path, words: str) -> InputError:
    with pytest.raises(InputError, match=words) as caught:
        source = EpisodeFolder(folder)
        for name in source.columns:
            list(source.column(name, range(len(source.steps))))
    return caught.value


def test_every_value_is_what_was_saved(tmp_path: Path, save: Write) -> None:
    episodes = [episode(0), episode(1, length=7)]
    for number, arrays in enumerate(episodes):
        save(tmp_path / f"episode_{number}", arrays)
    source = open_source(tmp_path)
    assert source.steps.episode.tolist() == [0] * 12 + [1] * 7
    assert source.steps.step.tolist() == [*range(12), *range(7)]
    assert source.steps.instructions == ()
    assert set(source.observed) == {FRONT, STATE}
    rows = [0, 5, 11, 12, 18]
    for name in (FRONT, STATE, "action"):
        whole = np.concatenate([arrays[name] for arrays in episodes])
        np.testing.assert_array_equal(np.stack(list(source.column(name, rows))), whole[rows])


@settings(max_examples=20)
@given(data=st.data(), form=st.sampled_from(sorted(FORMATS)))
def test_any_rows_of_any_numbers(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, form: str) -> None:
    dtype = data.draw(st.sampled_from(["float64", "float32", "float16", "int64", "uint8", "bool"]))
    shape = (data.draw(st.integers(1, 9)), *data.draw(st.lists(st.integers(1, 4), max_size=2)))
    array = (np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
    folder = tmp_path_factory.mktemp("episodes")
    FORMATS[form](folder / "one", {"a": array, "b": array[::-1].copy()})
    rows = sorted(data.draw(st.sets(st.integers(0, len(array) - 1), min_size=1)))
    found = list(EpisodeFolder(folder).column("b", rows))
    np.testing.assert_array_equal(np.stack(found), array[::-1][rows])
    assert str(found[0].dtype) == dtype


def test_big_endian_numbers_are_numbers(tmp_path: Path) -> None:
    save_npz(tmp_path / "one", {STATE: np.arange(8, dtype=">f4").reshape(4, 2)})
    source = EpisodeFolder(tmp_path)
    assert source.columns[STATE] == ("float32", (2,))
    assert [value.tolist() for value in source.column(STATE, [1, 3])] == [[2, 3], [6, 7]]


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_an_instruction_in_the_file(tmp_path: Path, form: str) -> None:
    for number, task in enumerate(["open", "close", "open"]):
        FORMATS[form](tmp_path / str(number), {**episode(number, 4), "task": np.array(task) if form == "npz" else task})
    steps = EpisodeFolder(tmp_path).steps
    assert steps.instructions == ("open", "close")
    assert steps.task.tolist() == [0] * 4 + [1] * 4 + [0] * 4


def test_an_instruction_that_changes_within_an_episode(tmp_path: Path) -> None:
    save_npz(tmp_path / "0", {**episode(0, 4), "task": np.array(["open", "open", "close", "close"])})
    assert EpisodeFolder(tmp_path).steps.task.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("told", ["open", ["open", "open", "open", "open"]])
def test_an_instruction_beside_the_file(tmp_path: Path, save: Write, told: str | list[str]) -> None:
    save(tmp_path / "0", episode(0, 4))
    (tmp_path / "0.json").write_text(json.dumps({"task": told, "operator": "me"}))
    assert EpisodeFolder(tmp_path).steps.instructions == ("open",)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"task": 3}', "neither a sentence nor one sentence per step"),
        ('{"task": ["a"]}', "neither a sentence"),
        ("{", "not JSON"),
    ],
)
def test_a_sidecar_that_says_nonsense(tmp_path: Path, text: str, words: str) -> None:
    save_npz(tmp_path / "0", episode(0, 4))
    (tmp_path / "0.json").write_text(text)
    refused(tmp_path, words)


def test_either_all_episodes_have_an_instruction_or_none(tmp_path: Path) -> None:
    save_npz(tmp_path / "0", {**episode(0), "task": np.array("open")})
    save_npz(tmp_path / "1", episode(1))
    refused(tmp_path, r"1\.npz: has no task, other episodes have one")


def test_objects_are_never_made(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (tmp_path.joinpath("ran").touch, ())

    save_npz(tmp_path / "0", {STATE: np.array([Bomb(), Bomb()], dtype=object)})
    refused(tmp_path, r"observation\.state: holds Python objects, which can run code")
    assert not (tmp_path / "ran").exists()


def header(shape: tuple[int, ...], descr: str = "<f4", fortran: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return stream.getvalue()


def write_member(path: Path, name: str, data: bytes) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "FILE_LIMIT", 1 << 20)
    with (
        zipfile.ZipFile(tmp_path / "0.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        member.write(header((64 << 20,), "|u1"))
        for _ in range(64):
            member.write(bytes(1 << 20))
    started = time.monotonic()
    error = refused(tmp_path, "bytes, more than the 1048576 allowed")
    assert error.hint == "one episode per file"
    assert time.monotonic() - started < 1


def test_an_array_that_says_it_is_larger_than_its_member(tmp_path: Path) -> None:
    write_member(tmp_path / "0.npz", "x.npy", header((10**12, 4)) + bytes(64))
    started = time.monotonic()
    refused(tmp_path, r"x: says 16000000000000 bytes of float32 \[1000000000000, 4\], 64 are there")
    assert time.monotonic() - started < 1


def test_memory_holds_a_few_rows_and_not_the_episode(tmp_path: Path, save: Write) -> None:
    frames = np.zeros((200, 128, 128, 3), np.uint8)
    frames[:, 0, 0, 0] = np.arange(200)
    save(tmp_path / "0", {FRONT: frames})
    tracemalloc.start()
    source = EpisodeFolder(tmp_path)
    seen = [int(value[0, 0, 0]) for value in source.column(FRONT, [3, 100, 199])]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seen == [3, 100, 199]
    assert peak < 4 << 20 < frames.nbytes


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (header((4, 2), fortran=True) + bytes(32), "stored column by column"),
        (header((4,), "|V4") + bytes(16), "numbers or text are needed"),
        (header((4,), "<c8") + bytes(32), "numbers or text are needed"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "not a sound .npz file: version"),
        (b"no array", "not a sound .npz file"),
        (b"", "not a sound .npz file"),
        (header((0, 4)), "differ in their number of steps, or have none"),
        (header(()) + bytes(4), "has no time dimension"),
    ],
    ids=["fortran", "void", "complex", "version", "no array", "empty", "no steps", "a single number"],
)
def test_arrays_that_no_policy_takes(tmp_path: Path, data: bytes, words: str) -> None:
    write_member(tmp_path / "0.npz", "x.npy", data)
    refused(tmp_path, words)


def test_members_that_are_no_arrays(tmp_path: Path) -> None:
    write_member(tmp_path / "0.npz", "run.pkl", b"")
    refused(tmp_path, "member 'run.pkl' is no array")


def test_an_archive_cut_at_every_tenth(tmp_path: Path) -> None:
    save_packed_npz(tmp_path / "0", episode(0))
    whole = (tmp_path / "0.npz").read_bytes()
    for tenth in range(10):
        (tmp_path / "0.npz").write_bytes(whole[: len(whole) * tenth // 10])
        refused(tmp_path, "not a sound .npz file")


def test_packed_bytes_that_were_changed(tmp_path: Path) -> None:
    save_packed_npz(tmp_path / "0", {STATE: np.random.default_rng(0).normal(size=(99, 4))})
    data = bytearray((tmp_path / "0.npz").read_bytes())
    for place in range(600, 700):
        data[place] ^= 0xFF
    (tmp_path / "0.npz").write_bytes(bytes(data))
    refused(tmp_path, r"not a sound \.npz file")


def test_safetensors_cut_at_every_tenth(tmp_path: Path) -> None:
    save_safetensors(tmp_path / "0", episode(0))
    whole = (tmp_path / "0.safetensors").read_bytes()
    for tenth in range(10):
        (tmp_path / "0.safetensors").write_bytes(whole[: len(whole) * tenth // 10])
        refused(tmp_path, "not a sound safetensors file")


def entry(begin: int, end: int, dtype: str = "U8", shape: list[Any] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"a": entry(0, 8), "b": entry(4, 16)}, "overlap or leave a hole"),
        ({"a": entry(0, 8), "b": entry(9, 16)}, "overlap or leave a hole"),
        ({"a": entry(0, 8)}, r"bytes, \d+ are said"),
        ({"a": entry(0, 16, shape=[4])}, "16 bytes for U8"),
        ({"a": entry(0, 16, "F32", [2**40])}, r"16 bytes for F32 \[1099511627776\]"),
        ({"a": entry(0, 16, "BF16", [8])}, "no element type 'BF16'"),
        ({"a": entry(0, 16, shape=[-4, -4])}, "not a sound safetensors file"),
        ({"a": {"dtype": "U8"}}, "an array without a place"),
        ({"a": 3}, "an array without a place"),
    ],
    ids=["overlap", "hole", "short", "wrong size", "huge", "bfloat16", "negative", "no offsets", "no entry"],
)
def test_headers_that_are_unsound(tmp_path: Path, arrays: dict[str, Any], words: str) -> None:
    text = json.dumps(arrays).encode()
    (tmp_path / "0.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(tmp_path, words)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 0])
def test_headers_of_impossible_length(tmp_path: Path, length: int) -> None:
    (tmp_path / "0.safetensors").write_bytes(struct.pack("<Q", length) + b"{}")
    refused(tmp_path, "not a sound safetensors file")


def test_arrays_of_different_length(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "0", {**episode(0), STATE: np.zeros((5, 4), np.float32)})
    refused(tmp_path, r"differ in their number of steps.*observation\.state 5")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {STATE: np.zeros((12, 5), np.float32)},
            r"observation\.state is float32 \[5\], in the first episode float32 \[4\]",
        ),
        ({STATE: np.zeros((12, 4))}, r"observation\.state is float64 \[4\], in the first episode float32 \[4\]"),
        ({"more": np.zeros((12, 5))}, r"more is float64 \[5\], in the first episode missing"),
    ],
    ids=["shape", "dtype", "name"],
)
def test_episodes_that_are_not_alike(tmp_path: Path, save: Write, change: Episode, words: str) -> None:
    save(tmp_path / "0", episode(0))
    save(tmp_path / "1", {**episode(1), **change})
    refused(tmp_path, words)


def test_channels_on_the_wrong_side(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "0", {FRONT: np.zeros((4, 3, 8, 6), np.uint8)})
    error = refused(tmp_path, r"front is uint8 \[3, 8, 6\], images are uint8 height, width, 3")
    assert error.hint == "the channels are on the wrong side: numpy.moveaxis(images, 1, -1)"


def test_four_channels(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "0", {FRONT: np.zeros((4, 8, 6, 4), np.uint8)})
    assert refused(tmp_path, r"front is uint8 \[8, 6, 4\]").hint == "store three channels, red, green, blue"


def test_float_images_with_the_channels_last(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "0", {FRONT: np.zeros((4, 8, 6, 3), np.float32)})
    refused(tmp_path, "float images are float32 3, height, width in 0 to 1")


def test_a_file_that_changes_during_the_reading(tmp_path: Path, save: Write) -> None:
    save(tmp_path / "0", episode(0))
    source = EpisodeFolder(tmp_path)
    save(tmp_path / "0", episode(1))
    with pytest.raises(InputError, match="changed while it was read"):
        list(source.column(STATE, [0]))
    with pytest.raises(InputError, match="changed while it was read"):
        source.check_unchanged()


@pytest.mark.parametrize(
    ("name", "words"), [("x", "no such folder"), ("a.h5", "a file, a folder is needed"), ("empty", "nothing to make")]
)
def test_what_is_no_source(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.h5").touch()
    with pytest.raises(InputError, match=words) as caught:
        open_source(tmp_path / name)
    assert caught.value.hint is not None and caught.value.hint.startswith("give a LeRobotDataset")
