"""What vLLM's first worker does while the engine starts, told to the server.

The worker is a process below the server. Both write and read a file in memory that the server opened, so that nothing
is left on a disk whoever dies.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

STAGE_FILE_VARIABLE = "POISE_GENERATION_STAGE_FILE"

_NAME = "poise-stage"
_MAX_BYTES = 200


class StageFile:
    """The server's side, for processes started after it. Close it once they have started."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create(_NAME)
        os.environ[STAGE_FILE_VARIABLE] = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def read(self) -> str:
        """Return the stage that was told last; empty if none was."""
        return os.pread(self._descriptor, _MAX_BYTES, 0).decode(errors="replace")

    def close(self) -> None:
        """Let go of the file."""
        del os.environ[STAGE_FILE_VARIABLE]
        os.close(self._descriptor)


def tell_stage(stage: str) -> None:
    """Tell the server what this process does now, if the server listens."""
    with contextlib.suppress(KeyError, OSError):  # it is no reason not to start
        path = Path(os.environ[STAGE_FILE_VARIABLE])
        if path.readlink().name.startswith(f"memfd:{_NAME}"):  # else the server has closed it, and it is another file
            path.write_text(stage)
