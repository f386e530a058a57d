"""Writing files and directories whole or not at all, and reading them once. Knows nothing of their content."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlaopt.errors import EnvironmentProblem, InputError

STAGING_PREFIX = ".staging-"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` (parents made), flushed to the disk before this returns.

    Raises EnvironmentProblem when it cannot be written or the disk is full.
    """
    with _refusals_named(path):
        _write(path, data)


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old bytes or the new ones, never a mixture.

    Raises EnvironmentProblem when it cannot be written or the disk is full; the old bytes stay then.
    """
    staging = _staging_beside(path)
    with _refusals_named(path):
        try:
            _write(staging, data)
            staging.replace(path)
        finally:
            staging.unlink(missing_ok=True)
        sync_directory(path.parent)


def read_file(path: Path, *, limit: int | None = None) -> bytes:
    """All bytes of a regular file. Raises InputError when it is missing, no file, unreadable or above `limit` bytes."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise InputError("not a regular file", where=str(path))
            if limit is not None and info.st_size > limit:
                raise InputError(f"{info.st_size} bytes, more than the {limit} allowed", where=str(path))
            data = file.read() if limit is None else file.read(limit + 1)
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path)) from error
    except IsADirectoryError as error:
        raise InputError("a directory, not a file", where=str(path)) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:  # a NUL in the path
        raise InputError(f"cannot be read: {error}", where=repr(str(path))) from error
    if limit is not None and len(data) > limit:
        raise InputError(f"grew above the {limit} bytes allowed while it was read", where=str(path))
    return data


def check_writable(folder: Path) -> None:
    """Find out before long work that a folder, there or still to be made, cannot be written; writes nothing.

    Raises EnvironmentProblem. A disk that fills up later is met when it does.
    """
    there = folder.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    with _refusals_named(folder):
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(there, os.W_OK | os.X_OK):
            read_only = bool(os.statvfs(there).f_flag & os.ST_RDONLY)
            code = errno.EROFS if read_only else errno.EACCES
            raise OSError(code, os.strerror(code))


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename into it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged_directory(final: Path) -> Iterator[Path]:
    """A fresh directory that becomes `final` when the block ends well, and vanishes when it does not.

    The rename is atomic. When another process published `final` first, its copy stays and ours is dropped.
    Raises EnvironmentProblem when the parent cannot be written or the disk is full.
    """
    staging = _staging_beside(final)
    try:
        with _refusals_named(final):
            staging.mkdir(parents=True)
        yield staging
        with _refusals_named(final):
            _publish(staging, final)
    except OSError as error:
        # Only a full or read-only disk is this machine's fault; any other OSError of the block is its own.
        if error.errno not in _NO_ROOM:
            raise
        raise _refusal(error, final) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_directory(path: Path) -> int:
    """Take a directory away in one step, then delete what it held; gives the bytes of its files, 0 when it was gone.

    No reader sees it half deleted. Raises EnvironmentProblem when it cannot be removed.
    """
    doomed = _staging_beside(path)
    with _refusals_named(path):
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return 0
        size = sum(file.lstat().st_size for file in doomed.rglob("*") if file.is_file())
        shutil.rmtree(doomed)
    return size


def remove_dead_staging(parent: Path) -> int:
    """Delete staging left in `parent` by processes that no longer run; returns how many entries went."""
    removed = 0
    for path in parent.glob(f"{STAGING_PREFIX}*"):
        pid = path.name[len(STAGING_PREFIX) :].split("-")[0]
        if pid.isdecimal() and not _alive(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed += 1
    return removed


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _staging_beside(path: Path) -> Path:
    return path.parent / f"{STAGING_PREFIX}{os.getpid()}-{uuid.uuid4().hex}"


def _publish(staging: Path, final: Path) -> None:
    for directory in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        sync_directory(directory)
    try:
        staging.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    sync_directory(final.parent)


def _open_at_once(path: str, flags: int) -> int:
    # Without O_NONBLOCK, opening a pipe waits for its writer, perhaps for ever.
    return os.open(path, flags | os.O_NONBLOCK)


@contextmanager
def _refusals_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _refusal(error, path) from error


def _refusal(error: OSError, path: Path) -> EnvironmentProblem:
    reason = error.strerror or str(error)
    return EnvironmentProblem(f"cannot be written: {reason}", where=str(path), hint="check free space and permissions")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
