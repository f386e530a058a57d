"""NVIDIA's driver, asked itself: whether it sees a GPU, and which. ONNX Runtime needs no CUDA library of Python."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from vlaopt.errors import EnvironmentProblem

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h.
_MAJOR, _MINOR = 75, 76
_LONGEST_NAME = 256


def problem() -> str | None:
    """None when a driver with a visible GPU answers, else the reason in one line."""
    try:
        _opened()
    except EnvironmentProblem as error:
        return error.message
    return None


def device() -> dict[str, str]:
    """Name and compute capability of the first GPU, as `Backend.machine` calls them. Raises EnvironmentProblem."""
    driver = _opened()
    index, name = ctypes.c_int(), ctypes.create_string_buffer(_LONGEST_NAME)
    numbers = [ctypes.c_int(), ctypes.c_int()]
    _check(driver.cuDeviceGet(ctypes.byref(index), 0))
    _check(driver.cuDeviceGetName(name, _LONGEST_NAME, index))
    for number, attribute in zip(numbers, (_MAJOR, _MINOR), strict=True):
        _check(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, index))
    return {"gpu": name.value.decode(errors="replace"), "sm": ".".join(str(number.value) for number in numbers)}


def _opened() -> Any:
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise EnvironmentProblem(f"no NVIDIA driver: {LIBRARY} cannot be loaded") from error
    count = ctypes.c_int()
    _check(driver.cuInit(0))
    _check(driver.cuDeviceGetCount(ctypes.byref(count)))
    if not count.value:
        raise EnvironmentProblem("the NVIDIA driver sees no GPU")
    return driver


def _check(code: int) -> None:
    if code:
        raise EnvironmentProblem(f"no usable NVIDIA driver: it answers error {code}")
