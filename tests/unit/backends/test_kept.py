"""The promise: what was compiled once opens faster and does the same, whatever became of it on the disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino
import pytest

from vlaopt.artifact.graph import Graph
from vlaopt.backends import EngineOptions, kept
from vlaopt.backends.openvino import BACKEND
from vlaopt.hashing import digest_bytes

GRAPHS = ("conv", "lstm", "int8")


def options(cache: Path | None, threads: int = 1) -> EngineOptions:
    return EngineOptions(threads=threads, cache=cache)


def feeds(session) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {port.name: generator.standard_normal(port.shape).astype(port.dtype) for port in session.inputs}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with everything that OpenVINO compiles."""
    real, seen = openvino.Core.compile_model, list[int]()

    def watched(self, *arguments):
        seen.append(1)
        return real(self, *arguments)

    monkeypatch.setattr(openvino.Core, "compile_model", watched)
    return seen


@pytest.mark.parametrize("name", GRAPHS)
def test_the_second_opening_compiles_nothing_and_computes_the_same_bits(graphs, tmp_path, compiled, name) -> None:
    files = BACKEND.build(Graph(graphs[name]), options(None)).files
    plain = BACKEND.open(files, options(None))
    given = feeds(plain)
    expected = plain.run(given)
    BACKEND.open(files, options(tmp_path))
    compiled.clear()
    again = BACKEND.open(files, options(tmp_path))
    assert compiled == []
    assert (again.inputs, again.outputs) == (plain.inputs, plain.outputs)
    assert all(np.array_equal(again.run(given)[output], value) for output, value in expected.items())


def test_other_weights_threads_or_settings_are_compiled_anew(graphs, tmp_path, compiled) -> None:
    files = BACKEND.build(Graph(graphs["conv"]), options(None)).files
    other = BACKEND.build(Graph(graphs["lstm"]), options(None)).files
    for given, chosen in ((files, options(tmp_path)), (other, options(tmp_path)), (files, options(tmp_path, 2))):
        compiled.clear()
        BACKEND.open(given, chosen)
        assert compiled == [1]
    assert len(list(tmp_path.iterdir())) == 3


def _flipped(data: bytes) -> bytes:
    return data[:200] + bytes([data[200] ^ 1]) + data[201:]


def _stranger(data: bytes) -> bytes:
    return digest_bytes(b"no model").encode() + b"no model"


@pytest.mark.parametrize("spoil", [_flipped, _stranger, lambda data: data[:-1], lambda data: b""])
def test_what_is_damaged_or_no_model_is_compiled_and_kept_again(graphs, tmp_path, compiled, spoil) -> None:
    files = BACKEND.build(Graph(graphs["conv"]), options(None)).files
    given = feeds(BACKEND.open(files, options(tmp_path)))
    (place,) = tmp_path.iterdir()
    sound = place.read_bytes()
    place.write_bytes(spoil(sound))
    compiled.clear()
    expected = BACKEND.open(files, options(None)).run(given)
    session = BACKEND.open(files, options(tmp_path))
    assert compiled == [1, 1]
    assert np.array_equal(session.run(given)["features"], expected["features"])
    assert kept.recall(tmp_path, place.name) is not None
    BACKEND.open(files, options(tmp_path))
    assert compiled == [1, 1]


def test_where_nothing_can_be_written_it_is_compiled_each_time(graphs, tmp_path, compiled) -> None:
    (tmp_path / "file").write_bytes(b"")
    files = BACKEND.build(Graph(graphs["conv"]), options(None)).files
    compiled.clear()
    for _ in range(2):
        BACKEND.open(files, options(tmp_path / "file" / "folder"))
    assert compiled == [1, 1]


def test_what_is_as_slow_to_read_as_to_compile_is_not_kept(graphs, tmp_path, compiled, monkeypatch) -> None:
    files = BACKEND.build(Graph(graphs["conv"]), options(None)).files
    monkeypatch.setattr("vlaopt.backends.openvino.LARGEST", 100)
    BACKEND.open(files, options(tmp_path))
    monkeypatch.setattr(kept, "LARGEST", 4)
    kept.keep(tmp_path, "large", b"large")
    assert list(tmp_path.iterdir()) == []
    kept.keep(tmp_path, "fits", b"fits")
    assert kept.recall(tmp_path, "fits") == b"fits"
    assert kept.recall(tmp_path, "another") is None
