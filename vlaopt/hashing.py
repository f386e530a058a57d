"""Digests (identity of bytes) and keys (identity of inputs). Knows nothing of what it hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vlaopt.errors import InputError


def canonical_json(value: Any) -> bytes:
    """The one JSON encoding of `value`: sorted keys, no spaces, UTF-8; NaN and infinities raise ValueError."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def digest_bytes(data: bytes) -> str:
    """SHA-256 of `data`, 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical JSON of `value`."""
    return digest_bytes(canonical_json(value))


def digest_file(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, read in pieces of 1 MiB. Raises InputError when it cannot be read."""
    sha, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                sha.update(piece)
                size += len(piece)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    return size, sha.hexdigest()


def digest_tree(root: Path) -> str:
    """SHA-256 over the relative paths and digests of all files below `root`, links to files followed; or of one file.

    Raises InputError when there is nothing at `root` or a file cannot be read.
    """
    if not (root.is_dir() or root.is_file()):
        raise InputError("no such file or folder", where=str(root))
    files = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    return digest_json({path.relative_to(root).as_posix(): digest_file(path)[1] for path in files})
