"""ILogger, Logger and the classes that users of the library subclass."""

from __future__ import annotations

import sys
import time
from typing import Any


class ILogger:
    """Base of loggers; `log` is what a subclass writes."""


class Logger:
    """Prints what is at least as severe as `min_severity`, as the library's own logger does."""

    def __init__(self, min_severity: Any) -> None:
        self.__dict__["_min"] = min_severity

    def log(self, severity: Any, msg: str) -> None:
        if int(severity) <= int(self._min):
            letter = {0: "F", 1: "E", 2: "W", 3: "I", 4: "V"}[int(severity)]
            sys.stderr.write(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT] [{letter}] {msg}\n")

    def _get(self) -> Any:
        return self.__dict__["_min"]

    def _set(self, value: Any) -> None:
        self.__dict__["_min"] = value

    min_severity = property(_get, _set)


def say(logger: Any, level: str, message: str) -> None:
    """Give one line to a user's logger."""
    severity = getattr(type(logger), level, None) or getattr(logger, level)
    logger.log(severity, message)


WRITTEN = {"ILogger": ILogger, "Logger": Logger, "IProgressMonitor": type("IProgressMonitor", (), {})}
