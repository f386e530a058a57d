"""The promise: what is written is there whole or not at all, whatever fails; only plain files are read."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vlaopt import files
from vlaopt.errors import EnvironmentProblem, InputError
from vlaopt.files import (
    STAGING_PREFIX,
    check_writable,
    copy_file,
    link_file,
    read_file,
    remove_dead_staging,
    remove_directory,
    replace_file,
    staged_directory,
    write_file,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Full:
    """Stands in for a function of `os`: works until its n-th call, then the disk is full for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, works: int, number: int = errno.ENOSPC) -> None:
        self.left, self.number, self.real = works, number, getattr(os, name)
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments: object, **named: object) -> object:
        self.left -= 1
        if self.left < 0:
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*arguments, **named)


def fill(final: Path) -> None:
    with staged_directory(final) as folder:
        write_file(folder / "a", b"1")
        write_file(folder / "b" / "c", b"2")


def test_a_staged_directory_is_there_whole(tmp_path: Path) -> None:
    fill(tmp_path / "parent" / "final")
    assert (tmp_path / "parent" / "final" / "b" / "c").read_bytes() == b"2"
    assert names(tmp_path / "parent") == ["final"]


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), staged_directory(tmp_path / "final") as folder:
        write_file(folder / "a", b"1")
        raise error
    assert names(tmp_path) == []


@pytest.mark.parametrize("works", range(6))
def test_a_disk_that_fills_up_at_any_flush_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: int
) -> None:
    with monkeypatch.context() as patch:
        Full(patch, "fsync", works)
        if works == 5:  # two files, two folders, the parent
            fill(tmp_path / "final")
            return
        with pytest.raises(EnvironmentProblem, match="No space left") as caught:
            fill(tmp_path / "final")
    assert caught.value.hint == "check free space and permissions"
    # The last flush is after the rename: what is there then is whole.
    assert names(tmp_path) == (["final"] if works == 4 else [])


@pytest.mark.parametrize(("call", "works", "named"), [("mkdir", 0, "final"), ("mkdir", 1, "c"), ("rename", 0, "final")])
def test_a_read_only_parent_is_this_machines_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, works: int, named: str
) -> None:
    with monkeypatch.context() as patch:
        Full(patch, call, works, errno.EROFS)
        with pytest.raises(EnvironmentProblem, match=f"/{named}: cannot be written: Read-only file system"):
            fill(tmp_path / "final")
    assert names(tmp_path) == []


def test_a_parent_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentProblem, match="Not a directory"):
        fill(tmp_path / "file" / "final")


def test_a_full_disk_met_by_the_blocks_own_writing_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="No space left"), staged_directory(tmp_path / "final"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_another_failure_of_the_block_is_not_taken_for_a_failure_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConnectionResetError), staged_directory(tmp_path / "final"):
        raise ConnectionResetError
    assert names(tmp_path) == []


def _race(final: Path, barrier: multiprocessing.synchronize.Barrier, mark: bytes) -> None:
    with staged_directory(final) as folder:
        for name in ("a", "b", "c"):
            write_file(folder / name, mark)
        barrier.wait(20)


