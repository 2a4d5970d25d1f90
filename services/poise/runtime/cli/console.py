"""The console on which programs print progress and results."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from rich.console import Console

from poise.runtime.cli.broken_pipe import OutputClosed, discard_output


class OutputConsole(Console):
    """A console on standard output. Raises `OutputClosed` when its reader has exited; rich would exit."""

    def __init__(self, **options: Any) -> None:
        super().__init__(file=sys.stdout, **options)

    def on_broken_pipe(self) -> NoReturn:
        """Raise `OutputClosed`. Called by rich when a write failed."""
        discard_output()
        raise OutputClosed from None
