"""TensorRT's timing cache on disk: what kernels took, so that the next build on this machine need not measure again.

One file for every TensorRT version, compute capability and name of a GPU. Times of another are of no use: a mismatch is
never ignored.
"""

from __future__ import annotations

import fcntl
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.files import read_file, replace_file
from vlaopt.hashing import digest_bytes

_DIGEST = 64


def cache_path(folder: Path, version: str, sm: str, gpu: str) -> Path:
    """The file of one TensorRT version on one kind of GPU."""
    return folder / "-".join(("timing", version, f"sm{sm}", re.sub(r"\W+", "_", gpu)))


class TimingCache:
    """The timing cache of one build, begun with what is kept at `path`.

    `state` says how: "reused", "new" where nothing was kept, "discarded" where it was damaged or TensorRT does not take
    it; `notes` say why. The object must stay until the engine is built.
    """

    def __init__(self, config: Any, path: Path) -> None:
        self.state = "new"
        self.notes: list[str] = []
        self._config, self._path = config, path
        self._began = self._kept()
        self._cache: Any = self._made(self._began) if self._began else None
        if self._cache is not None and config.set_timing_cache(self._cache, False):
            self.state = "reused"
            return
        if self._began:
            self._discard("TensorRT does not take it")
        self._cache = config.create_timing_cache(b"")
        config.set_timing_cache(self._cache, False)

    def keep(self) -> None:
        """Keep the times of the build together with those that another process kept meanwhile.

        Where nothing can be written, nothing is kept and `notes` say so: the engine is built all the same.
        """
        try:
            with _locked(self._path):
                meanwhile = self._kept()
                if meanwhile and meanwhile != self._began and (other := self._made(meanwhile)) is not None:
                    self._cache.combine(other, False)
                data = bytes(self._cache.serialize())
                replace_file(self._path, digest_bytes(data).encode() + data)
        except EnvironmentProblem as error:
            self.notes.append(f"timing cache not kept: {error.message}")

    def _kept(self) -> bytes:
        """What the file holds; empty where there is none. A file that is not whole is discarded."""
        if not self._path.exists():
            return b""
        try:
            kept = read_file(self._path)
        except InputError as error:
            self._discard(error.message)
            return b""
        digest, data = kept[:_DIGEST], kept[_DIGEST:]
        if digest != digest_bytes(data).encode():
            self._discard("it is damaged")
            return b""
        return data

    def _made(self, data: bytes) -> Any:
        return self._config.create_timing_cache(data)

    def _discard(self, why: str) -> None:
        self.state = "discarded"
        self.notes.append(f"timing cache discarded, kernels are measured again: {why}")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """No other process is in such a block for the same `path`. Raises EnvironmentProblem where nothing can be written.

    The lock is a file beside: the one at `path` is replaced, so that whoever holds it may hold one that is gone.
    """
    lock = path.with_name(f"{path.name}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("ab")
    except OSError as error:
        raise EnvironmentProblem(f"cannot be written: {error.strerror}", where=str(lock)) from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
