"""The command line: the only place that catches, prints and exits. Each subcommand is one thin file."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `vlaopt` and exit with its code: see `vlaopt.errors` for what each means."""
    # Threads that wait in a spin make training several times slower where other programs want the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # A stopped service or CI job cleans up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from vlaopt.cli.app import run

    for stream in (sys.stdout, sys.stderr):
        # A terminal or log that cannot show a character gets a question mark, not an error.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(run(list(sys.argv[1:] if arguments is None else arguments)))
