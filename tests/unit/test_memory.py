"""Freed memory goes back to the operating system, whatever stands behind it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vlaopt.memory import available_mib

HOLES = """
import re
from pathlib import Path
from vlaopt.memory import give_back

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

pieces = [bytearray(b"x" * 100_000) for _ in range(3000)]
last = pieces[-1]
before = resident()
del pieces
give_back()
print(before - resident())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pieces_below_one_that_is_still_used_are_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 250


def test_free_memory_is_what_the_kernel_says_is_available(tmp_path: Path) -> None:
    assert available_mib(tmp_path) is None
    (tmp_path / "proc").mkdir()
    meminfo = tmp_path / "proc/meminfo"
    meminfo.write_text("MemTotal:       31298032 kB\nMemFree:         1048576 kB\nMemAvailable:    2097152 kB\n")
    assert available_mib(tmp_path) == 2048
    meminfo.write_text("MemTotal:       31298032 kB\n")
    assert available_mib(tmp_path) is None
