"""The timing cache on disk: reused, merged, discarded when it is of no use, and never in the way of a build."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from vlaopt.backends.tensorrt import timing_cache
from vlaopt.backends.tensorrt.timing_cache import TimingCache, cache_path


class Times:
    """TensorRT's `ITimingCache`, holding the names of what was timed."""

    def __init__(self, data: bytes) -> None:
        self.timed = set(data.decode().split())

    def serialize(self) -> bytes:
        return " ".join(sorted(self.timed)).encode()

    def combine(self, other: Times, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.timed |= other.timed
        return True


class Config:
    """Of `IBuilderConfig` what timing caches need; it takes none that holds `strange`."""

    cache: Times

    def create_timing_cache(self, data: bytes) -> Times | None:
        return None if data.startswith(b"!") else Times(data)

    def set_timing_cache(self, cache: Times, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if "strange" in cache.timed:
            return False
        self.cache = cache
        return True


def build(path: Path, *timed: str) -> TimingCache:
    config = Config()
    cache = TimingCache(config, path)
    config.cache.timed.update(timed)
    cache.keep()
    return cache


@pytest.fixture
def path(tmp_path):
    return cache_path(tmp_path / "tensorrt", "10.3.0", "8.7", "Orin (nvgpu)")


def test_the_next_build_begins_with_what_was_timed(path):
    assert build(path, "conv").state == "new"
    second = build(path, "gemm")
    assert second.state == "reused"
    assert second.notes == []
    config = Config()
    TimingCache(config, path)
    assert config.cache.timed == {"conv", "gemm"}


def test_other_versions_and_gpus_have_other_files(tmp_path):
    paths = {
        cache_path(tmp_path, version, sm, gpu)
        for version in ("10.3.0", "10.13.3.9")
        for sm in ("8.7", "11.0")
        for gpu in ("Orin (nvgpu)", "NVIDIA Thor")
    }
    assert len(paths) == 8
    assert "timing-10.3.0-sm8.7-Orin_nvgpu_" in {path.name for path in paths}


def test_what_another_process_kept_meanwhile_is_not_lost(path):
    config = Config()
    first = TimingCache(config, path)
    build(path, "gemm")
    config.cache.timed.add("conv")
    first.keep()
    config = Config()
    TimingCache(config, path)
    assert config.cache.timed == {"conv", "gemm"}


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it is damaged"),
        (lambda path: path.write_bytes(b""), "it is damaged"),
        (lambda path: (path.unlink(), path.mkdir()), "not a"),
    ],
)
def test_a_damaged_file_is_discarded_with_a_note(path, spoil, why):
    build(path, "conv", "gemm")
    spoil(path)
    config = Config()
    cache = TimingCache(config, path)
    assert cache.state == "discarded"
    assert "discarded, kernels are measured again" in cache.notes[0]
    assert why in cache.notes[0]
    assert config.cache.timed == set()


@pytest.mark.parametrize("refused", ["strange", "!"])
def test_a_cache_that_tensorrt_does_not_take_is_discarded_and_replaced(path, refused, monkeypatch):
    build(path, "conv")
    data = refused.encode()
    path.write_bytes(timing_cache.digest_bytes(data).encode() + data)
    cache = build(path, "gemm")
    assert cache.state == "discarded"
    assert "TensorRT does not take it" in cache.notes[0]
    assert build(path).state == "reused"


def test_where_nothing_can_be_written_the_build_goes_on_with_a_note(tmp_path):
    (tmp_path / "tensorrt").write_text("a file where the folder should be")
    cache = build(tmp_path / "tensorrt" / "timing", "conv")
    assert cache.state == "new"
    assert "timing cache not kept" in cache.notes[0]


def held(path: Path, ready, seconds: float) -> None:
    with timing_cache._locked(path):
        ready.set()
        time.sleep(seconds)


def test_two_processes_do_not_write_at_once(path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=held, args=(path, ready, 0.5))
    other.start()
    assert ready.wait(20)
    began = time.monotonic()
    build(path, "conv")
    assert time.monotonic() - began > 0.3
    other.join()
    assert other.exitcode == 0
