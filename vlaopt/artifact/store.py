"""The store: stage results by key, and a journal of what each key was made of. Crash-safe; entries never change."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from vlaopt.artifact.artifact import Artifact
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.files import remove_dead_staging, remove_directory, replace_file
from vlaopt.hashing import canonical_json, digest_json

VARIABLE = "VLAOPT_STORE"
_DAY_S = 86400
_ABSENT = "nothing"


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


_RECORD = TypeAdapter(Record)


@dataclass(frozen=True)
class Store:
    """Stage results in a folder: `stages/<stage>/<key>/` are artifacts, `journal/<stage>/<key>.json` their records.

    `unfinished/<stage>/<key>.jsonl` is what a stage that is not through yet found out, and the folder
    `unfinished/<stage>/<key>/` what it has made.
    """

    root: Path

    @classmethod
    def default(cls) -> Store:
        """The store named by $VLAOPT_STORE, else `vlaopt` in the user's cache directory.

        Raises EnvironmentProblem for a user without a home directory.
        """
        if os.environ.get(VARIABLE):
            return cls(Path(os.environ[VARIABLE]))
        try:
            return cls(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlaopt")
        except RuntimeError as error:
            raise EnvironmentProblem("this user has no home directory", hint=f"set {VARIABLE}") from error

    @property
    def opened(self) -> Path:
        """Where backends keep what they compile while they open engines: `opened/<backend>/<key>`."""
        return self.root / "opened"

    def place(self, stage: str, key: str) -> Path:
        """Where the result of a stage under a key lies, or will lie."""
        return self.root / "stages" / stage / key

    def unfinished(self, stage: str, key: str) -> Path:
        """Where what an interrupted stage found out lies, or will lie; gone once its result is stored."""
        return self.root / "unfinished" / stage / f"{key}.jsonl"

    def unfinished_folder(self, stage: str, key: str) -> Path:
        """Where the files lie, or will lie, that an interrupted stage has made; gone once its result is stored."""
        return self.root / "unfinished" / stage / key

    def forget_unfinished(self, stage: str, key: str) -> None:
        """Remove what an interrupted stage left."""
        self.unfinished(stage, key).unlink(missing_ok=True)
        remove_directory(self.unfinished_folder(stage, key))

    def find(self, stage: str, key: str) -> Artifact | None:
        """The stored result, every byte checked, or None. A damaged entry is dropped, so that it is made again."""
        place = self.place(stage, key)
        if not place.is_dir():
            return None
        try:
            artifact = Artifact.open(place)
            artifact.check()
        except InputError:
            remove_directory(place)
            return None
        return artifact

    def note(self, record: Record) -> None:
        """Write a record of a new result."""
        replace_file(
            self._line(record.stage, record.key), canonical_json({**vars(record), "parts": dict(record.parts)})
        )

    def records(self) -> list[Record]:
        """All records whose result is still there, newest first."""
        return [record for record in self._journal() if self.place(record.stage, record.key).is_dir()]

    def why(self, stage: str, name: str, target: str, parts: Mapping[str, Any]) -> str:
        """Why no result of these key parts is stored: what differs from the newest one of the same recipe and stage."""
        wanted = json.loads(canonical_json(parts))
        for record in self._journal():
            if (record.stage, record.name, record.target) == (stage, name, target):
                changes = list(differences("", record.parts, wanted))
                return "; ".join(changes) if changes else "its result was removed"
        return "never built here"

    def collect(self, *, older_than_days: float) -> tuple[int, int]:
        """Remove what was not written in the last days, and staging of dead processes; gives entries and bytes gone."""
        removed, freed = 0, 0
        for folder in [*self.root.glob("*"), *self.root.glob("*/*")]:
            removed += remove_dead_staging(folder)
        limit = time.time() - older_than_days * _DAY_S
        written = {(record.stage, record.key): record.written for record in self._journal()}
        for place in self.root.glob("stages/*/[0-9a-f]*"):
            stage, key = place.parent.name, place.name
            # A builder killed between the result and its record leaves a result that only its folder dates.
            if (written[stage, key] if (stage, key) in written else _modified(place)) <= limit:
                freed += remove_directory(place)
                self._line(stage, key).unlink(missing_ok=True)
                removed += 1
        for left in [*self.root.glob("unfinished/*/[0-9a-f]*"), *self.opened.glob("*/[!.]*")]:
            if _modified(left) <= limit:
                freed += remove_directory(left) if left.is_dir() else _discard(left)
                removed += 1
        return removed, freed

    def remember(self, kind: str, key: str, value: Mapping[str, Any]) -> None:
        """Keep a small result beside the stages, such as the table of a build."""
        replace_file(self.root / kind / f"{key}.json", canonical_json(value))

    def recall(self, kind: str, key: str) -> dict[str, Any] | None:
        """What `remember` kept, or None."""
        path = self.root / kind / f"{key}.json"
        try:
            value = json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    def newest(self, kind: str, prefix: str) -> dict[str, Any] | None:
        """What `remember` kept last of `kind` under a key that starts with `prefix`, or None."""
        paths = [path for path in (self.root / kind).glob("*.json") if path.name.startswith(prefix)]
        last = max(paths, key=lambda path: (_modified(path), path.name), default=None)
        return self.recall(kind, last.stem) if last else None

    def _line(self, stage: str, key: str) -> Path:
        return self.root / "journal" / stage / f"{key}.json"

    def _journal(self) -> list[Record]:
        """All sound records, newest first. One that speaks of another stage or key than its file's name is not."""
        found = []
        for path in (self.root / "journal").glob("*/*.json"):
            try:
                record = _RECORD.validate_json(path.read_bytes())
            except (ValidationError, OSError):
                continue
            if (record.stage, record.key) == (path.parent.name, path.stem):
                found.append(record)
        return sorted(found, key=lambda record: record.written, reverse=True)


def key_of(parts: Mapping[str, Any]) -> str:
    """The key of a stage result: SHA-256 of the canonical JSON of everything it depends on."""
    return digest_json(parts)


def _modified(place: Path) -> float:
    """When a file or folder was last written; as long ago as can be when another process took it away just now."""
    try:
        return place.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _discard(file: Path) -> int:
    """Remove a file; gives its bytes, 0 when another process took it away just now."""
    try:
        size = file.stat().st_size
    except FileNotFoundError:
        return 0
    file.unlink(missing_ok=True)
    return size


def differences(place: str, old: Any, new: Any) -> Iterator[str]:
    """What differs between the parts of two keys, as `place: old → new`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(old.keys() | new.keys()):
            yield from differences(f"{place}.{key}" if place else key, old.get(key, _ABSENT), new.get(key, _ABSENT))
    elif old != new:
        yield f"{place}: {_short(old)} → {_short(new)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"{text[:12]}…" if len(text) == 64 else text
