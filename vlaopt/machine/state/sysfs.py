"""Numbers in files of /sys, read so that a sensor that is off or busy costs nothing but its number."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from vlaopt.machine.system import read_text


def read_number(path: Path) -> int | None:
    """The whole number in a file; None where there is no such file or number, or it cannot be read this time.

    A sensor whose unit is off answers EAGAIN for as long as it is, of which Python's buffered reading makes a
    TypeError; to try again would only cost time.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return int(os.read(file, 64))
        finally:
            os.close(file)
    except (OSError, ValueError):
        return None


def read_numbers(paths: Mapping[str, Path]) -> dict[str, int]:
    """The numbers by name, without those that cannot be read this time."""
    numbers = {name: read_number(path) for name, path in paths.items()}
    return {name: number for name, number in numbers.items() if number is not None}


def monitors(root: Path, driver: str) -> list[Path]:
    """The folders of hwmon that are this driver's; their own names change from start to start."""
    folders = sorted((root / "sys/class/hwmon").glob("hwmon[0-9]*"))
    return [folder for folder in folders if read_text(folder / "name") == driver]
