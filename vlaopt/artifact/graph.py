"""A component's portable graph as bytes: an ONNX file, and the file beside it that holds its weights above 2 GB."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Graph:
    """`model` is the ONNX file; `data`, when not empty, the file `data_name` in the same folder that it points into."""

    model: bytes = field(repr=False)
    data: bytes = field(default=b"", repr=False)
    data_name: str = ""

    @property
    def size(self) -> int:
        """Bytes of both files."""
        return len(self.model) + len(self.data)

    @property
    def digest(self) -> str:
        """SHA-256 of the model's bytes followed by those of the data, 64 lower-case hex digits."""
        sha = hashlib.sha256(self.model)
        sha.update(self.data)
        return sha.hexdigest()

    def files(self, name: str) -> dict[str, bytes]:
        """The bytes by file name, the model's being `name`."""
        return {name: self.model, self.data_name: self.data} if self.data else {name: self.model}
