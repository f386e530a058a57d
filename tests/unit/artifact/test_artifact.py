"""The promise: what an artifact gives is byte for byte what was written, or nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from vlaopt.artifact.artifact import SPEC_PATH, Artifact, copy, drafted, finish
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.hashing import canonical_json, digest_bytes

Publish = Callable[..., Artifact]
FILES = {"onnx/policy.onnx": ("component", b"graph"), "reports/a.json": ("report", b"{}"), "empty": ("weights", b"")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def artifact(tmp_path: Path, publish: Publish) -> Artifact:
    return publish(tmp_path / "artifact", FILES)


def test_an_artifact_opens_as_it_was_written(artifact: Artifact) -> None:
    assert {entry.path: artifact.read(entry.path) for entry in artifact.manifest.files} == {
        path: data for path, (_, data) in FILES.items()
    }
    assert [entry.path for entry in artifact.manifest.by_role("report")] == ["reports/a.json"]
    assert artifact.size("component", "report") == 7
    assert artifact.has("empty")
    assert not artifact.has("full")
    artifact.check()


def test_the_id_is_the_digest_of_the_manifests_bytes(artifact: Artifact) -> None:
    data = (artifact.path / "manifest.json").read_bytes()
    assert artifact.id == digest_bytes(data)
    assert artifact.encoded == data
    assert artifact.version == f"1.0.0+{artifact.id[:12]}"


def test_equal_content_is_the_same_artifact_wherever_it_lies(
    tmp_path: Path, publish: Publish, artifact: Artifact
) -> None:
    assert publish(tmp_path / "again", dict(reversed(FILES.items()))).id == artifact.id


def _extra(folder: Path) -> None:
    (folder / "onnx" / "more.onnx").write_bytes(b"")


def _hidden(folder: Path) -> None:
    (folder / ".hidden").write_bytes(b"")


def _missing(folder: Path) -> None:
    (folder / "empty").unlink()


def _linked(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").symlink_to("/dev/null")


def _linked_folder(folder: Path) -> None:
    (folder / "onnx").rename(folder.parent / "elsewhere")
    (folder / "onnx").symlink_to(folder.parent / "elsewhere")


def _linked_manifest(folder: Path) -> None:
    (folder / "manifest.json").rename(folder.parent / "elsewhere.json")
    (folder / "manifest.json").symlink_to(folder.parent / "elsewhere.json")


def _pipe(folder: Path) -> None:
    (folder / "empty").unlink()
    os.mkfifo(folder / "empty")


def _longer(folder: Path) -> None:
    (folder / "empty").write_bytes(b"1")


def _folder(folder: Path) -> None:
    (folder / "empty").unlink()
    (folder / "empty").mkdir()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_extra, r"onnx/more\.onnx is not listed in the manifest"),
        (_hidden, r"\.hidden is not listed in the manifest"),
        (_missing, "empty is missing"),
        (_linked, "empty is a link or a device"),
        (_linked_folder, "onnx is a link or a device"),
        (_linked_manifest, r"manifest\.json is a link or a device"),
        (_pipe, "empty is a link or a device"),
        (_longer, "empty has 1 bytes, 0 listed"),
        (_folder, "empty is missing"),
    ],
)
def test_files_that_are_not_exactly_the_listed_ones_are_refused(
    artifact: Artifact, damage: Callable[[Path], None], reason: str
) -> None:
    damage(artifact.path)
    with pytest.raises(InputError, match=reason) as caught:
        Artifact.open(artifact.path)
    assert "build the artifact again" in str(caught.value.hint)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: no such artifact directory"):
        Artifact.open(tmp_path / "gone")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        Artifact.open(tmp_path)
    (tmp_path / "manifest.json").write_bytes(b" " * ((16 << 20) + 1))
    with pytest.raises(InputError, match="more than the 16777216 allowed"):
        Artifact.open(tmp_path)


def test_an_artifact_taken_away_while_it_is_opened_is_refused(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "lstat", lambda path: os.lstat("/no/such/file"))
    with pytest.raises(InputError, match="cannot be read: No such file"):
        Artifact.open(artifact.path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, publish: Publish) -> Artifact:
    return publish(
        tmp_path_factory.mktemp("whole") / "artifact", {**FILES, "weights/w": ("weights", bytes(range(256)))}
    )


@given(data=st.data())
@examples(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_flipped_bit_of_any_file_is_refused(whole: Artifact, data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from([entry for entry in whole.manifest.files if entry.size]))
    offset = data.draw(st.integers(0, entry.size - 1))
    path = whole.path / entry.path
    sound = path.read_bytes()
    bad = bytearray(sound)
    bad[offset] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(bad)
    try:
        opened = Artifact.open(whole.path)
        with pytest.raises(InputError, match=f"{entry.path} was changed after it was written: its digest differs"):
            opened.read(entry.path)
        with pytest.raises(InputError, match="its digest differs"):
            opened.check()
    finally:
        path.write_bytes(sound)
    whole.check()


def test_the_bytes_given_are_those_hashed_even_when_the_file_is_swapped(artifact: Artifact) -> None:
    first = artifact.read("onnx/policy.onnx")
    (artifact.path / "onnx/policy.onnx").write_bytes(b"GRAPH")
    assert first == b"graph"
    with pytest.raises(InputError, match="its digest differs"):
        artifact.read("onnx/policy.onnx")


@pytest.mark.parametrize("path", ["onnx/other.onnx", "../artifact/empty", "/etc/passwd", "manifest.json"])
def test_only_listed_files_are_read(artifact: Artifact, path: str) -> None:
    with pytest.raises(InputError, match="the artifact has no"):
        artifact.read(path)


def test_an_unsound_policy_is_refused_by_its_key(tmp_path: Path, publish: Publish) -> None:
    artifact = publish(tmp_path / "artifact", {SPEC_PATH: ("policy", b'{"type": "tiny"}')})
    with pytest.raises(InputError, match=r"policy/spec\.json: action_dim: Field required"):
        artifact.spec()
    with pytest.raises(InputError, match=r"the artifact has no policy/spec\.json"):
        publish(tmp_path / "empty", {}).spec()


def test_an_unsound_recipe_is_refused_by_its_key(artifact: Artifact) -> None:
    with pytest.raises(InputError, match=r"manifest\.json: recipe: .*: "):
        artifact.recipe()


def test_a_draft_without_a_manifest_is_never_published(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="without a manifest"), drafted(tmp_path / "artifact") as draft:
        draft.write("a", b"", "report")
    assert names(tmp_path) == []


def test_a_draft_takes_files_over_and_drops_them(tmp_path: Path, artifact: Artifact) -> None:
    with drafted(tmp_path / "next") as draft:
        draft.carry(artifact, "component", "report")
        draft.write("reports/a.json", b"[]", "report")
        draft.write_json("reports/b.json", {"b": 1, "a": 2}, "report")
        draft.remove("onnx/policy.onnx")
        finish(draft, name="tiny", version="1.0.0", target="cpu", stage="x", recipe={}, lineage=(), tools={})
    found = Artifact.open(tmp_path / "next")
    assert {entry.path: found.read(entry.path) for entry in found.manifest.files} == {
        "reports/a.json": b"[]",
        "reports/b.json": b'{"a":2,"b":1}',
    }


def test_what_is_taken_over_is_linked_and_the_source_survives_what_is_done_to_it(
    tmp_path: Path, artifact: Artifact
) -> None:
    def save(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "policy.onnx").open("wb").write(b"written by a library that opens what is there")

    with drafted(tmp_path / "next") as draft:
        draft.carry(artifact, "component", "report", "weights")
        assert (draft.folder / "onnx/policy.onnx").samefile(artifact.path / "onnx/policy.onnx")
        draft.write("reports/a.json", b"[]", "report")
        draft.write_folder("onnx", save, "component")
        draft.remove("empty")
        finish(draft, name="tiny", version="1.0.0", target="cpu", stage="x", recipe={}, lineage=(), tools={})
    Artifact.open(artifact.path).check()
    Artifact.open(tmp_path / "next").check()


def test_a_copy_shares_no_file_with_the_original(tmp_path: Path, artifact: Artifact) -> None:
    place = copy(artifact, tmp_path / "copy").path
    assert not any((place / path).samefile(artifact.path / path) for path in FILES)


def test_large_files_are_taken_over_copied_and_checked_without_being_in_memory(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from vlaopt.artifact.artifact import Artifact, copy, drafted, finish
from vlaopt import files
from vlaopt.benchmark.environment import peak_memory_mib
root = Path(sys.argv[1])
fields = dict(name="tiny", version="1.0.0", target="cpu", stage="x", recipe={}, lineage=(), tools={})
def save(folder):
    folder.mkdir()
    with (folder / "w").open("wb") as file:
        file.truncate(256 << 20)
with drafted(root / "a") as draft:
    draft.write_folder("weights", save, "weights")
    finish(draft, **fields)
if sys.argv[2] == "copied":
    files.os.link = lambda *_, **__: (_ for _ in ()).throw(OSError(18, "another file system"))
before = peak_memory_mib()
source = Artifact.open(root / "a")
with drafted(root / "b") as draft:
    draft.carry(source, "weights")
    finish(draft, **fields)
copy(Artifact.open(root / "b"), root / "c").check()
print(peak_memory_mib() - before)
"""
    for how in ("linked", "copied"):
        folder = tmp_path / how
        folder.mkdir()
        done = subprocess.run([sys.executable, "-c", code, folder, how], capture_output=True, text=True, check=True)
        assert float(done.stdout) < 32, f"{done.stdout} MiB more for 256 MiB of files"
        shutil.rmtree(folder)


