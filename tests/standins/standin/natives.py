"""Classes of the library that must be a tuple or bytes: shapes, and memory that it gives."""

from __future__ import annotations

from typing import Any


class Dims(tuple):
    """A shape: a tuple that equals lists too."""

    MAX_DIMS = 8

    def __new__(cls, shape: Any = ()) -> Any:
        return tuple.__new__(cls, tuple(int(size) for size in shape))

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, list | tuple) else NotImplemented

    __hash__ = tuple.__hash__

    def __repr__(self) -> str:
        return repr(tuple(self))


class HostMemory(bytes):
    """What the library gives as IHostMemory: a buffer with a size, and no method of bytes."""

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name in ("nbytes", "dtype", "_kind"):
            return object.__getattribute__(self, name)
        raise AttributeError(f"IHostMemory has no {name}")

    @property
    def nbytes(self) -> int:
        return len(self)

    @property
    def dtype(self) -> Any:
        return type(self)._kind


def host_memory(surface: Any, data: bytes) -> Any:
    return surface.names["IHostMemory"](data)
