"""Stand-in for cuda-python's bindings: only the module `runtime`."""

from standin.settings import settings as _settings

__version__ = "13.4.4"

if _settings().has("no-cuda-python"):
    raise ModuleNotFoundError("No module named 'cuda.bindings'", name="cuda.bindings")
