"""Reports to the server what vLLM's first worker does while the engine starts.

The worker is a descendant process of the server. It writes to a file in memory that the server opened, so no file is
left on disk after a crash.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

STAGE_FILE_VARIABLE = "POISE_GENERATION_STAGE_FILE"

_NAME = "poise-stage"
_MAX_BYTES = 200


class StageFile:
    """The server's side. Open it before the processes start, and close it after they did."""

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


def tell_stage(stage: str) -> None:
    """Report to the server what this process does now, if the server still reads."""
    with contextlib.suppress(KeyError, OSError):  # failing to report must not fail the start
        path = Path(os.environ[STAGE_FILE_VARIABLE])
        if path.readlink().name.startswith(f"memfd:{_NAME}"):  # else the server has closed it, and it is another file
            path.write_text(stage)
