"""Writing files and directories whole or not at all, and reading them once. Knows nothing of their content."""

from __future__ import annotations

import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlaopt.errors import EnvironmentProblem, InputError

STAGING_PREFIX = ".staging-"


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` (parents made), flushed to the disk before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old bytes or the new ones, never a mixture."""
    staging = path.with_name(f"{STAGING_PREFIX}{os.getpid()}-{uuid.uuid4().hex}")
    try:
        write_file(staging, data)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)
    sync_directory(path.parent)


def read_file(path: Path, *, limit: int | None = None) -> bytes:
    """All bytes of a regular file. Raises InputError when it is missing, not a file, unreadable or above `limit` bytes."""
    try:
        with path.open("rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                raise InputError("not a regular file", where=str(path))
            if limit is not None and info.st_size > limit:
                raise InputError(f"{info.st_size} bytes, more than the {limit} allowed", where=str(path))
            return file.read()
    except FileNotFoundError as error:
        raise InputError("no such file", where=str(path)) from error
    except IsADirectoryError as error:
        raise InputError("a directory, not a file", where=str(path)) from error
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from error


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
    staging = final.parent / f"{STAGING_PREFIX}{os.getpid()}-{uuid.uuid4().hex}"
    try:
        staging.mkdir(parents=True)
        yield staging
        for directory in [staging, *(path for path in staging.rglob("*") if path.is_dir())]:
            sync_directory(directory)
        try:
            staging.rename(final)
        except OSError:
            if not final.is_dir():
                raise
        sync_directory(final.parent)
    except OSError as error:
        place = error.filename or str(final.parent)
        raise EnvironmentProblem(
            f"cannot write: {error.strerror or error}", where=str(place), hint="check free space and permissions"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def remove_dead_staging(parent: Path) -> int:
    """Delete staging left in `parent` by processes that no longer run; returns how many entries went."""
    removed = 0
    for path in parent.glob(f"{STAGING_PREFIX}*"):
        pid = path.name[len(STAGING_PREFIX) :].split("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed += 1
    return removed


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
