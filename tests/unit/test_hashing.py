"""The promise: equal values have equal digests however they are written down, and different ones do not."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.artifact.store import key_of
from vlaopt.errors import InputError
from vlaopt.hashing import canonical_json, digest_bytes, digest_file, digest_json, digest_tree

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=4))


def reordered(value: Any) -> Any:
    """The same value with every mapping filled in the opposite order, and tuples in place of lists."""
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(list(value))}
    return tuple(map(reordered, value)) if isinstance(value, list) else value


@given(st.dictionaries(TEXT, VALUES, max_size=6))
def test_a_key_does_not_depend_on_order(parts: dict[str, Any]) -> None:
    assert key_of(parts) == key_of(reordered(parts))


@given(VALUES)
def test_canonical_json_reads_back_and_writes_the_same_again(value: Any) -> None:
    data = canonical_json(value)
    assert canonical_json(json.loads(data)) == data


@given(st.dictionaries(TEXT, VALUES, min_size=1, max_size=4), st.data())
def test_a_changed_part_changes_the_key(parts: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(parts)))
    other = data.draw(VALUES)
    same = canonical_json(other) == canonical_json(parts[name])
    assert (key_of({**parts, name: other}) == key_of(parts)) == same


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        key_of({"threshold": [number]})


def test_canonical_json_is_the_documented_form() -> None:
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == '{"a":"é","b":[1,2.5,null]}'.encode()
    assert digest_json({}) == hashlib.sha256(b"{}").hexdigest()


def test_a_file_larger_than_one_piece_has_the_digest_of_its_bytes(tmp_path: Path) -> None:
    data = os.urandom((1 << 20) + 17)
    (tmp_path / "file").write_bytes(data)
    assert digest_file(tmp_path / "file") == (len(data), digest_bytes(data))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone: cannot be read: No such file"):
        digest_file(tmp_path / "gone")


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_the_digest_of_a_tree_is_that_of_its_names_and_bytes(tmp_path: Path) -> None:
    one = tree(tmp_path / "one", {"a": b"1", "b/c": b"2"})
    assert digest_tree(one) == digest_tree(tree(tmp_path / "two", {"b/c": b"2", "a": b"1"}))
    assert digest_tree(one) != digest_tree(tree(tmp_path / "three", {"a": b"1", "b/d": b"2"}))
    assert digest_tree(one) != digest_tree(tree(tmp_path / "four", {"a": b"1", "b/c": b"3"}))


def test_the_files_of_a_hub_cache_are_links_and_count_by_their_bytes(tmp_path: Path) -> None:
    plain = tree(tmp_path / "plain", {"model": b"weights"})
    linked = tree(tmp_path / "linked", {})
    linked.mkdir()
    (linked / "model").symlink_to(plain / "model")
    assert digest_tree(linked) == digest_tree(plain)


def test_a_checkpoint_of_one_file_is_hashed_too(tmp_path: Path) -> None:
    path = tree(tmp_path, {"model.safetensors": b"1"}) / "model.safetensors"
    before = digest_tree(path)
    path.write_bytes(b"2")
    assert digest_tree(path) != before


def test_a_tree_that_is_not_there_has_no_digest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone: no such file or folder"):
        digest_tree(tmp_path / "gone")