def test_builders_of_the_same_thing_all_succeed_and_one_copy_stays(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    racers = [context.Process(target=_race, args=(tmp_path / "final", barrier, b"%d" % n)) for n in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(30)
    assert [racer.exitcode for racer in racers] == [0] * 4
    assert names(tmp_path) == ["final"]
    assert len({(tmp_path / "final" / name).read_bytes() for name in ("a", "b", "c")}) == 1


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_only_the_staging_of_dead_processes_is_removed(tmp_path: Path) -> None:
    for name in (f"{STAGING_PREFIX}{dead_pid()}-0", f"{STAGING_PREFIX}{os.getpid()}-0", "mine", f"{STAGING_PREFIX}x-0"):
        write_file(tmp_path / name / "file", b"")
    write_file(tmp_path / f"{STAGING_PREFIX}{dead_pid()}-1", b"a file")
    write_file(tmp_path / f"{STAGING_PREFIX}{10**30}-1", b"no process has this number")
    assert remove_dead_staging(tmp_path) == 3
    assert names(tmp_path) == [f"{STAGING_PREFIX}{os.getpid()}-0", f"{STAGING_PREFIX}x-0", "mine"]


def test_a_process_of_another_user_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Full(monkeypatch, "kill", 0, errno.EPERM)
    write_file(tmp_path / f"{STAGING_PREFIX}1-0", b"")
    assert remove_dead_staging(tmp_path) == 0


@pytest.mark.parametrize("works", range(2))
def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: int) -> None:
    path = tmp_path / "file"
    replace_file(path, b"old")
    with monkeypatch.context() as patch:
        Full(patch, ("fsync", "replace")[works], 0)
        with pytest.raises(EnvironmentProblem, match="/file: cannot be written: No space left"):
            replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_link_shares_the_bytes_and_a_copy_does_not(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_file(source, b"weights")
    link_file(source, tmp_path / "deep" / "link")
    copy_file(source, tmp_path / "deep" / "copy")
    assert (tmp_path / "deep" / "link").samefile(source)
    assert not (tmp_path / "deep" / "copy").samefile(source)
    assert (tmp_path / "deep" / "copy").read_bytes() == b"weights"


@pytest.mark.parametrize("replace", [write_file, replace_file, lambda path, data: copy_file(path.parent / "new", path)])
def test_writing_where_a_link_is_leaves_what_it_links_to(
    tmp_path: Path, replace: Callable[[Path, bytes], None]
) -> None:
    write_file(tmp_path / "source", b"weights")
    write_file(tmp_path / "new", b"other")
    link_file(tmp_path / "source", tmp_path / "link")
    replace(tmp_path / "link", b"other")
    assert (tmp_path / "link").read_bytes() == b"other"
    assert (tmp_path / "source").read_bytes() == b"weights"


@pytest.mark.parametrize("number", [errno.EXDEV, errno.EPERM, errno.EMLINK])
def test_where_no_link_can_be_made_the_file_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    data = os.urandom((1 << 20) + 7)
    write_file(tmp_path / "source", data)
    write_file(tmp_path / "link", b"old")
    Full(monkeypatch, "link", 0, number)
    link_file(tmp_path / "source", tmp_path / "link")
    assert (tmp_path / "link").read_bytes() == data
    assert not (tmp_path / "link").samefile(tmp_path / "source")


def test_what_a_symbolic_link_points_to_is_copied(tmp_path: Path) -> None:
    write_file(tmp_path / "source", b"weights")
    (tmp_path / "symbolic").symlink_to(tmp_path / "source")
    link_file(tmp_path / "symbolic", tmp_path / "link")
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_bytes() == b"weights"


def test_what_cannot_be_copied_is_named_by_the_side_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="gone: no such file"):
        link_file(tmp_path / "gone", tmp_path / "link")
    with pytest.raises(InputError, match="a directory, not a file"):
        copy_file(tmp_path, tmp_path.parent / "copy")
    write_file(tmp_path / "source", b"weights")
    Full(monkeypatch, "fsync", 0)
    with pytest.raises(EnvironmentProblem, match="copy: cannot be written: No space left on device"):
        copy_file(tmp_path / "source", tmp_path / "copy")


def test_removing_frees_what_nothing_else_links_to(tmp_path: Path) -> None:
    write_file(tmp_path / "gone" / "a", b"123")
    link_file(tmp_path / "gone" / "a", tmp_path / "also" / "a")
    assert remove_directory(tmp_path / "gone") == 0
    assert (tmp_path / "also" / "a").read_bytes() == b"123"
    assert remove_directory(tmp_path / "also") == 3


def test_a_directory_is_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "gone" / "a", b"12")
    write_file(tmp_path / "gone" / "b" / "c", b"345")
    seen = []
    real = files.shutil.rmtree
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: (seen.append((tmp_path / "gone").exists()), real(path)))
    assert remove_directory(tmp_path / "gone") == 5
    assert seen == [False]
    assert names(tmp_path) == []
    assert remove_directory(tmp_path / "gone") == 0


def test_read_file_gives_the_bytes_of_plain_files_and_of_links_to_them(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"data")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_file(tmp_path / "file") == read_file(tmp_path / "link", limit=4) == b"data"


def test_a_file_above_its_limit_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    with pytest.raises(InputError, match="file: 5 bytes, more than the 4 allowed"):
        read_file(tmp_path / "file", limit=4)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    small = path.stat()
    path.write_bytes(b"12345")
    monkeypatch.setattr(os, "fstat", lambda descriptor: small)
    with pytest.raises(InputError, match="grew above the 4 bytes"):
        read_file(path, limit=4)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: not a regular file"):
        read_file(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gone", "no such file"),
        ("gone/file", "no such file"),
        (".", "a directory, not a file"),
        ("/dev/zero", "not a regular file"),
        ("n\0l", "embedded null byte"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(tmp_path: Path, path: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        read_file(tmp_path / path)


def test_a_folder_still_to_be_made_can_be_written_and_is_not_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert names(tmp_path) == []


def test_below_a_file_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(EnvironmentProblem, match="cannot be written: Not a directory"):
        check_writable(tmp_path / "file" / "out")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no folder that nobody can write to")
def test_a_folder_that_refuses_is_told_of_before_the_work() -> None:
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        check_writable(Path("/proc/self/out"))
