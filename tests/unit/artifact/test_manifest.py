"""The promise: a manifest is read only when every word of it is sound, and says what an artifact does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlaopt.artifact.manifest import EngineComponent, EngineEntry, FileEntry, Manifest, Step, decode
from vlaopt.errors import InputError
from vlaopt.hashing import canonical_json, digest_bytes

DIGEST = digest_bytes(b"")


def file(path: str = "onnx/policy.onnx", **fields: Any) -> dict[str, Any]:
    return {"path": path, "role": "component", "size": 0, "sha256": DIGEST, **fields}


def document(*files: dict[str, Any], **fields: Any) -> dict[str, Any]:
    base = {
        "schema": "vlaopt.artifact/1.0",
        "name": "tiny",
        "version": "1.0.0",
        "target": "cpu",
        "stage": "onnx",
        "recipe": {},
        "lineage": [],
        "tools": {},
        "metrics": {},
        "engine": None,
        "finish": None,
        "files": list(files) or [file()],
    }
    return {**base, **fields}


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def engine(reason: str = "faster", threads: int = 1) -> EngineEntry:
    component = EngineComponent(variant="quantized", reason=reason, files=("engines/a",), precisions={"int8": 3})
    return EngineEntry(
        machine="here", backend="b", backend_version="1", threads=threads, settings={}, components={"policy": component}
    )


def test_a_manifest_comes_back_from_its_own_bytes() -> None:
    step = Step(stage="export", stage_version=1, key=DIGEST, took=None)
    manifest = decode(encoded(document(lineage=[step.model_dump()], engine=engine().model_dump())), where="m")
    assert decode(manifest.encode(), where="m") == manifest
    assert manifest.encode() == canonical_json(json.loads(manifest.encode()))


@pytest.mark.parametrize(
    "path",
    [
        "../secret",
        "onnx/../../secret",
        "/etc/passwd",
        "C:\\windows",
        "C:/windows",
        "onnx\\policy.onnx",
        "onnx//policy.onnx",
        "onnx/",
        "./policy.onnx",
        ".",
        "",
        ".hidden",
        "onnx/.staging-1-0",
        "pol\0icy",
        "pol\nicy",
        "policy\n",
        "a b",
        "politique\u0301",
        "politiqué",
        "\u202egnp.exe",
        "CON",
        "onnx/nul.onnx",
        "com1",
        "a" * 241,
    ],
)
def test_a_path_that_is_not_plain_is_refused(path: str) -> None:
    with pytest.raises(InputError, match=r"m: not a sound manifest: files\.0\.path: .* is not a plain relative path"):
        decode(encoded(document(file(path))), where="m")


@given(st.text(max_size=12))
def test_an_accepted_path_never_leaves_the_artifact(path: str) -> None:
    try:
        FileEntry(path=path, role="report", size=0, sha256=DIGEST)
    except ValueError:
        return
    assert path.isascii()
    assert not path.startswith("/")
    assert not {"", ".", ".."} & set(path.split("/"))
    assert not set(path) & set("\\:\0 ")


def test_names_that_differ_only_in_case_are_refused() -> None:
    with pytest.raises(InputError, match=r"path 'onnx/Policy\.onnx' is listed twice"):
        decode(encoded(document(file("onnx/policy.onnx"), file("onnx/Policy.onnx"))), where="m")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (document(file(size=1 << 63)), r"files\.0\.size"),
        (document(file(size=1 << 53)), r"files\.0\.size"),
        (document(file(size=-1)), r"files\.0\.size"),
        (document(file(size=0.5)), r"files\.0\.size"),
        (document(file(sha256=DIGEST.upper())), r"files\.0\.sha256"),
        (document(file(sha256=DIGEST + "\n")), r"files\.0\.sha256"),
        (document(file(role="program")), r"files\.0\.role"),
        (document(file(mode=0o777)), r"files\.0\.mode"),
        (document(surprise=1), "surprise: Extra inputs"),
        ({key: value for key, value in document().items() if key != "files"}, "files: Field required"),
        (document(engine={"machine": "here"}), r"engine\.backend"),
        (document(metrics=[]), "metrics"),
    ],
)
def test_a_wrong_field_is_refused_by_name(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"m: not a sound manifest: {reason}"):
        decode(encoded(changed), where="m")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "Expecting value"),
        (b"\xff\xfe\x00", "not a manifest"),
        (encoded(document()).replace(b'"1.0.0"', b"NaN"), "NaN is not a number"),
        (encoded(document(metrics={"a": {"b": float("inf")}})), "Infinity is not a number"),
        (encoded(document(metrics={"a": {"b": 0}})).replace(b'"b": 0', b'"b": 1e999'), "not JSON compliant"),
        (encoded(document(metrics={"a": {"b": 0}})).replace(b'"b": 0', b'"b": "\\ud800"'), "surrogates not allowed"),
        (encoded(document())[:-1] + b', "name": "other"}', "key 'name' stands twice"),
        (encoded(document(metrics={"a": {}})).replace(b'{"a": {}}', b'{"a": {}, "a": {}}'), "key 'a' stands twice"),
        (b"[" * 100_000, "not a manifest"),
        (b'{"a":' * 100_000, "not a manifest"),
        (encoded(document())[:-5], "not a manifest"),
        (b"[]", "no schema"),
        (b"{}", "no schema"),
        (encoded(document(schema=1)), "no schema"),
        (encoded(document(schema="vlaopt.artifact/1")), "no schema"),
        (encoded(document(schema="vlaopt.artifact/1." + "9" * 5000)), "no schema"),
        (encoded(document(schema="vlaopt.artifact/١.0")), "no schema"),
    ],
)
def test_what_is_not_a_manifest_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        decode(data, where="m")
    assert caught.value.where == "m"


def test_an_unknown_major_is_refused_with_a_sentence() -> None:
    with pytest.raises(
        InputError, match=r"artifact schema vlaopt\.artifact/2\.0 is of another major.* reads 1\.x"
    ) as caught:
        decode(encoded({"schema": "vlaopt.artifact/2.0", "everything": "else"}), where="m")
    assert caught.value.hint == "use the vlaopt that wrote it, or build the artifact again"


def test_a_newer_minor_may_add_fields_at_the_top() -> None:
    manifest = decode(encoded(document(schema="vlaopt.artifact/1.7", signature="abc")), where="m")
    assert manifest.name == "tiny"
    with pytest.raises(InputError, match=r"files\.0\.mode"):
        decode(encoded(document(file(mode=1), schema="vlaopt.artifact/1.7")), where="m")


def with_files(*entries: dict[str, Any], engine: EngineEntry | None = None, **fields: Any) -> Manifest:
    return Manifest.model_validate({**document(*entries, **fields), "engine": engine})


def test_the_content_is_the_same_whatever_is_reported_or_called() -> None:
    same = with_files(file(), engine=engine())
    assert same.content_digest() == with_files(file(), engine=engine("slower")).content_digest()
    assert same.content_digest() == with_files(file(), name="other", stage="bench", engine=engine()).content_digest()
    report = file("reports/bench.json", role="report", sha256=digest_bytes(b"1"))
    assert same.content_digest() == with_files(file(), report, engine=engine()).content_digest()


def test_the_content_differs_with_any_byte_name_or_engine_setting() -> None:
    variants = [
        with_files(file()),
        with_files(file(sha256=digest_bytes(b"1"))),
        with_files(file("onnx/other.onnx")),
        with_files(file(), file("policy/spec.json", role="policy")),
        with_files(file(), engine=engine()),
        with_files(file(), engine=engine(threads=2)),
    ]
    assert len({manifest.content_digest() for manifest in variants}) == len(variants)
