"""The classic calibration cache: ranges of activations in the file that TensorRT's calibrators up to 10.x read.

vlaopt's own engines have their ranges in Q/DQ nodes. This is for tools that take a plain graph and such a file:
`trtexec --onnx=… --int8 --calib=…`. Form: public caches, and what ONNX Runtime's TensorRT provider reads.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping

from vlaopt.errors import InputError

OLDEST = "10.3"
"""JetPack 6's, the oldest that vlaopt builds for."""
LARGEST_CODE = 127
_LARGEST_FLOAT = (2 - 2**-23) * 2.0**127
_HEADER = re.compile(r"TRT-([0-9]+)-([A-Za-z0-9]+)")
_LINE = re.compile(r"(.*): ([0-9a-f]{1,8})", re.DOTALL)


def encode(ranges: Mapping[str, tuple[float, float]], version: str = OLDEST) -> bytes:
    """The cache of `ranges`, [low, high] by tensor, for a TensorRT such as '8.6.1'; each takes its own version alone.

    A line is a tensor and the hexadecimal digits, big-endian, of the float32 scale of symmetric int8: the larger one
    of |low| and |high|, by 127. Raises InputError for a range that is not finite and a name that has no line.
    """
    lines = [f"TRT-{version_number(version)}-EntropyCalibration2"]
    for name, (low, high) in ranges.items():
        if not name or "\n" in name or "\r" in name:
            raise InputError(f"a tensor called {name!r} cannot stand in a calibration cache")
        scale = max(abs(low), abs(high)) / LARGEST_CODE
        if not scale <= _LARGEST_FLOAT:
            raise InputError(f"the range of {name!r} is no finite float32: {low:g} to {high:g}")
        lines.append(f"{name}: {struct.pack('>f', scale).hex()}")
    return ("\n".join(lines) + "\n").encode()


def decode(data: bytes) -> dict[str, float]:
    """The scale of every tensor in a cache. Raises InputError for what is no cache."""
    try:
        header, *lines = data.decode().split("\n")
    except UnicodeDecodeError as error:
        raise InputError("not a calibration cache: it is no text") from error
    if not _HEADER.fullmatch(header):
        raise InputError(f"not a calibration cache: it begins with {header[:40]!r}, not with TRT-<version>-<algorithm>")
    scales = {}
    for line in filter(None, lines):
        found = _LINE.fullmatch(line)
        if not found or found[1] in scales:
            raise InputError(
                f"not a calibration cache: {'a tensor twice' if found else 'a line without a scale'}: {line!r}"
            )
        (scales[found[1]],) = struct.unpack(">f", bytes.fromhex(found[2].zfill(8)))
    return scales


def version_number(version: str) -> int:
    """TensorRT's version as one number, as its header files make it: 8.6.1 is 8601, 10.3 is 100300."""
    major, minor, patch = ([int(part) for part in version.split(".")] + [0, 0])[:3]
    return major * 10000 + minor * 100 + patch if major >= 10 else major * 1000 + minor * 100 + patch
