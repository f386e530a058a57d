"""The promise: the store gives whole results only, says why one is missing, and survives damage and company."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import VARIABLE, Record, Store, key_of
from vlaopt.errors import EnvironmentProblem

Publish = Callable[..., Artifact]
FILES = {"onnx/policy.onnx": ("component", b"graph")}
KEY = key_of({"stage": "export"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def record(parts: Mapping[str, Any] | None = None, *, written: float = 1000.0, **fields: Any) -> Record:
    parts = parts or {"stage": "export"}
    base = {"stage": "export", "key": key_of(parts), "name": "tiny", "target": "cpu", "parts": parts, "seconds": 1.5}
    return Record(**{**base, "written": written, **fields})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def keep(store: Store, publish: Publish) -> Callable[[Record], Artifact]:
    """Puts a result and its record into the store."""

    def put(line: Record) -> Artifact:
        artifact = publish(store.place(line.stage, line.key), FILES, stage=line.stage)
        store.note(line)
        return artifact

    return put


Keep = Callable[[Record], Artifact]


def test_a_result_is_found_under_its_key_only(store: Store, keep: Keep) -> None:
    kept = keep(record())
    found = store.find("export", KEY)
    assert found is not None
    assert found.id == kept.id
    assert store.find("prune", KEY) is None
    assert store.find("export", key_of({})) is None


@pytest.mark.parametrize("damage", ["byte", "missing", "extra", "manifest"])
def test_a_damaged_result_is_dropped_so_that_it_is_made_again(
    store: Store, keep: Keep, publish: Publish, damage: str
) -> None:
    folder = keep(record()).path
    if damage == "byte":
        (folder / "onnx/policy.onnx").write_bytes(b"grapH")
    elif damage == "missing":
        (folder / "onnx/policy.onnx").unlink()
    elif damage == "extra":
        (folder / "more").write_bytes(b"")
    else:
        (folder / "manifest.json").write_bytes(b"{")
    assert store.find("export", KEY) is None
    assert names(folder.parent) == []
    assert publish(folder, FILES).path == folder
    assert store.find("export", KEY) is not None


def test_a_damaged_result_that_cannot_be_dropped_is_told(
    store: Store, keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    (keep(record()).path / "more").write_bytes(b"")

    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(EnvironmentProblem, match="cannot be written: Permission denied"):
        store.find("export", KEY)


def test_records_are_those_whose_result_is_there_newest_first(store: Store, keep: Keep) -> None:
    old, new = record({"n": 1}, written=1), record({"n": 2}, written=2)
    keep(new)
    keep(old)
    store.note(record({"n": 3}, written=3))
    assert store.records() == [new, old]
    assert new.title == "tiny/cpu export"


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"\xff\xfe\x00",
        b"[]",
        b"null",
        b"{}",
        b"[" * 100_000,
        json.dumps({**vars(record()), "written": "yesterday"}).encode(),
        json.dumps({**vars(record()), "parts": "everything"}).encode(),
        json.dumps({**vars(record()), "stage": 5}).encode(),
        json.dumps({**vars(record()), "key": "../../.."}).encode(),
        json.dumps({**vars(record()), "stage": "../../../home", "key": "x"}).encode(),
    ],
)
def test_garbage_in_the_journal_is_passed_over_and_never_followed(store: Store, keep: Keep, garbage: bytes) -> None:
    sound = record({"n": 1}, written=time.time() - 10)
    keep(sound)
    bad = store.root / "journal" / "export" / f"{key_of({'n': 2})}.json"
    bad.write_bytes(garbage)
    assert store.records() == [sound]
    assert store.why("export", "tiny", "cpu", {"n": 3}) == "n: 1 → 3"
    assert store.collect(older_than_days=1) == (0, 0)
    assert store.find("export", sound.key) is not None


def test_a_key_never_built_is_told(store: Store, keep: Keep) -> None:
    assert store.why("export", "tiny", "cpu", {}) == "never built here"
    keep(record())
    for stage, name, target in (("prune", "tiny", "cpu"), ("export", "other", "cpu"), ("export", "tiny", "gpu")):
        assert store.why(stage, name, target, {}) == "never built here"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"opset": 19}, "opset: 20 → 19"),
        ({"prune": {"method": "l1", "sparsity": 0.5}}, "prune.method: none → l1; prune.sparsity: nothing → 0.5"),
        ({"input": "b" * 64}, "input: aaaaaaaaaaaa… → bbbbbbbbbbbb…"),
        ({"machine": "here"}, "machine: null → here"),
        ({"scopes": ["head", "eye"]}, 'scopes: ["head"] → ["head", "eye"]'),
        ({"new": None}, "new: nothing → null"),
    ],
)
def test_what_changed_since_the_newest_result_is_named(
    store: Store, keep: Keep, changed: dict[str, Any], sentence: str
) -> None:
    parts = {"opset": 20, "prune": {"method": "none"}, "input": "a" * 64, "machine": None, "scopes": ["head"]}
    keep(record({**parts, "opset": 1}, written=1))
    keep(record(parts, written=2))
    assert store.why("export", "tiny", "cpu", {**parts, **changed}) == sentence


def test_parts_differ_by_their_values_not_their_types(store: Store, keep: Keep) -> None:
    keep(record({"scopes": ["head"], "n": 1}))
    assert store.why("export", "tiny", "cpu", {"scopes": ("head",), "n": 2}) == "n: 1 → 2"


def test_a_result_that_was_dropped_is_told(store: Store, keep: Keep) -> None:
    (keep(record()).path / "more").write_bytes(b"")
    store.find("export", KEY)
    assert store.why("export", "tiny", "cpu", {"stage": "export"}) == "its result was removed"


def test_old_results_are_collected_and_younger_ones_kept(store: Store, keep: Keep) -> None:
    day, now = 86400, time.time()
    old, young = record({"n": 1}, written=now - 3 * day), record({"n": 2}, written=now - day)
    size = sum(path.stat().st_size for path in keep(old).path.rglob("*") if path.is_file())
    keep(young)
    assert store.collect(older_than_days=2) == (1, size)
    assert store.records() == [young]
    assert names(store.root / "journal" / "export") == [f"{young.key}.json"]
    assert store.collect(older_than_days=2) == (0, 0)


def test_a_result_whose_builder_died_before_its_record_is_collected_too(store: Store, publish: Publish) -> None:
    place = publish(store.place("export", KEY), FILES).path
    assert store.collect(older_than_days=1) == (0, 0)
    os.utime(place, (1, 1))
    removed, freed = store.collect(older_than_days=1)
    assert (removed, freed > 0) == (1, True)
    assert not place.exists()


def test_what_opening_engines_kept_is_collected_when_it_is_old(store: Store) -> None:
    store.opened.joinpath("openvino").mkdir(parents=True)
    old, young = store.opened / "openvino" / ("a" * 64), store.opened / "openvino" / ("b" * 64)
    old.write_bytes(b"12345")
    young.write_bytes(b"1")
    os.utime(old, (0, time.time() - 10 * 86400))
    assert store.collect(older_than_days=9) == (1, 5)
    assert [path.name for path in store.opened.glob("*/*")] == [young.name]


def test_what_dead_processes_left_anywhere_is_collected(store: Store) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (store.root / "stages/export" / f".staging-{dead.pid}-0").mkdir(parents=True)
    (store.root / "stages/export" / f".staging-{os.getpid()}-0").mkdir()
    (store.root / "journal/export").mkdir(parents=True)
    (store.root / "journal/export" / f".staging-{dead.pid}-1").write_bytes(b"{")
    (store.root / "summaries").mkdir()
    (store.root / "summaries" / f".staging-{dead.pid}-2").write_bytes(b"{")
    assert store.collect(older_than_days=0) == (3, 0)
    assert names(store.root / "stages/export") == [f".staging-{os.getpid()}-0"]


def test_what_an_interrupted_stage_found_out_is_collected_when_it_is_old(store: Store) -> None:
    old, young = store.unfinished("quantize", KEY), store.unfinished("quantize", "0" * 64)
    old.parent.mkdir(parents=True)
    for path in (old, young):
        path.write_bytes(b"a line")
    os.utime(old, (0, 0))
    assert store.collect(older_than_days=1) == (1, 6)
    assert not old.exists()
    assert young.exists()


def test_engines_of_an_interrupted_build_are_collected_when_they_are_old(store: Store) -> None:
    folder = store.unfinished_folder("engine", KEY)
    (folder / "tensorrt/head/plain").mkdir(parents=True)
    (folder / "tensorrt/head/plain/engine.plan").write_bytes(b"a plan")
    assert store.collect(older_than_days=1) == (0, 0)
    os.utime(folder, (0, 0))
    assert store.collect(older_than_days=1) == (1, 6)
    assert not folder.exists()


def test_small_results_are_kept_beside_the_stages(store: Store) -> None:
    assert store.recall("summaries", KEY) is None
    store.remember("summaries", KEY, {"rows": [1, 2]})
    assert store.recall("summaries", KEY) == {"rows": [1, 2]}
    for garbage in (b"", b"[]", b"\xff"):
        (store.root / "summaries" / f"{KEY}.json").write_bytes(garbage)
        assert store.recall("summaries", KEY) is None


def test_a_store_that_cannot_be_written_is_this_machines_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentProblem, match="cannot be written: Not a directory"):
        Store(tmp_path / "file").note(record())


def test_the_store_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert Store.default().root == tmp_path
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store.default().root == tmp_path / "cache" / "vlaopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store.default().root == tmp_path / "home" / ".cache" / "vlaopt"


def test_a_user_without_a_home_is_told_how_to_name_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in (VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(EnvironmentProblem, match="no home directory") as caught:
        Store.default()
    assert caught.value.hint == "set VLAOPT_STORE"


def _build(store: Store, publish: Publish, barrier: multiprocessing.synchronize.Barrier, number: int) -> None:
    barrier.wait(20)
    for round_ in range(3):
        found = store.find("export", KEY)
        if found is None:
            publish(store.place("export", KEY), FILES)
        store.note(record(written=1000.0 + number))
        assert store.find("export", KEY) is not None
        assert [line.key for line in store.records()] == [KEY], round_


def test_sixteen_builders_of_one_key_all_succeed(store: Store, publish: Publish) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(16)
    builders = [context.Process(target=_build, args=(store, publish, barrier, number)) for number in range(16)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(30)
    assert [builder.exitcode for builder in builders] == [0] * 16
    assert names(store.root / "stages/export") == [KEY]
    assert names(store.root / "journal/export") == [f"{KEY}.json"]


def test_the_newest_of_a_kind_is_the_one_written_last_among_its_keys(store: Store) -> None:
    assert store.newest("bench", "aa-") is None
    for age, key in enumerate(("aa-new", "aa-old", "bb-newest")):
        store.remember("bench", key, {"key": key})
        os.utime(store.root / "bench" / f"{key}.json", (1000.0 - age, 1000.0 - age))
    assert store.newest("bench", "aa-") == {"key": "aa-new"}
    (store.root / "bench" / "aa-new.json").write_bytes(b"{")
    assert store.newest("bench", "aa-") is None
