"""Stand-in for NVIDIA's `tensorrt`: exactly the names of one lane, on host memory. See the README of its folder."""

from typing import Any

from standin.module import surface as _surface
from standin.settings import settings as _settings

if _settings().has("no-tensorrt"):
    raise ImportError("libnvinfer.so.10: cannot open shared object file: No such file or directory")
_made = _surface(_settings())
globals().update(_made.names)


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module tensorrt {_made.lane} has no {name}")
