"""Which measurement a report tells: the one given, else this machine's newest, else that of the build."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vlaopt.artifact.artifact import Artifact
from vlaopt.artifact.store import Store
from vlaopt.benchmark.record import BenchRecord
from vlaopt.errors import InputError
from vlaopt.files import read_file
from vlaopt.hashing import digest_bytes
from vlaopt.runtime.golden import ACTIONS

OWN = "reports/bench.json"
SIZE_LIMIT = 256 << 20
MEASURE = "`vlaopt bench ARTIFACT` measures it"


@dataclass(frozen=True)
class Found:
    """A record and where it was found, or why there is none."""

    record: BenchRecord | None
    where: str | None
    reason: str | None


def given(path: Path, artifact: Artifact) -> Found:
    """The record in the file `path`. Raises InputError for no record, and for one of another artifact."""
    record = BenchRecord.from_json(read_file(path, limit=SIZE_LIMIT), where=str(path))
    if not _measures(record, artifact):
        raise InputError(
            f"measures another artifact ({(record.subject.artifact or 'unnamed')[:12]}, this one is "
            f"{artifact.id[:12]})",
            where=str(path),
            hint="`vlaopt bench ARTIFACT --record FILE` writes one of this artifact",
        )
    return Found(record, f"the file {path.name}", None)


def newest(artifact: Artifact, store: Store) -> Found:
    """The newest record of `artifact` in this machine's store, else the one that its build made, else why none."""
    kept = store.newest("bench", f"{artifact.id[:16]}-")
    if kept is not None:
        try:
            record = BenchRecord.from_json(json.dumps(kept), where="the store")
        except InputError:  # kept by another version of vlaopt
            record = None
        if record and _measures(record, artifact):
            return Found(record, "this machine's newest measurement", None)
    return _own(artifact)


def _own(artifact: Artifact) -> Found:
    if not artifact.has(OWN):
        reason = artifact.manifest.metrics.get("bench", {}).get("not_measured")
        return Found(None, None, f"{reason or 'the artifact holds no measurement'}; {MEASURE}")
    try:
        record = BenchRecord.from_json(artifact.read(OWN), where=OWN)
    except InputError:  # its bytes are those of the manifest, so it is sound, and of another schema
        return Found(None, None, f"another version of vlaopt measured it when it was built; {MEASURE}")
    return Found(record, "the measurement made when the artifact was built", None)


def _measures(record: BenchRecord, artifact: Artifact) -> bool:
    """Whether a record is of this artifact, or of the one that a machine finished of it: that one has its policy."""
    if record.subject.artifact == artifact.id:
        return True
    policy = digest_bytes(artifact.read(ACTIONS)) if artifact.has(ACTIONS) else None
    return artifact.manifest.finish is not None and policy is not None and record.subject.policy == policy