def test_a_damaged_file_is_not_taken_over(tmp_path: Path, artifact: Artifact) -> None:
    (artifact.path / "onnx/policy.onnx").write_bytes(b"GRAPH")
    with pytest.raises(InputError, match="its digest differs"), drafted(tmp_path / "next") as draft:
        draft.carry(artifact, "component")
    assert not (tmp_path / "next").exists()


def test_a_path_outside_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a plain relative path"), drafted(tmp_path / "artifact") as draft:
        draft.write("../outside", b"", "report")
    assert names(tmp_path) == []


def test_copying_twice_is_copying_once(tmp_path: Path, artifact: Artifact) -> None:
    first = copy(artifact, tmp_path / "copies" / "a")
    assert copy(artifact, tmp_path / "copies" / "a").id == first.id == artifact.id
    first.check()
    assert names(tmp_path / "copies") == ["a"]


def test_another_artifact_is_never_written_over(tmp_path: Path, publish: Publish, artifact: Artifact) -> None:
    other = publish(tmp_path / "other", {"a": ("report", b"")})
    with pytest.raises(InputError, match="something else lies there") as caught:
        copy(artifact, other.path)
    assert caught.value.hint == "give another --output"
    assert Artifact.open(other.path).id == other.id


@pytest.mark.parametrize("damage", ["changed", "lost", "added"])
def test_a_damaged_copy_makes_room_for_a_sound_one(tmp_path: Path, artifact: Artifact, damage: str) -> None:
    place = copy(artifact, tmp_path / "copies" / "a").path
    if damage == "changed":
        (place / "onnx/policy.onnx").write_bytes(b"GRAPH")
    elif damage == "lost":
        (place / "onnx/policy.onnx").unlink()
    else:
        (place / "stray").write_bytes(b"")
    copy(artifact, place).check()
    assert names(tmp_path / "copies") == ["a"]


