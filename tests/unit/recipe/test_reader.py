"""YAML is read strictly, and every refusal names its place."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.errors import InputError, RecipeError
from vlaopt.recipe.reader import PlainFloat, PlainInt, parse, parse_mapping, read_mapping


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E3", 1000.0),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("12", 12),
        ("-0", 0),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("010", "010"),
        ("08", "08"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("2026-01-02", "2026-01-02"),
        ("1.2.3", "1.2.3"),
        ("nan", "nan"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("=", "="),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    got = parse_mapping(f"a: {text}\n", "r").values["a"]
    assert got == value
    assert isinstance(got, type(value))


def test_a_plain_number_keeps_how_it_was_written() -> None:
    values = parse_mapping("a: 10.10\nb: 0x10\n", "r").values
    assert isinstance(values["a"], PlainFloat) and values["a"].text == "10.10"
    assert isinstance(values["b"], PlainInt) and values["b"].text == "0x10"
    assert copy.deepcopy(values)["a"].text == "10.10"
    assert json.dumps(values) == '{"a": 10.1, "b": 16}'


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a: 1\nb: 2\na: 3\n", r"r:3:1: duplicate key `a` \(first on line 1\)"),
        ("a: {b: 1, b: 2}\n", r"r:1:11: duplicate key `b`"),
        ("a: 1\n'a': 2\n", r"r:2:1: duplicate key `a`"),
        ("a: &x [1]\nb: *x\n", r"r:1:4: anchor `&x`"),
        ("a: *x\n", r"r:1:4: alias `\*x`"),
        ("a: !!python/object/apply:os.system ['true']\n", r"r:1:4: tag .*os\.system"),
        ("a: !!str 1\n", r"r:1:4: tag"),
        ("a: ! 1\n", r"r:1:4: tag `!`"),
        ("a:\n  <<: {b: 1}\n", r"r:2:3: merge key"),
        ("a: 1\n---\nb: 2\n", r"r:2:1: a second document"),
        ("%YAML 1.1\n---\na: 1\n", r"r:.*directive"),
        ("? [1, 2]\n: 3\n", r"r:1:3: a list or mapping used as a key"),
        (": 3\n", r"r:1:1: a key is missing|r:1:1: not valid YAML"),
        ("'': 3\n", r"r:1:1: a key is missing"),
        ("a: .nan\n", r"r:1:4: `\.nan` is not a finite number"),
        ("a: -.inf\n", r"r:1:4: `-\.inf` is not a finite number"),
        ("a: 1e999\n", r"r:1:4: `1e999` is not a finite number"),
        ("a: " + "9" * 5000 + "\n", r"r:1:4: a number of 5000 digits"),
        ("a: " + "[" * 5000, r"r:1:\d+: nested deeper than 32 levels"),
        ("a: [1, 2\n", r"r:\d+:\d+: not valid YAML"),
        ("a: 'open\n", r"r:\d+:\d+: not valid YAML"),
        ("a:\n\tb: 1\n", r"r:2:1: not valid YAML"),
        ("a: \x01\n", r"r: not valid YAML|r:1:4: not valid YAML"),
        ('a: "\\0"\n', r"r:1:4: a character that is not text"),
        ("[1]\n", r"r:1:1: the top level must be a mapping"),
        ("text\n", r"r:1:1: the top level must be a mapping"),
        ("", r"r: empty file"),
        ("# only a comment\n", r"r: empty file"),
    ],
)
def test_refusals_name_their_place(text: str, match: str) -> None:
    with pytest.raises(InputError, match=match):
        parse_mapping(text, "r")


def test_an_alias_bomb_is_refused_at_its_first_anchor() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 20)]
    with pytest.raises(RecipeError, match="r:1:5: anchor `&a0`") as caught:
        parse_mapping("\n".join(lines), "r")
    assert len(caught.value.problems) == 1


def test_all_duplicate_keys_are_reported_at_once() -> None:
    with pytest.raises(RecipeError, match="duplicate") as caught:
        parse_mapping("a: 1\na: 2\nb: {c: 1, c: 2}\nd: &x 1\n", "r")
    assert [problem.where for problem in caught.value.problems] == ["r:2:1", "r:3:11", "r:4:4"]


def test_places_are_those_of_the_keys_and_items() -> None:
    places = parse_mapping("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n", "r").places
    assert places[("a", "b")] == (2, 3)
    assert places[("a", "c", 1)] == (5, 7)
    assert places[("a", "c", 1, "d")] == (5, 8)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    with pytest.raises(InputError, match="209715200 bytes, more than the 1048576 allowed"):
        read_mapping(path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\x7fELF\0\0", "a binary file, not YAML"),
        ("a: ä".encode("latin-1"), r":1:4: not UTF-8 text"),
        ("a: 1".encode("utf-16"), "binary|not UTF-8"),
        (b"", "empty file"),
    ],
)
def test_what_is_not_utf8_text_is_refused(tmp_path: Path, data: bytes, match: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(InputError, match=match):
        read_mapping(path)


def test_a_byte_order_mark_is_not_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_mapping(path).values == {"a": 1}


@pytest.mark.parametrize("name", ["nothing.yaml", "."])
def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"no such file|a directory, not a file"):
        read_mapping(tmp_path / name)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    # JSON escapes what lies above U+FFFF as two surrogates, which YAML refuses; NUL is refused by design.
    | st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=10,
)


@given(_JSON)
def test_json_reads_as_itself(value: object) -> None:
    assert parse(json.dumps(value), "r").values == value


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused_with_a_sentence(text: str) -> None:
    try:
        parse(text, "r")
    except InputError as error:
        assert error.lines()
