"""Scopes: globs over dotted names of components and their layers. One meaning for pruning and quantization."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase


def covers(glob: str, path: str) -> bool:
    """Whether the glob matches the path or a module above it. `*` crosses dots."""
    return any(fnmatchcase(module, glob) for module in _with_parents(path))


def nearest(glob: str, paths: Iterable[str]) -> str | None:
    """The path, or the module above one, whose name is most like the glob's; None when there are no paths."""
    candidates = dict.fromkeys(module for path in paths for module in _with_parents(path))
    near = difflib.get_close_matches(glob.rstrip(".*"), list(candidates), n=1, cutoff=0.0)
    return near[0] if near else None


def _with_parents(path: str) -> Iterator[str]:
    parts = path.split(".")
    return (".".join(parts[:end]) for end in range(1, len(parts) + 1))
