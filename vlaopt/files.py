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
from typing import BinaryIO

from vlaopt.errors import EnvironmentProblem, InputError

STAGING_PREFIX = ".staging-"
_PIECE = 1 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` (parents made), flushed to the disk before this returns.

    A file there is replaced, never written into: it may be linked from elsewhere. Raises EnvironmentProblem when it
    cannot be written or the disk is full.
    """
    with _refusals_named(path):
        _write(path, data)


def copy_file(source: Path, path: Path) -> None:
    """Copy a file in pieces, flushed to the disk before this returns; one at `path` is replaced, as by `write_file`.

    Raises InputError when `source` cannot be read, EnvironmentProblem when `path` cannot be written.
    """
    with _opened(source) as given, _refusals_named(path), _new(path) as file:
        while piece := _piece(given, source):
            file.write(piece)
        _flush(file)


def link_file(source: Path, path: Path) -> None:
    """The file `source` under another name, its bytes not copied where one file system holds both; else as `copy_file`.

    For files that are never written into. Neither name is a symbolic link.
    """
    with _refusals_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    try:
        os.link(source, path, follow_symlinks=False)
        linked = stat.S_ISREG(path.lstat().st_mode)
    except OSError:  # another file system, one without links, too many links, or no such file
        linked = False
    if not linked:
        copy_file(source, path)


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
        sync(path.parent)


def read_file(path: Path, *, limit: int | None = None) -> bytes:
    """All bytes of a regular file. Raises InputError when it is missing, no file, unreadable or above `limit` bytes."""
    with _opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if limit is not None and size > limit:
            raise InputError(f"{size} bytes, more than the {limit} allowed", where=str(path))
        data = file.read() if limit is None else file.read(limit + 1)
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


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, so that a rename of it or into it survives a power cut."""
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
    """Take a directory away in one step, then delete what it held; gives the bytes freed, 0 when it was gone.

    No reader sees it half deleted. A file that is linked from elsewhere frees nothing. Raises EnvironmentProblem when
    it cannot be removed.
    """
    doomed = _staging_beside(path)
    with _refusals_named(path):
        try:
            path.rename(doomed)
        except FileNotFoundError:
            return 0
        found = [file.lstat() for file in doomed.rglob("*")]
        shutil.rmtree(doomed)
    return sum(info.st_size for info in found if stat.S_ISREG(info.st_mode) and info.st_nlink == 1)


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
    with _new(path) as file:
        file.write(data)
        _flush(file)


def _new(path: Path) -> BinaryIO:
    """A file of its own at `path`, whatever was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path.open("xb")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _piece(file: BinaryIO, path: Path) -> bytes:
    try:
        return file.read(_PIECE)
    except OSError as error:  # named here: it is the source that failed, not what is written
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file to read. Raises InputError when it is missing, no file, or unreadable."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise InputError("not a regular file", where=str(path))
            yield file
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path)) from error
    except IsADirectoryError as error:
        raise InputError("a directory, not a file", where=str(path)) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except ValueError as error:  # a NUL in the path
        raise InputError(f"cannot be read: {error}", where=repr(str(path))) from error


def _staging_beside(path: Path) -> Path:
    return path.parent / f"{STAGING_PREFIX}{os.getpid()}-{uuid.uuid4().hex}"


def _publish(staging: Path, final: Path) -> None:
    for directory in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
        sync(directory)
    try:
        staging.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    sync(final.parent)


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
