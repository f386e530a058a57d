"""Stand-in for pycuda: the modules driver, autoinit and autoprimaryctx, as far as memory and streams go."""

from standin.settings import settings as _settings

if _settings().has("no-pycuda"):
    raise ModuleNotFoundError("No module named 'pycuda'", name="pycuda")

VERSION = (2026, 1)
VERSION_TEXT = "2026.1"
