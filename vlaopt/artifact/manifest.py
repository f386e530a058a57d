"""The manifest: what an artifact holds, where it came from, what was measured. Canonical JSON; its digest is the id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from vlaopt.errors import InputError
from vlaopt.hashing import canonical_json, digest_json

FILE_NAME = "manifest.json"
SCHEMA_MAJOR = 1
SCHEMA_MINOR = 0
SIZE_LIMIT = 16 << 20
PLAN_PATH = "policy/quantization.json"
_SEGMENT = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]*")
_WINDOWS_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))}

Role = Literal["component", "plain", "placed", "weights", "policy", "golden", "capture", "engine", "report"]


class Entry(BaseModel):
    """Common rules: unknown keys refused, values frozen, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(Entry):
    """One file of the artifact: POSIX path below its root, what it is for, size in bytes, SHA-256."""

    path: str
    role: Role
    size: int = Field(ge=0, lt=1 << 53)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        segments = path.split("/")
        plain = all(_SEGMENT.fullmatch(segment) for segment in segments) and len(path) <= 240
        if not plain or any(segment.split(".")[0].lower() in _WINDOWS_DEVICES for segment in segments):
            raise ValueError(f"path {path!r} is not a plain relative path")
        return path


class EngineComponent(Entry):
    """How a component was compiled: which graph (`plain` FP32 or `quantized`), why that one, its files, its layers.

    `needs` and `facts` are those of `vlaopt.backends.Engine`.
    """

    variant: Literal["plain", "quantized"]
    reason: str
    files: tuple[str, ...]
    precisions: dict[str, int]
    needs: dict[str, str] = {}
    facts: dict[str, Any] = {}


class EngineEntry(Entry):
    """A compiled policy for one class of machine."""

    machine: str
    backend: str
    backend_version: str
    threads: int
    settings: dict[str, Any]
    components: dict[str, EngineComponent]


class Finish(Entry):
    """What is left to do on the target: the command that builds the engine there, and why it was not built before."""

    backend: str
    command: str
    reason: str


class Step(Entry):
    """One stage that led here: its key and version, and the digest of the content it took."""

    stage: str
    stage_version: int
    key: str
    took: str | None


class Manifest(Entry):
    """See DESIGN: lineage, tools and metrics by stage; `files` is complete."""

    schema_: str = Field(default=f"vlaopt.artifact/{SCHEMA_MAJOR}.{SCHEMA_MINOR}", alias="schema")
    name: str
    version: str
    target: str
    stage: str
    recipe: dict[str, Any]
    lineage: tuple[Step, ...]
    tools: dict[str, str]
    metrics: dict[str, dict[str, Any]]
    parent: str | None = Field(default=None, description="Id of the artifact that this one finishes on its target.")
    engine: EngineEntry | None = None
    finish: Finish | None = None
    files: tuple[FileEntry, ...]

    @model_validator(mode="after")
    def _names_differ(self) -> Manifest:
        seen: set[str] = set()
        for entry in self.files:
            folded = entry.path.casefold()
            if folded in seen:
                raise ValueError(f"path {entry.path!r} is listed twice")
            seen.add(folded)
        return self

    def encode(self) -> bytes:
        """The canonical JSON."""
        return canonical_json(self.model_dump(mode="json", by_alias=True))

    def content_digest(self) -> str:
        """Digest of what the artifact does: its files but for the reports, and how its engine is put together."""
        files = {entry.path: entry.sha256 for entry in self.files if entry.role != "report"}
        engine = (
            self.engine.model_dump(mode="json", exclude={"components": {"__all__": {"reason"}}})
            if self.engine
            else None
        )
        return digest_json({"files": files, "engine": engine})

    def by_role(self, *roles: Role) -> list[FileEntry]:
        """The files of these roles, in path order."""
        return [entry for entry in self.files if entry.role in roles]


def decode(data: bytes, *, where: str) -> Manifest:
    """The manifest in `data`.

    Raises InputError for an unknown major, malformed JSON, numbers that are not finite, duplicate or unknown keys, and
    paths that leave the artifact. Unknown top-level keys of a newer minor are ignored.
    """
    try:
        value = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        canonical_json(value)  # what cannot be written again (1e999, half a surrogate pair) is refused at the door
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a manifest: {error}", where=where) from error
    schema = value.get("schema") if isinstance(value, dict) else None
    found = re.fullmatch(r"vlaopt\.artifact/([0-9]{1,9})\.([0-9]{1,9})", schema) if isinstance(schema, str) else None
    if not found:
        raise InputError("not a manifest: no schema vlaopt.artifact/MAJOR.MINOR", where=where)
    if int(found[1]) != SCHEMA_MAJOR:
        raise InputError(
            f"artifact schema {schema} is of another major version; this vlaopt reads {SCHEMA_MAJOR}.x",
            where=where,
            hint="use the vlaopt that wrote it, or build the artifact again",
        )
    if int(found[2]) > SCHEMA_MINOR:
        value = _known_fields(value)
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        raise InputError(f"not a sound manifest: {first_problem(error)}", where=where) from error


def first_problem(error: ValidationError) -> str:
    """The first thing pydantic found wrong, with the key it is about."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{place}: {first['msg']}" if place else first["msg"]


def _known_fields(value: dict[str, Any]) -> dict[str, Any]:
    """A newer minor may add top-level fields: they are ignored."""
    known = {field.alias or name for name, field in Manifest.model_fields.items()}
    return {key: item for key, item in value.items() if key in known}


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"key {key!r} stands twice")
        result[key] = value
    return result


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a number of JSON")


def component_path(name: str) -> str:
    """Where the portable graph of a component lies."""
    return str(PurePosixPath("onnx", f"{name}.onnx"))


def plain_path(name: str) -> str:
    """Where the unquantized twin of a quantized component lies."""
    return str(PurePosixPath("onnx", "plain", f"{name}.onnx"))


def placed_path(placement: str, name: str) -> str:
    """Where a quantized component lies as a placement wants it that is not the one of the target's first backend."""
    return str(PurePosixPath("onnx", placement, f"{name}.onnx"))


def cache_path(name: str) -> str:
    """Where the ranges of a component's activations lie as a classic calibration cache, for older tools."""
    return str(PurePosixPath("policy", "calibration", f"{name}.cache"))


def data_path(path: str) -> str:
    """Where the weights of the graph at `path` lie when its own file cannot hold them."""
    return f"{path}.data"