def test_a_folder_that_is_no_artifact_is_never_written_over(tmp_path: Path, artifact: Artifact) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_bytes(b"three years")
    with pytest.raises(InputError, match="something else lies there"):
        copy(artifact, tmp_path / "mine")
    assert names(tmp_path / "mine") == ["thesis.txt"]


def test_a_damaged_artifact_is_not_copied(tmp_path: Path, artifact: Artifact) -> None:
    (artifact.path / "onnx/policy.onnx").write_bytes(b"GRAPH")
    with pytest.raises(InputError, match="its digest differs"):
        copy(artifact, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_copy_onto_a_file_is_refused(tmp_path: Path, artifact: Artifact) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentProblem, match="file: cannot be written: Not a directory"):
        copy(artifact, tmp_path / "file")


def rewritten(artifact: Artifact, change: Mapping[str, Any], encode: Callable[[Any], bytes]) -> Artifact:
    value = {**json.loads(artifact.encoded), **change}
    (artifact.path / "manifest.json").write_bytes(encode(value))
    return Artifact.open(artifact.path)


@pytest.mark.parametrize(
    ("change", "encode"),
    [
        ({"schema": "vlaopt.artifact/1.9", "signature": "x"}, canonical_json),
        ({}, lambda value: json.dumps(value).encode()),
    ],
    ids=["newer minor", "not canonical"],
)
def test_a_manifest_written_otherwise_is_copied_byte_for_byte(
    tmp_path: Path, artifact: Artifact, change: dict[str, Any], encode: Callable[[Any], bytes]
) -> None:
    changed = rewritten(artifact, change, encode)
    copied = copy(changed, tmp_path / "copy")
    assert copied.id == changed.id != artifact.id
    assert (tmp_path / "copy/manifest.json").read_bytes() == (artifact.path / "manifest.json").read_bytes()


def test_the_same_files_under_another_manifest_are_another_artifact(tmp_path: Path, artifact: Artifact) -> None:
    renamed = Artifact.from_manifest(artifact.path, artifact.manifest.model_copy(update={"name": "other"}))
    assert renamed.id != artifact.id
    assert copy(renamed, tmp_path / "copy").id == renamed.id
    shutil.rmtree(tmp_path / "copy")
