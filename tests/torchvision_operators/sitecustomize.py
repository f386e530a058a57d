"""torchvision beside a torch that its compiled operators were not built for: they are declared, never called.

With this folder on PYTHONPATH a Python started by a test does it too. Nothing is imported before torchvision is.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

NEEDS_OPERATORS = "torchvision._meta_registrations"
_DECLARED: list[object] = []


class DeclareOperators(importlib.abc.MetaPathFinder):
    """Declares the operators just before torchvision describes them, unless its own library could be loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Never finds anything itself."""
        if fullname == NEEDS_OPERATORS and path and not _DECLARED:
            declare(Path(next(iter(path))))
        return None


def declare(folder: Path) -> None:
    """Declare every operator that the Python files in torchvision's `folder` name."""
    import torch
    from torchvision.extension import _has_ops

    if _has_ops():
        return
    sources = "".join((folder / name).read_text() for name in ("_meta_registrations.py", "_autograd_registrations.py"))
    names = set(re.findall(r'register_meta\("(\w+)"', sources)) | set(re.findall(r'"torchvision::(\w+)"', sources))
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in sorted(names):
        library.define(f"{name}(Tensor x) -> Tensor")
    # They live as long as the library that declared them.
    _DECLARED.append(library)


sys.meta_path.insert(0, DeclareOperators())
