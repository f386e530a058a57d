"""Memory that is free but still held by the C library, given back to the operating system."""

from __future__ import annotations

import ctypes
import gc
import sys


def give_back() -> None:
    """Collect garbage and return what is free; glibc keeps it otherwise, and large weights in small pieces most of all.

    Only the first half where the C library is another one.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
