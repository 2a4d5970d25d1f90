"""Reports the stage of vLLM's start from its first worker to the server.

The worker is a descendant of the server. It writes to an in-memory file of the server, so no file survives a crash.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

STAGE_FILE_VARIABLE = "POISE_GENERATION_STAGE_FILE"

_NAME = "poise-stage"
_MAX_BYTES = 200


class StageFile:
    """The server's side. Open it before vLLM's processes start, and close it once they have started."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create(_NAME)
        os.environ[STAGE_FILE_VARIABLE] = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def read(self) -> str:
        """Return the last reported stage; empty before the first report."""
        return os.pread(self._descriptor, _MAX_BYTES, 0).decode(errors="replace")

    def close(self) -> None:
        """Close the file."""
        del os.environ[STAGE_FILE_VARIABLE]
        os.close(self._descriptor)


def report_stage(stage: str) -> None:
    """Report the current stage to the server, if the server still reads it."""
    with contextlib.suppress(KeyError, OSError):  # an unreported stage must not fail the start
        path = Path(os.environ[STAGE_FILE_VARIABLE])
        if path.readlink().name.startswith(f"memfd:{_NAME}"):  # else the server closed it and reused its number
            path.write_text(stage)
