"""Memory: how much is free on this machine, and what the C library still holds given back to the operating system."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
from pathlib import Path


def give_back() -> None:
    """Collect garbage and return what is free; glibc keeps it otherwise, and large weights in small pieces most of all.

    Only the first half where the C library is another one.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def available_mib(root: Path = Path("/")) -> int | None:
    """MiB that programs can still take without swapping, by the kernel's own estimate; None where it gives none.

    Source: MemAvailable of /proc/meminfo, see proc(5). The GPU of a Jetson takes its memory from there too.
    """
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s*([0-9]+) kB$", text, re.MULTILINE)
    return int(found[1]) // 1024 if found else None
