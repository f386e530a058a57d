"""The store: stage results by key, and a journal of what each key was made of. Crash-safe; entries never change."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlaopt.artifact.artifact import Artifact
from vlaopt.errors import InputError
from vlaopt.files import remove_dead_staging, replace_file
from vlaopt.hashing import canonical_json, digest_json

VARIABLE = "VLAOPT_STORE"


@dataclass(frozen=True)
class Record:
    """A journal line: what the key of a stage result was made of, and what making it took."""

    stage: str
    key: str
    name: str
    target: str
    parts: Mapping[str, Any]
    seconds: float
    written: float

    @property
    def title(self) -> str:
        """`name/target stage`, as people say it."""
        return f"{self.name}/{self.target} {self.stage}"


@dataclass(frozen=True)
class Store:
    """A directory of stage results: `stages/<stage>/<key>/` are artifacts, `journal/<stage>/<key>.json` their records."""

    root: Path

    @classmethod
    def default(cls) -> Store:
        """The store named by $VLAOPT_STORE, else `vlaopt` in the user's cache directory."""
        if os.environ.get(VARIABLE):
            return cls(Path(os.environ[VARIABLE]))
        return cls(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlaopt")

    def place(self, stage: str, key: str) -> Path:
        """Where the result of a stage under a key lies, or will lie."""
        return self.root / "stages" / stage / key

    def find(self, stage: str, key: str) -> Artifact | None:
        """The stored result, every byte checked, or None. A damaged entry is dropped, so that it is made again."""
        place = self.place(stage, key)
        if not place.is_dir():
            return None
        try:
            artifact = Artifact.open(place)
            artifact.check()
        except InputError:
            shutil.rmtree(place, ignore_errors=True)
            return None
        return artifact

    def note(self, record: Record) -> None:
        """Write a record of a new result."""
        path = self.root / "journal" / record.stage / f"{record.key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, canonical_json({**vars(record), "parts": dict(record.parts)}))

    def records(self) -> list[Record]:
        """All records whose result is still there, newest first."""
        found = []
        for path in (self.root / "journal").glob("*/*.json"):
            try:
                record = Record(**json.loads(path.read_bytes()))
            except (ValueError, TypeError, OSError):
                continue
            if self.place(record.stage, record.key).is_dir():
                found.append(record)
        return sorted(found, key=lambda record: record.written, reverse=True)

    def why(self, stage: str, name: str, target: str, parts: Mapping[str, Any]) -> str:
        """Why no result of these key parts is stored: what differs from the newest one of the same recipe and stage."""
        for record in self.records():
            if (record.stage, record.name, record.target) == (stage, name, target):
                changes = list(_differences("", record.parts, parts))
                return "; ".join(changes) if changes else "its result was removed"
        return "never built here"

    def collect(self, *, older_than_days: float) -> tuple[int, int]:
        """Remove results not written in the last days, and staging of dead processes; gives (entries, bytes) removed."""
        removed, freed = 0, 0
        for stage in self.root.glob("stages/*"):
            removed += remove_dead_staging(stage)
        limit = time.time() - older_than_days * 86400
        for record in self.records():
            if record.written <= limit:
                place = self.place(record.stage, record.key)
                freed += sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
                shutil.rmtree(place)
                (self.root / "journal" / record.stage / f"{record.key}.json").unlink(missing_ok=True)
                removed += 1
        return removed, freed

    def remember(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a small result beside the stages, such as the table of a build."""
        path = self.root / kind / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, canonical_json(value))

    def recall(self, kind: str, key: str) -> dict[str, Any] | None:
        """What `remember` kept, or None."""
        path = self.root / kind / f"{key}.json"
        try:
            value: dict[str, Any] = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return value


def key_of(parts: Mapping[str, Any]) -> str:
    """The key of a stage result: SHA-256 of the canonical JSON of everything it depends on."""
    return digest_json(parts)


def _differences(place: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(f"{place}.{key}" if place else key, old.get(key), new.get(key))
    elif old != new:
        yield f"{place}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) == 64 else text
